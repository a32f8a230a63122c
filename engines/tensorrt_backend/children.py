"""Compiling processes: several at once where memory allows, all gone when the caller is.

A process of its own makes a crash of the compiler one failed plan, frees what it took, and can be killed at any moment:
a plan appears whole or not at all. Ctrl-C reaches the parent alone, which then kills them. A library that measures
kernels on the GPU compiles one plan at a time, or the measurements would disturb one another.
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
LAST_LINES = 3  # of a crashed process's log, in the message


class Child:
    """One process at work on one plan."""

    def __init__(self, job: PlanJob, environment: Mapping[str, str]) -> None:
        self.job = job
        self._started = time.monotonic()
        log = Path(job.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._answer = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (a pipe is full at 64 KiB)
        with log.open("w") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scail2_rt.engines.tensorrt_backend.compiling"],
                stdin=subprocess.PIPE,
                stdout=self._answer,
                stderr=messages,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,  # a terminal's Ctrl-C is the parent's
            )
        assert self._process.stdin is not None  # it stays open: its end tells the child that we are gone
        with contextlib.suppress(BrokenPipeError):  # dead already: its outcome will say so
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()

    def outcome(self) -> Outcome | None:
        """What came of the job; None while it is at work."""
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
        """End the process and wait until it is gone; half a plan goes too."""
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
                ended += ", as happens when memory runs out"
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
    """Do all jobs (each with the bytes of memory that it may take), at most `at_once` at a time and within `memory`;
    one alone always starts. `finished` hears of each in this thread. An exception of anybody ends all processes."""
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
