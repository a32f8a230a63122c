"""Progress of a build for its caller: one step at a time, with sizes, times and an estimate for the phase."""

import time
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BuildStep:
    """One step. phase: "hash" (source files), "weights" (the store, stage by stage), a backend's name (its artefacts),
    "seal" (hashes of the results). index counts from 1 to total within the phase; seconds is 0 when the step starts;
    remaining_s is the estimate for the rest of the phase, None if unknown."""

    phase: str
    index: int
    total: int
    name: str
    size_bytes: int
    seconds: float = 0.0
    remaining_s: float | None = None


class BuildObserver(Protocol):
    """Receives the progress of a build."""

    def note(self, text: str) -> None:
        """Report a sentence about the build: a choice and its reason, or resumed work."""

    def started(self, step: BuildStep) -> None: ...

    def advanced(self, step: BuildStep, done_bytes: int) -> None:
        """Report that a long step (hashing a file) has processed `done_bytes` of its bytes."""

    def done(self, step: BuildStep) -> None: ...


class SilentObserver:
    """An observer that ignores everything."""

    def note(self, text: str) -> None:
        return

    def started(self, step: BuildStep) -> None:
        return

    def advanced(self, step: BuildStep, done_bytes: int) -> None:
        return

    def done(self, step: BuildStep) -> None:
        return


class Phase:
    """Steps of one phase: counts and times them, and estimates the rest from the effort of the steps done so far.

    `sizes` in bytes; `effort` in any unit, for steps whose duration is not proportional to bytes."""

    def __init__(
        self, observer: BuildObserver, name: str, sizes: dict[str, int], effort: dict[str, float] | None = None
    ) -> None:
        self.observer, self.name, self.sizes = observer, name, sizes
        self._effort = effort or {step: float(max(size, 1)) for step, size in sizes.items()}
        self._order = {step: i + 1 for i, step in enumerate(sizes)}
        self._left = set(sizes)
        self._worked, self._worked_s, self._start = 0.0, 0.0, 0.0

    def skip(self, name: str) -> None:
        """Mark a step that an earlier call has done."""
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
