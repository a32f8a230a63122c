"""Progress events of a run, and the duration of each phase.

The pipeline enters phases and counts segments and steps on a `RunProgress`, which sends each event to a callback as a
`Progress` record. The durations of a phase that is entered several times are added. A phase ends when the GPU has
finished the work queued in it, unless work of the next phase is already queued (decoding). A cancelled run raises
`Cancelled` at its next event.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scail2_rt.kernels.errors import Scail2Error


class Cancelled(Scail2Error):
    """Raised in a run whose `cancel` event is set."""

    exit_code = 130


WORK_PHASES = ("masks", "mask check", "mask preview")


@dataclass(frozen=True, slots=True)
class Progress:
    """One event of a run.

    phase                text, clip, reference, context, read, driving, denoise, decode or finish; one of `WORK_PHASES`
                         outside a run
    segment, segments    number of the current segment from 1 (0 before the first), and the number of segments
    step, steps          finished denoising steps of this segment, and the number of its steps
    fraction             finished share of the run's work, 0 to 1
    seconds_left         estimate; None before the first step is finished"""

    phase: str
    segment: int = 0
    segments: int = 0
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    seconds_left: float | None = None

    @property
    def position(self) -> str:
        """`segment 2/3, step 5/40`; empty before the first segment."""
        return f"segment {self.segment}/{self.segments}, step {self.step}/{self.steps}" if self.segment else ""

    def __str__(self) -> str:
        left = "" if self.seconds_left is None or self.fraction == 1 else f", about {self.seconds_left:.0f} s left"
        return f"{100 * self.fraction:3.0f} %  {', '.join(part for part in (self.position, self.phase) if part)}{left}"


Listener = Callable[[Progress], object]
Tell = Callable[[float], object]  # called with the finished share of some work, 0 to 1


def untold(_share: float) -> None:
    """A `Tell` that does nothing."""


def within(tell: Tell, begin: float, end: float) -> Tell:
    """A `Tell` for one part of some work: maps its share 0 … 1 to begin … end of the whole."""
    return lambda share: tell(begin + min(share, 1.0) * (end - begin))


class Work:
    """A `Tell` that reports work without segments (checking and writing masks) to a listener, after `SILENT_S` seconds.

    phase: one of `WORK_PHASES`, which the commands show on separate lines."""

    SILENT_S = 2.0

    def __init__(self, phase: str, listener: Listener | None) -> None:
        self._phase, self._listener, self._began = phase, listener, time.perf_counter()

    def __call__(self, share: float) -> None:
        seconds = time.perf_counter() - self._began
        if self._listener is not None and seconds >= self.SILENT_S and 0 < share < 1:
            self._listener(Progress(self._phase, fraction=share, seconds_left=seconds / share * (1 - share)))


class RunProgress:
    """Measures phases, counts steps, informs a listener, and stops a cancelled run.

    timings: seconds by phase. `cancel`: once it is set, the next event raises `Cancelled`."""

    def __init__(self, listener: Listener | None = None, cancel: threading.Event | None = None) -> None:
        self.timings: dict[str, float] = {}
        self._listener, self._cancel = listener, cancel
        self._phase, self._segment, self._segments, self._step, self._steps = "", 0, 0, 0, 0
        self._rest, self._before, self._started = 1.0, 0.0, time.perf_counter()

    @contextmanager
    def phase(self, name: str, wait: bool = True) -> Iterator[None]:
        """Measure the body of a `with` statement as phase `name`; with `wait`, until the GPU has finished its work.
        Raises Scail2Error, with advice, if the body runs out of memory."""
        start = time.perf_counter()
        self._phase = name
        self._tell()
        try:
            yield
            if wait:
                _wait_for_gpu()
        except Exception as error:
            if (advice := _memory_error(error, name)) is None:
                raise
            raise advice from error
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def begin(self, segments: int, steps: int, before: int = 0, rest: float = 1.0) -> None:
        """Set the number of segments, of denoising steps per segment, and of segments `before` that an interrupted run
        has finished. rest: time of a segment outside denoising, in steps (`Estimate.rest`)."""
        self._segments, self._steps, self._rest = segments, steps, rest
        self._before = before * (steps + rest)
        self._started = time.perf_counter()

    def segment(self, index: int) -> None:
        """Report that segment `index`, from 0, starts."""
        self._segment, self._step = index + 1, 0
        self._tell()

    def step(self, index: int) -> None:
        """Report that step `index`, from 0, of the current segment is finished."""
        self._step = index + 1
        self._tell()

    @property
    def now(self) -> Progress:
        """The current state of the run."""
        return self._event(finished=False)

    def end(self) -> None:
        """Report that the run is finished."""
        self._tell(finished=True)

    def _tell(self, finished: bool = False) -> None:
        if self._cancel is not None and self._cancel.is_set() and not finished:
            raise Cancelled("The run was cancelled.")
        if self._listener is not None:
            self._listener(self._event(finished))

    def _event(self, finished: bool) -> Progress:
        segment = self._steps + self._rest
        total = self._segments * segment
        done = total if finished else max(self._segment - 1, 0) * segment + self._step
        left = None
        if done > self._before:
            left = (time.perf_counter() - self._started) / (done - self._before) * (total - done)
        return Progress(
            self._phase, self._segment, self._segments, self._step, self._steps, done / total if total else 0.0, left
        )


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


_LESS_MEMORY = {  # by phase: options that make its largest buffers smaller
    "denoise": "a smaller --size, --segment-length or --max-rows",
    "read": "a smaller --segment-length or --size",
    "reference": "a smaller --size",
    "decode": "a smaller --size",
}
_OTHERWISE = "a smaller --size, --segment-length or --max-rows"
# The requested size in messages of PyTorch on a GPU, PyTorch on a CPU, NumPy and ONNX Runtime.
_REQUESTED = re.compile(
    r"Tried to allocate ([\d.]+ \w+)|tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)|"
    r"buffer of size (\d+)"
)


def _memory_error(error: Exception, phase: str) -> Scail2Error | None:
    """For an out-of-memory error, one that names the phase, the requested size and the remedy; None for other
    errors."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    requested = _REQUESTED.search(str(error))
    refused = requested is not None and "allocat" in str(error)
    if isinstance(error, Scail2Error) or not (on_gpu or isinstance(error, MemoryError) or refused):
        return None
    what = ""
    if requested is not None:
        size = next(group for group in requested.groups() if group)
        what = f", which requested another {f'{int(size) / 2**30:.2f} GiB' if size.isdecimal() else size}"
    remedy = _LESS_MEMORY.get(phase, _OTHERWISE)
    if on_gpu:
        remedy = f"--vram-limit with less than the free memory, or {remedy}"
    memory = "GPU" if on_gpu else "Host"
    return Scail2Error(f"{memory} memory ran out in the phase {phase}{what}: use {remedy}.")
