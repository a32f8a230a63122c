"""How long the plans that are still to come will take.

TensorRT's own progress cannot be believed (it stands at 0.83 from 3 % of the time on), so stages are counted. A stage
takes as long as the last ones of its family did; before there was one, as long as its weights suggest, by figures of
the 14B model on a CPU, scaled by how well those did so far. How many are compiled at the same time follows from the
last ones that ended.
"""

import time
from collections.abc import Iterable, Mapping

# Seconds per stage, and seconds per byte of its weights
_GUESS = {"dit": (0.4, 15e-9), "umt5": (0.4, 20e-9), "clip": (0.4, 18e-9), "vae": (1.0, 60e-9)}
RECENT = 3  # stages of a family whose times count
WINDOW = 8  # stages by which the number at the same time is told


class PlanTimes:
    """families: stage → family; sizes: stage → bytes of weights."""

    def __init__(self, families: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._families, self._sizes = families, sizes
        self._known: dict[str, list[float]] = {}
        self._guessed, self._took = 0.0, 0.0
        self._ended: list[tuple[float, float]] = []  # when each ended, and its seconds

    def start(self) -> None:
        self._ended = [(time.monotonic(), 0.0)]

    def add(self, stage: str, seconds: float) -> None:
        """A stage is done."""
        self._known.setdefault(self._families[stage], []).append(seconds)
        self._guessed += self._guess(stage)
        self._took += seconds
        self._ended.append((time.monotonic(), seconds))

    def remaining_s(self, stages: Iterable[str]) -> float:
        """Seconds until these are done. At least one stage must have been added."""
        scale = self._took / self._guessed
        total = 0.0
        for stage in stages:
            known = self._known.get(self._families[stage], [])[-RECENT:]
            total += sum(known) / len(known) if known else scale * self._guess(stage)
        (began, _), *window = self._ended[-WINDOW - 1 :]
        worked = sum(min(seconds, ended - began) for ended, seconds in window)  # of a long one what lies in the window
        return total * (window[-1][0] - began) / worked

    def _guess(self, stage: str) -> float:
        base, rate = _GUESS[stage.partition(".")[0]]
        return base + rate * self._sizes[stage]
