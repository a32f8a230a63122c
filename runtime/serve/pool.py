"""Manages the worker processes from the server: starts them, assigns jobs, handles their deaths.

If a worker is killed from outside (SIGKILL, SIGTERM), its job is queued again and resumes after its last finished
segment. If a worker crashes, or the kernel kills it because memory ran out, its job fails; other jobs continue. A dead
worker is replaced, at growing intervals while replacements die too.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve.errors import DiskFull
from scail2_rt.runtime.serve.settings import Settings
from scail2_rt.runtime.serve.store import KILLS, JobRow, Store

LINE_BYTES = 4 << 20
LONGEST_PAUSE_S = 30.0
STOP_S = 5.0
OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
FULL_DISK_S = 1.0  # pause before a write to a full disk is repeated

Written = TypeVar("Written")
Hear = Callable[[JobRow, Mapping[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class Worker:
    """One worker process.

    about        its `ready` message: backend choice, licence note, memory
    memory       peak memory in GiB, by kind
    job          the job it runs; segments: finished segments of that job; phase: its current phase
    oom_before   `oom_kills()` when the job started
    pause_s      seconds before the next restart
    """

    number: int
    process: asyncio.subprocess.Process | None = None
    ready: bool = False
    taking: bool = False  # `dispatch` is taking a job for it from the store
    about: Mapping[str, Any] | None = None
    memory: Mapping[str, float] | None = None
    job: JobRow | None = None
    segments: int = 0
    phase: str = ""
    oom_before: int = 0
    pause_s: float = 0.5


class Pool:
    """All workers of a service. hear: called with every message of a worker about its job, and when a worker dies."""

    def __init__(self, settings: Settings, store: Store, hear: Hear) -> None:
        self._settings, self._store, self._hear = settings, store, hear
        self.workers = [Worker(number) for number in range(settings.workers)]
        self.deaths = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._opened: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start all workers; return when one has opened its engines. Raises InputError if it cannot open them."""
        self._opened = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self.workers]
        await self._opened

    async def close(self) -> None:
        """Stop all workers. The next server queues their jobs again and resumes them."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            if worker.process is not None:
                await _end(worker.process)

    @property
    def ready(self) -> bool:
        """Whether a worker has opened its engines."""
        return any(worker.ready for worker in self.workers)

    @property
    def busy(self) -> int:
        """The number of running jobs."""
        return sum(worker.job is not None for worker in self.workers)

    def running(self, job_id: str) -> Worker | None:
        """The worker that runs a job; None if there is none."""
        return next((worker for worker in self.workers if worker.job is not None and worker.job.id == job_id), None)

    async def dispatch(self) -> None:
        """Give queued jobs to idle workers."""
        for worker in self.workers:
            if worker.ready and worker.job is None and not worker.taking:
                worker.taking = True
                try:
                    row = await asyncio.to_thread(self._store.take)
                except DiskFull:  # the service's sweep calls this again
                    return
                finally:
                    worker.taking = False
                if row is None:
                    return
                if not worker.ready:  # the worker has died since
                    await self.noted(self._store.give_back, row.id, row.attempt, False, 0)
                    continue
                worker.job = row
                worker.segments, worker.phase, worker.oom_before = 0, "start", oom_kills()
                await self._send(worker, run=self._order(row))

    async def noted(self, write: Callable[..., Written], *arguments: Any) -> Written:
        """Run a write of the store in a thread and return its result. On a full disk, repeat it until it succeeds, so
        that a worker's result is not lost."""
        while True:
            try:
                return await asyncio.to_thread(write, *arguments)
            except DiskFull:
                await asyncio.sleep(FULL_DISK_S)

    def _order(self, row: JobRow) -> dict[str, Any]:
        folder, asked = str(self._store.folder(row.id)), row.request
        given = {name: asked[name] for name in ("options", "extra_refs", "masking")}
        return {"id": row.id, "attempt": row.attempt, "folder": folder, **given}

    async def cancel(self, job_id: str) -> bool:
        """Cancel a running job, within one denoising step. False if no worker has it."""
        worker = self.running(job_id)
        if worker is not None:
            await self._send(worker, cancel=job_id)
        return worker is not None

    async def _send(self, worker: Worker, **message: Any) -> None:
        process = worker.process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(ConnectionError, RuntimeError):  # the worker has died; `_keep` handles that
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()

    async def _keep(self, worker: Worker) -> None:
        """Run the worker and restart it whenever it dies."""
        while not self._closing:
            began = time.monotonic()
            try:
                code = await self._live(worker)
                worker.ready = False
                self.deaths += 1
                await self._lost(worker, code)
            except Exception:  # keep restarting: a fault here must not leave the service without a worker
                worker.ready = False
                traceback.print_exc()
            worker.pause_s = 0.1 if time.monotonic() - began > 60 else min(worker.pause_s * 2, LONGEST_PAUSE_S)
            await asyncio.sleep(worker.pause_s)

    async def _live(self, worker: Worker) -> int:
        """Start one process of the worker, read its messages and return its exit code."""
        worker.process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scail2_rt.runtime.serve.worker", self._arguments(worker)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment(worker),
            limit=LINE_BYTES,
        )
        assert process.stdout is not None
        while line := await process.stdout.readline():
            try:
                await self._heard(worker, json.loads(line))
            except Exception:  # keep reading: a fault here must not stop the worker's messages
                traceback.print_exc()
        return await process.wait()

    def _arguments(self, worker: Worker) -> str:
        names = ("backend", "max_rows", "attention", "vram_limit", "no_graphs", "warm", "gpus_per_video")
        given = {name: getattr(self._settings, name) for name in names}
        return json.dumps({"engines": str(self._settings.engines), **given})

    def _environment(self, worker: Worker) -> dict[str, str] | None:
        """The environment of a worker: CUDA_VISIBLE_DEVICES names its group of GPUs. None (unchanged) on the CPU."""
        if not self._settings.on_gpu:
            return None
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        each = self._settings.gpus_per_video
        own = range(worker.number * each, (worker.number + 1) * each)
        chosen = [visible[i] if visible else str(i) for i in own]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(chosen)}

    async def _heard(self, worker: Worker, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, worker.about, worker.pause_s = True, message["ready"], 0.1
            worker.memory = message["ready"]["memory"]
            if self._opened is not None and not self._opened.done():
                self._opened.set_result(None)
            await self.dispatch()
        elif "idle" in message:
            worker.memory = message["idle"]["memory"]
        elif "unusable" in message:
            if self._opened is not None and not self._opened.done():
                self._opened.set_exception(InputError(message["unusable"]))
            else:
                print(f"error: worker {worker.number}: {message['unusable']} It is restarted.", file=sys.stderr)
        elif worker.job is not None:
            row = worker.job
            if "event" in message:
                worker.phase = message["event"]["phase"]
                worker.segments = max(worker.segments, message["event"]["finished"])
            if ended := not message.keys().isdisjoint({"done", "failed", "cancelled"}):
                worker.job = None
            await self._hear(row, message)
            if ended:
                await self.dispatch()

    async def _lost(self, worker: Worker, code: int) -> None:
        """Queue the job of a dead worker again, or fail it, depending on the worker's exit code."""
        row, worker.job = worker.job, None
        if row is None:
            return
        out_of_memory = oom_kills() > worker.oom_before
        if code in OUTSIDE and not out_of_memory:
            given = await self.noted(self._store.give_back, row.id, row.attempt, True, worker.segments)
            if given is not None and given.kills >= KILLS:
                taken = await self.noted(self._store.take_one, row.id)
                row = taken or row
            else:
                await self._hear(row, {"returned": True})
                return
        await self._hear(row, {"failed": {"message": _death(code, worker.phase, out_of_memory), "kind": "crash"}})


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close a worker's stdin, which makes it exit; kill it if it still runs after `STOP_S` seconds."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def oom_kills() -> int:
    """The number of processes that the kernel's out-of-memory killer has ended since boot; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _death(code: int, phase: str, out_of_memory: bool) -> str:
    if out_of_memory:
        less = "a smaller --size, --segment-length or --max-rows"
        return f"The host memory ran out in the phase {phase}. Use {less}."
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return f"The worker process ended with {how} in the phase {phase}. Send the job again; a new worker has started."
