"""Figures that another tool has cut out: SAM3_TRACK_DATA of ComfyUI, black-and-white mattes and alpha channels.

Each becomes a list of masks for a picture, or frames of labels for a clip, in the order that a segmenter would give.
SAM3_TRACK_DATA is a dict: `packed_masks` uint8 [T, N, h, w/8], bit i of a byte the i-th of its eight pixels, with
`n_frames`, `orig_size` and `scores`; it is read from what `torch.save`, `numpy.savez` or safetensors wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.files import frames_of, open_source
from scail2_rt.runtime.masks.make.figures import LEAST_AREA, area, ordered
from scail2_rt.runtime.masks.sources import grey_levels
from scail2_rt.runtime.media.images import is_image, load_alpha, load_image
from scail2_rt.runtime.media.video_reader import has_transparency

TRACKS = (".pt", ".pth", ".npz", ".safetensors")
ON = 128  # 8-bit level from which on a matte shows the figure


def ready_masks(path: Path, most: int, sort: str) -> list[np.ndarray]:
    """Masks bool [h, w] of the figures of a reference image, in their order."""
    if path.suffix.lower() in TRACKS:
        tracks = load_tracks(path)
        return [tracks.masks(0)[i] for i in tracks.kept(most, sort)]
    mask = next(_mattes(path))
    return [mask] if area(mask) >= LEAST_AREA else []


def ready_labels(path: Path, most: int, sort: str) -> Iterator[np.ndarray]:
    """Labels uint8 [h, w] of every frame of a clip: 0, or the figure's number from 1."""
    if path.suffix.lower() not in TRACKS:
        for mask in _mattes(path):
            yield mask.astype(np.uint8)
        return
    tracks = load_tracks(path)
    kept = tracks.kept(most, sort)
    for frame in range(tracks.frames):
        labels = np.zeros(tracks.size, np.uint8)
        masks = tracks.masks(frame)
        for number, i in reversed(list(enumerate(kept, 1))):
            labels[masks[i]] = number
        yield labels


def unpacked(bits: np.ndarray) -> np.ndarray:
    """uint8 [N, h, w/8] → bool [N, h, w]."""
    masks: np.ndarray = np.unpackbits(bits, axis=-1, bitorder="little").astype(bool)
    return masks


class Tracks:
    """SAM3_TRACK_DATA. size: (h, w) of its masks."""

    def __init__(self, packed: np.ndarray, scores: np.ndarray) -> None:
        self._packed, self._scores = packed, scores
        self.frames, self.figures = packed.shape[:2]
        self.size = (packed.shape[2], packed.shape[3] * 8)

    def masks(self, frame: int) -> np.ndarray:
        """bool [N, h, w]."""
        return unpacked(self._packed[frame])

    def kept(self, most: int, sort: str) -> list[int]:
        """The figures that count, in their order: of those that take enough of the first frame that shows them the
        surest; those of the first frame sorted, late ones after them as they come."""
        first: dict[int, int] = {}
        shapes: dict[int, np.ndarray] = {}
        for frame in range(self.frames):
            if len(first) == self.figures:
                break
            for i, mask in enumerate(self.masks(frame)):
                if i not in first and area(mask) >= LEAST_AREA:
                    first[i], shapes[i] = frame, mask
        surest = sorted(first, key=lambda i: -self._scores[i])[:most]
        begun = min((first[i] for i in surest), default=0)
        early = [i for i in surest if first[i] == begun]
        early = [early[n] for n in ordered([shapes[i] for i in early], sort)]
        return early + sorted((i for i in surest if first[i] > begun), key=lambda i: first[i])


def load_tracks(path: Path) -> Tracks:
    """InputError for a file that holds no track data."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a SAM3_TRACK_DATA file, a matte or an image with alpha.")
    try:
        found = _read(path)
        scores = np.asarray(found.get("scores", ()), np.float64).ravel()
    except Exception as error:
        raise InputError(f"{path} cannot be read as track data ({type(error).__name__}: {error}).") from error
    packed = found.get("packed_masks")
    if packed is None:
        raise InputError(f"{path} holds no packed_masks: save SAM3_TRACK_DATA as it is, or give a matte.")
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim != 4 or not packed.size:
        raise InputError(f"packed_masks of {path} is {packed.dtype} {list(packed.shape)}, not uint8 [T, N, H, W/8].")
    return Tracks(packed, scores if len(scores) == packed.shape[1] else -np.arange(packed.shape[1], dtype=float))


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    if path.suffix.lower() == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    import torch

    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _mattes(path: Path) -> Iterator[np.ndarray]:
    """Where the character is: opaque, if there is an alpha channel that is not full (in a video's first frame), else
    bright."""
    source = open_source(path)
    found = False
    alpha = source.kind == "video" and has_transparency(path)
    for frame in frames_of(source, _levels, alpha=alpha):
        mask = (frame if frame.ndim == 2 else grey_levels(frame, path)) >= ON
        found = found or bool(mask.any())
        yield mask
    if not found:
        raise InputError(f"{path} shows no figure: a matte is white, or opaque, where the figure is.")


def _levels(path: Path) -> np.ndarray:
    alpha = load_alpha(path) if is_image(path) else None
    return alpha if alpha is not None and alpha.min() < 255 else load_image(path)
