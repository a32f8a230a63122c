"""Section `load`: from an engine folder on disk to the first denoising step, in a fresh process each time.

Counted is everything from the start of the process to the end of the first step, less the time of a step that has
nothing left to load: imports, checks, opening, encoding of references and driving clip, context keys and values, and
the weights of the transformer. The folder's files are in the page cache, the prompt's encoding in the prompt cache.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.workload import Workload, engine_folder, workload_of
from scail2_rt.kernels.errors import Scail2Error

LIMIT_S = 600
DETAILS = ("import_s", "checked_s", "opened_s", "first_step_done_s", "warm_step_s")


def run(bench: Bench) -> None:
    with bench.attempt("load/first-step"):
        folder, workload = engine_folder(bench), workload_of(bench)
        workload.request()  # draws the case
        bench.free()
        fresh_process(folder, workload)  # page cache, prompt cache, compiled kernels
        found = [fresh_process(folder, workload) for _ in range(max(3, bench.options.runs) if bench.on_gpu else 1)]
        middle = sorted(found, key=to_first_step)[len(found) // 2]
        phases = {name.removeprefix("phase_"): value for name, value in middle.items() if name.startswith("phase_")}
        bench.add(
            "load/first-step",
            Timing.of(map(to_first_step, found)),
            note=f"fresh process, {folder_gib(folder):.1f} GiB, page cache warm",
            breakdown=phases,
            **details(middle),
        )


def to_first_step(times: Mapping[str, float]) -> float:
    return times["first_step_done_s"] - times["warm_step_s"]


def details(times: Mapping[str, float]) -> dict[str, Any]:
    return {name: times[name] for name in DETAILS}


def fresh_process(folder: Path, workload: Workload) -> dict[str, float]:
    words = [
        sys.executable,
        "-m",
        "scail2_rt.benchmarks.speed.first_step",
        str(folder),
        str(workload.folder),
        str(workload.work),
    ]
    result = subprocess.run([*words, str(time.time())], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Scail2Error(f"the process that loads the engines failed: {last[0]}")
    times: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return times


def folder_gib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30
