"""Section `grid`: seconds, fps and peak memory of a generation for every size, schedule and GPU memory limit.

Each cell is a generation from files to mp4 through one warm session. A schedule with more steps than `--measure` is run
with that many, and its seconds are computed: the measured ones plus the missing steps at the measured seconds per
step. Memory does not depend on the number of steps. Computed cells are marked in the table and in their rows' notes;
those that differ only in the number of missing steps share one run.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scail2_rt.benchmarks.report.record import Row, Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.generate import StepClock
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder
from scail2_rt.engines.engine_set import Execution
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.session.session import Session

HEADINGS = ("size", "GPU memory limit", "steps", "guidance", "seconds", "fps", "peak GiB", "how")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Denoising steps, and the guidance scale; 1 means one transformer pass per step, more means two."""

    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.steps}steps" + ("" if self.guidance == 1 else f"-guidance{self.guidance:g}")


def parse_schedules(text: str) -> tuple[Schedule, ...]:
    """`4,6,40:5`: 4 and 6 steps without guidance, 40 with guidance 5. Raises InputError for anything else."""
    found = []
    for part in text.split(","):
        steps, _, guidance = part.strip().partition(":")
        try:
            found.append(Schedule(int(steps), float(guidance or 1)))
        except ValueError:
            raise InputError(f"--steps: {part!r} is not STEPS or STEPS:GUIDANCE, as in 4,6,40:5.") from None
        if found[-1].steps < 1 or found[-1].guidance < 1:
            raise InputError(f"--steps: {part!r} needs at least 1 step and a guidance of at least 1.")
    return tuple(found)


def parse_limits(text: str) -> tuple[int | None, ...]:
    """`none,24,16`: no limit, 24 and 16 GiB. Raises InputError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part != "none" and not (part.isdecimal() and int(part)):
            raise InputError(f"--limits: {part!r} is neither none nor a number of GiB, as in none,24,16,12.")
    return tuple(None if part == "none" else int(part) for part in parts)


def run(bench: Bench) -> None:
    options = bench.options
    schedules, limits = parse_schedules(options.steps), parse_limits(options.limits)
    folder = engine_folder(bench)
    for work in options.sizes:
        for limit in limits:
            label = f"grid/{work}/" + ("resident" if limit is None else f"limit-{limit}GiB")
            if limit is not None and not bench.on_gpu:
                bench.skip(label)
                continue
            with bench.attempt(label):
                workload = Workload(work, 1, options.work)
                execution = Execution(attention=options.attention, vram_limit=None if limit is None else limit << 30)
                with workload.open(folder, execution, options.gpus) as session:
                    session.generate(session.check(workload.request()), workload.output)  # loads and compiles
                    runs: dict[Schedule, Run] = {}
                    for schedule in schedules:
                        with bench.attempt(f"{label}/{schedule}"):
                            steps = max(2, min(schedule.steps, options.measure))  # a step's time needs two
                            short = Schedule(steps, schedule.guidance)
                            if short not in runs:
                                runs[short] = _run(bench, session, workload, short)
                            _add_cell(bench, f"{label}/{schedule}", runs[short], schedule.steps - steps)


@dataclass(frozen=True, slots=True)
class Run:
    """A measured generation: its frames and schedule, seconds in total and per step, and its GPU memory in GiB."""

    frames: int
    schedule: Schedule
    seconds: float
    step_s: float
    memory: Mapping[str, Any]


def _run(bench: Bench, session: Session, workload: Workload, schedule: Schedule) -> Run:
    """Generate once with this schedule and measure it."""
    plan = session.check(replace(workload.request(schedule.steps), guidance=schedule.guidance))
    with bench.peaks() as peaks:
        clock, started = StepClock(), time.perf_counter()
        session.generate(plan, workload.output, clock)
        seconds = time.perf_counter() - started
    assert plan.estimate is not None
    assert clock.step_s is not None
    memory = {"estimated_peak_gib": plan.estimate.peak / 2**30, **peaks}
    return Run(workload.frames, schedule, seconds, clock.step_s, memory)


def _add_cell(bench: Bench, name: str, run: Run, missing: int) -> None:
    """Add a row for the run's schedule with `missing` steps more."""
    seconds = run.seconds + missing * run.step_s
    bench.add(
        name,
        Timing.of([seconds]),
        note=f"computed from {run.schedule.steps} steps" if missing else "",
        fps=run.frames / seconds,
        step_s=run.step_s,
        guidance=run.schedule.guidance,
        **run.memory,
    )


def grid_table(rows: Iterable[Row]) -> str:
    """The cells as a table in Markdown; those that were not measured say why."""
    lines: list[tuple[str, ...]] = [HEADINGS, tuple("---" for _ in HEADINGS)]
    for row in rows:
        if row.section != "grid":
            continue
        _, size, limit, *schedule = row.name.split("/")
        limit = limit.removeprefix("limit-").replace("GiB", " GiB").replace("resident", "none")
        if row.timing is None:
            lines.append((size, limit, *schedule, *[""] * (5 - len(schedule)), row.failure or row.note))
            continue
        peak = row.values.get("driver_peak_gib")
        steps = schedule[0].partition("steps")[0]
        figures = (f"{row.timing.median_s:.1f}", f"{row.values['fps']:.2f}", "" if peak is None else f"{peak:.1f}")
        lines.append((size, limit, steps, f"{row.values['guidance']:g}", *figures, row.note or "measured"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
