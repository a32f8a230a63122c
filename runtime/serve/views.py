"""The JSON documents that describe jobs and files in the interface."""

from fractions import Fraction
from typing import Any

from scail2_rt.runtime.serve.service import Live, Service
from scail2_rt.runtime.serve.store import FileRow, JobRow

POLL_MS = 1000


def video_object(service: Service, row: JobRow, place: int | None = None) -> dict[str, Any]:
    """OpenAI's `video` object with further entries of this service. place: number of queued jobs before it, if
    known."""
    live, result = service.live.get(row.id), row.result or {}
    status = {"running": "in_progress" if live is not None and live.started else "queued"}.get(row.state, row.state)
    facts, options = row.request["facts"], row.request["options"]
    seconds = float(facts["frames"] / Fraction(facts["frame_rate"]))
    document = {
        "id": row.id,
        "object": "masks" if row.id.startswith("masks_") else "video",
        "model": service.settings.model,
        "status": status,
        "progress": 100 if row.state == "completed" else _percent(live),
        "created_at": int(row.created_at),
        "started_at": row.started_at and int(row.started_at),
        "completed_at": int(row.completed_at) if row.state == "completed" and row.completed_at else None,
        "expires_at": int(row.completed_at + service.settings.keep_s) if row.completed_at else None,
        "prompt": options.get("prompt", ""),
        "size": f"{facts['width']}x{facts['height']}",
        "seconds": f"{seconds:g}",
        "remixed_from_video_id": None,
        "error": None,
        "frames": facts["frames"],
        "frame_rate": facts["frame_rate"],
        "mode": facts["mode"],
        "framing": facts["framing"],
        "segments": facts["segments"],
        "options": options,
        "warnings": list(result.get("warnings", facts["warnings"])),
    }
    if status == "queued":
        document["queue_position"] = 0 if row.state == "running" else _place(service, row, place)
    if row.state == "running" and live is not None:
        document |= {name: live.progress.get(name) for name in ("phase", "segment", "step", "steps", "seconds_left")}
    if row.state == "failed":
        code = {"input": "invalid_input", "memory": "out_of_memory", "crash": "worker_died"}.get(
            result["kind"], "fault"
        )
        document["error"] = {"code": code, "message": result["message"]}
    if row.state == "completed":
        document |= {
            "inference_time_s": result["inference_s"],
            "stage_durations": result["timings_s"],
            "peak_memory_mb": peak_mb(result),
        }
        document |= {name: result[name] for name in ("characters", "notes") if name in result}
    return document


def _place(service: Service, row: JobRow, place: int | None) -> int:
    """The number of queued and running jobs before this one."""
    waiting = service.store.place(row) if place is None else place
    return waiting + service.pool.busy


def _percent(live: Live | None) -> int:
    return min(99, int(100 * live.progress.get("fraction", 0.0))) if live is not None else 0


def peak_mb(result: Any) -> int | None:
    """The peak memory of a job in MiB: GPU memory, or on the CPU the worker's host memory; None if not measured."""
    memory = result.get("memory", {})
    found = memory.get("device_allocator_peak_gib", memory.get("host_peak_gib"))
    return None if found is None else round(found * 1024)


def file_object(row: FileRow) -> dict[str, Any]:
    """OpenAI's `file` object, with the SHA-256 of the content."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
        "sha256": row.sha256,
    }


def page_of(documents: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list object with at most `limit` documents. `documents` has up to `limit` + 1; the last one only shows
    that there are more."""
    shown = documents[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(documents) > limit,
    }
