"""Section `generate`: a whole generation from files to mp4, engines and prompt cache warm, with and without a memory
limit.

It goes through the pipeline that `scail2-rt generate` calls. A run of one step comes first, which loads, compiles and
reads; then whole runs are timed. Peak memory covers all of it, loading included.
"""

import time
from pathlib import Path

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.case import Job, engine_folder, job_of, run_job
from scail2_rt.engines.engine_set import Execution, open_engines
from scail2_rt.runtime.core.progress import SilentProgress

LIMIT_GIB = 12


def run(bench: Bench) -> None:
    job = job_of(bench)
    resident = f"generate/resident/{job.name}"
    limited = f"generate/limit-{LIMIT_GIB}GiB/{job.name}"
    with bench.attempt(resident):
        folder = engine_folder(bench)
        _measure(bench, resident, folder, job, None, bench.options.runs if bench.on_gpu else 1)
        if not bench.on_gpu:
            bench.skip(limited)
            return
    with bench.attempt(limited):
        _measure(bench, limited, engine_folder(bench), job, LIMIT_GIB << 30, 1)
        whole, part = bench.results.value(resident), bench.results.value(limited)
        row = bench.results.rows[limited]
        if whole and part:
            bench.add(limited, row.timing, "ours", row.note, breakdown=row.breakdown, **row.values, ratio=part / whole)


def _measure(bench: Bench, name: str, folder: Path, job: Job, limit: int | None, runs: int) -> None:
    execution = Execution(attention=bench.options.attention, vram_limit=limit)
    seconds, plan = [], job.plan()
    with bench.peaks() as peaks, open_engines(folder, "torch", execution) as engines:
        run_job(job.plan(steps=1), engines, SilentProgress(), job.folder)
        for _ in range(runs):
            progress = SilentProgress()
            started = time.perf_counter()
            memory = run_job(plan, engines, progress, job.folder)
            seconds.append(time.perf_counter() - started)
        attention = engines.attention
    timing = Timing.of(seconds)
    note = f"attention {attention}" + (f"; {memory}" if memory else "")
    bench.add(
        name,
        timing,
        note=note,
        fps=job.work.frames / timing.median_s,
        step_s=progress.timings.get("denoise", 0.0) / job.steps,
        breakdown=dict(progress.timings),
        **peaks,
    )
