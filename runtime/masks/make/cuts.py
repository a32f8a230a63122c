"""Scene cuts: frames that have nothing to do with the one before."""

from __future__ import annotations

from collections import deque

import numpy as np

from scail2_rt.runtime.masks.make.figures import alike, look

SIDE = 32  # pixels of the small pictures that are compared
LEVELS = 30.0  # mean difference, of 255, that a cut makes at least
SUDDEN = 3.0  # as many times the usual difference of neighbours
COLOURS_SHARED = 0.7  # of their histograms: neighbours of one scene share more
USUAL = 8  # frames that "usual" is taken from


class CutFinder:
    """Looks at frames in order."""

    def __init__(self) -> None:
        self._small: np.ndarray | None = None
        self._differences: deque[float] = deque(maxlen=USUAL)

    def cut_before(self, frame: np.ndarray) -> bool:
        """Whether a new scene begins with this frame, uint8 [H, W, 3]."""
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
    """Means over cells, fp32 [h, w, 3] with sides of at most `SIDE`."""
    rows, columns = (np.linspace(0, side, min(SIDE, side) + 1).astype(int)[:-1] for side in frame.shape[:2])
    step = max(frame.shape[0] // 256, 1), max(frame.shape[1] // 256, 1)  # every n-th pixel tells enough
    thinned = frame[:: step[0], :: step[1]].astype(np.float32)
    rows, columns = (edges // n for edges, n in zip((rows, columns), step, strict=True))
    sums = np.add.reduceat(np.add.reduceat(thinned, rows, 0), columns, 1)
    counts = [np.diff(np.append(edges, side)) for edges, side in zip((rows, columns), thinned.shape, strict=False)]
    return np.asarray(sums / (counts[0][:, None] * counts[1])[..., None])


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """What the colours of two pictures of one size share, 0…1."""
    whole = np.ones(a.shape[:2], bool)
    return alike(look(a, whole), look(b, whole))
