"""Progress of commands on stderr: a bar on a terminal, plain lines in a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from scail2_rt.runtime.core.progress import WORK_PHASES, Listener, Progress

if TYPE_CHECKING:
    from scail2_rt.engines.observer import BuildStep

FIRST_LINE_S, LINE_INTERVAL_S = 2.0, 10.0
QUIET = ("seal", "check")  # phases that only read files: most of their steps are too short for a line


class ProgressLines:
    """Plain lines on stderr, for logs: one per segment, and every `LINE_INTERVAL_S` seconds the current step, or the
    finished share of work on masks."""

    def __init__(self) -> None:
        self._printed = 0.0
        self._last: tuple[int, int] = (0, 0)

    def __call__(self, event: Progress) -> None:
        if event.phase in WORK_PHASES:
            self._share(event)
            return
        now, here = time.perf_counter(), (event.segment, event.step)
        new_segment = event.segment > self._last[0]
        last_step = event.step == event.steps and event.segment == event.segments
        due = now - self._printed >= LINE_INTERVAL_S or last_step
        if not event.segment or here == self._last or not (new_segment or due):
            return
        self._printed, self._last = now, here
        left = "" if event.seconds_left is None else f", about {event.seconds_left:.0f} s left"
        print(f"{event.position}{left}", file=sys.stderr, flush=True)

    def _share(self, event: Progress) -> None:
        now = time.perf_counter()
        if now - self._printed >= LINE_INTERVAL_S or event.fraction == 1:
            self._printed = now
            print(event, file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Listener]:
    """Show a bar on the terminal (stderr): segment, step, phase, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("left {task.fields[left]}"))
    with Bar(*columns, *times, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, left="-:--:--")

        def show(event: Progress) -> None:
            text = ", ".join(part for part in (event.position, event.phase) if part)
            left = "-:--:--" if event.seconds_left is None else _clock(event.seconds_left)
            total = 1.0 if event.segments or event.fraction else None
            bar.update(task, description=text, completed=event.fraction, total=total, left=left)

        yield show


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def open_progress() -> Iterator[Listener]:
    """Show the bar if stderr is a terminal that can draw one, else plain lines."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with progress_bar() as show:
            yield show
    else:
        yield ProgressLines()


@contextmanager
def patient_progress() -> Iterator[Listener]:
    """Like `open_progress`, but nothing is shown before the first event. For commands that are usually fast."""
    with ExitStack() as opened:
        shown: list[Listener] = []

        def show(event: Progress) -> None:
            if not shown:
                shown.append(opened.enter_context(open_progress()))
            shown[0](event)

        yield show


class BuildLines:
    """Progress of `build-engines` and similar commands on stderr: a line per finished step, with its size, its time and
    the time left. During long steps and during `QUIET` phases there is a line with the progress after `FIRST_LINE_S`
    seconds, then every `LINE_INTERVAL_S` seconds."""

    def __init__(self) -> None:
        self.phase = ""
        self.due = 0.0  # time of the next progress line
        self.base: tuple[float, int] | None = None  # (time, bytes) of the first event of the current step

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def started(self, step: "BuildStep") -> None:
        self.base = None
        if step.phase != self.phase or step.index == 1 or step.phase not in QUIET:
            self.phase, self.due = step.phase, time.monotonic() + FIRST_LINE_S

    def advanced(self, step: "BuildStep", done_bytes: int) -> None:
        now = time.monotonic()
        since, before = self.base = self.base or (now, done_bytes)
        if now < self.due:
            return
        self.due = now + LINE_INTERVAL_S
        left = ""
        if done_bytes > before:
            seconds = (now - since) / (done_bytes - before) * (step.size_bytes - done_bytes)
            left = f", about {seconds:.0f} s left"
        done, size = done_bytes / 2**30, step.size_bytes / 2**30
        print(f"{step.phase} {step.name}: {done:.1f} of {size:.1f} GiB{left}", file=sys.stderr, flush=True)

    def done(self, step: "BuildStep") -> None:
        now = time.monotonic()
        if step.phase in QUIET and now < self.due:
            return
        self.due = now + LINE_INTERVAL_S
        left = "" if step.remaining_s is None or step.remaining_s < 1 else f", about {step.remaining_s:.0f} s left"
        size = f"{step.size_bytes / 2**20:.1f} MiB, {step.seconds:.1f} s"
        print(f"{step.phase} {step.index}/{step.total} {step.name}: {size}{left}", file=sys.stderr, flush=True)
