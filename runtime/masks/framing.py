"""How large the reference character is beside the driving one, and making it as large.

In replace mode the character comes out at the size it has in the reference frame, so a portrait that fills the picture
makes a giant in the driving scene. The measure is the height of the character's bounding box relative to the frame, in
the part of the picture that is left after cropping (what the model sees), and over the driving video its median: one
frame in a crouch, cut by the border or badly tracked does not move it, and unlike an area it hardly changes with limbs.
What it cannot know is how much of a character that touches the border lies outside.

`--fit-reference` scales the whole reference, what cropping would cut away too, until the heights agree, keeping the
character's centre. The new margin is black in the mask: it must not show. In the image it takes the median colour of
the hidden border, so that a cut-out on white stays one and a photo gets no hard edge, which VAE and CLIP would see.
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

_NEUTRAL: RGB = (127, 127, 127)  # 0 in the networks' range
_BORDER = 0.02  # of a side: the border whose colour the margin continues


def heights(stats: MaskStats, window: Window) -> dict[str, float]:
    """Character → its height over the frame's: in the one frame of an image, or the median over a clip's."""
    part = window.part_of_mask(stats.shape)
    filled = min(window.height, window.frame[0]) / window.frame[0]
    return {name: height * filled for name, height in stats.heights(part).items()}


def fit_reference(image: np.ndarray, mask: np.ndarray, driving: Mapping[str, float], window: Window) -> ReferenceFit:
    """How a reference (uint8 [H, W, 3] each), shown through `window`, is fitted to the driving characters' heights.

    driving: character → its height over the frame's."""
    whole = {name: share * window.height / window.frame[0] for name, share in image_stats(mask).heights().items()}
    ratio = Framing(whole, driving).ratio
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
        there = np.flatnonzero(characters.any(axis=1 - axis)) / characters.shape[axis]
        first, last = there[0], there[-1] + 1 / characters.shape[axis]  # of the picture's side
        centre = min(max((first + last) / 2 * base[axis] + begins, 0), side)  # where the frame shows it
        begin = centre - (first + last) / 2 * scaled[axis]
        if (last - first) * scaled[axis] <= side:  # then no part of the character may leave the frame
            begin = min(max(begin, -first * scaled[axis]), side - last * scaled[axis])
        corner.append(round(begin))
    return ReferenceFit(scale, *scaled, corner[0], corner[1], _margin(image, mask))


def framed_by_fit(framed: Framed, mask: np.ndarray, fit: ReferenceFit) -> Framed:
    """The reference in the frame once it is scaled: what is left of its characters."""
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
    """bool [H, W]: where the mask clearly shows a character."""
    labels = CLEAR_LABEL[codes(mask)]
    return (labels > 0) & (labels < BLACK)


def _margin(image: np.ndarray, mask: np.ndarray) -> RGB:
    """Median colour of the image's border where the mask shows no character."""
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
    """Scales [1, 3, h, w] in -1..1 (bicubic, anti-aliased, overshoot kept) and lays it into a frame [1, 3, height,
    width] of the colour `margin`."""
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
