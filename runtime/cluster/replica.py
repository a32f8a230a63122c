"""A replica: one or several GPUs, a worker process with open engines, and one job at a time.

Worker and pool are those of `runtime.serve`. A job's inputs are fetched to a folder on this node. After each finished
segment the state to resume from is stored, and at the end the result, both in the folder of the attempt. The ledger
accepts a message only from the current attempt. A replica that was disconnected and whose job was given to another one
stops within one denoising step and removes the files of its attempt.
"""

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scail2_rt.runtime.cluster.engines_folder import digest_of, local_engines
from scail2_rt.runtime.cluster.joining import scratch_folder
from scail2_rt.runtime.cluster.ledger import newest_state, open_ledger
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.media.unfinished import part_ends, partial_path, sidecar_path
from scail2_rt.runtime.serve.pool import Pool
from scail2_rt.runtime.serve.settings import Settings
from scail2_rt.runtime.serve.store import JobRow, Store

BEAT_S = 4.0  # maximum interval between messages about a job
EVENT_S = 1.0  # minimum interval between progress events of one phase
ENCODINGS = 64  # prompts for which a replica counts as having the encodings


class Desk(Store):
    """The store of this replica's pool: it offers one job, and forwards other calls to the ledger."""

    def __init__(self, ledger: Any, data: Path) -> None:
        self._ledger, self.data, self.jobs = ledger, data, data
        self.next: JobRow | None = None

    def take(self) -> JobRow | None:
        row, self.next = self.next, None
        return row

    def give_back(self, *arguments: Any) -> JobRow | None:
        import ray

        row: JobRow | None = ray.get(self._ledger.ask.remote("give_back", *arguments))
        return row

    def take_one(self, job_id: str) -> JobRow | None:
        import ray

        row: JobRow | None = ray.get(self._ledger.ask.remote("take_one", job_id))
        return row


class Replica:
    """The class that Ray Serve starts, one per `gpus_per_video` GPUs. engines: folder or URL; digest: the expected
    digest of their manifest. Raises InputError for other engines."""

    async def __init__(self, settings: Settings, data: str, engines: str, digest: str) -> None:  # type: ignore[misc]  # Ray awaits it
        import ray
        from ray import serve

        self._ledger, self._objects = open_ledger(data), Objects(data)
        here = scratch_folder("replica")
        folder = await asyncio.to_thread(local_engines, engines, digest)
        self.digest = digest_of(folder)
        self._desk = Desk(self._ledger, here)
        self._pool = Pool(replace(settings, engines=folder, data=here, workers=1), self._desk, self._heard)
        await self._pool.start()
        self._name = f"{ray.get_runtime_context().get_node_id()[:12]}/{os.getpid()}"
        self._working: JobRow | None = None
        self._ended: asyncio.Future[None] | None = None
        self._passed, self._said, self._saved = 0.0, 0.0, 0
        self._phase = ""
        await self._ledger.offer.remote(self.digest, serve.get_replica_context().app_name)

    def check_health(self) -> None:
        """Ray Serve's health check. Always healthy: the pool restarts a worker that died."""

    async def run(self, job_id: str) -> None:
        """Run a job to its end, in whatever state; returns at once if it is no longer queued."""
        from ray import serve

        await self.encodings(serve.get_multiplexed_model_id())
        row: JobRow | None = await self._ledger.claim.remote(job_id, self.digest)
        if row is None:
            return
        folder = self._desk.folder(row.id)
        try:
            self._saved = await asyncio.to_thread(self._bring, row, folder)
            self._working = row
            self._ended, self._phase, self._passed = asyncio.get_running_loop().create_future(), "", 0.0
            self._desk.next = row
            await self._pool.dispatch()
            while not self._ended.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(self._ended), BEAT_S / 2)
                if not self._ended.done() and time.monotonic() - self._said > BEAT_S / 2:
                    await self._say(row, {})
            self._ended.result()
        except asyncio.CancelledError:  # the ledger has given the job to another replica
            await self._pool.cancel(row.id)
            raise
        finally:
            self._desk.next, self._working = None, None
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def encodings(self, prompt: str) -> str:
        """Tell Ray Serve that this node has the encodings of a prompt, so that it routes requests with it here."""
        return prompt

    def _bring(self, row: JobRow, folder: Path) -> int:
        """Fetch the inputs, and the state of an earlier attempt. Returns its number of finished segments."""
        own = f"jobs/{row.id}"
        for name in self._objects.names(f"{own}/inputs"):
            self._objects.fetch(f"{own}/inputs/{name}", folder / name)
        found = newest_state(self._objects, row.id) if row.attempt > 1 else None
        if found is None:
            return 0
        attempt, finished = found
        video = folder / "video.mp4"
        self._objects.fetch(f"{own}/{attempt}/partial-{finished}.mp4", partial_path(video))
        self._objects.fetch(f"{own}/{attempt}/state-{finished}.safetensors", sidecar_path(video, finished))
        return finished

    async def _say(self, row: JobRow, message: Mapping[str, Any]) -> bool:
        self._said = time.monotonic()
        counts: bool = await self._ledger.heard.remote(row.id, row.attempt, dict(message))
        if not counts:
            await self._pool.cancel(row.id)
        return counts

    async def _heard(self, row: JobRow, message: Mapping[str, Any]) -> None:
        """Handle a worker's message about its job."""
        now = self._working
        if now is None or row.id != now.id or row.attempt < now.attempt:  # of a job that another replica has
            return
        assert self._ended is not None
        try:
            await self._pass_on(row, message)
        except BaseException as error:
            if not self._ended.done():
                self._ended.set_exception(error)
            raise
        if not message.keys().isdisjoint({"done", "failed", "cancelled", "returned"}) and not self._ended.done():
            self._ended.set_result(None)

    async def _pass_on(self, row: JobRow, message: Mapping[str, Any]) -> None:
        if "event" in message:
            event = message["event"]
            if event["finished"] > self._saved:
                self._saved = await asyncio.to_thread(self._save, row, event["finished"])
            if event["phase"] == self._phase and time.monotonic() - self._passed < EVENT_S:
                return
            self._phase, self._passed = event["phase"], time.monotonic()
        elif "done" in message:
            message = {"done": {**message["done"], "replica": self._name}}
            await asyncio.to_thread(self._deliver, row)
        elif "returned" in message:  # `Desk.give_back` has queued it again
            return
        counts = "cancelled" not in message and await self._say(row, message)
        if counts and "done" in message:
            await asyncio.to_thread(self._tidy, row)
        elif not counts and not message.keys().isdisjoint({"done", "cancelled"}):
            await asyncio.to_thread(self._objects.remove, f"jobs/{row.id}/{row.attempt}")

    def _save(self, row: JobRow, finished: int) -> int:
        """Store the state after `finished` segments, while the worker may write more. Returns the number of segments of
        the stored state."""
        video, own = self._desk.folder(row.id) / "video.mp4", f"jobs/{row.id}/{row.attempt}"
        try:
            state = sidecar_path(video, finished).read_bytes()
            with partial_path(video).open("rb") as file:
                part = file.read(part_ends(partial_path(video))[finished - 1])
        except (FileNotFoundError, IndexError):  # the next segment is finished already
            return self._saved
        self._objects.put(f"{own}/partial-{finished}.mp4", part)
        self._objects.put(f"{own}/state-{finished}.safetensors", state)
        for kind, ending in (("state", "safetensors"), ("partial", "mp4")):
            self._objects.remove(f"{own}/{kind}-{self._saved}.{ending}")
        return finished

    def _deliver(self, row: JobRow) -> None:
        """Store the result in the attempt's folder, the video last."""
        folder, own = self._desk.folder(row.id), f"jobs/{row.id}/{row.attempt}"
        inputs = set(self._objects.names(f"jobs/{row.id}/inputs"))
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: path.name == "video.mp4"):
            name = path.relative_to(folder).as_posix()
            if name not in inputs:
                self._objects.put_file(path, f"{own}/{name}")

    def _tidy(self, row: JobRow) -> None:
        """Remove the states of a finished job, and all files of earlier attempts."""
        for name in self._objects.names(f"jobs/{row.id}"):
            attempt, _, file = name.partition("/")
            if attempt.isdecimal() and (int(attempt) < row.attempt or file.startswith(("state-", "partial-"))):
                self._objects.remove(f"jobs/{row.id}/{name}")
