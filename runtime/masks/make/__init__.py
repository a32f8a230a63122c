"""Makes the colour masks of a reference image and a driving clip with a segmenter."""
