"""Section `generate`: a complete generation from files to mp4, with and without a GPU memory limit.

It uses a session, as `scail2-rt generate` does. A first run of one step loads weights, compiles and fills the caches;
then complete runs are timed. Peak memory includes loading. For several segments the overhead per segment is reported:
the time of a segment minus its steps (decoding, encoding the overlap for the next segment, recording a CUDA graph).
"""

import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder, workload_of
from scail2_rt.engines.engine_set import Execution
from scail2_rt.runtime.core.progress import Progress

LIMIT_GIB = 12


def run(bench: Bench) -> None:
    workload = workload_of(bench)
    gpus = f"-{bench.options.gpus}gpus" if bench.options.gpus > 1 else ""
    resident = f"generate/resident{gpus}/{workload.name}"
    limited = f"generate/limit-{LIMIT_GIB}GiB/{workload.name}"
    if bench.wants(resident):
        with bench.attempt(resident):
            folder = engine_folder(bench)
            _measure(bench, resident, folder, workload, None, bench.options.runs if bench.on_gpu else 1)
    if not bench.wants(limited) or bench.options.gpus > 1:
        return
    if not bench.on_gpu:
        bench.skip(limited)
        return
    with bench.attempt(limited):
        _measure(bench, limited, engine_folder(bench), workload, LIMIT_GIB << 30, 1)
        whole, part = bench.results.value(resident), bench.results.value(limited)
        row = bench.results.rows[limited]
        if whole and part:
            bench.add(limited, row.timing, "ours", row.note, breakdown=row.breakdown, **row.values, ratio=part / whole)


class StepClock:
    """A progress listener that records the end of each step. done_s: (segment, step), both from 1 → seconds."""

    def __init__(self) -> None:
        self.done_s: dict[tuple[int, int], float] = {}

    def __call__(self, event: Progress) -> None:
        if event.step:
            self.done_s.setdefault((event.segment, event.step), time.perf_counter())

    @property
    def step_s(self) -> float | None:
        """Median seconds per step, within segments; None if no segment has two steps."""
        gaps = [b - a for (one, a), (other, b) in pairwise(self.done_s.items()) if one[0] == other[0]]
        return median(gaps) if gaps else None

    @property
    def segment_overhead_s(self) -> float | None:
        """Mean seconds of a segment after the first, minus its steps; None for a clip of one segment."""
        last = {segment: time_s for (segment, _), time_s in self.done_s.items()}
        steps = max((step for _, step in self.done_s), default=0)
        if len(last) < 2 or self.step_s is None:
            return None
        return mean(b - a for a, b in pairwise(last.values())) - steps * self.step_s


def _measure(bench: Bench, name: str, folder: Path, workload: Workload, limit: int | None, runs: int) -> None:
    execution = Execution(attention=bench.options.attention, vram_limit=limit)
    seconds: list[float] = []
    with bench.peaks() as peaks, workload.open(folder, execution, bench.options.gpus) as session:
        session.generate(session.check(workload.request(steps=1)), workload.output)
        plan = session.check(workload.request())
        for _ in range(runs):
            clock, started = StepClock(), time.perf_counter()
            result = session.generate(plan, workload.output, clock)
            seconds.append(time.perf_counter() - started)
        graphs, attention = session.constants.graphs_recorded, session.engines.attention
    assert plan.estimate is not None
    timing = Timing.of(seconds)
    note = f"attention {attention}; graphs recorded: {graphs}"
    bench.add(
        name,
        timing,
        note=f"{note}; {plan.estimate.placement}" if plan.estimate.placement else note,
        fps=workload.frames / timing.median_s,
        step_s=clock.step_s,
        segment_overhead_s=clock.segment_overhead_s,
        estimated_peak_gib=plan.estimate.peak / 2**30,
        breakdown=dict(result.timings),
        **peaks,
    )
