"""The actor that owns all jobs: only it writes their records, gives them to replicas and accepts results.

Its index is an SQLite database on its node's disk, which may be lost. The records in the object store are the source of
truth; they are written before a call returns. A new ledger reads them, so the ledger may die at any time: Ray restarts
it, on another node if necessary, and pending calls wait. Each ledger writes a number to the object store; an older
ledger that finds a newer number exits.

Queued jobs are pushed to Ray Serve, which queues them, prefers a replica that has the prompt's encodings, and scales. A
replica claims a job that reaches it. The claim increments the job's `attempt`, and messages of earlier attempts are
ignored. An attempt that sends no message for `SILENT_TICKS` ticks of this process is lost. Ticks do not count while
this process is paused.
"""

import asyncio
import collections
import contextlib
import os
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from scail2_rt.runtime.cluster.joining import NAMESPACE, scratch_folder
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.serve.store import KILLS, FileRow, JobRow, Store

NAME = "ledger"
APPS = "scail2-rt-"  # prefix of the applications that `serve --ray` creates
TICK_S = 1.0
WRITERS = 64  # records written concurrently
SILENT_TICKS = 15
AHEAD = 64  # jobs queued at Ray Serve
NEWS = 4096  # messages kept for front ends that lag behind
NEWS_WAIT_S = 5.0
READS = frozenset(
    {
        *("job", "job_of_key", "place", "places", "list_jobs", "counts", "unfinished", "finished_before"),
        *("file", "list_files", "file_bytes"),
    }
)
WRITES = frozenset({"add_job", "started", "planned", "finish", "give_back", "take_one", "delete_job"})
FILE_WRITES = frozenset({"add_file", "delete_file"})


class Index(Store):
    """A `Store` filled from records. It is not synced, because it need not survive its process."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self._writer.execute("PRAGMA synchronous=OFF")

    def load(self, table: str, documents: Any) -> None:
        """Insert rows. table: jobs or files; documents: dictionaries of column values."""
        row = JobRow if table == "jobs" else FileRow
        names = [field.name for field in fields(row)]
        sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        with self._writing:
            self._writer.execute("BEGIN")
            self._writer.executemany(sql, ([document[name] for name in names] for document in documents))
            self._writer.execute("COMMIT")

    def record(self, table: str, row_id: str) -> dict[str, Any] | None:
        """A row as a dictionary of column values; None if it does not exist."""
        rows = self._read(f"SELECT * FROM {table} WHERE id=?", row_id)
        return dict(rows[0]) if rows else None

    def queued(self, engines: Collection[str], most: int) -> list[JobRow]:
        """At most `most` queued jobs for these engines, oldest first."""
        sql = "SELECT * FROM jobs WHERE state='queued' AND json_extract(request, '$.engines') IN"
        rows = self._read(f"{sql} ({', '.join('?' * len(engines))}) ORDER BY seq LIMIT ?", *engines, most)
        return [JobRow.of(row) for row in rows]

    def running(self) -> list[str]:
        """Ids of the running jobs."""
        return [row["id"] for row in self._read("SELECT id FROM jobs WHERE state='running'")]

    def wanted(self) -> set[str]:
        """The digests of the engines that unfinished jobs need."""
        sql = "SELECT DISTINCT json_extract(request, '$.engines') AS digest FROM jobs"
        return {row["digest"] for row in self._read(f"{sql} WHERE state IN ('queued', 'running')")}


class Ledger:
    """The actor, one per cluster, named `ledger`. data: URL or folder of the object store."""

    def __init__(self, data: str) -> None:
        self.objects = Objects(data)
        self.index = Index(scratch_folder("ledger"))
        self._number = 1 + int(self.objects.get("ledger") or b"0")
        self.objects.put("ledger", str(self._number).encode())
        self.index.load("jobs", self.objects.documents("records"))
        self.index.load("files", self.objects.documents("uploads"))
        self._locks: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        self._pushed: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, int] = dict.fromkeys(self.index.running(), 0)
        self._apps: dict[str, str] = {}
        self._news: collections.deque[tuple[int, str, dict[str, Any]]] = collections.deque(maxlen=NEWS)
        self._count, self._told, self.deaths = 0, asyncio.Condition(), 0
        self._ticking: asyncio.Task[None] | None = None
        for document in self.objects.documents("engines"):
            self._apps[document["digest"]] = document["app"]

    async def begin(self) -> str:
        """Start the periodic work at the first call, and return the URL of the records."""
        if self._ticking is None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WRITERS))
            self._ticking = asyncio.create_task(self._tick_for_ever())
        return self.objects.url

    # calls from front ends and replicas

    async def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the index. Changes are in the object store before this returns. Repeated calls, as after a
        restart of this actor, have no further effect."""
        await self.begin()
        if name in READS:
            return getattr(self.index, name)(*arguments)
        if name in WRITES:
            job_id = arguments[0].id if isinstance(arguments[0], JobRow) else arguments[0]
            if name == "add_job" and (there := self._there(*arguments)) is not None:
                return there
            answer = getattr(self.index, name)(*arguments)
            if name == "finish" and not answer:  # possibly a repeated call
                now = self.index.job(job_id)
                answer = now is not None and now.attempt == arguments[1] and now.state == arguments[2]
            await self._publish("jobs", job_id)
            if name in ("add_job", "give_back"):
                self._push_more()
            if name == "delete_job":
                await self._tell(job_id, {"deleted": True})
            return answer
        assert name in FILE_WRITES, name
        if name == "add_file" and (file := self.index.file(*arguments[:2])) is not None:
            return file
        answer = getattr(self.index, name)(*arguments)
        await self._publish("files", arguments[0])
        return answer

    def _there(self, job_id: str, owner: str, request: Any, idempotency: str | None, digest: str) -> JobRow | None:
        """The existing job of a repeated `add_job`: the same id after a restart of this actor, or the same
        Idempotency-Key through another front end."""
        by_key = None if idempotency is None else self.index.job_of_key(owner, idempotency)
        return self.index.job(job_id) or by_key

    async def offer(self, digest: str, app: str) -> None:
        """Record that this Ray Serve application serves the engines with this digest."""
        await self.begin()
        if self._apps.get(digest) != app:
            self._apps[digest] = app
            await asyncio.to_thread(self.objects.put_json, f"engines/{digest}.json", {"digest": digest, "app": app})
        self._push_more()

    async def claim(self, job_id: str, digest: str) -> JobRow | None:
        """Mark the job as running and return it; None if it is not queued or needs other engines."""
        await self.begin()
        now = self.index.job(job_id)
        if now is None or now.state != "queued" or now.request["engines"] != digest:
            return None
        self._silent[job_id] = 0
        row = self.index.take_one(job_id)
        await self._publish("jobs", job_id)
        return row

    async def heard(self, job_id: str, attempt: int, message: Mapping[str, Any]) -> bool:
        """Handle a message of an attempt. False if it is not the current attempt: it must stop, and its message is
        ignored."""
        await self.begin()
        row = self.index.job(job_id)
        if row is None or row.attempt != attempt or row.state != "running":
            ended = row is not None and row.attempt == attempt and row.state in ("completed", "failed")
            return ended and not message.keys().isdisjoint({"done", "failed"})  # repeated after a restart
        self._silent[job_id] = 0
        if "planned" in message:
            await self.ask("planned", row, message["planned"])
        elif "event" in message and row.started_at is None and message["event"]["phase"] == "denoise":
            await self.ask("started", job_id, attempt)
        elif "done" in message or "failed" in message:
            state = "completed" if "done" in message else "failed"
            await self.ask("finish", job_id, attempt, state, dict(message.get("done") or message["failed"]))
        if message:
            await self._tell(job_id, dict(message))
        return True

    async def news(self, number: int, after: int) -> tuple[int, int, list[tuple[str, dict[str, Any]]], dict[str, int]]:
        """Wait up to `NEWS_WAIT_S` seconds for a message with a number above `after`. Returns (number of this ledger,
        number of the last message, messages after `after`, overview). number: the ledger that issued `after`."""
        await self.begin()
        after = after if number == self._number else self._count
        async with self._told:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait_for(lambda: self._count > after), NEWS_WAIT_S)
        found = [(job_id, message) for count, job_id, message in self._news if count > after]
        overview = {"busy": len(self.index.running()), "deaths": self.deaths}
        return self._number, self._count, found, overview

    # records

    async def _publish(self, table: str, row_id: str) -> None:
        """Write the current row to the object store. If that fails, or a newer ledger exists, this process exits; the
        next ledger reads the records."""
        name = f"{'records' if table == 'jobs' else 'uploads'}/{row_id}.json"
        async with self._locks[row_id]:
            record = self.index.record(table, row_id)
            try:
                await asyncio.to_thread(self._write, name, record)
            except BaseException as error:
                print(f"The ledger cannot write {name}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        if not self._locks[row_id].locked():
            self._locks.pop(row_id, None)

    def _write(self, name: str, record: Mapping[str, Any] | None) -> None:
        if int(self.objects.get("ledger") or b"0") != self._number:
            raise RuntimeError("another ledger has begun")
        if record is None:
            self.objects.remove(name)
        else:
            self.objects.put_json(name, record)

    async def _tell(self, job_id: str, message: dict[str, Any]) -> None:
        async with self._told:
            self._count += 1
            self._news.append((self._count, job_id, message))
            self._told.notify_all()

    # dispatching jobs

    def _push_more(self) -> None:
        room = AHEAD + len(self.index.running()) - len(self._pushed)
        for row in self.index.queued(self._apps, AHEAD) if room > 0 else ():
            app = self._apps[row.request["engines"]]
            if row.id not in self._pushed and room > 0:
                room -= 1
                self._pushed[row.id] = asyncio.create_task(self._push(row, app))

    async def _push(self, row: JobRow, app: str) -> None:
        """Send a job through Ray Serve to a replica; returns when the replica has ended it, in whatever state."""
        from ray import serve

        try:
            handle = serve.get_deployment_handle("Engines", app)
            await handle.options(multiplexed_model_id=row.request["encodings"]).run.remote(row.id)
        except Exception as error:
            print(f"{row.id}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            await self._lost(row.id)
        finally:
            if self._pushed.get(row.id) is asyncio.current_task():
                del self._pushed[row.id]
            self._push_more()

    async def _lost(self, job_id: str) -> None:
        """Handle the loss of a job's replica: queue the job again at its old position, or fail it after `KILLS`."""
        row = self.index.job(job_id)
        if row is None or row.state != "running":
            await asyncio.sleep(TICK_S)
            return
        self.deaths += 1
        finished = await asyncio.to_thread(newest_state, self.objects, job_id)
        given = await self.ask("give_back", job_id, row.attempt, True, finished[1] if finished else 0)
        if given is not None and given.kills >= KILLS:
            taken = await self.ask("take_one", job_id)
            said = f"The job's process ended {given.kills} times without finishing another segment. Check its inputs."
            await self.heard(job_id, taken.attempt, {"failed": {"message": said, "kind": "crash"}})
        else:
            await self._tell(job_id, {"returned": True})

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._tick()
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)

    async def _tick(self) -> None:
        running = self.index.running()
        self._silent = {job_id: self._silent.get(job_id, 0) + 1 for job_id in running}
        for job_id in running:
            if self._silent[job_id] > SILENT_TICKS:
                if (push := self._pushed.pop(job_id, None)) is not None:  # the replica may never answer
                    push.cancel()
                await self._lost(job_id)
        for job_id in self.index.deleted():
            if job_id not in self._pushed:
                await asyncio.to_thread(self.objects.remove, f"jobs/{job_id}")
                self.index.forget_job(job_id)
                await self._publish("jobs", job_id)
        self._push_more()
        await self._retire()

    async def _retire(self) -> None:
        """Remove the applications of replaced engines that no unfinished job needs. Applications from a config file are
        left to their owner."""
        current = await asyncio.to_thread(self.objects.get, "current")
        if current is None:
            return
        kept = {current.decode(), *self.index.wanted()}
        ours = {digest for digest, app in self._apps.items() if app.startswith(APPS)}
        for digest in ours - kept:
            from ray import serve

            await asyncio.to_thread(serve.delete, self._apps.pop(digest), _blocking=False)
            await asyncio.to_thread(self.objects.remove, f"engines/{digest}.json")


def newest_state(objects: Objects, job_id: str) -> tuple[int, int] | None:
    """(attempt, finished segments) of the state to resume a job from; None if there is none. The state of any attempt
    is valid: it depends only on the job, and resuming verifies that."""
    found = []
    for name in objects.names(f"jobs/{job_id}"):
        attempt, _, file = name.partition("/")
        if attempt.isdecimal() and file.startswith("state-"):
            found.append((int(file.removeprefix("state-").removesuffix(".safetensors")), int(attempt)))
    return (max(found)[1], max(found)[0]) if found else None


def open_ledger(data: str) -> Any:
    """A handle to the cluster's ledger, which is started with `data` unless it runs."""
    import ray

    lasting: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 1000}
    lasting["resources"] = {"node:__internal_head__": 0.001}  # on the head node, because worker nodes may be removed
    return (
        ray.remote(**lasting)(Ledger)
        .options(name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
        .remote(data)
    )
