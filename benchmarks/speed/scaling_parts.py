"""The parts of `bench scaling`: `python -m scail2_rt.benchmarks.speed.scaling_parts PART CONFIG GPUS WORK FIGURES`.

One GPU and several are measured alternately in the leading process (rank 0); the other ranks wait while it computes
alone. Both use the same weights (drawn from the same seeds) and inputs. `difference` is the relative Frobenius error of
the velocity of several GPUs against that of one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scail2_rt.benchmarks.speed.breakdown import gpu_breakdown
from scail2_rt.benchmarks.speed.forward import step
from scail2_rt.benchmarks.speed.harness import synchronise, time_sample
from scail2_rt.benchmarks.speed.models import SMALL, STANDARD, Work
from scail2_rt.benchmarks.speed.random_folder import write_random_folder
from scail2_rt.benchmarks.speed.random_weights import random_on
from scail2_rt.benchmarks.speed.scaling import save, scaled
from scail2_rt.benchmarks.speed.workload import Workload
from scail2_rt.engines.engine_set import EngineSet, Execution
from scail2_rt.export.models.precision import Precision
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.distributed.leading import LeadingConstants
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.vae import decode_unclamped
from scail2_rt.runtime.session.session import Session

COMPUTED = (4, 8)


class Figures:
    """The values measured so far by a part; saved after every `add`."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, dict[str, Any]()

    def add(self, name: str, value: Any) -> None:
        self.values[name] = value
        save(self.path, self.values)
        print(name, json.dumps(value), flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an exception inside as the value `name`, so that the part continues."""
        try:
            yield
        except Exception as error:
            self.add(name, {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


class Setting:
    """The context of a part: model, number of GPUs, work folder, device, sizes, steps and runs."""

    def __init__(self, config: str, gpus: int, work: Path, figures: Figures) -> None:
        self.config, self.gpus, self.work, self.figures = config, gpus, work, figures
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.tiny = config == "tiny"
        self.sizes = (SMALL,) if self.tiny else STANDARD[:2]
        self.steps = (2, 1) if self.tiny else (6, 4)
        self.runs = 1 if self.tiny else 2


def forward(setting: Setting, precision: Precision) -> None:
    """Measure a denoising step on one GPU and on several: one pass; in fp8 also two guidance passes and other sizes."""
    opener = partial(random_on, setting.config, precision, Execution())
    with torch.inference_mode(False), torch.no_grad(), opener(setting.device) as engines:
        team = Team(setting.gpus, setting.device, opener)
        team.start()
        first, *others = setting.sizes
        jobs = [(f"{precision}/{first.tokens}", first, 1)]
        if precision == "fp8":
            jobs += [(f"guidance/{precision}/{first.tokens}", first, 2)]
            jobs += [(f"{precision}/{work.tokens}", work, 1) for work in others]
        try:
            for name, work, passes in jobs:
                with setting.figures.attempt(name):
                    _compare(setting, engines, team, name, work, passes, thorough=name == jobs[0][0])
                if setting.device.type == "cuda":
                    torch.cuda.empty_cache()
        finally:
            team.close()


def _compare(
    setting: Setting, engines: EngineSet, team: Team, name: str, work: Work, passes: int, thorough: bool
) -> None:
    """Measure one row of `forward`. thorough: `setting.runs` samples instead of one, and on a GPU a breakdown."""
    alone = step(engines, work.layout, Constants(engines), passes)
    shared = step(engines, work.layout, LeadingConstants(engines, team), passes)
    calls = {"alone": alone, "shared": shared}
    results = {key: [velocity.double() for velocity in call()] for key, call in calls.items()}  # compiles and loads
    figures: dict[str, Any] = {"difference": _difference(results["shared"], results["alone"])}
    setting.figures.add(name, figures)
    for call in calls.values():
        call()  # records the CUDA graph
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(setting.runs if thorough else 1):
        for key, call in calls.items():
            seconds[key].append(time_sample(call, setting.device))
            figures |= {f"{key}_s": median(seconds[key]), f"{key}_all_s": seconds[key]}
            setting.figures.add(name, figures)
    figures |= {"speedup": figures["alone_s"] / figures["shared_s"]}
    figures |= {"difference_recorded": _difference([v.double() for v in shared()], results["alone"])}
    setting.figures.add(name, figures)
    figures |= {"collectives": _collectives(setting, team, shared)}
    setting.figures.add(name, figures)
    if setting.device.type == "cuda" and thorough:
        parts, unknown = gpu_breakdown(shared)
        parts_alone, _ = gpu_breakdown(alone)
        figures |= {"parts": parts, "parts_alone": parts_alone, "unknown": unknown}
        if parts and parts_alone:
            figures |= {f"{n}_gpus": scaled(parts_alone, parts, setting.gpus, n) for n in COMPUTED}
        setting.figures.add(name, figures)


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The relative Frobenius error of a list of velocities."""
    error = sum((a - b).square().sum().item() for a, b in zip(ours, theirs, strict=True))
    return (error / sum(b.square().sum().item() for b in theirs)) ** 0.5


def _collectives(setting: Setting, team: Team, call: Callable[[], list[Tensor]]) -> dict[str, Any]:
    """Kind of collective → count, bytes and seconds in one call. Seconds are measured on the stream, from the start to
    the end of a collective, and include waiting for other ranks. CUDA graphs are disabled for this call, because times
    cannot be taken inside a graph."""
    transformer = call.func.__self__  # type: ignore[attr-defined]
    graph, transformer._graph = transformer._graph, None
    try:
        with team.groups.watched() as seen:
            call()
            synchronise(setting.device)
        return {
            kind: {"count": len(rows), "bytes": sum(b for b, _ in rows), "seconds": sum(s() for _, s in rows)}
            for kind, rows in seen.items()
        }
    finally:
        transformer._graph = graph


def generate(setting: Setting) -> None:
    """Measure complete generations from files to mp4, on several GPUs first. Each session is warmed up with a
    generation of one step."""
    folder = _folder(setting)
    work = setting.sizes[0]
    for gpus in (setting.gpus, 1):
        with setting.figures.attempt(f"{gpus}gpus"), _session(setting, folder, gpus) as session:
            started = time.perf_counter()
            workload = Workload(work, setting.steps[0], setting.work)
            session.generate(session.check(workload.request(steps=1)), workload.output)
            setting.figures.add(f"warm_{gpus}gpus", time.perf_counter() - started)
            for steps in setting.steps if gpus > 1 else setting.steps[:1]:
                plan = session.check(workload.request(steps=steps))
                walls, result = [], None
                for _ in range(setting.runs if gpus > 1 and steps == setting.steps[0] else 1):
                    started = time.perf_counter()
                    result = session.generate(plan, workload.output)
                    walls.append(time.perf_counter() - started)
                assert result is not None
                name = f"{work.frames}f_{steps}steps" + ("" if gpus > 1 else "_1gpu")
                setting.figures.add(name, {"wall_s": min(walls), "all_s": walls, "phases": dict(result.timings)})
            if gpus > 1:
                _decoding(setting, session)


def _decoding(setting: Setting, session: Session) -> None:
    """Decode a clip on one GPU and on several: seconds, and the largest absolute pixel difference in -1..1."""
    layout = setting.sizes[0].layout
    latent = torch.randn(16, layout.frames, layout.height, layout.width, device=setting.device)
    decoders: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
        "alone": partial(decode_unclamped, session.engines),
        "shared": session.constants.decode,
    }
    pixels, figures = {}, dict[str, float]()
    with torch.no_grad():
        for key, decoder in decoders.items():
            for _ in range(2):
                synchronise(setting.device)
                started = time.perf_counter()
                pixels[key] = [group.clamp(-1, 1).cpu() for group in decoder(latent)]
                figures[f"{key}_s"] = time.perf_counter() - started
    pairs = zip(pixels["alone"], pixels["shared"], strict=True)
    figures["difference"] = max((a - b).abs().max().item() for a, b in pairs)
    setting.figures.add("decode", figures)


def failures(setting: Setting) -> None:
    """Measure a cancellation, the kill of a rank, and the generation after them."""
    folder = _folder(setting)
    workload = Workload(setting.sizes[0], setting.steps[0], setting.work)
    with _session(setting, folder, setting.gpus) as session:
        session.generate(session.check(workload.request(steps=1)), workload.output)
        plan = session.check(workload.request(steps=60 if setting.tiny else None))
        cancel, ended_s = threading.Event(), [0.0]

        def cancel_at_first(event: Progress) -> None:
            if event.step == 1 and not cancel.is_set():
                ended_s[0] = time.perf_counter()
                cancel.set()

        try:
            session.generate(plan, workload.output, cancel_at_first, cancel)
        except Cancelled:
            setting.figures.add("cancelled_s", time.perf_counter() - ended_s[0])
        assert session.team is not None
        victims = session.team.processes

        def kill_at_first(event: Progress) -> None:
            if event.step == 1 and not ended_s[0]:
                ended_s[0] = time.perf_counter()
                threading.Timer(0.3, os.kill, (victims[-1], signal.SIGKILL)).start()

        ended_s[0] = 0.0
        try:
            session.generate(plan, workload.output, kill_at_first)
        except Scail2Error as error:
            setting.figures.add("killed_told_s", time.perf_counter() - ended_s[0] - 0.3)
            setting.figures.add("killed_told", str(error))
        setting.figures.add("left", [pid for pid in victims if Path(f"/proc/{pid}").exists()])
        started = time.perf_counter()
        session.generate(session.check(workload.request(steps=1)), workload.output)
        setting.figures.add("again_s", time.perf_counter() - started)


def golden(setting: Setting) -> None:
    """Run the golden pipeline fixtures (`SCAIL2_GOLDEN`) on all GPUs."""
    folder = os.environ.get("SCAIL2_GOLDEN")
    if not folder:
        setting.figures.add("skipped", "SCAIL2_GOLDEN names no folder of golden fixtures")
        return
    words = ["-m", "tests.parity", folder, "--device", setting.device.type, "--gpus", str(setting.gpus)]
    command = [sys.executable, *words, "--only", "pipeline"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    setting.figures.add("failing", [line for line in lines if line.startswith("FAIL")][:40])
    setting.figures.add("passed", sum(line.startswith("PASS") for line in lines))
    setting.figures.add("failed", sum(line.startswith("FAIL") for line in lines))
    if result.returncode:
        setting.figures.add("stderr", result.stderr.splitlines()[-15:])


def _folder(setting: Setting) -> Path:
    precision: Precision = "fp8" if setting.device.type == "cuda" else "fp32"
    directory = setting.work / f"engines-{setting.config}-{precision}"
    started = time.perf_counter()
    write_random_folder(directory, setting.config, precision)
    setting.figures.add("folder_s", time.perf_counter() - started)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return directory


def _session(setting: Setting, folder: Path, gpus: int) -> Session:
    device = setting.device.type
    return Session.open(folder, backend="torch", device=device, prompt_cache=setting.work / "cache", gpus=gpus)


PARTS: dict[str, Callable[[Setting], None]] = {
    "forward-fp8": partial(forward, precision="fp8"),
    "forward-bf16": partial(forward, precision="bf16"),
    "generate": generate,
    "golden": golden,
    "failures": failures,
}


def main() -> None:
    part, config, gpus, work, figures = sys.argv[1:]
    Path(work).mkdir(parents=True, exist_ok=True)
    PARTS[part](Setting(config, int(gpus), Path(work), Figures(Path(figures))))


if __name__ == "__main__":
    from scail2_rt.benchmarks.speed import scaling_parts  # other ranks import functions under this module name

    scaling_parts.main()
