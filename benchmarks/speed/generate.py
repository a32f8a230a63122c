"""Section `generate`: a whole generation from files to mp4, engines and prompt cache warm, with and without a memory
limit.

It goes through the pipeline that `scail2-rt generate` calls. A run of one step comes first, which loads, compiles and
reads; then whole runs are timed. Peak memory covers all of it, loading included.
"""

import time
from pathlib import Path

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder, run_workload, workload_of
from scail2_rt.engines.engine_set import Execution, open_engines
from scail2_rt.runtime.core.progress import SilentProgress

LIMIT_GIB = 12


def run(bench: Bench) -> None:
    workload = workload_of(bench)
    resident = f"generate/resident/{workload.name}"
    limited = f"generate/limit-{LIMIT_GIB}GiB/{workload.name}"
    with bench.attempt(resident):
        folder = engine_folder(bench)
        _measure(bench, resident, folder, workload, None, bench.options.runs if bench.on_gpu else 1)
        if not bench.on_gpu:
            bench.skip(limited)
            return
    with bench.attempt(limited):
        _measure(bench, limited, engine_folder(bench), workload, LIMIT_GIB << 30, 1)
        whole, part = bench.results.value(resident), bench.results.value(limited)
        row = bench.results.rows[limited]
        if whole and part:
            bench.add(limited, row.timing, "ours", row.note, breakdown=row.breakdown, **row.values, ratio=part / whole)


def _measure(bench: Bench, name: str, folder: Path, workload: Workload, limit: int | None, runs: int) -> None:
    execution = Execution(attention=bench.options.attention, vram_limit=limit)
    seconds, plan = [], workload.plan()
    with bench.peaks() as peaks, open_engines(folder, "torch", execution) as engines:
        run_workload(workload.plan(steps=1), engines, SilentProgress(), workload.folder)
        for _ in range(runs):
            progress = SilentProgress()
            started = time.perf_counter()
            memory = run_workload(plan, engines, progress, workload.folder)
            seconds.append(time.perf_counter() - started)
        attention = engines.attention
    timing = Timing.of(seconds)
    note = f"attention {attention}" + (f"; {memory}" if memory else "")
    bench.add(
        name,
        timing,
        note=note,
        fps=workload.work.frames / timing.median_s,
        step_s=progress.timings.get("denoise", 0.0) / workload.steps,
        breakdown=dict(progress.timings),
        **peaks,
    )
