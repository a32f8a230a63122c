"""The HTTP interface. It follows OpenAI's videos and files endpoints, so OpenAI's clients work unchanged."""

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
MOST = 100  # entries per page of a list
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
    """Return the application with the routes of a service. The caller starts and closes the service."""
    app = FastAPI(title="scail2-rt", docs_url=None, redoc_url=None)
    for add in (_add_videos, _add_results, _add_files, _add_state, _add_page):
        add(app, service)

    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        if not route.path.endswith("/events"):
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = _refusal(error)
        service.metrics.refused.labels(refusal.status).inc()
        # Close the connection instead of reading the rest of the request body.
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
        return Refusal(400, "The client closed the connection during the upload.", "aborted")
    return wrong(str(error)) if isinstance(error, Scail2Error) else fault(error)


@contextlib.contextmanager
def _known(after: str | None) -> Iterator[None]:
    """Raises Refusal (400) if `after` names an unknown entry."""
    try:
        yield
    except LookupError:
        said = f"after: the list has no entry {str(after)[:80]!r}. Start again with the first page."
        raise wrong(said, "after") from None


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
        """Create a video job from a multipart or JSON body."""
        row = await submit(request)
        return JSONResponse(video_object(service, row), headers={"openai-poll-after-ms": str(POLL_MS)})

    @app.post("/v1/masks", openapi_extra=video_body())
    async def create_masks(request: Request) -> JSONResponse:
        """Create a job that makes only the masks of a request, for inspection before the video is made. Pass its id as
        `masks_id` to use the masks for a video."""
        row = await submit(request, "masks")
        return JSONResponse(video_object(service, row))

    @app.post("/v1/videos/sync", openapi_extra=video_body())
    async def create_video_and_wait(request: Request) -> Response:
        """Create a video job, wait for it and return the video file. If the client disconnects, the job continues."""
        row = await submit(request)
        async for kind, _ in _events(service, row, _owner(request)):
            if kind in ("completed", "failed", "deleted", "closing"):
                break
        row = service.job(row.id, _owner(request))
        if row.state == "failed":
            raise Refusal(422, str((row.result or {})["message"]), "video_failed")
        if row.state != "completed" or row.result is None:
            said = f"The service is stopping. {row.id} continues after the restart: ask for it then."
            raise Refusal(503, said, "stopping", retry_s=30)
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
        """Delete a job. A running job is cancelled within one denoising step."""
        await service.delete(video_id, _owner(request))
        return {"id": video_id, "object": "video.deleted", "deleted": True}


def _add_results(app: FastAPI, service: Service) -> None:
    @app.get("/v1/videos/{video_id}/content")
    @app.get("/v1/masks/{video_id}/content", include_in_schema=False)
    async def video_content(request: Request, video_id: str, variant: str = "video") -> Response:
        """Download the video, its run report, its thumbnail or sprite sheet, its masks or an input."""
        row = service.job(video_id, _owner(request))
        if variant not in VARIANTS:
            raise wrong(f"variant must be one of {', '.join(VARIANTS)}, not {variant[:80]}.", "variant")
        name, media_type = VARIANTS[variant]
        if not (variant.endswith("_reference") or variant.startswith("mask_")):
            if row.state == "failed":
                raise Refusal(422, str((row.result or {})["message"]), "video_failed")
            if row.state != "completed":
                raise Refusal(404, f"The video {row.id} is not finished yet. Try again later.", "not_done", retry_s=1)
            if name.endswith(".webp"):
                await asyncio.to_thread(_draw, variant, service.store.result(row, "video.mp4").with_name(name))
        path = await asyncio.to_thread(service.store.result, row, name)
        if not path.is_file():
            raise Refusal(404, f"{row.id} has no {variant}. Ask for another variant.", "not_found", param="variant")
        headers = {"cache-control": "private, no-store"}
        if media_type == "application/json":
            headers["content-disposition"] = f'attachment; filename="{row.id}.json"'
            return Response(service.without_places(row, path), media_type=media_type, headers=headers)
        return FileResponse(path, media_type=media_type, filename=f"{row.id}{path.suffix}", headers=headers)

    @app.get("/v1/videos/{video_id}/events")
    @app.get("/v1/masks/{video_id}/events", include_in_schema=False)
    async def video_events(request: Request, video_id: str) -> StreamingResponse:
        """Server-sent events: `progress` (phase, step, seconds left), `preview` (one JPEG per finished segment), and at
        the end one of `completed`, `failed` and `deleted` with the video object."""
        owner = _owner(request)
        row = service.job(video_id, owner)

        async def text() -> AsyncIterator[str]:
            async for kind, document in _events(service, row, owner):
                yield f"event: {kind}\ndata: {json.dumps(document)}\n\n" if kind else ": still here\n\n"

        return StreamingResponse(text(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _draw(variant: str, path: Path) -> None:
    """Make the thumbnail or sprite sheet of a video at `path`, unless the file exists."""
    if path.is_file():
        return
    from scail2_rt.runtime.serve import pictures

    data = getattr(pictures, variant)(path.with_name("video.mp4"))
    temporary = path.with_name(f".{new_id('')}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


async def _events(service: Service, row: JobRow, owner: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield (kind, document) until the job has ended, and ("", {}) after `KEEP_ALIVE_S` seconds without an event."""
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
                kind = "progress"  # the queue position may have changed
    finally:
        live.listeners.discard(heard)
        if not (live.listeners or live.worked_on) and service.live.get(row.id) is live:
            service.live.pop(row.id)


def _add_files(app: FastAPI, service: Service) -> None:
    store = service.store

    @app.post("/v1/files")
    async def create_file(request: Request) -> dict[str, Any]:
        """Upload a file that several jobs can use. Form fields: `file` and `purpose`."""
        owner = _owner(request)
        form = await receive(request, store.incoming, service.settings.limits)
        try:
            upload = form.files.get("file")
            if upload is None:
                raise wrong("The field file is missing. Send a file as multipart/form-data.", "file")
            purpose = str(dict(form.fields).get("purpose", "user_data"))[:40]
            most = service.settings.limits.file_bytes
            if store.file_bytes(owner) + upload.bytes > most:
                raise Refusal(413, f"Your files would take more than {most >> 20} MiB. Delete some.", "file_quota")
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
        """List the client's files. With `sha256`, only files with this hash."""
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
        """Delete a file. Jobs that use it keep their own link to it."""
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
        """Return `ok`: the server answers requests."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Return 200 if a worker has opened its engines and the disk has more than 256 MiB free, else 503."""
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
