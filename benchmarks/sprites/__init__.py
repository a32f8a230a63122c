"""Sprite world: drawn characters whose correct animation is known, and a small SCAIL-2 trained on them.

`figures` and `motions` compute the position of every limb, `raster` draws, `cases` builds the inputs of the model and
the correct output, `dataset`, `train_vae` and `train` make the committed checkpoint, `quality` measures.
"""
