"""Converts frames between ComfyUI (float tensors [T, H, W, 3] in 0..1) and a session (uint8 arrays).

No clip is held twice: the session reads the graph's tensor a few frames at a time, and the tensor of the result is
allocated once at its final size and filled as frames are finished.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scail2_rt.kernels.errors import InputError

_AT_ONCE = 8  # frames


class TensorFrames:
    """A batch of images, any float dtype [T, H, W, 3 or 4] in 0..1, as frames for `Clip`.

    Indexing and slicing return uint8 arrays [H, W, 3] and [n, H, W, 3], rounded to the nearest level. A fourth channel
    (alpha) is dropped, as ComfyUI's own nodes do. Raises InputError that mentions `name` for another shape or dtype."""

    def __init__(self, images: Tensor, name: str) -> None:
        if not isinstance(images, Tensor):
            raise InputError(f"The {name} is a {type(images).__name__}. Connect images.")
        if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
            raise InputError(f"The {name} has the shape {list(images.shape)}. Connect images, [frames, H, W, 3].")
        if not images.is_floating_point():
            raise InputError(f"The {name} has the dtype {images.dtype}. Connect images, which are floats in 0..1.")
        self._images = images[..., :3]
        frames, height, width, _ = self._images.shape
        self.shape = (frames, height, width, 3)
        self.size = (height, width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        levels: np.ndarray = to_levels(self._images[index]).numpy()
        return levels

    def __iter__(self) -> Iterator[np.ndarray]:
        return one_by_one(self)


def one_by_one(frames: Any) -> Iterator[np.ndarray]:
    """Iterate over the frames of a sliceable clip, slicing `_AT_ONCE` at a time."""
    for start in range(0, len(frames), _AT_ONCE):
        yield from frames[start : start + _AT_ONCE]


def to_levels(images: Tensor) -> Tensor:
    """Floats in 0..1 → uint8 on the CPU, rounded to the nearest level and clamped. Raises InputError for NaN."""
    if images.isnan().any():
        raise InputError("An image contains NaN. Check the node that made it.")
    return images.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu()


def float_levels(dtype: torch.dtype) -> Tensor:
    """The floats [256] for the 8-bit levels. ComfyUI saves images as `x * 255`, truncated. Entry v is v / 255 or, if
    that would be truncated to v - 1, the next larger float of this dtype."""
    levels = torch.arange(256)
    exact = (levels / 255).to(dtype)
    for _ in range(2):
        short = (exact * 255).to(torch.uint8) < levels
        exact = torch.where(short, torch.nextafter(exact, torch.ones_like(exact)), exact)
    return exact


class ImageBatch:
    """The result: a float tensor [T, H, W, 3] in 0..1, filled in order. filled: number of frames so far."""

    def __init__(self, frames: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.images = torch.empty(frames, height, width, 3, dtype=dtype)
        self.filled = 0
        self._levels = float_levels(dtype)

    def add(self, pixels: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3]."""
        for frame in pixels:
            torch.index_select(
                self._levels, 0, torch.from_numpy(frame).reshape(-1).int(), out=self.images[self.filled].view(-1)
            )
            self.filled += 1
