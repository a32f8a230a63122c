"""`scail2-rt bench scaling`: one GPU against several of the same host, in one run.

Each part is a process of its own with a time limit, so that a collective that hangs or a card that fails costs one part
and not the others; parts are run in the order of their importance until the time is used up. What a part has measured
is on disk after every figure. The summary holds the ratios; `scaled` works out from the measured parts of a forward
pass what other numbers of GPUs would give.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scail2_rt.benchmarks.speed.harness import describe_run

PARTS = ("forward-fp8", "generate", "golden", "forward-bf16", "failures")
LIMITS_S = {"forward-fp8": 240, "generate": 240, "golden": 100, "forward-bf16": 120, "failures": 120}
TINY_S = 40  # of a part with the tiny model


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """config: model; gpus: how many to compare with one; parts: which; work: folder for random engines and videos;
    limit_s: seconds for everything; output: where all figures are saved; summary: where the ratios go."""

    config: str
    gpus: int
    parts: tuple[str, ...]
    work: Path
    limit_s: float
    output: Path
    summary: Path | None = None


def run(options: ScalingOptions) -> dict[str, Any]:
    """Every part; → the document, which is saved after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    document: dict[str, Any] = {"run": describe_run(device, section="scaling", gpus=options.gpus), "parts": {}}
    for part in options.parts:
        left = options.limit_s - (time.monotonic() - started)
        if left < 20:
            document["parts"][part] = {"failure": "not run: the time was used up"}
        else:
            document["parts"][part] = _run_part(
                options, part, min(left, LIMITS_S[part] if options.config != "tiny" else TINY_S)
            )
        document["summary"] = summary(document, options.gpus)
        save(options.output, document)
        if options.summary is not None:
            save(options.summary, {**document["summary"], "config": options.config, "measured": document["run"]})
    return document


def _run_part(options: ScalingOptions, part: str, limit_s: float) -> dict[str, Any]:
    """The figures of one part, and `failure` when it did not end well."""
    figures = options.output.with_name(f"{options.output.stem}.{part}.json")
    figures.unlink(missing_ok=True)
    words = [part, options.config, str(options.gpus), str(options.work), str(figures)]
    print(f"== {part} (at most {limit_s:.0f} s)", file=sys.stderr, flush=True)
    started = time.monotonic()
    log = figures.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "scail2_rt.benchmarks.speed.scaling_parts", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found: dict[str, Any] = json.loads(figures.read_text()) if figures.is_file() else {}
    found["wall_s"] = round(time.monotonic() - started, 1)
    if code != 0:
        end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        found["failure"] = f"exit code {code}: {end[-600:]}" if code is not None else f"cut off at {limit_s:.0f} s"
    print(json.dumps(found, indent=1), file=sys.stderr, flush=True)
    return found


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def summary(document: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The flat figures; what was not measured is left out."""
    parts = document["parts"]
    found: dict[str, Any] = {"gpus": gpus}
    for part in ("forward-fp8", "forward-bf16"):
        for name, figures in parts.get(part, {}).items():
            if not isinstance(figures, dict) or "speedup" not in figures:
                continue
            key = "guidance_pair" if name.startswith("guidance") else f"forward_{name.replace('/', '_')}"
            found[f"{key}_speedup"] = figures["speedup"]
            found[f"{key}_1gpu_s"], found[f"{key}_{gpus}gpu_s"] = figures["alone_s"], figures["shared_s"]
            found[f"{key}_difference"] = figures["difference"]
    for name, figures in parts.get("generate", {}).items():
        if isinstance(figures, dict) and "wall_s" in figures:
            found[f"generate_{name}_s"] = figures["wall_s"]
    if "difference" in (decoding := parts.get("generate", {}).get("decode", {})):
        found |= {f"decode_{key}": value for key, value in decoding.items()}
    for key in ("passed", "failed"):
        if key in parts.get("golden", {}):
            found[f"golden_{key}"] = parts["golden"][key]
    for key in ("killed_told_s", "cancelled_s", "again_s"):
        if key in parts.get("failures", {}):
            found[key] = parts["failures"][key]
    return found


def scaled(alone: Mapping[str, float], shared: Mapping[str, float], gpus: int, wanted: int) -> dict[str, float]:
    """Computed, not measured: a forward pass on `wanted` GPUs, from the parts of one on one GPU and on `gpus`.

    What computes is divided; a collective moves 1/N of everything, of which (N-1)/N crosses, at the rate measured; what
    one GPU does not spend and several do besides (copies around the exchange) is divided too."""
    compute = sum(alone.values())
    crossing = shared.get("collectives", 0.0) * (wanted - 1) / wanted**2 / ((gpus - 1) / gpus**2)
    others = sum(seconds for name, seconds in shared.items() if name != "collectives")
    copies = max(others - compute / gpus, 0.0) * gpus / wanted
    total = compute / wanted + crossing + copies
    return {"computed_s": total, "computed_speedup": compute / total}
