"""A front end: the interface of `runtime.serve`, with the ledger as its store and replicas as its workers."""

import asyncio
import contextlib
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scail2_rt.runtime.cluster.joining import scratch_folder
from scail2_rt.runtime.cluster.ledger import open_ledger
from scail2_rt.runtime.cluster.objects import Objects
from scail2_rt.runtime.cluster.remote_store import RemoteStore
from scail2_rt.runtime.serve.api import make_app
from scail2_rt.runtime.serve.doors import Doors
from scail2_rt.runtime.serve.fields import Asked
from scail2_rt.runtime.serve.pool import Pool
from scail2_rt.runtime.serve.service import Live, Service
from scail2_rt.runtime.serve.settings import Settings

CACHED_S = 3600.0  # how long this node keeps files fetched from the object store


class Replicas(Pool):
    """The pool of a front end: Ray Serve manages the replicas; this only records the ledger's overview."""

    def __init__(self) -> None:
        self.workers, self.deaths, self._busy, self._heard_of = [], 0, 0, False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def dispatch(self) -> None:
        """Nothing to do: the ledger gives jobs to Ray Serve."""

    async def cancel(self, job_id: str) -> bool:
        """True: the replica of a deleted job stops at its next message, and the ledger removes the files."""
        return True

    @property
    def ready(self) -> bool:
        return self._heard_of

    @property
    def busy(self) -> int:
        return self._busy

    def told(self, overview: dict[str, int]) -> None:
        """Record the ledger's overview: running jobs and lost replicas."""
        self._busy, self.deaths, self._heard_of = overview["busy"], overview["deaths"], True


class ClusterService(Service):
    """A `Service` whose jobs are run by replicas and whose rows are in the ledger. engines: digest for new jobs."""

    def __init__(self, settings: Settings, store: RemoteStore, ledger: Any, engines: str) -> None:
        super().__init__(settings, store)
        self._ledger, self.remote, self._engines, self.replicas = ledger, store, engines, Replicas()
        self.pool = self.replicas
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        self._listener = asyncio.create_task(self._listen())

    def _tidy(self) -> None:
        """Nothing to do: the local folder is new for each process."""

    async def _checked(self, asked: Asked, folder: Path, masking: dict[str, Any] | None) -> dict[str, Any]:
        request = await super()._checked(asked, folder, masking)
        prompts = [str(asked.options.get(name, "")) for name in ("prompt", "negative_prompt")]
        encodings = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:24]
        return {**request, "engines": self._engines, "encodings": encodings}

    async def delete(self, job_id: str, owner: str) -> None:
        await super().delete(job_id, owner)
        await asyncio.to_thread(self.remote.drop, job_id)

    def sweep(self) -> None:
        for job_id in self.store.finished_before(time.time() - self.settings.keep_s):
            self.store.delete_job(job_id)
        for folder in (self.store.jobs, self.store.files):
            for path in folder.iterdir():
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < time.time() - CACHED_S:
                        self.remote.drop(path.name) if path.is_dir() else path.unlink()

    async def _listen(self) -> None:
        """Receive the replicas' messages from the ledger, for event streams and progress."""
        number = after = 0
        while True:
            try:
                now, after, messages, overview = await self._ledger.news.remote(number, after)
            except Exception:  # Ray is restarting the ledger
                await asyncio.sleep(1)
                continue
            if number not in (0, now):
                for live in self.live.values():
                    live.tell("progress", {})
            number = now
            self.replicas.told(overview)
            for job_id, message in messages:
                self._hear(job_id, message)

    def _hear(self, job_id: str, message: dict[str, Any]) -> None:
        live = self.live.setdefault(job_id, Live())
        live.worked_on = True
        if "event" in message:
            live.started = live.started or message["event"]["phase"] == "denoise" or bool(message["event"]["step"])
            live.progress = message["event"]
            live.tell("progress", live.progress)
        elif "preview" in message:
            live.preview = message["preview"]
            live.tell("preview", message["preview"])
        elif "returned" in message:
            live.started, live.progress = False, {}
            live.tell("progress", {})
        elif ended := message.keys() & {"done", "failed", "deleted"}:
            self.live.pop(job_id, None)
            if "deleted" not in ended:
                state = "completed" if "done" in ended else "failed"
                self.metrics.ended(state, dict(message.get("done") or message["failed"]))
            live.tell({"done": "completed", "failed": "failed", "deleted": "deleted"}[ended.pop()], {"id": job_id})


class FrontEnd:
    """A replica of the front end's deployment, which gets its requests from Ray Serve."""

    async def __init__(self, settings: Settings, data: str, engines: str) -> None:  # type: ignore[misc]  # Ray awaits it
        os.umask(0o077)
        here = scratch_folder("front")
        ledger = open_ledger(data)
        store = RemoteStore(ledger, Objects(data), here)
        self._settings = replace(settings, data=here)
        self._service = ClusterService(self._settings, store, ledger, engines)
        await self._service.start()

    def __serve_build_asgi_app__(self) -> Any:
        service = self._service
        return Doors(make_app(service), self._settings, lambda status: service.metrics.refused.labels(status).inc())
