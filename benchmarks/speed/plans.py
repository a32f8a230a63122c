"""Measure time and memory for building all TensorRT plans of a model:
`python -m scail2_rt.benchmarks.speed.plans --precision fp8`.

For one stage after another, seeded random weights of its real shapes are drawn and written, its plan is compiled in a
separate process as `build-engines` does, and both are deleted. This needs no checkpoint, and disk and memory only for
the largest stage. TensorRT for RTX compiles without a GPU. The output is a table by family, then one line of JSON:
seconds and peak memory of the compiling process, bytes of plan and weights. The time for drawing weights is not
included.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from scail2_rt.benchmarks.speed.models import MODELS, model
from scail2_rt.benchmarks.speed.random_weights import RandomStore, RandomWeights
from scail2_rt.engines.folder.manifest import STAGES
from scail2_rt.engines.folder.store import STORE_NAME, StoreWriter
from scail2_rt.engines.folder.weights import StageTensors, plan_store
from scail2_rt.engines.registry import check_precision
from scail2_rt.engines.tensorrt_backend.builder import chosen_stages, plan_job
from scail2_rt.engines.tensorrt_backend.children import compile_all
from scail2_rt.engines.tensorrt_backend.compiling import Outcome, PlanJob
from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX
from scail2_rt.engines.tensorrt_backend.plans import graph_path
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions, plan_options
from scail2_rt.engines.tensorrt_backend.targets import choose_targets
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.onnx.stages import export_stage
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import Scail2Error

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Built:
    """The plan of one stage. peak_bytes: peak memory of the compiling process."""

    stage: str
    family: str
    seconds: float
    peak_bytes: int
    plan_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Family:
    """All stages of one form. seconds: median per stage; peak_gib: largest peak; plan_gib: sum of the plans."""

    name: str
    stages: int
    seconds: float
    longest_s: float
    total_s: float
    peak_gib: float
    plan_gib: float


def build_all(config: ModelConfig, precision_name: str, targets: str | None, patterns: tuple[str, ...]) -> list[Built]:
    """Build and delete the plans of all stages that match `patterns`, in a temporary folder. targets: comma-separated
    architectures; None: all that the precision allows."""
    precision = check_precision(precision_name)
    definitions = stage_definitions(config)
    options = plan_options(None, None, targets) or PlanOptions()
    chosen = choose_targets(TENSORRT_RTX, options.targets, (), None, definitions.values(), precision)
    options = replace(options, targets=chosen)
    store = RandomStore(config, precision, RandomWeights(config, "cpu"))
    found = []
    with tempfile.TemporaryDirectory(prefix="scail2-rt-plans.") as scratch:
        stages = Path(scratch) / STAGES
        for name in chosen_stages(tuple(definitions), patterns):
            definition = definitions[name]
            stages.mkdir()
            weights = _write(store, name, store.shapes[name], stages / STORE_NAME)
            layout = plan_store({name: store.shapes[name]})
            export_stage(definition, definition.numerics(precision), graph_path(stages, name), layout)
            job = plan_job(TENSORRT_RTX, definition, precision, config, options, Path(scratch))
            outcome, size = _compiled(job)
            built = Built(name, definition.family or name, outcome.seconds, outcome.peak_bytes, size, weights)
            print(
                f"{name}: {built.seconds:.1f} s, peak {built.peak_bytes / GIB:.2f} GiB, {size / GIB:.3f} GiB",
                flush=True,
            )
            found.append(built)
            shutil.rmtree(stages)
    return found


def _write(store: RandomStore, stage: str, tensors: StageTensors, path: Path) -> int:
    """Write the weights of one stage; returns their bytes."""
    writer = StoreWriter(path, plan_store({stage: tensors}))
    try:
        for name, tensor in store.stage(stage, tensors).items():
            writer.write(f"{stage}.{name}", tensor)
    finally:
        writer.close()
    os.replace(writer.partial, path)
    return sum(tensor.nbytes for tensor in tensors.values())


def _compiled(job: PlanJob) -> tuple[Outcome, int]:
    outcomes: list[Outcome] = []
    compile_all(iter([(job, 0)]), 0, 1, {"CUDA_VISIBLE_DEVICES": ""}, lambda _, outcome: outcomes.append(outcome))
    if outcomes[0].error is not None:
        raise Scail2Error(outcomes[0].error)
    return outcomes[0], Path(job.plan).stat().st_size


def families(built: Iterable[Built]) -> list[Family]:
    """The plans grouped by the form of their stage."""
    groups: dict[str, list[Built]] = {}
    for one in built:
        groups.setdefault(one.family, []).append(one)
    return [
        Family(
            name,
            len(group),
            statistics.median(one.seconds for one in group),
            max(one.seconds for one in group),
            sum(one.seconds for one in group),
            max(one.peak_bytes for one in group) / GIB,
            sum(one.plan_bytes for one in group) / GIB,
        )
        for name, group in groups.items()
    ]


def table(rows: Iterable[Family]) -> str:
    """The families as a text table."""
    lines = [
        f"{'family':<24}{'stages':>7}{'median s':>10}{'longest s':>11}{'sum s':>9}{'peak GiB':>10}{'plans GiB':>11}"
    ]
    lines += [
        f"{row.name:<24}{row.stages:>7}{row.seconds:>10.2f}{row.longest_s:>11.2f}{row.total_s:>9.1f}"
        f"{row.peak_gib:>10.2f}{row.plan_gib:>11.3f}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=MODELS, default="14b")
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--target", help="architectures, e.g. sm89,sm120 (default: all that the precision allows)")
    parser.add_argument("--stages", action="append", default=[], help="shell pattern of stages; repeatable")
    given = parser.parse_args()
    started = time.monotonic()
    built = build_all(model(given.config), given.precision, given.target, tuple(given.stages))
    rows = families(built)
    total_s, plan_bytes = sum(one.seconds for one in built), sum(one.plan_bytes for one in built)
    peak = max(one.peak_bytes for one in built)
    print(table(rows))
    print(
        f"{given.config} in {given.precision}: {len(built)} plan(s) in {total_s:.0f} s, built sequentially, "
        f"{plan_bytes / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB; {os.cpu_count()} CPU core(s); "
        f"{time.monotonic() - started:.0f} s including drawing weights"
    )
    print(
        json.dumps(
            {
                "config": given.config,
                "precision": given.precision,
                "library": f"{TENSORRT_RTX.title} {TENSORRT_RTX.api().__version__}",
                "cpu_cores": os.cpu_count(),
                "plans": len(built),
                "seconds": total_s,
                "plan_bytes": plan_bytes,
                "peak_bytes": peak,
                "families": [asdict(row) for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
