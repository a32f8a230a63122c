"""Compares the heights of the reference character and the driving character, and scales the reference to match.

In replace mode the output shows the character at the size that it has in the reference frame, so a portrait that fills
the image becomes a giant in the driving scene. The measure is the height of the character's bounding box relative to
the frame, in the part that remains after cropping, which is what the model sees. For the driving clip it is the median
over its frames: single frames with a crouch, a cut by the border or a tracking error do not change it, and moving limbs
change a height less than an area. It does not include parts of a character beyond the border of the image.

`--fit-reference` scales the complete reference, including parts that cropping would remove, until the heights agree.
The centre of the character stays in place. The new margin is black in the mask, that is, hidden. In the image it has
the median colour of the hidden border, because VAE and CLIP would see a hard edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.findings import RGB, Framed, Framing, ReferenceFit
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.palette import BLACK, CHARACTERS, CLEAR_LABEL, codes
from scail2_rt.runtime.masks.stats import MaskStats, image_stats
from scail2_rt.runtime.masks.windows import kept

if TYPE_CHECKING:
    from torch import Tensor

_NEUTRAL: RGB = (127, 127, 127)  # 0 in the -1..1 range of the networks
_BORDER = 0.02  # share of a side: width of the border whose colour the margin gets


def heights(stats: MaskStats, window: Window) -> dict[str, float]:
    """Character → its height relative to the frame: of an image, or the median over a clip."""
    part = window.part_of_mask(stats.shape)
    filled = min(window.height, window.frame[0]) / window.frame[0]
    return {name: height * filled for name, height in stats.heights(part).items()}


def fit_reference(image: np.ndarray, mask: np.ndarray, driving: Mapping[str, float], window: Window) -> ReferenceFit:
    """Compute how to scale a reference shown through `window` so that its characters are as tall as the driving ones.

    image, mask   uint8 [H, W, 3]
    driving       character → its height relative to the frame

    Raises InputError if no character is in both."""
    full = {name: share * window.height / window.frame[0] for name, share in image_stats(mask).heights().items()}
    ratio = Framing(full, driving).ratio
    if ratio is None:
        raise InputError(
            "--fit-reference found no character that both the reference mask and the driving mask show: run "
            "`scail2-rt masks check` on the case."
        )
    scale = 1 / ratio
    base = (window.height, window.width)
    scaled = (max(1, round(base[0] * scale)), max(1, round(base[1] * scale)))
    corner = []
    characters = _characters(mask)
    for axis, (side, begins) in enumerate(zip(window.frame, (window.top, window.left), strict=True)):
        covered = np.flatnonzero(characters.any(axis=1 - axis)) / characters.shape[axis]
        first, last = covered[0], covered[-1] + 1 / characters.shape[axis]  # as shares of the image's side
        centre = min(max((first + last) / 2 * base[axis] + begins, 0), side)  # in the frame, before scaling
        begin = centre - (first + last) / 2 * scaled[axis]
        if (last - first) * scaled[axis] <= side:  # it fits, so the complete character must be in the frame
            begin = min(max(begin, -first * scaled[axis]), side - last * scaled[axis])
        corner.append(round(begin))
    return ReferenceFit(scale, *scaled, corner[0], corner[1], _margin(image, mask))


def framed_by_fit(framed: Framed, mask: np.ndarray, fit: ReferenceFit) -> Framed:
    """Update `framed.kept`, the visible share of each character, for a reference scaled by `fit`. mask: uint8 [H, W,
    3]."""
    labels = CLEAR_LABEL[codes(mask)]
    spans = []
    for side, scaled, begins, shown in zip(
        labels.shape, (fit.height, fit.width), (fit.top, fit.left), framed.window.frame, strict=True
    ):
        middles = begins + (np.arange(side) + 0.5) / side * scaled
        spans.append((middles >= 0) & (middles < shown))
    inside = spans[0][:, None] & spans[1]
    found = {}
    for name in framed.kept:
        own = labels == CHARACTERS.index(name) + 1
        left, total = (np.array([np.count_nonzero(pixels)], np.float64) for pixels in (own & inside, own))
        found[name] = kept(np.zeros(1, int), left, total, total)
    return replace(framed, kept=found)


def _characters(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels that are clearly of a character."""
    labels = CLEAR_LABEL[codes(mask)]
    return (labels > 0) & (labels < BLACK)


def _margin(image: np.ndarray, mask: np.ndarray) -> RGB:
    """Median colour of the image's border where the mask shows no character; `_NEUTRAL` if it shows one everywhere."""
    labels = CLEAR_LABEL[codes(mask)]
    rows = np.arange(image.shape[0]) * mask.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * mask.shape[1] // image.shape[1]
    hidden = np.isin(labels, (0, BLACK))[rows][:, columns]
    depth = [max(1, round(side * _BORDER)) for side in image.shape[:2]]
    hidden[depth[0] : -depth[0], depth[1] : -depth[1]] = False
    if not hidden.any():
        return _NEUTRAL
    r, g, b = (int(value) for value in np.median(image[hidden], axis=0))
    return r, g, b


def place(picture: Tensor, fit: ReferenceFit, margin: RGB, height: int, width: int) -> Tensor:
    """Scale an image [1, 3, h, w] in -1..1 (bicubic, anti-aliased, overshoot not clipped) and place it in a frame
    [1, 3, height, width] filled with the 8-bit colour `margin`."""
    import torch
    from torch.nn import functional as F

    scaled = F.interpolate(picture, (fit.height, fit.width), mode="bicubic", antialias=True, align_corners=False)
    frame = torch.tensor(margin).view(1, 3, 1, 1).expand(1, 3, height, width) / 255 * 2 - 1
    frame = frame.to(picture.dtype).contiguous()
    top, left = max(fit.top, 0), max(fit.left, 0)
    bottom, right = min(fit.top + fit.height, height), min(fit.left + fit.width, width)
    frame[..., top:bottom, left:right] = scaled[
        ..., top - fit.top : bottom - fit.top, left - fit.left : right - fit.left
    ]
    return frame
