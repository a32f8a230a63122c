"""Compiling processes: several in parallel if memory allows; all end when the caller ends.

With a separate process per plan, a crash of the compiler costs one plan, its memory is freed, and it can be killed at
any time: a plan file appears complete or not at all. Ctrl-C reaches the parent only, which then kills the processes. A
library that measures kernels on the GPU compiles one plan at a time, because parallel builds would disturb the
measurements.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from scail2_rt.engines.tensorrt_backend.compiling import Outcome, PlanJob, refusal
from scail2_rt.engines.tensorrt_backend.library import LIBRARIES

POLL_S = 0.01
LAST_LINES = 3  # lines of a crashed process's log in the error message


class Child:
    """One process that compiles one plan."""

    def __init__(self, job: PlanJob, environment: Mapping[str, str]) -> None:
        self.job = job
        self._started = time.monotonic()
        log = Path(job.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._answer = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (a pipe holds only 64 KiB)
        with log.open("w") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scail2_rt.engines.tensorrt_backend.compiling"],
                stdin=subprocess.PIPE,
                stdout=self._answer,
                stderr=messages,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,  # so that only the parent receives a terminal's Ctrl-C
            )
        assert self._process.stdin is not None  # stays open: its end tells the child that the parent has ended
        with contextlib.suppress(BrokenPipeError):  # the child has died: its outcome will report it
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()

    def outcome(self) -> Outcome | None:
        """Return the job's result; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._answer.seek(0)
        answer = self._answer.read()
        self._close()
        seconds = time.monotonic() - self._started
        try:
            return replace(Outcome(**json.loads(answer)), seconds=seconds)
        except (ValueError, TypeError):
            return Outcome(seconds, 0, self._crash(code))

    def kill(self) -> None:
        """Kill the process, wait for its end, and delete its partial plan."""
        self._process.kill()
        self._process.wait()
        self._close()
        self._drop_partial()

    def _drop_partial(self) -> None:
        plan = Path(self.job.plan)
        plan.with_name(f"{plan.name}.partial").unlink(missing_ok=True)

    def _close(self) -> None:
        self._answer.close()
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def _crash(self, code: int) -> str:
        self._drop_partial()
        ended = f"with code {code}"
        if code < 0:
            known = {number.value: number.name for number in signal.Signals}
            ended = f"by the signal {known.get(-code, -code)}"
            if -code == signal.SIGKILL:
                ended += ", which happens when memory runs out"
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = [line for line in Path(self.job.log).read_text(errors="replace").splitlines() if line.strip()]
        title = LIBRARIES[self.job.library].title
        return str(refusal(self.job, f"the compiler of {title} was ended {ended}", lines[-LAST_LINES:]))


def compile_all(
    jobs: Iterator[tuple[PlanJob, int]],
    memory: int,
    at_once: int,
    environment: Mapping[str, str],
    finished: Callable[[PlanJob, Outcome], None],
) -> None:
    """Run all jobs (each with its estimated bytes of host memory), at most `at_once` in parallel and within `memory`.

    A single job always starts. `finished` is called for each, in this thread. Any exception kills all processes."""
    running: list[tuple[Child, int]] = []
    upcoming = next(jobs, None)
    try:
        while upcoming is not None or running:
            while upcoming is not None and _fits(running, upcoming[1], memory, at_once):
                running.append((Child(upcoming[0], environment), upcoming[1]))
                upcoming = next(jobs, None)
            for entry in list(running):
                outcome = entry[0].outcome()
                if outcome is not None:
                    running.remove(entry)
                    finished(entry[0].job, outcome)
            if running:
                time.sleep(POLL_S)
    finally:
        for child, _ in running:
            child.kill()


def _fits(running: list[tuple[Child, int]], needed: int, memory: int, at_once: int) -> bool:
    if not running:
        return True
    return len(running) < at_once and needed + sum(taken for _, taken in running) <= memory
