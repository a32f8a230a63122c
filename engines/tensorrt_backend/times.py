"""Estimate of the remaining time of a plan build.

TensorRT's progress report is unusable (it stands at 0.83 from 3 % of the time on), so stages are counted. A stage is
estimated by the last stages of its family; without any, by its weights, with figures of the 14B model on a CPU, scaled
by the error of earlier estimates. The number of parallel compilations is derived from the stages that ended last.
"""

import time
from collections.abc import Iterable, Mapping

# Seconds per stage, and seconds per byte of weights
_GUESS = {"dit": (0.4, 15e-9), "umt5": (0.4, 20e-9), "clip": (0.4, 18e-9), "vae": (1.0, 60e-9)}
RECENT = 3  # number of a family's last stages used for the estimate
WINDOW = 8  # number of last stages from which the parallelism is derived


class PlanTimes:
    """Build times of stages. families: stage → family; sizes: stage → bytes of weights."""

    def __init__(self, families: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._families, self._sizes = families, sizes
        self._known: dict[str, list[float]] = {}
        self._guessed, self._took = 0.0, 0.0
        self._ended: list[tuple[float, float]] = []  # when each ended, and its seconds

    def start(self) -> None:
        self._ended = [(time.monotonic(), 0.0)]

    def add(self, stage: str, seconds: float) -> None:
        """Record the seconds of a finished stage."""
        self._known.setdefault(self._families[stage], []).append(seconds)
        self._guessed += self._guess(stage)
        self._took += seconds
        self._ended.append((time.monotonic(), seconds))

    def remaining_s(self, stages: Iterable[str]) -> float:
        """Estimate the seconds until these stages are done. At least one stage must have been added."""
        scale = self._took / self._guessed
        total = 0.0
        for stage in stages:
            known = self._known.get(self._families[stage], [])[-RECENT:]
            total += sum(known) / len(known) if known else scale * self._guess(stage)
        (began, _), *window = self._ended[-WINDOW - 1 :]
        worked = sum(min(seconds, ended - began) for ended, seconds in window)  # only the part inside the window
        return total * (window[-1][0] - began) / worked

    def _guess(self, stage: str) -> float:
        base, rate = _GUESS[stage.partition(".")[0]]
        return base + rate * self._sizes[stage]
