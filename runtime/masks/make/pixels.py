"""Conversion of images to inputs of the segmenters, and of their outputs to masks.

These few lines replace the processors of `transformers`, which need torchvision. `python -m tests.parity.segmenters`
compares both if torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for SAM 2 and Grounding DINO
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation for SAM 3


@dataclass(frozen=True, slots=True)
class InputFormat:
    """Input format of a network: the size (H, W) that images are stretched to, and the normalisation per channel."""

    size: tuple[int, int]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD


def network_picture(frame: np.ndarray, form: InputFormat) -> Tensor:
    """uint8 [H, W, 3] → fp32 [3, h, w]: stretched bilinearly (anti-aliased, in 8 bits as the processors do) and
    normalised."""
    import torch
    from torch.nn import functional as F

    picture = torch.from_numpy(frame).permute(2, 0, 1)[None]
    if picture.shape[-2:] != form.size:
        picture = F.interpolate(picture, form.size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (form.mean, form.std))
    return (picture[0].float() / 255 - mean) / std


def picture_masks(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [N, h, w] → fp32 logits [N, H, W] at `size` (H, W)."""
    from torch.nn import functional as F

    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def network_points(points: np.ndarray, size: tuple[int, int], square: int) -> Tensor:
    """Points (x, y) [P, 2] in an image of `size` (H, W) → points in the network's square input, fp32 [1, 1, P, 2]."""
    import torch

    scale = torch.tensor([square / size[1], square / size[0]])
    return (torch.from_numpy(np.asarray(points, np.float32)) * scale)[None, None]


def network_mask(mask: np.ndarray, square: int) -> Tensor:
    """Mask bool [H, W] → fp32 [1, 1, S, S] of 0 and 1, where S is `square`."""
    import torch
    from torch.nn import functional as F

    pixels = torch.from_numpy(mask)[None, None].float()
    stretched = F.interpolate(pixels, (square, square), mode="bilinear", align_corners=False, antialias=True)
    return (stretched >= 0.5).float()
