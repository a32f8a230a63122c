"""What a run tells whoever waits for it, and how long each phase took.

The pipeline enters phases and counts segments and steps on a `RunProgress`; each event goes to a callback as a
`Progress` record. Phases that are entered again add up. A phase ends when the GPU has finished what was queued in it,
except where work of the next is queued already (decoding). At every event a cancelled run ends with `Cancelled`.
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
    """The run was told to end by its `cancel` event."""

    exit_code = 130


WORK_PHASES = ("masks", "mask check", "mask preview")


@dataclass(frozen=True, slots=True)
class Progress:
    """One event of a run.

    phase                text, clip, reference, context, read, driving, denoise, decode or finish; one of `WORK_PHASES`
                         outside the run
    segment, segments    number of the current segment from 1 (0 before the first), and how many there are
    step, steps          denoising steps of this segment that are done, and how many it has
    fraction             of the whole run's work that is done, 0 to 1
    seconds_left         estimate; None before the first step is done"""

    phase: str
    segment: int = 0
    segments: int = 0
    step: int = 0
    steps: int = 0
    fraction: float = 0.0
    seconds_left: float | None = None

    @property
    def position(self) -> str:
        """`segment 2/3, step 5/40`; empty before the segments begin."""
        return f"segment {self.segment}/{self.segments}, step {self.step}/{self.steps}" if self.segment else ""

    def __str__(self) -> str:
        left = "" if self.seconds_left is None or self.fraction == 1 else f", about {self.seconds_left:.0f} s left"
        return f"{100 * self.fraction:3.0f} %  {', '.join(part for part in (self.position, self.phase) if part)}{left}"


Listener = Callable[[Progress], object]
Tell = Callable[[float], object]  # called with the share of some work that is done, 0 to 1


def untold(_share: float) -> None:
    """The `Tell` of work that nobody follows."""


def within(tell: Tell, begin: float, end: float) -> Tell:
    """The `Tell` of the part of some work between two shares of it."""
    return lambda share: tell(begin + min(share, 1.0) * (end - begin))


class Work:
    """A `Tell` that tells a listener of work without segments (checking and writing masks), after `SILENT_S` seconds.

    phase: one of `WORK_PHASES`, which the commands show in lines of their own."""

    SILENT_S = 2.0

    def __init__(self, phase: str, listener: Listener | None) -> None:
        self._phase, self._listener, self._began = phase, listener, time.perf_counter()

    def __call__(self, share: float) -> None:
        seconds = time.perf_counter() - self._began
        if self._listener is not None and seconds >= self.SILENT_S and 0 < share < 1:
            self._listener(Progress(self._phase, fraction=share, seconds_left=seconds / share * (1 - share)))


class RunProgress:
    """Times phases, counts steps, tells a listener, and ends a cancelled run.

    timings: seconds by phase. `cancel`: once it is set, the next event raises `Cancelled`."""

    def __init__(self, listener: Listener | None = None, cancel: threading.Event | None = None) -> None:
        self.timings: dict[str, float] = {}
        self._listener, self._cancel = listener, cancel
        self._phase, self._segment, self._segments, self._step, self._steps = "", 0, 0, 0, 0
        self._rest, self._before, self._started = 1.0, 0.0, time.perf_counter()

    @contextmanager
    def phase(self, name: str, wait: bool = True) -> Iterator[None]:
        """Time what runs inside as `name`; with `wait` until the GPU has finished it."""
        start = time.perf_counter()
        self._phase = name
        self._tell()
        try:
            yield
            if wait:
                _wait_for_gpu()
        except Exception as error:
            told = _told(error, name)
            if told is error:
                raise
            raise told from error
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def begin(self, segments: int, steps: int, before: int = 0, rest: float = 1.0) -> None:
        """The run has this many segments of this many denoising steps; `before` of them were done in an earlier one.
        rest: how many steps take as long as what a segment costs besides (reading, encoding, decoding)."""
        self._segments, self._steps, self._rest = segments, steps, rest
        self._before = before * (steps + rest)
        self._started = time.perf_counter()

    def segment(self, index: int) -> None:
        """Segment `index`, from 0, starts."""
        self._segment, self._step = index + 1, 0
        self._tell()

    def step(self, index: int) -> None:
        """Step `index`, from 0, of the current segment is done."""
        self._step = index + 1
        self._tell()

    @property
    def now(self) -> Progress:
        """Where the run is."""
        return self._event(finished=False)

    def end(self) -> None:
        """Everything is done."""
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


_LESS_MEMORY = {  # by phase: what makes its largest buffers smaller
    "denoise": "a smaller --size, --segment-length or --max-rows",
    "read": "a smaller --segment-length or --size",
    "reference": "a smaller --size",
    "decode": "a smaller --size",
}
_OTHERWISE = "a smaller --size, --segment-length or --max-rows"
# How PyTorch on a GPU, PyTorch on a CPU, NumPy and ONNX Runtime say what they asked for.
_ASKED = re.compile(
    r"Tried to allocate ([\d.]+ \w+)|tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)|"
    r"buffer of size (\d+)"
)


def _told(error: Exception, phase: str) -> Exception:
    """An error of memory as a sentence that says where, how much was asked for and what to do; any other as it is."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    asked = _ASKED.search(str(error))
    refused = asked is not None and re.search("allocat", str(error)) is not None
    if isinstance(error, Scail2Error) or not (on_gpu or isinstance(error, MemoryError) or refused):
        return error
    what = ""
    if asked is not None:
        size = next(group for group in asked.groups() if group)
        what = f", which asked for another {f'{int(size) / 2**30:.2f} GiB' if size.isdecimal() else size}"
    remedy = _LESS_MEMORY.get(phase, _OTHERWISE)
    if on_gpu:
        remedy = f"--vram-limit with a size below what is free, or {remedy}"
    return Scail2Error(
        f"{'the GPU' if on_gpu else 'the computer'}'s memory ran out in the phase {phase}{what}: give {remedy}."
    )
