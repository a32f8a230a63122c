"""Building TensorRT plans: every stage from its ONNX file to a serialised engine.

Each plan is compiled in a separate process (`compiling`). A stage that cannot be compiled does not stop the others. At
the end the first failure is reported with its ONNX file and the library's message; a second call builds the missing
plans.
"""

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.manifest import STAGES
from scail2_rt.engines.observer import BuildObserver, BuildStep, Phase
from scail2_rt.engines.tensorrt_backend.children import compile_all
from scail2_rt.engines.tensorrt_backend.compiling import Outcome, PlanJob
from scail2_rt.engines.tensorrt_backend.library import Library
from scail2_rt.engines.tensorrt_backend.plans import (
    Environment,
    PlanLedger,
    PlanRecord,
    graph_path,
    log_path,
    plan_digest,
    plan_path,
    timings_path,
)
from scail2_rt.engines.tensorrt_backend.preflight import (
    build_memory,
    check_machine,
    check_resources,
    environment,
    find_gpu,
    host_memory,
)
from scail2_rt.engines.tensorrt_backend.profiles import TYPE_NAMES, PlanOptions, stage_profiles
from scail2_rt.engines.tensorrt_backend.targets import choose_targets
from scail2_rt.engines.tensorrt_backend.times import PlanTimes
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics, Precision
from scail2_rt.export.onnx.stages import export_stage, stage_graph
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError, Scail2Error

FREE_SHARE = 0.8  # maximum fraction of the free GPU memory for one layer's workspace
MEMORY_SHARE = 0.8  # fraction of the free host memory for all compiling processes


@dataclass(frozen=True, slots=True)
class PlansReport:
    """Stages whose plans a call built, and stages whose plans were already valid."""

    environment: Environment
    built: tuple[str, ...]
    kept: tuple[str, ...]


def chosen_stages(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names that match any shell pattern (`dit.blocks.*.ffn`), or all if there is no pattern.

    Raises InputError if a pattern matches nothing."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--stages {pattern} matches no stage. Use names like {', '.join(names[:3])}.")
    return tuple(name for name in names if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns))


def resolve_options(plan: ArtefactPlan, library: Library) -> PlanOptions:
    """Return a build's options with its targets. Raises InputError for an unsupported precision or target."""
    check_machine(library, plan.precision)
    ledger = PlanLedger(plan.directory / STAGES, library)
    before = ledger.options
    options = plan.options or before or PlanOptions()
    gpu = find_gpu()
    targets = choose_targets(
        library,
        options.targets,
        before.targets if before is not None else (),
        gpu.capability if gpu is not None else None,
        plan.definitions.values(),
        plan.precision,
    )
    if plan.patterns and before is not None and ledger.records and targets != before.targets:
        raise InputError(
            f"--stages with --target {','.join(targets)} would leave plans for different cards in {plan.directory}, "
            f"which has {','.join(before.targets)}. Leave out --stages, or use the folder's --target."
        )
    return replace(options, targets=targets)


def build_plans(plan: ArtefactPlan, observer: BuildObserver, library: Library) -> PlansReport:
    """Build the plans of an engine folder whose weight store is complete.

    Raises InputError if the machine cannot build; Scail2Error, with the ONNX file and the library's messages, if a
    stage cannot be built. Finished plans remain valid however the call ends."""
    return _Build(plan, observer, library).run()


class _Build:
    def __init__(self, plan: ArtefactPlan, observer: BuildObserver, library: Library) -> None:
        self.plan, self.observer, self.library = plan, observer, library
        self.options = resolve_options(plan, library)
        self.environment = environment(library, self.options.targets)
        self.wanted = chosen_stages(tuple(plan.definitions), plan.patterns)
        self.stages = plan.directory / STAGES
        self.ledger = PlanLedger(self.stages, library)
        self.left = dict.fromkeys(self.wanted)
        self.built: list[str] = []
        self.digests: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        definitions = plan.definitions
        self.sizes = {name: plan.stage_bytes.get(name, 0) for name in definitions}
        self.times = PlanTimes({name: d.family or name for name, d in definitions.items()}, self.sizes)

    def run(self) -> PlansReport:
        fresh = [name for name in self.wanted if not plan_path(self.stages, name, self.library).is_file()]
        check_resources(self.library, {name: self.sizes[name] for name in fresh}, self.plan.directory)
        if self.options.targets:
            self.observer.note(f"plans for {', '.join(self.options.targets)}")
        self._trace()
        self.ledger.begin(self.options)
        at_once = 1 if self.library.compiles_here else os.cpu_count() or 1
        compile_all(self._jobs(), int(host_memory() * MEMORY_SHARE), at_once, self._environment(), self._finished)
        if self.failures:
            raise Scail2Error(self._failure_text())
        kept = tuple(name for name in self.wanted if name not in self.built)
        return PlansReport(self.environment, tuple(self.built), kept)

    def _trace(self) -> None:
        """Trace the graphs, which takes long without a cache; not part of the estimate for the plans."""
        families: dict[str, StageDefinition] = {}
        for name in self.wanted:
            definition = self.plan.definitions[name]
            families.setdefault(definition.family or name, definition)
        phase = Phase(self.observer, "graph", {definition.name: 0 for definition in families.values()})
        for definition in families.values():
            step = phase.start(definition.name)
            stage_graph(definition, definition.numerics(self.plan.precision))
            phase.finish(step)
        self.times.start()

    def _jobs(self) -> Iterator[tuple[PlanJob, int]]:
        """Yield the plans to build, while others compile: each stage needs its graph and the digest of its weights."""
        plan = self.plan
        for name in self.wanted:
            definition = plan.definitions[name]
            graph = graph_path(self.stages, name)
            export_stage(definition, definition.numerics(plan.precision), graph, plan.store)
            job = plan_job(self.library, definition, plan.precision, plan.config, self.options, plan.directory)
            self.digests[name] = plan_digest(graph, job.profiles, self.options, self.environment)
            if self.ledger.good(name, self.digests[name]):
                del self.left[name]
                continue
            yield job, build_memory(self.sizes[name])

    def _finished(self, job: PlanJob, outcome: Outcome) -> None:
        name = job.stage
        if outcome.errno is not None:
            raise OSError(outcome.errno, os.strerror(outcome.errno), job.plan)
        del self.left[name]
        self.times.add(name, outcome.seconds)
        if outcome.error is not None:
            self.failures[name] = outcome.error
            self.observer.note(outcome.error)
            return
        self.ledger.add(name, PlanRecord(self.digests[name], Path(job.plan).stat().st_size, outcome.seconds))
        self.built.append(name)
        done = len(self.wanted) - len(self.left)
        step = BuildStep(self.library.name, done, len(self.wanted), name, self.sizes[name])
        self.observer.started(step)
        self.observer.done(replace(step, seconds=outcome.seconds, remaining_s=self.times.remaining_s(self.left)))

    def _environment(self) -> Mapping[str, str]:
        """Return the GPU setting of a compiling process: the GPU used here, or none."""
        if not self.library.compiles_here:
            return {"CUDA_VISIBLE_DEVICES": ""}
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[index] if visible != [""] else str(index)}

    def _failure_text(self) -> str:
        (_, text), *others = self.failures.items()
        also = f" {', '.join(name for name, _ in others)} could not be built either." if others else ""
        count = len(self.wanted) - len(self.failures)
        return f"{text}{also} All other plans ({count}) are kept. Run the same command again to build the missing ones."


def plan_job(
    library: Library,
    definition: StageDefinition,
    precision: Precision,
    config: ModelConfig,
    options: PlanOptions,
    directory: Path,
) -> PlanJob:
    """Return the job that compiles a stage's plan in the engine folder `directory`, which contains its graph."""
    name, stages = definition.name, directory / STAGES
    numerics = definition.numerics(precision)
    gpu = find_gpu() if library.compiles_here else None
    limit = options.workspace_bytes if gpu is None else int(gpu.free_bytes * FREE_SHARE)
    profiles = stage_profiles(definition, numerics, config, options)
    return PlanJob(
        library.name,
        name,
        str(graph_path(stages, name)),
        str(plan_path(stages, name, library)),
        str(log_path(directory, name, library)),
        {spec.name: TYPE_NAMES[spec.dtype] for spec in definition.io(numerics)[0]},
        tuple({key: (r.smallest, r.usual, r.largest) for key, r in profile.items()} for profile in profiles),
        min(options.workspace_bytes, limit),
        options.optimization_level,
        options.targets,
        str(timings_path(stages, library)) if library.timing_cache else None,
        fp8_linears(definition, numerics),
    )


def fp8_linears(definition: StageDefinition, numerics: Numerics) -> int:
    """Return how many products of a stage multiply e4m3 by e4m3: one per e4m3 weight."""
    with torch.device("meta"):
        module = definition.build(numerics)
    return sum(weight.dtype == torch.float8_e4m3fn for weight in module.parameters())
