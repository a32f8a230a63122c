"""Pictures as the segmenters take them, and masks as they give them: resize, normalise and post-processing.

A few lines instead of the processors of `transformers`, which need torchvision. `benchmarks.segment.compare` holds both
together where torchvision is installed.
"""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of SAM 2
