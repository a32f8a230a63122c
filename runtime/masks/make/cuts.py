"""Detects scene cuts from the difference between neighbouring frames, compared with the usual difference."""

from __future__ import annotations

from collections import deque

import numpy as np

from scail2_rt.runtime.masks.make.figures import alike, look

SIDE = 32  # longer side of the reduced frames that are compared, in pixels
LEVELS = 30.0  # a cut has a larger mean difference, of 255
SUDDEN = 3.0  # and a difference larger than the usual one by this factor
COLOURS_SHARED = 0.7  # and a smaller histogram intersection, 0 to 1
USUAL = 8  # number of frames whose median difference is the usual one


class CutFinder:
    """Finds cuts in frames that are given in order."""

    def __init__(self) -> None:
        self._small: np.ndarray | None = None
        self._differences: deque[float] = deque(maxlen=USUAL)

    def cut_before(self, frame: np.ndarray) -> bool:
        """Whether a new scene begins with this frame, uint8 [H, W, 3]; False for the first frame."""
        small, last = _small(frame), self._small
        self._small = small
        if last is None:
            return False
        difference = float(np.abs(small - last).mean())
        usual = float(np.median(self._differences)) if self._differences else 0.0
        cut = difference > LEVELS and difference > SUDDEN * usual and _shared(small, last) < COLOURS_SHARED
        if cut:
            self._differences.clear()
        else:
            self._differences.append(difference)
        return cut


def _small(frame: np.ndarray) -> np.ndarray:
    """Reduce a frame to means over cells, fp32 [h, w, 3] with sides of at most `SIDE`."""
    rows, columns = (np.linspace(0, side, min(SIDE, side) + 1).astype(int)[:-1] for side in frame.shape[:2])
    step = max(frame.shape[0] // 256, 1), max(frame.shape[1] // 256, 1)  # every n-th pixel is enough
    thinned = frame[:: step[0], :: step[1]].astype(np.float32)
    rows, columns = (edges // n for edges, n in zip((rows, columns), step, strict=True))
    sums = np.add.reduceat(np.add.reduceat(thinned, rows, 0), columns, 1)
    counts = [np.diff(np.append(edges, side)) for edges, side in zip((rows, columns), thinned.shape, strict=False)]
    return np.asarray(sums / (counts[0][:, None] * counts[1])[..., None])


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of the colour histograms of two images of one size, 0 to 1."""
    everything = np.ones(a.shape[:2], bool)
    return alike(look(a, everything), look(b, everything))
