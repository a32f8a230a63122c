"""`scail2-rt bench scaling`: compare several GPUs of one host with one GPU.

Each part runs in a separate process with a time limit, so that a hanging collective or a failing GPU affects only one
part. Parts run in the given order until the time limit. A part saves its values after each measurement. The summary
contains the ratios; `scaled` computes the times for other numbers of GPUs from the measured breakdown of a forward
pass.
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
TINY_S = 40  # time limit of a part with the tiny model


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """The options of `bench scaling`.

    config    model name
    gpus      number of GPUs to compare with one
    parts     parts to run, in order
    work      folder for random engines and videos
    limit_s   time limit for all parts, seconds
    output    file for all values
    summary   file for the summary; None: not written"""

    config: str
    gpus: int
    parts: tuple[str, ...]
    work: Path
    limit_s: float
    output: Path
    summary: Path | None = None


def run(options: ScalingOptions) -> dict[str, Any]:
    """Run all parts. Returns the document, which is saved after each part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    document: dict[str, Any] = {"run": describe_run(device, section="scaling", gpus=options.gpus), "parts": {}}
    for part in options.parts:
        left = options.limit_s - (time.monotonic() - started)
        if left < 20:
            document["parts"][part] = {"failure": "not run: the time limit was reached"}
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
    """Run one part. Returns its values, with `failure` if it failed or reached its time limit."""
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
        found["failure"] = f"exit code {code}: {end[-600:]}" if code is not None else f"stopped after {limit_s:.0f} s"
    print(json.dumps(found, indent=1), file=sys.stderr, flush=True)
    return found


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, replacing it atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def summary(document: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """The flat summary. Values that were not measured are left out."""
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
    """Compute, without measuring, the time of a forward pass on `wanted` GPUs from its breakdowns on one GPU (`alone`)
    and on `gpus` GPUs (`shared`), group → seconds.

    Compute time is divided by the number of GPUs N. In an all-to-all each rank holds 1/N of the data and sends (N-1)/N
    of that, at the measured rate. Further time on several GPUs (copies around the exchange) is divided by N too."""
    compute = sum(alone.values())
    crossing = shared.get("collectives", 0.0) * (wanted - 1) / wanted**2 / ((gpus - 1) / gpus**2)
    others = sum(seconds for name, seconds in shared.items() if name != "collectives")
    copies = max(others - compute / gpus, 0.0) * gpus / wanted
    total = compute / wanted + crossing + copies
    return {"computed_s": total, "computed_speedup": compute / total}
