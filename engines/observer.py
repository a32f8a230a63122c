"""What a build tells whoever waits for it: one step at a time, with sizes, times and what is left of the phase."""

import time
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BuildStep:
    """One step. phase: "hash" (source files), "weights" (the store, stage by stage), a backend's name (its artefacts),
    "seal" (hashes of what was built). index counts from 1 to total within the phase; seconds is 0 when the step
    starts; remaining_s is the estimate for the rest of the phase, None while nothing is known."""

    phase: str
    index: int
    total: int
    name: str
    size_bytes: int
    seconds: float = 0.0
    remaining_s: float | None = None


class BuildObserver(Protocol):
    def note(self, text: str) -> None:
        """A sentence about the build: what was chosen and why, what is continued."""

    def started(self, step: BuildStep) -> None: ...

    def advanced(self, step: BuildStep, done_bytes: int) -> None:
        """A long step (hashing a file) has done so many of its bytes."""

    def done(self, step: BuildStep) -> None: ...


class SilentObserver:
    """Says nothing."""

    def note(self, text: str) -> None:
        return

    def started(self, step: BuildStep) -> None:
        return

    def advanced(self, step: BuildStep, done_bytes: int) -> None:
        return

    def done(self, step: BuildStep) -> None:
        return


class Phase:
    """Steps of one phase: counts them, times them, and estimates the rest from the effort of the steps done so far.

    `sizes` in bytes; `effort` in any unit, where bytes do not tell how long a step takes."""

    def __init__(
        self, observer: BuildObserver, name: str, sizes: dict[str, int], effort: dict[str, float] | None = None
    ) -> None:
        self.observer, self.name, self.sizes = observer, name, sizes
        self._effort = effort or {step: float(max(size, 1)) for step, size in sizes.items()}
        self._order = {step: i + 1 for i, step in enumerate(sizes)}
        self._left = set(sizes)
        self._worked, self._worked_s, self._start = 0.0, 0.0, 0.0

    def skip(self, name: str) -> None:
        """This step was done by an earlier call."""
        self._left.discard(name)

    def start(self, name: str) -> BuildStep:
        step = BuildStep(self.name, self._order[name], len(self._order), name, self.sizes[name])
        self._start = time.monotonic()
        self.observer.started(step)
        return step

    def finish(self, step: BuildStep) -> None:
        seconds = time.monotonic() - self._start
        self._left.discard(step.name)
        self._worked_s += seconds
        self._worked += self._effort[step.name]
        left = sum(self._effort[name] for name in self._left)
        self.observer.done(replace(step, seconds=seconds, remaining_s=self._worked_s * left / self._worked))
