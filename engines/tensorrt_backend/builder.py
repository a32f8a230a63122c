"""Plans for TensorRT: every stage from its ONNX file to a serialised engine, on the GPU that will run it.

The network is strongly typed, so the graph alone decides in which type anything is computed; no builder flag chooses a
precision (those flags are gone in TensorRT 11). TF32 is off: fp32 in this project means fp32. All activations of
a plan lie in one scratch block that the executor provides, on one stream, so auxiliary streams are off too. The
inspector must be able to show data types, so layers keep their details. A build stops at the first stage that
TensorRT refuses and says which file it was and what TensorRT said; what was built before is kept.
"""

import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.manifest import STAGES
from scail2_rt.engines.observer import BuildObserver, BuildStep, Phase
from scail2_rt.engines.tensorrt_backend.library import TENSORRT, Library, process_log, process_logger
from scail2_rt.engines.tensorrt_backend.plans import (
    LOGS,
    TIMINGS,
    Environment,
    PlanLedger,
    PlanRecord,
    TimingCache,
    graph_path,
    plan_digest,
    plan_path,
    write_file,
)
from scail2_rt.engines.tensorrt_backend.preflight import check_machine, check_resources, find_gpu
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions, Profile, stage_profiles
from scail2_rt.engines.tensorrt_backend.progress import BuildProgress, interruptible, progress_monitor
from scail2_rt.export.onnx.stages import export_stage
from scail2_rt.export.stages.spec import TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    import tensorrt as trt

FREE_SHARE = 0.8  # of the free GPU memory, at most, for one layer's workspace


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """One stage's graph, the plan to be made from it, and the file for what TensorRT says meanwhile."""

    graph: Path
    plan: Path
    log: Path


@dataclass(frozen=True, slots=True)
class PlansReport:
    """Stages whose plans were built by a call, and those whose plans were good already."""

    environment: Environment
    built: tuple[str, ...]
    kept: tuple[str, ...]


def chosen_stages(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that match any shell pattern (`dit.blocks.*.ffn`), all without a pattern. InputError when one matches
    nothing."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--stages {pattern} matches no stage; stages are called like {', '.join(names[:3])}.")
    return tuple(name for name in names if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns))


def build_plans(plan: ArtefactPlan, observer: BuildObserver, library: Library = TENSORRT) -> PlansReport:
    """Make the plans of an engine folder whose weight store is complete.

    InputError when the machine cannot build; Scail2Error, naming the ONNX file and TensorRT's messages, when a stage
    cannot be built. KeyboardInterrupt passes through once TensorRT has stopped. Finished plans stay good."""
    options = plan.options or PlanOptions()
    environment = check_machine(plan.precision, library)
    wanted = chosen_stages(tuple(plan.definitions), plan.patterns)
    stages = plan.directory / STAGES
    ledger, timings = PlanLedger(stages), TimingCache(stages / TIMINGS)
    phase = Phase(observer, library.name, {name: plan.stage_bytes.get(name, 0) for name in wanted})
    todo: dict[str, tuple[str, tuple[Profile, ...]]] = {}
    for name in wanted:
        definition = plan.definitions[name]
        numerics = definition.numerics(plan.precision)
        graph = graph_path(stages, name)
        export_stage(definition, numerics, graph, plan.store)
        profiles = stage_profiles(definition, numerics, plan.config, options)
        digest = plan_digest(graph, profiles, options, environment)
        if ledger.good(name, digest):
            phase.skip(name)
        else:
            todo[name] = digest, profiles
    check_resources({name: plan.stage_bytes.get(name, 0) for name in todo}, plan.directory)
    for name, (digest, profiles) in todo.items():
        step = phase.start(name)
        started = time.monotonic()
        files = PlanFiles(graph_path(stages, name), plan_path(stages, name), plan.directory / LOGS / f"{name}.log")
        inputs = plan.definitions[name].io(plan.definitions[name].numerics(plan.precision))[0]
        build_plan(name, inputs, files, profiles, options, timings, partial(_advance, observer, step))
        ledger.add(name, PlanRecord(digest, files.plan.stat().st_size, time.monotonic() - started))
        phase.finish(step)
    return PlansReport(environment, tuple(todo), tuple(name for name in wanted if name not in todo))


def _advance(observer: BuildObserver, step: BuildStep, fraction: float) -> None:
    observer.advanced(step, int(fraction * step.size_bytes))


def build_plan(
    stage: str,
    inputs: Sequence[TensorSpec],
    files: PlanFiles,
    profiles: Sequence[Profile],
    options: PlanOptions,
    timings: TimingCache,
    advanced: Callable[[float], None],
) -> None:
    """Parse, configure, build and write one plan, then save the timing cache. `advanced`: the fraction done, 0..1."""
    import tensorrt as trt

    with process_log().writing_to(files.log):
        try:
            builder = trt.Builder(process_logger())
        except (TypeError, RuntimeError) as error:
            raise _failure(stage, files, f"TensorRT could not start ({error})") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, process_logger())  # owns the weights until the build has returned
        if not parser.parse_from_file(str(files.graph)):
            errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
            raise _failure(stage, files, "TensorRT's parser does not take it", errors)
        _check_inputs(stage, network, inputs, files)
        config = _configure(builder, options)
        _add_profiles(stage, builder, config, network, profiles, files)
        cache = timings.attach(config)
        progress = BuildProgress(advanced)
        monitor = progress_monitor(progress)
        config.progress_monitor = monitor
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def build() -> "trt.IHostMemory | None":
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            return builder.build_serialized_network(network, config)

        plan = interruptible(build, progress.cancel)
        if plan is None:
            raise _failure(stage, files, "TensorRT could not build it")
        write_file(files.plan, plan)
        timings.save(config)
        del plan, parser, cache, monitor  # they had to last until here


def _configure(builder: "trt.Builder", options: PlanOptions) -> "trt.IBuilderConfig":
    import tensorrt as trt

    config = builder.create_builder_config()
    gpu = find_gpu()
    room = options.workspace_bytes if gpu is None else int(gpu.free_bytes * FREE_SHARE)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, min(options.workspace_bytes, room))
    config.max_aux_streams = 0
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _add_profiles(
    stage: str,
    builder: "trt.Builder",
    config: "trt.IBuilderConfig",
    network: "trt.INetworkDefinition",
    profiles: Sequence[Profile],
    files: PlanFiles,
) -> None:
    import tensorrt as trt

    named = set(profiles[0]) if profiles else set()
    free = {tensor.name for tensor in _inputs(network) if any(size < 0 for size in tuple(tensor.shape))}
    if free - named:
        raise _failure(stage, files, f"its inputs {', '.join(sorted(free - named))} have sizes without a range")
    for profile in profiles:
        target = builder.create_optimization_profile()
        for name, shapes in profile.items():
            try:
                target.set_shape(name, *(trt.Dims(list(shape)) for shape in shapes))
            except ValueError as error:
                raise _failure(stage, files, f"TensorRT refuses the sizes {shapes} of {name} ({error})") from error
        if config.add_optimization_profile(target) < 0:
            raise _failure(stage, files, f"TensorRT refuses its profile {dict(profile)}")


def _inputs(network: "trt.INetworkDefinition") -> "list[trt.ITensor]":
    return [network.get_input(index) for index in range(network.num_inputs)]


def _check_inputs(stage: str, network: "trt.INetworkDefinition", specs: Sequence[TensorSpec], files: PlanFiles) -> None:
    """Names and types of what the parser made are those of the stage."""
    have = {tensor.name: tensor.dtype for tensor in _inputs(network)}
    want = {spec.name: data_type(spec.dtype) for spec in specs}
    if have != want:
        raise _failure(stage, files, f"TensorRT's parser gave it the inputs {have} instead of {want}")


def data_type(dtype: torch.dtype) -> "trt.DataType":
    """TensorRT's name of a type that an engine takes or gives."""
    import tensorrt as trt

    return {
        torch.float32: trt.DataType.FLOAT,
        torch.float16: trt.DataType.HALF,
        torch.bfloat16: trt.DataType.BF16,
        torch.int64: trt.DataType.INT64,
    }[dtype]


def _parser_error(error: "trt.ParserError") -> str:
    return f"{error.desc()} at node {error.node()} ({error.node_operator()} {error.node_name()!r})"


def _failure(stage: str, files: PlanFiles, what: str, messages: Sequence[str] = ()) -> Scail2Error:
    """The stage, its ONNX file, what went wrong and what TensorRT said about it."""
    said = [*messages, *(text for text in process_log().recent() if not any(text in known for known in messages))]
    quoted = "; ".join(said) or "nothing"
    return Scail2Error(
        f"stage {stage} cannot be built from {files.graph}: {what}. TensorRT said: {quoted}. "
        f"All of it is in {files.log}; the stages built so far are kept."
    )
