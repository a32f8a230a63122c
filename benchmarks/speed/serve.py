"""Section `serve`: the overhead of the service over a session, and its response times under load.

A service is started with the engines on a free loopback port, warmed up with one video, and stopped at the end.
Measured are: the time from the request to the first denoising step, with stored inputs and a cached prompt; the time of
a video, compared with the same request in a session of this process; the time from the start of `generate --server` to
the first step; status requests of `--clients` clients that poll every five seconds while jobs run; and, with `--queued`
jobs, the growth of the server's memory and the time for a page of the list.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.polling import POLL_S, poll
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder, workload_of
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.serve.fields import REFERENCES
from scail2_rt.runtime.serve.wire import Wire
from scail2_rt.runtime.session.report import file_hash

START_S, POLLED_S = 300, 20.0
COMMAND = (sys.executable, "-m", "scail2_rt.runtime.cli.main")


def run(bench: Bench) -> None:
    names = [f"serve/{name}" for name in ("first-step", "video", "command-first-step", "status", "queue")]
    if missing := [
        name for name in ("fastapi", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None
    ]:
        for name in names:
            bench.skip(name, f"not measured: needs {', '.join(missing)} (extra serve)")
        return
    folder, workload = engine_folder(bench), workload_of(bench)
    own: float | None = None
    videos_wanted = bench.wants("serve/first-step") or bench.wants("serve/video")
    if videos_wanted:
        with bench.attempt("serve/own-session"):
            own = own_session(bench, folder, workload)
    with running(bench, folder, workload) as (wire, server):
        body = body_of(wire, workload.request())
        finish(wire, wire.ask("POST", "/v1/videos", body)["id"])
        if videos_wanted:
            with bench.attempt("serve/first-step"):
                videos(bench, wire, body, own, workload)
        others: dict[str, Callable[[], None]] = {
            "serve/command-first-step": lambda: command(bench, wire, workload),
            "serve/status": lambda: status(bench, wire, body),
            "serve/queue": lambda: queue(bench, wire, server, body),
        }
        for name, measure in others.items():
            if bench.wants(name):
                with bench.attempt(name):
                    measure()


def own_session(bench: Bench, folder: Path, workload: Workload) -> float:
    """Measure the same video in a warmed-up session of this process. Returns the median in seconds."""
    with workload.open(folder) as session:
        session.generate(session.check(workload.request()), workload.output)
        seconds = []
        for _ in range(bench.options.runs):
            began = time.perf_counter()
            session.generate(session.check(workload.request()), workload.output)
            seconds.append(time.perf_counter() - began)
    timing = Timing.of(seconds)
    bench.add("serve/own-session", timing, "baseline", note="check and generate in a warmed-up session")
    return timing.median_s


@contextlib.contextmanager
def running(bench: Bench, folder: Path, workload: Workload) -> Iterator[tuple[Wire, int]]:
    """Start a service with the engine folder; yields (its connection, its process id). Raises Scail2Error if it does
    not start."""
    data = bench.options.work / f"serve-{os.getpid()}"
    words = ["serve", str(folder), "--backend", "torch", "--gpus", "1", "--port", "0", "--data", str(data)]
    words += ["--max-queue", "100000", "--max-queue-per-key", "100000"]
    environment = {**os.environ, "SCAIL2_RT_CACHE": str(workload.folder / "serve-cache")}
    with (bench.options.work / "serve.log").open("w") as log:
        process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        alarm = threading.Timer(START_S, process.kill)
        alarm.start()
        url = process.stdout.readline().strip()
        alarm.cancel()
        try:
            if not url:
                raise Scail2Error(f"The service did not start. Read {log.name}.")
            yield Wire(url, None), process.pid
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def body_of(wire: Wire, request: Request) -> dict[str, Any]:
    """The JSON body of a request; its inputs are uploaded to the service."""
    files = {name: getattr(request, field) for name, field in REFERENCES.items()}
    kept = {name: {"file_id": wire.keep(Path(str(path)), file_hash(Path(str(path))))} for name, path in files.items()}
    same = ("prompt", "scheduler", "steps", "shift", "guidance", "segment_length", "segment_overlap", "seed")
    assert request.size is not None
    size = f"{request.size[1]}x{request.size[0]}"
    return {**kept, "size": size, **{name: getattr(request, name) for name in same}}


def watch(wire: Wire, video_id: str, began: float) -> tuple[float, float, Mapping[str, Any]]:
    """Follow a job to its end. Returns (seconds from `began` to the start of its first step, seconds from `began` to
    its end, the video object). Raises Scail2Error if it fails."""
    first: float | None = None
    for kind, video in wire.events(f"/v1/videos/{video_id}/events"):
        now = time.perf_counter() - began
        if kind == "completed":
            return first or now, now, video
        if kind in ("failed", "deleted"):
            raise Scail2Error(f"The job ended as {kind}: {video.get('error')}")
        if first is None and video.get("status") == "in_progress":
            first = now
    raise Scail2Error("The event stream ended before the job. Read the service's log.")


def finish(wire: Wire, video_id: str) -> None:
    watch(wire, video_id, time.perf_counter())
    wire.ask("DELETE", f"/v1/videos/{video_id}")


def videos(bench: Bench, wire: Wire, body: Mapping[str, Any], own: float | None, workload: Workload) -> None:
    first, whole = [], []
    for seed in range(bench.options.runs):
        began = time.perf_counter()
        video = wire.ask("POST", "/v1/videos", {**body, "seed": seed})
        step, end, done = watch(wire, video["id"], began)
        first.append(step)
        whole.append(end)
        wire.ask("DELETE", f"/v1/videos/{video['id']}")
    bench.add(
        "serve/first-step",
        Timing.of(first),
        note="from request to first step; inputs stored, prompt cached",
        breakdown=done["stage_durations"],
    )
    timing = Timing.of(whole)
    bench.add(
        "serve/video",
        timing,
        note=f"from request to end, {workload.name}",
        inference_s=done["inference_time_s"],
        percent_over_session=None if own is None else 100 * (timing.median_s / own - 1),
    )


def command(bench: Bench, wire: Wire, workload: Workload) -> None:
    """Measure `generate --server` in fresh processes, from the start of the process to the first step of its job."""
    request, seconds = workload.request(), []
    words: list[Any] = ["generate", "--server", wire.url, "--image", request.image, "--mask-image", request.mask_image]
    words += ["--driving", request.driving, "--mask-video", request.mask_video, "--prompt", request.prompt]
    words += ["--size", f"{request.size[0]}x{request.size[1]}" if request.size else "", "--steps", request.steps]
    words += ["--scheduler", request.scheduler, "--shift", request.shift, "--guidance", request.guidance]
    words += ["--segment-length", request.segment_length, "--overwrite", "-o", workload.folder / "command.mp4"]
    for _ in range(bench.options.runs):
        began = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            listed = wait_for(lambda: wire.ask("GET", "/v1/videos?limit=1")["data"])
            seconds.append(watch(wire, listed[0]["id"], began)[0])
            _, said = process.communicate(timeout=START_S)
        finally:
            process.kill()
        if process.returncode:
            raise Scail2Error(f"The command failed: {said.strip().splitlines()[-1]}")
        wire.ask("DELETE", f"/v1/videos/{listed[0]['id']}")
    bench.add(
        "serve/command-first-step", Timing.of(seconds), note="from the start of `generate --server`, fresh process"
    )


def wait_for(found: Callable[[], Any]) -> Any:
    """Call `found` until its result is true and return that. Raises Scail2Error after `START_S` seconds."""
    deadline = time.monotonic() + START_S
    while not (answer := found()):
        if time.monotonic() > deadline:
            raise Scail2Error(f"The service did not answer within {START_S} s. Read its log.")
        time.sleep(0.005)
    return answer


def status(bench: Bench, wire: Wire, body: Mapping[str, Any]) -> None:
    """Measure status requests while one job runs and others are queued."""
    made = [wire.ask("POST", "/v1/videos", {**body, "steps": 1000})["id"] for _ in range(10)]
    wait_for(lambda: wire.ask("GET", f"/v1/videos/{made[0]}")["status"] == "in_progress")
    latencies = poll(wire.url, [f"/v1/videos/{video_id}" for video_id in made], bench.options.clients, POLLED_S)
    for video_id in made[::-1]:
        wire.ask("DELETE", f"/v1/videos/{video_id}")
    ordered = sorted(latencies)
    bench.add(
        "serve/status",
        Timing.of(latencies),
        note=f"{bench.options.clients} clients poll every {POLL_S:g} s while a job runs",
        p99_ms=1000 * ordered[int(0.99 * (len(ordered) - 1))],
        worst_ms=1000 * ordered[-1],
        requests=len(ordered),
    )


def queue(bench: Bench, wire: Wire, server: int, body: Mapping[str, Any]) -> None:
    """Measure a long queue behind a running job."""
    made = [wire.ask("POST", "/v1/videos", {**body, "steps": 1000})["id"]]
    for _ in range(50):  # the first requests load modules, which must not count as growth
        made.append(wire.ask("POST", "/v1/videos", body)["id"])
        wire.ask("GET", "/v1/videos?limit=100")
    before = resident_mb(server)
    began = time.perf_counter()
    made += [wire.ask("POST", "/v1/videos", body)["id"] for _ in range(bench.options.queued)]
    taken = time.perf_counter() - began
    seconds, after = [], ""
    for _ in range(max(10, bench.options.runs)):
        began = time.perf_counter()
        page = wire.ask("GET", f"/v1/videos?limit=100{after}")
        seconds.append(time.perf_counter() - began)
        after = f"&after={page['last_id']}" if page["has_more"] else ""
    growth = resident_mb(server) - before
    for video_id in made[::-1]:
        wire.ask("DELETE", f"/v1/videos/{video_id}")
    timing = Timing.of(seconds)
    bench.add(
        "serve/queue",
        timing,
        note=f"a page of 100 of {bench.options.queued} queued jobs",
        worst_ms=1000 * max(seconds),
        growth_mb=growth,
        taken_per_s=bench.options.queued / taken,
    )


def resident_mb(process: int) -> float:
    """Resident memory of a process in MiB, from /proc; 0 on other systems."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0
