"""Connected areas of a mask: `masks.cleaning` repairs frames with them, and `masks.useless` detects useless mattes.

Areas are found from runs of equal pixels by union-find in NumPy: 30 lines instead of SciPy for one function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scail2_rt.runtime.masks.palette import BLACK

_CHARACTERS = sum(1 << label for label in range(1, BLACK))  # one bit per label
_LEAST, _LEAST_SHARE = 3, 1 / 40_000  # grid points, and share of the frame: smaller pieces and holes do not count


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of one character in one frame; areas are in grid points.

    area           of the complete character
    main, second   area of its largest and second-largest piece
    pieces         number of its pieces
    holes          number of background areas that it alone encloses
    hole_area      their total area
    largest_hole   area of the largest hole
    beside         whether it touches another character
    specks         number of pieces and enclosed areas that are too small to count among these
    speck_area     their total area"""

    area: int
    main: int
    second: int
    pieces: int
    holes: int
    hole_area: int
    largest_hole: int
    beside: bool
    specks: int
    speck_area: int

    @property
    def noisy(self) -> float:
        """Area of the specks over that of the character."""
        return self.speck_area / self.area

    @property
    def scattered(self) -> float:
        """Share of the character's area outside its largest piece."""
        return 1 - self.main / self.area

    @property
    def hollow(self) -> float:
        """Share of the holes in the area of the character's filled outline."""
        return self.hole_area / (self.area + self.hole_area)


def least_area(points: int) -> float:
    """Points that a piece or a hole has at least, in a picture of so many."""
    return max(_LEAST, points * _LEAST_SHARE)


def shapes(labels: np.ndarray) -> dict[int, Shape]:
    """Map the label of each character in `labels` (uint8 [H, W], 0 to 7 as in `palette.MODEL_LABEL`) to its shape."""
    ids = connected(labels)
    sizes = np.bincount(ids.ravel())
    least = least_area(labels.size)
    kind = np.empty(len(sizes), np.uint8)
    kind[ids] = labels
    around = _around(ids, labels, len(sizes))
    at_border = np.zeros(len(sizes), bool)
    for edge in (ids[0], ids[-1], ids[:, 0], ids[:, -1]):
        at_border[edge] = True
    enclosed = ~at_border & ((kind == 0) | (kind == BLACK))
    found = {}
    for label in range(1, BLACK):
        own = np.sort(sizes[kind == label])
        if not len(own):
            continue
        gaps = sizes[enclosed & (around == 1 << label)]
        holes, small = gaps[gaps >= least], np.concatenate([own[own < least], gaps[gaps < least]])
        found[label] = Shape(
            area=int(own.sum()),
            main=int(own[-1]),
            second=int(own[-2]) if len(own) > 1 else 0,
            pieces=int(np.count_nonzero(own >= least)),
            holes=len(holes),
            hole_area=int(holes.sum()),
            largest_hole=int(holes.max(initial=0)),
            beside=bool((around[kind == label] & (_CHARACTERS ^ (1 << label))).any()),
            specks=len(small),
            speck_area=int(small.sum()),
        )
    return found


def _around(ids: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` areas, one bit per label that touches it above, below, left or right; int [count]."""
    bits = np.zeros((count, BLACK + 1), bool)
    for axis in (0, 1):
        before, after = (slice(None, -1), slice(1, None))
        low, high = ((part, slice(None)) if axis == 0 else (slice(None), part) for part in (before, after))
        edge = ids[low] != ids[high]
        bits[ids[low][edge], labels[high][edge]] = True
        bits[ids[high][edge], labels[low][edge]] = True
    return bits @ (1 << np.arange(BLACK + 1))


def connected(labels: np.ndarray) -> np.ndarray:
    """The number (from 0) of the area of equal labels that each pixel belongs to, int [H, W]. Diagonal neighbours are
    connected."""
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = starts.ravel().cumsum().reshape(labels.shape) - 1
    joined = []
    width = labels.shape[1]
    for shift in (-1, 0, 1):
        above, below = slice(max(-shift, 0), width - max(shift, 0)), slice(max(shift, 0), width - max(-shift, 0))
        equal = labels[:-1, above] == labels[1:, below]
        upper, lower = runs[:-1, above][equal], runs[1:, below][equal]
        new = np.r_[True, (upper[1:] != upper[:-1]) | (lower[1:] != lower[:-1])][: len(upper)]
        joined.append((upper[new], lower[new]))
    parent = np.arange(runs[-1, -1] + 1)
    a, b = (np.concatenate(ends) for ends in zip(*joined, strict=True))
    while True:
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        if (low == high).all():
            break
        np.minimum.at(parent, high, low)
        while (parent[parent] != parent).any():
            parent = parent[parent]
    return np.unique(parent, return_inverse=True)[1][runs]
