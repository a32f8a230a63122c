"""From a checked request to frames: conditions, segments, denoising, decoding. Read `pipeline` first."""
