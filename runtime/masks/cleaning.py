"""Repairs mask frames (`masks clean`): gives every pixel one of the mask colours.

Video coding keeps the luma of a mask exact to the pixel but blurs its chroma over several pixels. A pixel is *clear* if
all channels are near off or on. A clear pixel keeps its colour if its area is at least three pixels thick; a fringe of
false yellow between red and white is thinner. Every other pixel gets the most similar colour among those of such areas
within `_REACH` pixels, where luma counts more than chroma. Flat colours close to a mask colour become that colour, and
flat grey becomes black, as the model reads it. Other flat colours are refused, because only the user knows which
character they mean. At the end, areas of less than `speck` pixels get the colour around them.

If all pixels are exact mask colours, only specks change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.areas import connected
from scail2_rt.runtime.masks.palette import (
    BLACK,
    CLEAR_LABEL,
    EXACT,
    PALETTE,
    PALETTE_RGB,
    PALETTE_TEXT,
    RGB,
    UNCLEAR,
    codes,
)
from scail2_rt.runtime.masks.stats import SAME_COLOUR, Stranger, flat_strangers

SNAP = 80  # largest difference in any channel at which a flat colour becomes the nearest mask colour
SPECK_SHARE = 0.0001  # share of the frame below which an area is a speck; 46 pixels at 512×896
_SPECK_PASSES = 8  # a speck inside a speck needs two
_REACH = 16  # pixels; 4 loses half of the fingers that have no clear pixel after coding, 32 is no better
_CHROMA = 0.15  # weight of squared chroma differences, luma has 1; 0.05 to 0.25 are equally good, 1 is a third worse
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]).T  # BT.601
_WEIGHTS = np.array([1, _CHROMA, _CHROMA])


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Options of the repair.

    recolour     RGB to replace → name of the mask colour
    background   `white` or `black`: the other of the two becomes this one; None: unchanged
    speck        areas of fewer pixels get the colour around them; None: `SPECK_SHARE` of the frame"""

    recolour: Mapping[RGB, str]
    background: str | None = None
    speck: int | None = None


def clean_frame(frame: np.ndarray, cleaning: Cleaning, name: str) -> np.ndarray:
    """Repair a frame, uint8 [H, W, 3]; the result has mask colours only. Raises InputError, which mentions `name`, for
    a flat colour that is no mask colour and not in `recolour`."""
    seen = codes(frame)
    labels = CLEAR_LABEL[seen]
    frame_levels = frame.astype(np.int16)
    sure = EXACT[seen]
    for colour, target in cleaning.recolour.items():
        labels[_near(frame_levels, colour)] = list(PALETTE).index(target)
        sure |= (frame == colour).all(-1)
    if not sure.all():
        for colour, label in _flat_labels(frame, cleaning.recolour, name):
            labels[_near(frame_levels, colour) & (labels == UNCLEAR)] = label
            sure |= (frame == colour).all(-1)
    if not sure.all():
        settle(labels, lambda y, x: _colour_distances(frame[y, x]))
    speck = round(SPECK_SHARE * labels.size) if cleaning.speck is None else cleaning.speck
    if speck > 1:
        for _ in range(_SPECK_PASSES):
            if not _remove_specks(labels, speck):
                break
    if cleaning.background is not None:
        labels[labels == (BLACK if cleaning.background == "white" else 0)] = list(PALETTE).index(cleaning.background)
    return np.take(PALETTE_RGB, labels, axis=0)


def _near(levels: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """bool [H, W]: pixels that differ from `colour` by at most `SAME_COLOUR` in each channel."""
    return (np.abs(levels - np.array(colour, np.int16)) <= SAME_COLOUR).all(-1)


def _flat_labels(frame: np.ndarray, recolour: Mapping[RGB, str], name: str) -> Iterator[tuple[RGB, int]]:
    """Yield (colour, label) for each flat colour outside the palette. Raises InputError if it is close to no mask
    colour."""
    for colour, share in flat_strangers(frame):
        if any(max(abs(a - b) for a, b in zip(colour, known, strict=True)) <= SAME_COLOUR for known in recolour):
            continue
        label = snapped(colour)
        if label is None and Stranger(colour, [], share).is_grey:
            label = BLACK
        if label is None:
            r, g, b = colour
            raise InputError(
                f"({r},{g},{b}) covers {100 * share:.1f} % of {name} and is not near any mask colour: say what it is "
                f"with --map {r},{g},{b}=COLOUR. The colours are {PALETTE_TEXT}."
            )
        yield colour, label


def snapped(colour: RGB) -> int | None:
    """The label of the mask colour within `SNAP` of a flat colour; None if there is none."""
    distances = np.abs(PALETTE_RGB.astype(int) - colour).max(-1)
    return int(distances.argmin()) if distances.min() <= SNAP else None


def _colour_distances(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, 3] → squared distance to each colour of the palette, [n, 8], with chroma weighted by `_CHROMA`."""
    differences = (pixels @ _TO_YCC)[:, None] - PALETTE_RGB @ _TO_YCC
    distances: np.ndarray = (differences**2 * _WEIGHTS).sum(-1)
    return distances


def settle(labels: np.ndarray, distances: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Relabel, in place, each pixel that is unclear or in an area that is nowhere three pixels thick. It gets the
    nearest of the labels of thick areas within `_REACH`.

    labels      uint8 [H, W]
    distances   (y [n], x [n]) → distances of these pixels to each label, [n, 8]"""
    ids = connected(labels)
    same = np.ones(labels.shape, bool)
    for axis in (0, 1):
        for shift in (-1, 1):
            same &= labels == _shifted(labels, axis, shift)
    core = same.copy()
    for shift in (-1, 1):  # the rows above and below also agree with their neighbours: a 3×3 block of one label
        core &= _shifted(same, 0, shift)
    thick = np.zeros(ids.max() + 1, bool)
    thick[ids[core & (labels != UNCLEAR)]] = True
    kept = thick[ids]
    y, x = np.nonzero(~kept)
    if not len(y):
        return
    offered = np.stack([_within_reach(kept & (labels == label), y, x) for label in range(len(PALETTE_RGB))], axis=1)
    offered |= ~offered.any(1, keepdims=True)  # if no thick area is near, all colours are possible
    labels[y, x] = np.where(offered, distances(y, x), np.inf).argmin(1)


def _shifted(values: np.ndarray, axis: int, by: int) -> np.ndarray:
    """The neighbour of each pixel, `by` pixels along `axis`; beyond the border, the pixel at the border."""
    index = np.clip(np.arange(values.shape[axis]) + by, 0, values.shape[axis] - 1)
    return np.take(values, index, axis=axis)


def _within_reach(plane: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """bool [n]: whether a pixel of `plane` (bool [H, W]) is within `_REACH` pixels of each (y, x) in both
    directions."""
    if not plane.any():
        return np.zeros(len(y), bool)
    sums = np.pad(plane, ((1, 0), (1, 0))).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    top, bottom = np.maximum(y - _REACH, 0), np.minimum(y + _REACH + 1, plane.shape[0])
    left, right = np.maximum(x - _REACH, 0), np.minimum(x + _REACH + 1, plane.shape[1])
    found: np.ndarray = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left] > 0
    return found


def _remove_specks(labels: np.ndarray, least: int) -> bool:
    """Give areas of fewer than `least` pixels the most frequent label of the larger areas around them, in place. Return
    whether some remain because only small areas surround them."""
    ids = connected(labels)
    small = np.bincount(ids.ravel()) < least
    if not small.any() or small.all():
        return False
    around = np.zeros((len(small), len(PALETTE_RGB)), np.int64)
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        other_ids = _shifted(_shifted(ids, 0, dy), 1, dx)
        y, x = np.nonzero(small[ids] & (other_ids != ids) & ~small[other_ids])
        neighbours = _shifted(_shifted(labels, 0, dy), 1, dx)[y, x]
        np.add.at(around, (ids[y, x], neighbours), 1)
    surrounded = small & around.any(1)
    replaced = surrounded[ids]
    labels[replaced] = around.argmax(1)[ids[replaced]]
    return bool((small & ~surrounded).any())
