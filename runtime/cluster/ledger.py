"""The actor that knows all jobs: it alone writes their records, gives them to replicas, and takes their results.

Its index is the database of the single service, on a disk of its node, and may be lost: what counts are the records in
the store, which are written before anything is answered. A ledger that starts reads them, so it may die at any time:
Ray starts it again, elsewhere if need be, and calls wait. A newer ledger's number in the store ends an older one.

Queued jobs are pushed to Ray Serve, which queues them, chooses a replica that has the prompt's encodings, and scales.
A replica claims what reaches it: the claim counts the job's `attempt` up, and only the present attempt is listened to.
An attempt that is not heard of for `SILENT_TICKS` ticks of this process (one that was paused counts no time) is over.
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
from scail2_rt.runtime.serve.store import FileRow, JobRow, Store

NAME = "ledger"
APPS = "scail2-rt-"  # what names of applications begin with that `serve --ray` made
TICK_S = 1.0
WRITERS = 64  # records that are written at once
SILENT_TICKS = 15
KILLS = 20
AHEAD = 64  # jobs that wait at Ray Serve
NEWS = 4096  # messages that a front end may lag behind
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
    """The database, filled from records; it need not survive its process."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self._writer.execute("PRAGMA synchronous=OFF")

    def load(self, table: str, documents: Any) -> None:
        row = JobRow if table == "jobs" else FileRow
        names = [field.name for field in fields(row)]
        sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        with self._writing:
            self._writer.execute("BEGIN")
            self._writer.executemany(sql, ([document[name] for name in names] for document in documents))
            self._writer.execute("COMMIT")

    def record(self, table: str, row_id: str) -> dict[str, Any] | None:
        """A row as it is stored; None when it is gone."""
        rows = self._read(f"SELECT * FROM {table} WHERE id=?", row_id)
        return dict(rows[0]) if rows else None

    def queued(self, engines: Collection[str], most: int) -> list[JobRow]:
        """The oldest ones for these engines."""
        sql = "SELECT * FROM jobs WHERE state='queued' AND json_extract(request, '$.engines') IN"
        rows = self._read(f"{sql} ({', '.join('?' * len(engines))}) ORDER BY seq LIMIT ?", *engines, most)
        return [JobRow.of(row) for row in rows]

    def running(self) -> list[str]:
        return [row["id"] for row in self._read("SELECT id FROM jobs WHERE state='running'")]

    def wanted(self) -> set[str]:
        """Digests of the engines that unfinished jobs are for."""
        sql = "SELECT DISTINCT json_extract(request, '$.engines') AS digest FROM jobs"
        return {row["digest"] for row in self._read(f"{sql} WHERE state IN ('queued', 'running')")}


class Ledger:
    """One per cluster, by the name `ledger`."""

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
        """Where its records are; work begins with the first call."""
        if self._ticking is None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WRITERS))
            self._ticking = asyncio.create_task(self._tick_for_ever())
        return self.objects.url

    # what front ends and replicas ask

    async def ask(self, name: str, *arguments: Any) -> Any:
        """A method of the database; what it changed is in the store before this returns."""
        await self.begin()
        if name in READS:
            return getattr(self.index, name)(*arguments)
        if name in WRITES:
            job_id = arguments[0].id if isinstance(arguments[0], JobRow) else arguments[0]
            if name == "add_job" and (there := self._there(*arguments)) is not None:
                return there
            answer = getattr(self.index, name)(*arguments)
            if name == "finish" and not answer:  # asked again
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
        """A job that is asked for again: after a restart of this actor, or by its key, through another front end."""
        by_key = None if idempotency is None else self.index.job_of_key(owner, idempotency)
        return self.index.job(job_id) or by_key

    async def offer(self, digest: str, app: str) -> None:
        """These engines are served by this application of Ray Serve."""
        await self.begin()
        if self._apps.get(digest) != app:
            self._apps[digest] = app
            await asyncio.to_thread(self.objects.put_json, f"engines/{digest}.json", {"digest": digest, "app": app})
        self._push_more()

    async def claim(self, job_id: str, digest: str) -> JobRow | None:
        """The job, running from now on, if it still waits and is for these engines."""
        await self.begin()
        now = self.index.job(job_id)
        if now is None or now.state != "queued" or now.request["engines"] != digest:
            return None
        self._silent[job_id] = 0
        row = self.index.take_one(job_id)
        await self._publish("jobs", job_id)
        return row

    async def heard(self, job_id: str, attempt: int, message: Mapping[str, Any]) -> bool:
        """What an attempt says. False when it is not the present one: it must stop, and nothing of it counts."""
        await self.begin()
        row = self.index.job(job_id)
        if row is None or row.attempt != attempt or row.state != "running":
            ended = row is not None and row.attempt == attempt and row.state in ("completed", "failed")
            return ended and not message.keys().isdisjoint({"done", "failed"})  # said again after a restart
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
        """(this ledger's number, the last message's, messages after that one, an overview), waiting a while for one.
        number: of the ledger that counted `after`."""
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
        """The row as it is now, into the store. A ledger that cannot, or is not the newest, ends: the next one reads
        what is there."""
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

    # giving jobs out

    def _push_more(self) -> None:
        room = AHEAD + len(self.index.running()) - len(self._pushed)
        for row in self.index.queued(self._apps, AHEAD) if room > 0 else ():
            app = self._apps[row.request["engines"]]
            if row.id not in self._pushed and room > 0:
                room -= 1
                self._pushed[row.id] = asyncio.create_task(self._push(row, app))

    async def _push(self, row: JobRow, app: str) -> None:
        """Through Ray Serve to a replica; it returns when the replica is done with the job, one way or another."""
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
        """Its replica is gone: the job waits again, where it was."""
        row = self.index.job(job_id)
        if row is None or row.state != "running":
            await asyncio.sleep(TICK_S)
            return
        self.deaths += 1
        finished = await asyncio.to_thread(newest_state, self.objects, job_id)
        given = await self.ask("give_back", job_id, row.attempt, True, finished[1] if finished else 0)
        if given is not None and given.kills >= KILLS:
            taken = await self.ask("take_one", job_id)
            said = f"Its process ended {given.kills} times without finishing another segment."
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
                if (push := self._pushed.pop(job_id, None)) is not None:  # its replica may never answer
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
        """Engines that were replaced go when no job is for them any more; those of a config file are its owner's."""
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
    """(attempt, finished segments) of the state that a job goes on from. Whichever attempt left it, it is right: states
    follow from the job alone, and runs check that."""
    found = []
    for name in objects.names(f"jobs/{job_id}"):
        attempt, _, file = name.partition("/")
        if attempt.isdecimal() and file.startswith("state-"):
            found.append((int(file.removeprefix("state-").removesuffix(".safetensors")), int(attempt)))
    return (max(found)[1], max(found)[0]) if found else None


def open_ledger(data: str) -> Any:
    """The cluster's ledger; it is started, on `data`, where there is none."""
    import ray

    lasting: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 1000}
    lasting["resources"] = {"node:__internal_head__": 0.001}  # nodes that work are those that come and go
    return (
        ray.remote(**lasting)(Ledger)
        .options(name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
        .remote(data)
    )
