"""From checked input to frames: conditions, segments, denoising, decoding. Read `pipeline` first."""
