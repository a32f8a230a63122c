"""Reads masks that another tool made: SAM3_TRACK_DATA of ComfyUI, black-and-white mattes and alpha channels.

They become masks for an image, or frames of labels for a clip, in the order that a segmenter would give.
SAM3_TRACK_DATA is a dict: `packed_masks` uint8 [T, N, h, w/8] (bit i of a byte is the i-th of its eight pixels),
`n_frames`, `orig_size` and `scores`. Files of `torch.save`, `numpy.savez` and safetensors are read.
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
ON = 128  # 8-bit level from which a pixel of a matte is the character's


def ready_masks(path: Path, most: int, sort: str) -> list[np.ndarray]:
    """Masks bool [h, w] of the characters of a reference image, sorted; at most `most`, none if a matte shows no
    character of `LEAST_AREA`. Raises InputError if the file cannot be read."""
    if path.suffix.lower() in TRACKS:
        tracks = load_tracks(path)
        return [tracks.masks(0)[i] for i in tracks.kept(most, sort)]
    mask = next(_mattes(path))
    return [mask] if area(mask) >= LEAST_AREA else []


def ready_labels(path: Path, most: int, sort: str) -> Iterator[np.ndarray]:
    """Yield the labels uint8 [h, w] of each frame of a clip: the number of the character from 1, or 0. Raises
    InputError if the file cannot be read or a matte shows nothing."""
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
    """Unpack masks uint8 [N, h, w/8] → bool [N, h, w]."""
    masks: np.ndarray = np.unpackbits(bits, axis=-1, bitorder="little").astype(bool)
    return masks


class Tracks:
    """SAM3_TRACK_DATA: `frames` frames with masks of `figures` characters at `size` (h, w).

    packed   uint8 [T, N, h, w/8]
    scores   [N]"""

    def __init__(self, packed: np.ndarray, scores: np.ndarray) -> None:
        self._packed, self._scores = packed, scores
        self.frames, self.figures = packed.shape[:2]
        self.size = (packed.shape[2], packed.shape[3] * 8)

    def masks(self, frame: int) -> np.ndarray:
        """The masks of a frame, bool [N, h, w]."""
        return unpacked(self._packed[frame])

    def kept(self, most: int, sort: str) -> list[int]:
        """Indices of the `most` characters with the highest scores, of those that reach `LEAST_AREA` in a frame. Those
        of the earliest frame are sorted; later ones follow in the order in which they appear."""
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
    """Read track data. Raises InputError if the file holds none."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a SAM3_TRACK_DATA file, a matte or an image with alpha.")
    try:
        found = _read(path)
        scores = np.asarray(found.get("scores", ()), np.float64).ravel()
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as track data ({type(error).__name__}: {error}): save it again."
        ) from error
    packed = found.get("packed_masks")
    if packed is None:
        raise InputError(f"{path} holds no packed_masks: save the complete SAM3_TRACK_DATA, or give a matte.")
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim != 4 or not packed.size:
        raise InputError(
            f"packed_masks of {path} must be uint8 [T, N, H, W/8], not {packed.dtype} {list(packed.shape)}."
        )
    return Tracks(packed, scores if len(scores) == packed.shape[1] else -np.arange(packed.shape[1], dtype=float))


def _read(path: Path) -> dict[str, Any]:
    """The dict in a file of `numpy.savez`, safetensors or `torch.save`."""
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    if path.suffix.lower() == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    import torch

    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _mattes(path: Path) -> Iterator[np.ndarray]:
    """Yield the mask, bool [h, w], of each frame of a matte. The character is where it is opaque, if there are
    transparent pixels (for a video, in the first frame), else where it is bright. Raises InputError if there is no
    character."""
    source = open_source(path)
    found = False
    alpha = source.kind == "video" and has_transparency(path)
    for frame in frames_of(source, _levels, alpha=alpha):
        mask = (frame if frame.ndim == 2 else grey_levels(frame, path)) >= ON
        found = found or bool(mask.any())
        yield mask
    if not found:
        raise InputError(f"{path} shows no character: give a matte that is white, or opaque, where the character is.")


def _levels(path: Path) -> np.ndarray:
    """The alpha channel [H, W] of an image if it has transparent pixels, else its RGB pixels [H, W, 3]."""
    alpha = load_alpha(path) if is_image(path) else None
    return alpha if alpha is not None and alpha.min() < 255 else load_image(path)
