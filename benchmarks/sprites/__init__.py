"""Sprite world: drawn characters whose right animation is known, and a small SCAIL-2 that was trained on them.

`figures` and `motions` say where every limb is, `raster` draws, `cases` puts scenes together into what the model is
given and what it should answer, `dataset`, `train_vae` and `train` make the committed checkpoint, `quality` measures.
"""
