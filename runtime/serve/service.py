"""The operations behind the interface: accept, describe and delete jobs, and keep the data folder within its limit."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.serve import made_masks, plans
from scail2_rt.runtime.serve.checking import Checker
from scail2_rt.runtime.serve.errors import Refusal, not_found, wrong
from scail2_rt.runtime.serve.fields import Asked, check_numbers, read_fields
from scail2_rt.runtime.serve.inputs import Inputs, check_complete
from scail2_rt.runtime.serve.metrics import Metrics
from scail2_rt.runtime.serve.multipart import Form
from scail2_rt.runtime.serve.pool import Pool
from scail2_rt.runtime.serve.settings import Settings
from scail2_rt.runtime.serve.store import FileRow, JobRow, Store, new_id

SWEEP_S = 30.0
Kind = Literal["video", "masks"]
HEARD_AT_ONCE = 256  # events queued per listener; a slower listener misses events


@dataclass(slots=True)
class Live:
    """The state of a job that is not in the store.

    progress    the last progress event
    preview     the last preview: segment and base64 JPEG
    started     its first denoising step has begun
    worked_on   a worker has had it; the record is removed when the job ends
    listeners   queues of its open event streams
    """

    progress: dict[str, Any] = field(default_factory=dict)
    preview: dict[str, Any] | None = None
    started: bool = False
    worked_on: bool = False
    listeners: set["asyncio.Queue[tuple[str, dict[str, Any]]]"] = field(default_factory=set)

    def tell(self, kind: str, document: dict[str, Any]) -> None:
        """Send an event to all open event streams; a stream whose queue is full misses it."""
        for listener in self.listeners:
            with contextlib.suppress(asyncio.QueueFull):
                listener.put_nowait((kind, document))


class Service:
    """One data folder and its workers."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.checker = Checker(settings.limits)
        self.pool = Pool(settings, store, self._heard)
        self.metrics = Metrics(self)
        self.live: dict[str, Live] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._taking = 0  # submissions in progress
        self._sweeper: asyncio.Task[None] | None = None
        self._full = False  # the data folder exceeds its limit and holds no result that can be removed

    async def start(self) -> None:
        """Clean up the data folder and start the processes. Raises InputError if the engines cannot be opened."""
        await asyncio.to_thread(self._tidy)
        await self.checker.start()
        await self.pool.start()
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """End the event streams and stop all processes."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for live in self.live.values():
            live.tell("closing", {})
        await self.pool.close()
        await self.checker.close()

    def _tidy(self) -> None:
        """Recover from the end of the last server: queue its running jobs again, remove files without a row."""
        self.store.recover()
        for job_id in self.store.deleted():
            self._remove(job_id)
        for folder, known in ((self.store.jobs, self.store.job_ids()), (self.store.files, self.store.file_ids())):
            for path in folder.iterdir():
                if path.name not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.store.incoming.iterdir():
            path.unlink()

    # accepting jobs

    async def submit(self, form: Form, owner: str, idempotency: str | None, kind: Kind = "video") -> JobRow:
        """Check the inputs of a request and queue its job. A repeated Idempotency-Key returns the first job. Raises
        Refusal for an invalid request, a full queue or a full disk."""
        if idempotency is None:
            return await self._submit(form, owner, None, kind)
        if not 1 <= len(idempotency) <= 200:
            raise wrong("An Idempotency-Key must have 1 to 200 characters.", "Idempotency-Key")
        lock = self._locks.setdefault((owner, idempotency), asyncio.Lock())
        try:
            async with lock:
                return await self._submit(form, owner, idempotency, kind)
        finally:
            if not lock.locked():
                self._locks.pop((owner, idempotency), None)

    async def _submit(self, form: Form, owner: str, idempotency: str | None, kind: Kind) -> JobRow:
        asked = read_fields(form.fields)
        self._check_model(asked.model)
        job_id = new_id(f"{kind}_")
        folder = self.store.folder(job_id)
        check_numbers(asked, folder)
        before = None if idempotency is None else self.store.job_of_key(owner, idempotency)
        if before is None:
            self._check_queue(owner)
        self._taking += 1
        try:
            folder.mkdir(mode=0o700)
            inputs = Inputs(self.store, owner, self.settings.limits, self.settings.fetch_hosts)
            await inputs.place(form, asked, folder)
            if asked.masks_id is not None:
                earlier = self.job(asked.masks_id, owner)
                files = [self.store.result(earlier, name) for name in made_masks.INPUTS]
                await asyncio.to_thread(made_masks.take_over, files, folder)
                inputs.hashes |= dict.fromkeys(made_masks.INPUTS, asked.masks_id)
            made = kind == "masks" or inputs.hashes.keys().isdisjoint(made_masks.INPUTS)
            check_complete(inputs.hashes, made)
            digest = _digest(asked, inputs.hashes)
            if before is not None:
                if before.digest != digest:
                    said = "This Idempotency-Key was used for another request. Send a new key."
                    raise Refusal(409, said, "idempotency_key_reused")
                await asyncio.to_thread(shutil.rmtree, folder)
                return before
            request = await self._checked(asked, folder, asked.masking if made else None)
            await asyncio.to_thread(_sync, folder)
            row = await asyncio.to_thread(self.store.add_job, job_id, owner, request, idempotency, digest)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))
            raise
        finally:
            self._taking -= 1
        self.metrics.taken.inc()
        await self.pool.dispatch()
        return row

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.settings.model:
            said = f"The service has no model {model[:80]!r}. Use {self.settings.model}, or leave model out."
            raise wrong(said, "model", "model_not_found")

    def _check_queue(self, owner: str) -> None:
        limits = self.settings.limits
        if self._full:
            raise Refusal(
                507, "The service's data folder is full. Delete files or queued jobs.", "disk_full", retry_s=60
            )
        for count, most, whose in (
            (self.store.unfinished() + self._taking, limits.queued, "The service has"),
            (self.store.unfinished(owner), limits.queued_per_key, "You have"),
        ):
            if count >= most:
                said = f"{whose} {counted(most, 'unfinished job')} already. Try again later."
                raise Refusal(429, said, "queue_full", retry_s=30)

    async def _checked(self, asked: Asked, folder: Path, masking: dict[str, Any] | None) -> dict[str, Any]:
        """Check a request and return the record that the store keeps: options, extra_refs, masking, facts. masking:
        options for making masks; None if the client sent masks. Raises Refusal for an invalid request."""
        options = dict(asked.options)
        if masking is not None:
            weights = self.settings.segmenter_weights
            masking = {**masking, "segmenter": self.settings.segmenter, "weights": weights and str(weights)}
        told = options | {"extra_refs": len(asked.extra_refs), "masking": masking}
        if asked.seconds is not None:
            told["seconds"] = str(asked.seconds)
        facts = await self.checker.check(folder, told)
        if "plan" in facts:
            await asyncio.to_thread((folder / plans.NAME).write_bytes, base64.b64decode(facts.pop("plan")))
        if (frames := facts.pop("asked_frames")) is not None:
            options["frames"] = frames
        return {"options": options, "extra_refs": len(asked.extra_refs), "masking": masking, "facts": facts}

    # describing jobs and files

    def job(self, job_id: str, owner: str) -> JobRow:
        """A client's job. Raises Refusal (404) if it does not exist."""
        row = self.store.job(job_id, owner)
        if row is None:
            raise not_found("masks" if job_id.startswith("masks_") else "video", job_id)
        return row

    def file(self, file_id: str, owner: str) -> FileRow:
        """A client's file. Raises Refusal (404) if it does not exist."""
        row = self.store.file(file_id, owner)
        if row is None:
            raise not_found("file", file_id)
        return row

    def without_places(self, row: JobRow, record: Path) -> bytes:
        """The text of a job's run report or mask record, with this machine's paths replaced by names."""
        engines, weights = self.settings.engines, self.settings.segmenter_weights
        names = {f"{self.store.folder(row.id)}/": "", str(engines): engines.name}
        names |= {str(weights): weights.name} if weights is not None else {}
        names |= {str(Path.home()): "~"} if Path.home() != Path("/") else {}
        text = record.read_text(encoding="utf-8")
        for place, name in names.items():
            text = text.replace(json.dumps(place)[1:-1], json.dumps(name)[1:-1])
        return text.encode()

    # deleting and finishing

    async def delete(self, job_id: str, owner: str) -> None:
        """Delete a job. A running job is cancelled within one denoising step; its folder is removed after that."""
        row = self.job(job_id, owner)
        await asyncio.to_thread(self.store.delete_job, row.id)
        live = self.live.get(row.id)
        if live is not None:
            live.tell("deleted", {"id": row.id})
        if not await self.pool.cancel(row.id):
            await asyncio.to_thread(self._remove, row.id)
            self.live.pop(row.id, None)

    def _remove(self, job_id: str) -> None:
        shutil.rmtree(self.store.folder(job_id), ignore_errors=True)
        self.store.forget_job(job_id)

    async def _heard(self, row: JobRow, message: Mapping[str, Any]) -> None:
        """Handle a worker's message about its job."""
        live = self.live.setdefault(row.id, Live())
        live.worked_on = True
        if "event" in message:
            await self._progress(row, live, dict(message["event"]))
        elif "planned" in message:
            await self.pool.noted(self.store.planned, row, message["planned"])
        elif "preview" in message:
            live.preview = dict(message["preview"])
            live.tell("preview", live.preview)
        elif "done" in message or "failed" in message:
            await self._ended(row, live, message)
        elif "cancelled" in message or "returned" in message:
            if self.store.job(row.id) is None:
                self.live.pop(row.id, None)
                await asyncio.to_thread(self._remove, row.id)
            elif "cancelled" in message:  # the cancel was meant for another attempt: queue the job again
                await self.pool.noted(self.store.give_back, row.id, row.attempt, False, 0)
            live.started, live.worked_on, live.progress = False, False, {}
            live.tell("progress", {})

    async def _progress(self, row: JobRow, live: Live, event: dict[str, Any]) -> None:
        if not live.started and (event["phase"] == "denoise" or event["step"]):
            seconds = time.time() - row.created_at
            await self.pool.noted(self.store.started, row.id, row.attempt)
            self.metrics.first_step.observe(seconds)
            live.started = True  # with the progress below and the stored time, so that a client sees all of them
        live.progress = event
        live.tell("progress", event)

    async def _ended(self, row: JobRow, live: Live, message: Mapping[str, Any]) -> None:
        state = "completed" if "done" in message else "failed"
        result = dict(message["done"] if state == "completed" else message["failed"])
        if await self.pool.noted(self.store.finish, row.id, row.attempt, state, result):
            self.metrics.ended(state, result)
            if state == "failed":
                await asyncio.to_thread(_drop_partial, self.store.folder(row.id))
        elif self.store.job(row.id) is None:
            await asyncio.to_thread(self._remove, row.id)
        self.live.pop(row.id, None)
        live.tell(state, {"id": row.id})

    # housekeeping

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.sweep)
                await self.pool.dispatch()
            except Exception:  # for example a full disk; the next sweep tries again
                traceback.print_exc()
            await asyncio.sleep(SWEEP_S)

    def sweep(self) -> None:
        """Remove expired results, then the oldest ones until the data folder is within its limit."""
        for job_id in self.store.finished_before(time.time() - self.settings.keep_s):
            self._expire(job_id)
        self.store.keep_reserve()
        most = self.settings.disk_bytes
        if most is None:
            return
        used = self.used_bytes()
        for job_id in self.store.finished_before(time.time()) if used > most else ():
            used -= _folder_bytes(self.store.folder(job_id))
            self._expire(job_id)
            if used <= most:
                break
        self._full = used > most

    def _expire(self, job_id: str) -> None:
        self.store.delete_job(job_id)
        self._remove(job_id)

    def used_bytes(self) -> int:
        """Bytes on disk of the data folder. Hard links to one file count once; the reserve does not count."""
        return _folder_bytes(self.store.data) - _folder_bytes(self.store.reserve)


def _digest(asked: Asked, hashes: Mapping[str, str]) -> str:
    said = json.dumps([asked.options, asked.masking, dict(hashes), str(asked.seconds)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _folder_bytes(folder: Path) -> int:
    seen: dict[tuple[int, int], int] = {}
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            found = path.lstat()
            seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())


def _sync(folder: Path) -> None:
    """Sync the directory entries of a job's folder, and the folder's own entry, to the disk."""
    for path in (folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _drop_partial(folder: Path) -> None:
    """Remove the partial video of a failed job; its inputs and report stay."""
    for path in (*folder.glob("video.partial.*"), *folder.glob("video.resume-*")):
        path.unlink(missing_ok=True)
