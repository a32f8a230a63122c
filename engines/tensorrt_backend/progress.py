"""How far TensorRT is with a plan, and how to stop it.

TensorRT reports nested phases with numbered steps, from threads of its own. They become one fraction that only grows.
The build call blocks inside the library, where Python does not see Ctrl-C; so it runs in a worker thread while the main
thread waits, and an interruption is passed on through the monitor, whose next answer ends the build.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, SupportsInt, TypeVar

if TYPE_CHECKING:
    import tensorrt as trt

Result = TypeVar("Result")


class BuildProgress:
    """The phases that are open. `advanced(fraction)` is called, from any thread, whenever the fraction has grown."""

    def __init__(self, advanced: Callable[[float], None]) -> None:
        self._advanced = advanced
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str | None, int, int]] = {}  # phase → parent, steps, steps done
        self._fraction = 0.0
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Let the next step end the build."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            known = parent if parent in self._open and phase not in self._open else None  # so that no cycle can arise
            self._open[phase] = (known, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> bool:
        """A step is complete; False when the build is to end."""
        with self._lock:
            if phase in self._open:
                parent, steps, _ = self._open[phase]
                self._open[phase] = (parent, steps, min(step + 1, steps))
            fraction = max((self._part(name) for name, (up, _, _) in self._open.items() if up is None), default=0.0)
            grown = fraction > self._fraction
            self._fraction = max(fraction, self._fraction)
        if grown:
            self._advanced(fraction)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        with self._lock:
            self._open.pop(phase, None)

    def _part(self, phase: str) -> float:
        """The fraction of a phase that is done, that of its open children included."""
        _, steps, done = self._open[phase]
        inner = max((self._part(name) for name, (parent, _, _) in self._open.items() if parent == phase), default=0.0)
        return min((done + inner) / steps, 1.0)


def progress_monitor(progress: BuildProgress) -> "trt.IProgressMonitor":
    """TensorRT's monitor for `progress`; to be kept until the build has returned."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
            progress.start(phase_name, parent_phase, int(num_steps))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            return progress.step(phase_name, int(step))

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def interruptible(work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
    """`work()` in a thread. On Ctrl-C `cancel()` is called, the thread is awaited, and KeyboardInterrupt goes on."""
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt-build") as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            cancel()
            raise
