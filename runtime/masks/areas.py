"""Connected areas of a mask: `masks.cleaning` repairs frames with them, and `masks.useless` detects useless mattes.

Areas are found from runs of equal pixels by union-find in NumPy: 50 lines instead of SciPy for one function.
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
    height, width = labels.shape
    runs = _Runs.of(labels)
    ids = runs.areas()
    lengths = np.diff(runs.first, append=labels.size)
    sizes = np.bincount(ids, lengths).astype(int)
    least = least_area(labels.size)
    kind = np.empty(len(sizes), np.uint8)
    kind[ids] = runs.labels
    around = runs.around(ids, len(sizes))
    row, column = np.divmod(runs.first, width)
    edge = (row == 0) | (row == height - 1) | (column == 0) | (column + lengths == width)
    at_border = np.zeros(len(sizes), bool)
    at_border[ids[edge]] = True
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


def connected(labels: np.ndarray) -> np.ndarray:
    """The number (from 0) of the area of equal labels that each pixel belongs to, int [H, W]. Diagonal neighbours are
    connected."""
    runs = _Runs.of(labels)
    return np.repeat(runs.areas(), np.diff(runs.first, append=labels.size)).reshape(labels.shape)


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs of equal labels in the rows of a picture: far fewer than its pixels.

    first    index of the first pixel of each run in the flat picture
    labels   its label
    beside   runs that the next run continues in the same row
    touching runs of two neighbouring rows that touch: an array of upper and one of lower runs, for each of the three
             directions (below left, below, below right)"""

    first: np.ndarray
    labels: np.ndarray
    beside: np.ndarray
    touching: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, labels: np.ndarray) -> _Runs:
        width = labels.shape[1]
        starts = np.ones(labels.shape, bool)
        starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
        first = np.flatnonzero(starts)
        touching = []
        for shift in (-1, 0, 1):
            left, right = max(-shift, 0), max(shift, 0)
            # the first pixels in which two runs touch are the first ones of one of them
            meets = starts[:-1, left : width - right] | starts[1:, right : width - left]
            row, column = np.divmod(np.flatnonzero(meets), width - left - right)
            upper, lower = row * width + column + left, (row + 1) * width + column + right
            touching.append(tuple(np.searchsorted(first, pixels, side="right") - 1 for pixels in (upper, lower)))
        beside = np.flatnonzero(first[1:] % width)
        return cls(first, labels.ravel()[first], beside, tuple(touching))

    def areas(self) -> np.ndarray:
        """The number (from 0) of the connected area that each run belongs to, by union-find."""
        parent = np.arange(len(self.first))
        a, b = (np.concatenate(ends) for ends in zip(*self.touching, strict=True))
        same = self.labels[a] == self.labels[b]
        a, b = a[same], b[same]
        while True:
            low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
            if (low == high).all():
                break
            np.minimum.at(parent, high, low)
            while (parent[parent] != parent).any():
                parent = parent[parent]
        return np.unique(parent, return_inverse=True)[1]

    def around(self, ids: np.ndarray, count: int) -> np.ndarray:
        """For each of `count` areas, one bit per label that touches it above, below, left or right; int [count].

        ids: the area of each run."""
        bits = np.zeros((count, BLACK + 1), bool)
        for a, b in ((self.beside, self.beside + 1), self.touching[1]):
            edge = ids[a] != ids[b]
            bits[ids[a][edge], self.labels[b][edge]] = True
            bits[ids[b][edge], self.labels[a][edge]] = True
        return bits @ (1 << np.arange(BLACK + 1))
