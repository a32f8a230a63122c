"""What a run tells the person who waits for it, and how long each phase took.

The pipeline knows only the `Progress` protocol: phases that are timed, and a count of segments and steps. A terminal
gets a bar with the time left; a log file gets a line now and then. Everything goes to stderr: stdout belongs to
results. Phases that are entered again add up. A phase ends when the GPU has finished what
was queued in it, except where work of the next is queued already (decoding).
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    from scail2_rt.engines.observer import BuildStep

LINE_INTERVAL_S = 10.0


class Progress(Protocol):
    """timings: seconds by phase name (text, clip, reference, context, read, driving, denoise, decode,
    finish)."""

    timings: dict[str, float]

    def phase(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        """Time what runs inside as `name`; with `wait` until the GPU has finished it."""

    def begin(self, segments: int, steps: int, before: int = 0) -> None:
        """The run has this many segments of this many denoising steps; `before` of them were done in an earlier one."""

    def segment(self, index: int) -> None:
        """Segment `index`, from 0, starts."""

    def step(self, index: int) -> None:
        """Step `index`, from 0, of the current segment is done."""


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


class SilentProgress:
    """Times phases and counts steps without showing anything; the other two derive from it."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        self.segments, self.steps, self.current, self.done = 0, 0, 0, 0
        self.before = 0  # steps that an earlier run has done
        self.started = time.perf_counter()

    @contextmanager
    def phase(self, name: str, wait: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        self._show(name)
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

    def begin(self, segments: int, steps: int, before: int = 0) -> None:
        self.segments, self.steps, self.done, self.before = segments, steps, before * steps, before * steps
        self.started = time.perf_counter()

    def segment(self, index: int) -> None:
        self.current, self.done = index, index * self.steps
        self._show("segment")

    def step(self, index: int) -> None:
        self.done = self.current * self.steps + index + 1
        self._show("step")

    def position(self) -> str:
        """`segment 2/3, step 5/40`; empty before the segments begin."""
        if not self.segments:
            return ""
        step = self.done - self.current * self.steps
        return f"segment {self.current + 1}/{self.segments}, step {step}/{self.steps}"

    def _show(self, event: str) -> None:
        """Called at every event: a phase's name, `segment` or `step`."""


class LineProgress(SilentProgress):
    """Plain lines on stderr for logs: each segment's start, and a step every `LINE_INTERVAL_S` seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.printed = 0.0

    def _show(self, event: str) -> None:
        now = time.perf_counter()
        if not self.segments or event not in ("segment", "step"):
            return
        if event == "step" and now - self.printed < LINE_INTERVAL_S and self.done < self.segments * self.steps:
            return
        self.printed = now
        left = ""
        if self.done > self.before:
            seconds = (now - self.started) / (self.done - self.before) * (self.segments * self.steps - self.done)
            left = f", about {seconds:.0f} s left"
        print(f"{self.position()}{left}", file=sys.stderr, flush=True)


class BarProgress(SilentProgress):
    """A bar on the terminal (stderr): segment, step, phase, time left. Use as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = RichProgress(*columns, *times, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("starting", total=None)

    def begin(self, segments: int, steps: int, before: int = 0) -> None:
        super().begin(segments, steps, before)
        self.bar.reset(self.task, total=segments * steps, completed=before * steps)

    def _show(self, event: str) -> None:
        label = "" if event in ("segment", "step") else event
        text = ", ".join(part for part in (self.position(), label) if part)
        self.bar.update(self.task, description=text, completed=self.done)

    def __enter__(self) -> "BarProgress":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()


@contextmanager
def open_progress() -> Iterator[Progress]:
    """The bar when stderr is a terminal, else plain lines."""
    if sys.stderr.isatty():
        with BarProgress() as bar:
            yield bar
    else:
        yield LineProgress()


class BuildLines:
    """What `build-engines` and the like show on stderr: a line for each finished step, with its size, its time and what
    is left; for a long one (a large file) also how far it is, every `LINE_INTERVAL_S` seconds."""

    def __init__(self) -> None:
        self.printed = 0.0
        self.base: tuple[float, int] | None = None  # when the current step was heard of first, and how far it was

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def started(self, step: "BuildStep") -> None:
        self.printed, self.base = time.monotonic(), None

    def advanced(self, step: "BuildStep", done_bytes: int) -> None:
        now = time.monotonic()
        since, before = self.base = self.base or (now, done_bytes)
        if now - self.printed < LINE_INTERVAL_S:
            return
        self.printed = now
        left = ""
        if done_bytes > before:
            seconds = (now - since) / (done_bytes - before) * (step.size_bytes - done_bytes)
            left = f", about {seconds:.0f} s left"
        done, size = done_bytes / 2**30, step.size_bytes / 2**30
        print(f"{step.phase} {step.name}: {done:.1f} of {size:.1f} GiB{left}", file=sys.stderr, flush=True)

    def done(self, step: "BuildStep") -> None:
        if step.phase == "seal":
            return  # hashing what was written: quick, and nothing to learn from
        left = "" if step.remaining_s is None or step.remaining_s < 1 else f", about {step.remaining_s:.0f} s left"
        size = f"{step.size_bytes / 2**20:.1f} MiB, {step.seconds:.1f} s"
        print(f"{step.phase} {step.index}/{step.total} {step.name}: {size}{left}", file=sys.stderr, flush=True)
