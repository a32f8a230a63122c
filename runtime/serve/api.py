"""The HTTP interface. Its shape is that of OpenAI's videos and files, so that their clients work as they are."""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.serve import made_masks
from scail2_rt.runtime.serve.description import video_body
from scail2_rt.runtime.serve.errors import DiskFull, Refusal, fault, not_found, wrong
from scail2_rt.runtime.serve.multipart import receive
from scail2_rt.runtime.serve.service import HEARD_AT_ONCE, Kind, Live, Service
from scail2_rt.runtime.serve.store import JobRow, Order, new_id
from scail2_rt.runtime.serve.views import POLL_MS, file_object, page_of, peak_mb, video_object

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"app.js": "text/javascript", "app.css": "text/css", "docs.js": "text/javascript"}
MOST = 100  # entries of a page of a list
KEEP_ALIVE_S = 15.0
VARIANTS = {
    "video": ("video.mp4", "video/mp4"),
    "report": ("video.json", "application/json"),
    "thumbnail": ("thumbnail.webp", "image/webp"),
    "spritesheet": ("spritesheet.webp", "image/webp"),
    "input_reference": ("input_reference", "application/octet-stream"),
    "mask_reference": ("mask_reference", "application/octet-stream"),
    "video_reference": ("video_reference", "application/octet-stream"),
    "video_mask_reference": ("video_mask_reference", "application/octet-stream"),
    "mask_sheet": (f"{made_masks.FOLDER}/masks.png", "image/png"),
    "mask_record": (f"{made_masks.FOLDER}/masks.json", "application/json"),
}


def make_app(service: Service) -> FastAPI:
    """The routes around a service that is started elsewhere."""
    app = FastAPI(title="scail2-rt", docs_url=None, redoc_url=None)
    for add in (_add_videos, _add_results, _add_files, _add_state, _add_page):
        add(app, service)

    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        if not route.path.endswith("/events"):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = _refusal(error)
        service.metrics.refused.labels(refusal.status).inc()
        # What is still being sent is not waited for.
        unread = {"Connection": "close"} if request.method == "POST" else {}
        return JSONResponse(refusal.body, refusal.status, refusal.headers | unread)

    for kind in (Scail2Error, HTTPException, RequestValidationError, ClientDisconnect, OSError, DiskFull, Exception):
        app.add_exception_handler(kind, refused)
    return app


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, f"{error.detail}.", "http_error")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return wrong(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}.", str(first["loc"][-1]))
    if isinstance(error, ClientDisconnect):
        return Refusal(400, "The upload was broken off.", "aborted")
    return wrong(str(error)) if isinstance(error, Scail2Error) else fault(error)


@contextlib.contextmanager
def _known(after: str | None) -> Iterator[None]:
    """Refusal when `after` names an entry that is not known."""
    try:
        yield
    except LookupError:
        raise wrong(f"after: there is no {str(after)[:80]!r} in this list: start it again.", "after") from None


def _owner(request: Request) -> str:
    return str(request.scope["state"]["owner"])


def _add_videos(app: FastAPI, service: Service) -> None:
    async def submit(request: Request, kind: Kind = "video") -> JobRow:
        form = await receive(request, service.store.incoming, service.settings.limits)
        try:
            return await service.submit(form, _owner(request), request.headers.get("idempotency-key"), kind)
        finally:
            form.discard()

    @app.post("/v1/videos", openapi_extra=video_body())
    async def create_video(request: Request) -> JSONResponse:
        """Take a job: a multipart or JSON body."""
        row = await submit(request)
        return JSONResponse(video_object(service, row), headers={"openai-poll-after-ms": str(POLL_MS)})

    @app.post("/v1/masks", openapi_extra=video_body())
    async def create_masks(request: Request) -> JSONResponse:
        """Make the masks of a request alone, to look at before the video: a job like one, whose id a video takes as
        `masks_id`."""
        row = await submit(request, "masks")
        return JSONResponse(video_object(service, row))

    @app.post("/v1/videos/sync", openapi_extra=video_body())
    async def create_video_and_wait(request: Request) -> Response:
        """The video itself, when it is done. Who leaves earlier finds the job in the list."""
        row = await submit(request)
        async for kind, _ in _events(service, row, _owner(request)):
            if kind in ("completed", "failed", "deleted", "closing"):
                break
        row = service.job(row.id, _owner(request))
        if row.state == "failed":
            raise Refusal(422, str((row.result or {})["message"]), "video_failed")
        if row.state != "completed" or row.result is None:
            raise Refusal(503, f"The service is stopping; {row.id} goes on when it is back.", "stopping", retry_s=30)
        headers = {
            "X-Video-Id": row.id,
            "X-Inference-Time-S": f"{row.result['inference_s']:g}",
            "X-Stage-Durations": json.dumps(row.result["timings_s"]),
            "X-Peak-Memory-MB": str(peak_mb(row.result)),
        }
        video = await asyncio.to_thread(service.store.result, row, "video.mp4")
        return FileResponse(video, media_type="video/mp4", headers=headers)

    @app.get("/v1/videos")
    async def list_videos(
        request: Request, after: str | None = None, limit: int = Query(20, ge=1, le=MOST), order: Order = "desc"
    ) -> JSONResponse:
        with _known(after):
            rows = service.store.list_jobs(_owner(request), after, limit + 1, order)
        places = service.store.places() if any(row.state == "queued" for row in rows) else {}
        return JSONResponse(page_of([video_object(service, row, places.get(row.seq)) for row in rows], limit))

    @app.get("/v1/videos/{video_id}")
    @app.get("/v1/masks/{video_id}", include_in_schema=False)
    async def retrieve_video(request: Request, video_id: str) -> JSONResponse:
        row = service.job(video_id, _owner(request))
        return JSONResponse(video_object(service, row), headers={"openai-poll-after-ms": str(POLL_MS)})

    @app.delete("/v1/videos/{video_id}")
    @app.delete("/v1/masks/{video_id}", include_in_schema=False)
    async def delete_video(request: Request, video_id: str) -> dict[str, Any]:
        """Remove a job; one that runs ends within a step."""
        await service.delete(video_id, _owner(request))
        return {"id": video_id, "object": "video.deleted", "deleted": True}


def _add_results(app: FastAPI, service: Service) -> None:
    @app.get("/v1/videos/{video_id}/content")
    @app.get("/v1/masks/{video_id}/content", include_in_schema=False)
    async def video_content(request: Request, video_id: str, variant: str = "video") -> Response:
        """The video, its report, a picture of it, or an input."""
        row = service.job(video_id, _owner(request))
        if variant not in VARIANTS:
            raise wrong(f"variant must be one of {', '.join(VARIANTS)}, not {variant[:80]}.", "variant")
        name, media_type = VARIANTS[variant]
        if not (variant.endswith("_reference") or variant.startswith("mask_")):
            if row.state == "failed":
                raise Refusal(422, str((row.result or {})["message"]), "video_failed")
            if row.state != "completed":
                raise Refusal(404, f"The video {row.id} is not done yet.", "not_done", retry_s=1)
            if name.endswith(".webp"):
                await asyncio.to_thread(_draw, variant, service.store.result(row, "video.mp4").with_name(name))
        path = await asyncio.to_thread(service.store.result, row, name)
        if not path.is_file():
            raise Refusal(404, f"{row.id} has no {variant}.", "not_found", param="variant")
        headers = {"cache-control": "private, no-store"}
        if media_type == "application/json":
            headers["content-disposition"] = f'attachment; filename="{row.id}.json"'
            return Response(service.without_places(row, path), media_type=media_type, headers=headers)
        return FileResponse(path, media_type=media_type, filename=f"{row.id}{path.suffix}", headers=headers)

    @app.get("/v1/videos/{video_id}/events")
    @app.get("/v1/masks/{video_id}/events", include_in_schema=False)
    async def video_events(request: Request, video_id: str) -> StreamingResponse:
        """Server-sent events: `progress` (phase, step, seconds left), `preview` (a JPEG per finished segment), and one
        of completed, failed, deleted at the end, with the video object."""
        owner = _owner(request)
        row = service.job(video_id, owner)

        async def text() -> AsyncIterator[str]:
            async for kind, document in _events(service, row, owner):
                yield f"event: {kind}\ndata: {json.dumps(document)}\n\n" if kind else ": still here\n\n"

        return StreamingResponse(text(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _draw(variant: str, path: Path) -> None:
    """A picture of a video, made when it is first asked for."""
    if path.is_file():
        return
    from scail2_rt.runtime.serve import pictures

    data = getattr(pictures, variant)(path.with_name("video.mp4"))
    temporary = path.with_name(f".{new_id('')}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


async def _events(service: Service, row: JobRow, owner: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(kind, document) until the job has ended; ("", {}) when nothing has happened for a while."""
    heard: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(HEARD_AT_ONCE)
    live = service.live.setdefault(row.id, Live())
    live.listeners.add(heard)
    try:
        if live.preview is not None:
            yield "preview", live.preview
        kind = "progress"
        while True:
            now = service.store.job(row.id, owner)
            if now is None:
                yield "deleted", {"id": row.id, "object": "video.deleted", "deleted": True}
                return
            if now.state in ("completed", "failed"):
                yield now.state, video_object(service, now)
                return
            if kind == "progress":
                yield "progress", video_object(service, now)
            kind = ""
            with contextlib.suppress(TimeoutError):
                kind, document = await asyncio.wait_for(heard.get(), KEEP_ALIVE_S)
            if kind == "preview":
                yield kind, document
            elif kind == "closing":
                yield kind, {"id": row.id}
                return
            elif not kind:
                kind = "progress"  # its place may have changed
    finally:
        live.listeners.discard(heard)
        if not (live.listeners or live.worked_on) and service.live.get(row.id) is live:
            service.live.pop(row.id)


def _add_files(app: FastAPI, service: Service) -> None:
    store = service.store

    @app.post("/v1/files")
    async def create_file(request: Request) -> dict[str, Any]:
        """Keep a file for several jobs: fields `file` and `purpose`."""
        owner = _owner(request)
        form = await receive(request, store.incoming, service.settings.limits)
        try:
            upload = form.files.get("file")
            if upload is None:
                raise wrong("The field file is missing: send a file as multipart/form-data.", "file")
            purpose = str(dict(form.fields).get("purpose", "user_data"))[:40]
            most = service.settings.limits.file_bytes
            if store.file_bytes(owner) + upload.bytes > most:
                raise Refusal(413, f"Your files would take more than {most >> 20} MiB: delete some.", "file_quota")
            file_id = new_id("file-")
            await asyncio.to_thread(upload.path.replace, store.files / file_id)
            row = await asyncio.to_thread(
                store.add_file, file_id, owner, upload.name, upload.bytes, upload.sha256, purpose
            )
            return file_object(row)
        finally:
            form.discard()

    @app.get("/v1/files")
    async def list_files(
        request: Request,
        after: str | None = None,
        limit: int = Query(MOST, ge=1, le=10_000),
        order: Order = "desc",
        sha256: str | None = None,
    ) -> JSONResponse:
        """A client's files; with `sha256` those of this content."""
        with _known(after):
            rows = store.list_files(_owner(request), after, limit + 1, order, sha256)
        return JSONResponse(page_of([file_object(row) for row in rows], limit))

    @app.get("/v1/files/{file_id}")
    async def retrieve_file(request: Request, file_id: str) -> dict[str, Any]:
        return file_object(service.file(file_id, _owner(request)))

    @app.get("/v1/files/{file_id}/content")
    async def file_content(request: Request, file_id: str) -> FileResponse:
        row = service.file(file_id, _owner(request))
        file = await asyncio.to_thread(store.upload, row)
        return FileResponse(file, media_type="application/octet-stream", filename=row.id)

    @app.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
        """Jobs that were made with it keep what they need."""
        if not await asyncio.to_thread(store.delete_file, file_id, _owner(request)):
            raise not_found("file", file_id)
        await asyncio.to_thread((store.files / file_id).unlink, True)
        return {"id": file_id, "object": "file", "deleted": True}


def _add_state(app: FastAPI, service: Service) -> None:
    model = {"id": service.settings.model, "object": "model", "created": 0, "owned_by": "scail2-rt"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        if name != service.settings.model:
            raise not_found("model", name)
        return model

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """A worker has its engines open, and the disk has room."""
        free = shutil.disk_usage(service.store.data).free
        works = service.pool.ready and free > 1 << 28
        return JSONResponse({"ready": works}, 200 if works else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text, media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", media_type="text/html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in PAGE_FILES:
            raise not_found("page", name)
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name])
