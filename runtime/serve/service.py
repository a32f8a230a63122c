"""What the interface does: take a job, tell about it, end it, and keep the data folder within its limits."""

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
HEARD_AT_ONCE = 256  # events that a slow listener may lag behind


@dataclass(slots=True)
class Live:
    """What is known of a running job beyond the store. progress: the last event; worked_on: a worker has it, and
    this record goes when it ends; listeners: of its event streams."""

    progress: dict[str, Any] = field(default_factory=dict)
    preview: dict[str, Any] | None = None
    started: bool = False
    worked_on: bool = False
    listeners: set["asyncio.Queue[tuple[str, dict[str, Any]]]"] = field(default_factory=set)

    def tell(self, kind: str, document: dict[str, Any]) -> None:
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
        self._taking = 0  # jobs that are being taken in
        self._sweeper: asyncio.Task[None] | None = None
        self._full = False  # the data folder is beyond its limit, and nothing of it can go

    async def start(self) -> None:
        """InputError when the engines cannot be opened."""
        await asyncio.to_thread(self._tidy)
        await self.checker.start()
        await self.pool.start()
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for live in self.live.values():
            live.tell("closing", {})
        await self.pool.close()
        await self.checker.close()

    def _tidy(self) -> None:
        """After whatever ended the last server: what ran is queued, what nobody knows is removed."""
        self.store.recover()
        for job_id in self.store.deleted():
            self._remove(job_id)
        for folder, known in ((self.store.jobs, self.store.job_ids()), (self.store.files, self.store.file_ids())):
            for path in folder.iterdir():
                if path.name not in known:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self.store.incoming.iterdir():
            path.unlink()

    # taking jobs

    async def submit(self, form: Form, owner: str, idempotency: str | None, kind: Kind = "video") -> JobRow:
        """A queued job, its inputs checked. The same Idempotency-Key gives the same job."""
        if idempotency is None:
            return await self._submit(form, owner, None, kind)
        if not 1 <= len(idempotency) <= 200:
            raise wrong("An Idempotency-Key has 1 to 200 characters.", "Idempotency-Key")
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
                    raise Refusal(409, "This Idempotency-Key was used for another request.", "idempotency_key_reused")
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
            raise wrong(
                f"The model {model[:80]!r} is not here: this is {self.settings.model}.", "model", "model_not_found"
            )

    def _check_queue(self, owner: str) -> None:
        limits = self.settings.limits
        if self._full:
            raise Refusal(
                507, "The service's folder is full of files and waiting jobs: delete some.", "disk_full", retry_s=60
            )
        for count, most, whose in (
            (self.store.unfinished() + self._taking, limits.queued, "of all"),
            (self.store.unfinished(owner), limits.queued_per_key, "of yours"),
        ):
            if count >= most:
                raise Refusal(429, f"{counted(most, 'job')} {whose} already wait: try later.", "queue_full", retry_s=30)

    async def _checked(self, asked: Asked, folder: Path, masking: dict[str, Any] | None) -> dict[str, Any]:
        """What is stored of a request; masking: of masks that are made. Refusal when it cannot work."""
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

    # telling

    def job(self, job_id: str, owner: str) -> JobRow:
        row = self.store.job(job_id, owner)
        if row is None:
            raise not_found("masks" if job_id.startswith("masks_") else "video", job_id)
        return row

    def file(self, file_id: str, owner: str) -> FileRow:
        row = self.store.file(file_id, owner)
        if row is None:
            raise not_found("file", file_id)
        return row

    def without_places(self, row: JobRow, record: Path) -> bytes:
        """A report or record of a job, in which this machine's paths are names."""
        engines, weights = self.settings.engines, self.settings.segmenter_weights
        names = {f"{self.store.folder(row.id)}/": "", str(engines): engines.name}
        names |= {str(weights): weights.name} if weights is not None else {}
        names |= {str(Path.home()): "~"} if Path.home() != Path("/") else {}
        text = record.read_text(encoding="utf-8")
        for place, name in names.items():
            text = text.replace(json.dumps(place)[1:-1], json.dumps(name)[1:-1])
        return text.encode()

    # ending

    async def delete(self, job_id: str, owner: str) -> None:
        """Nobody sees it any more; if it runs, it ends within a step."""
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
        """A worker's message about its job."""
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
            elif "cancelled" in message:  # of another attempt: it is not this job's end
                await self.pool.noted(self.store.give_back, row.id, row.attempt, False, 0)
            live.started, live.worked_on, live.progress = False, False, {}
            live.tell("progress", {})

    async def _progress(self, row: JobRow, live: Live, event: dict[str, Any]) -> None:
        if not live.started and (event["phase"] == "denoise" or event["step"]):
            live.started = True
            self.metrics.first_step.observe(time.time() - row.created_at)
            await self.pool.noted(self.store.started, row.id, row.attempt)
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
            except Exception:  # a full disk, say: the next time is not far
                traceback.print_exc()
            await asyncio.sleep(SWEEP_S)

    def sweep(self) -> None:
        """Remove what has expired, and the oldest results while the folder is too large."""
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
        """Of the data folder; a file that several names share counts once, and the reserve not at all."""
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
    """The names in a job's folder, and the folder's own, are on the disk."""
    for path in (folder, folder.parent):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _drop_partial(folder: Path) -> None:
    """A failed job keeps its report; its segments cannot be asked for."""
    for path in (*folder.glob("video.partial.*"), *folder.glob("video.resume-*")):
        path.unlink(missing_ok=True)
