"""Pictures as the segmenters take them, and masks as they give them: resize, normalise and post-processing.

A few lines instead of the processors of `transformers`, which need torchvision. `python -m tests.parity.segmenters`
holds both together where torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of SAM 2 and Grounding DINO
HALF = (0.5, 0.5, 0.5)  # of SAM 3


@dataclass(frozen=True, slots=True)
class Taken:
    """How a network takes pictures. size: (H, W) that any picture is stretched to."""

    size: tuple[int, int]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD


def network_picture(frame: np.ndarray, taken: Taken) -> Tensor:
    """uint8 [H, W, 3] → fp32 [3, h, w]: stretched bilinearly, smoothed where it shrinks, in 8 bits as the processors
    do it, then normalised."""
    import torch
    from torch.nn import functional as F

    picture = torch.from_numpy(frame).permute(2, 0, 1)[None]
    if picture.shape[-2:] != taken.size:
        picture = F.interpolate(picture, taken.size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (taken.mean, taken.std))
    return (picture[0].float() / 255 - mean) / std


def picture_masks(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits [N, h, w] → logits [N, H, W] of a picture of `size`."""
    from torch.nn import functional as F

    return F.interpolate(logits[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def network_points(points: np.ndarray, size: tuple[int, int], square: int) -> Tensor:
    """(x, y) in a picture of `size` (H, W), [P, 2] → in the network's square, fp32 [1, 1, P, 2]."""
    import torch

    scale = torch.tensor([square / size[1], square / size[0]])
    return (torch.from_numpy(np.asarray(points, np.float32)) * scale)[None, None]


def network_mask(mask: np.ndarray, square: int) -> Tensor:
    """bool [H, W] → fp32 [1, 1, S, S] of 0 and 1."""
    import torch
    from torch.nn import functional as F

    whole = torch.from_numpy(mask)[None, None].float()
    stretched = F.interpolate(whole, (square, square), mode="bilinear", align_corners=False, antialias=True)
    return (stretched >= 0.5).float()
