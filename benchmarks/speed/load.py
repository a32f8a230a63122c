"""Section `load`: the time from an engine folder on disk, or from a request, to the first denoising step.

The time runs from the start of a fresh process to the end of the first step, minus the time of a later step. It covers
imports, checks, opening the folder, encoding references and driving clip, context keys and values, and loading the
transformer's weights. The folder's files are in the page cache and the prompt's encoding in the prompt cache. Processes
that verify no checksums alternate with the others. Times of processes vary more than verification costs, so the
transformer's weights are also loaded repeatedly in this process, with and without checksums.

Two more rows: `cold-kernels` is the same process with empty kernel caches (Triton, NVRTC, driver), so that every kernel
up to the first step is compiled. `warm-request` is the time from `check` to the end of the first step in a session that
has run before, with a new reference image and the same prompt and driving clip.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.harness import time_calls
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder, workload_of
from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.engines.folder.store import StoreReader
from scail2_rt.engines.torch_backend.engine import stage_tensors
from scail2_rt.engines.torch_backend.loading import Loading, WeightLoader
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.core.request import Output
from scail2_rt.runtime.session.session import Session

LIMIT_S = 600
AHEAD = 16  # stages loading concurrently, so that the readers never wait
DETAILS = ("import_s", "checked_s", "opened_s", "first_step_done_s", "warm_step_s")


def run(bench: Bench) -> None:
    if bench.wants("load/first-step") or bench.wants("load/first-step-unchecked"):
        first_step(bench)
    if bench.wants("load/weights"):
        with bench.attempt("load/weights"):
            weights(bench)
    if bench.wants("load/cold-kernels"):
        if bench.on_gpu:
            with bench.attempt("load/cold-kernels"):
                cold_kernels(bench)
        else:
            bench.skip("load/cold-kernels")
    if bench.wants("load/warm-request"):
        with bench.attempt("load/warm-request"):
            warm_request(bench)


def first_step(bench: Bench) -> None:
    with bench.attempt("load/first-step"):
        folder, workload = engine_folder(bench), workload_of(bench)
        workload.request()  # draws the case
        bench.free()
        fresh_process(folder, workload)  # page cache, prompt cache, compiled kernels
        found, unchecked = [], []
        for _ in range(max(3, bench.options.runs) if bench.on_gpu else 1):
            if bench.wants("load/first-step-unchecked"):
                unchecked.append(fresh_process(folder, workload, checked=False))
            found.append(fresh_process(folder, workload))
        middle = sorted(found, key=to_first_step)[len(found) // 2]
        phases = {name.removeprefix("phase_"): value for name, value in middle.items() if name.startswith("phase_")}
        timing, check_percent = Timing.of(map(to_first_step, found)), None
        if unchecked:
            without = Timing.of(map(to_first_step, unchecked))
            bench.add("load/first-step-unchecked", without, "baseline", note="checksums not verified")
            check_percent = 100 * (timing.median_s / without.median_s - 1)
        bench.add(
            "load/first-step",
            timing,
            note=f"fresh process, {folder_gib(folder):.1f} GiB, files in page cache",
            breakdown=phases,
            check_percent=check_percent,
            **details(middle),
        )


def cold_kernels(bench: Bench) -> None:
    """One fresh process without compiled kernels: a second one would find the first one's in the driver's memory."""
    folder, workload = engine_folder(bench), workload_of(bench)
    workload.request()
    with tempfile.TemporaryDirectory() as empty:
        times = fresh_process(folder, workload, caches=Path(empty))
    phases = {name.removeprefix("phase_"): value for name, value in times.items() if name.startswith("phase_")}
    note = "kernel caches empty, page cache warm"
    bench.add("load/cold-kernels", Timing.of([to_first_step(times)]), note=note, breakdown=phases, **details(times))


def warm_request(bench: Bench) -> None:
    """Measure the time from `check` to the first step, with a reference image that differs from the previous one in a
    single pixel. Each run is cancelled after that step, which leaves the session usable."""
    workload = workload_of(bench)
    request = workload.request()
    with Image.open(cast(Path, request.image)) as file:
        image = np.array(file.convert("RGB"))
    seconds = []
    with workload.open(engine_folder(bench)) as session:
        session.generate(session.check(workload.request(steps=2)), workload.output)
        for number in range(bench.options.runs if bench.on_gpu else 1):
            image[0, 0] = number
            if bench.on_gpu:
                torch.cuda.synchronize()  # the step that was queued when the previous run was cancelled
            started = time.perf_counter()
            plan = session.check(replace(request, image=image.copy()))
            checked = time.perf_counter()
            seconds.append(_to_first_step(session, plan, workload.output) - started)
        phases = {"check": checked - started, **session.timings}
    note = "warm session, cached prompt, new reference image"
    bench.add("load/warm-request", Timing.of(seconds), note=note, breakdown=phases)


def _to_first_step(session: Session, plan: Plan, output: Output) -> float:
    """Run a plan up to its first step. Returns when that was done, on the clock of `time.perf_counter`."""
    cancel, done_s = threading.Event(), list[float]()

    def on_progress(event: Progress) -> None:
        if event.step and not cancel.is_set():
            done_s.append(time.perf_counter())
            cancel.set()

    with contextlib.suppress(Cancelled):
        session.generate(plan, output, on_progress, cancel)
    return done_s[0]


def weights(bench: Bench) -> None:
    """Measure loading the transformer's weights from the page cache to the device, alternately with and without
    checksums."""
    with open_engines(engine_folder(bench), "torch", device=bench.device.type) as engines:
        stages = [name for name in engines.definitions if name.startswith("dit.")]
        names = {True: "load/weights", False: "load/weights-unchecked"}
        calls: dict[str, Callable[[], object]] = {
            name: partial(load_all, engines, stages, checked) for checked, name in names.items()
        }
        timings = time_calls(calls, bench.device, bench.options.runs)
        size = sum(engines.store.layout.stage_bytes(stage) for stage in stages)
    whole, without = (timings[name] for name in names.values())
    bench.add(names[False], without, "baseline", "checksums not verified", gb_s=size / without.median_s / 1e9)
    share = 100 * (whole.median_s / without.median_s - 1)
    note = f"{size / 2**30:.1f} GiB, files in page cache"
    bench.add(names[True], whole, note=note, gb_s=size / whole.median_s / 1e9, check_percent=share)


def load_all(engines: EngineSet, stages: Sequence[str], checked: bool) -> None:
    """Load stages and drop them, `AHEAD` concurrently. checked: verify checksums."""
    store = engines.store
    assert isinstance(store, StoreReader)
    checker, store.checker = store.checker, store.checker if checked else None
    loader = WeightLoader(store, engines.device)
    coming: deque[Loading] = deque()
    try:
        for stage in stages:
            if len(coming) == AHEAD:
                coming.popleft().wait()
            coming.append(loader.start(stage, stage_tensors(engines.definitions[stage], engines.numerics(stage))))
        while coming:
            coming.popleft().wait()
    finally:
        loader.close()
        store.checker = checker


def to_first_step(times: Mapping[str, float]) -> float:
    """Seconds to the end of the first step, minus a step without loading."""
    return times["first_step_done_s"] - times["warm_step_s"]


def details(times: Mapping[str, float]) -> dict[str, Any]:
    return {name: times[name] for name in DETAILS}


def fresh_process(
    folder: Path, workload: Workload, checked: bool = True, caches: Path | None = None
) -> dict[str, float]:
    """Run `first_step` in a fresh process and return its times in seconds. caches: folder for compiled kernels, instead
    of the one in the engine folder. Raises Scail2Error if the process fails."""
    names = ("TRITON_CACHE_DIR", "SCAIL2_RT_KERNELS", "CUDA_CACHE_PATH")
    environment = os.environ | ({} if caches is None else dict.fromkeys(names, str(caches)))
    words = [
        sys.executable,
        "-m",
        "scail2_rt.benchmarks.speed.first_step",
        str(folder),
        str(workload.folder),
        str(workload.work),
    ]
    words += [str(time.time()), "checked" if checked else "unchecked"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Scail2Error(f"The process that loads the engines failed: {last[0]}")
    times: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return times


def folder_gib(folder: Path) -> float:
    """The size of a folder in GiB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30
