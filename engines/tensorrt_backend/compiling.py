"""One plan, compiled in a process of its own: `python -m scail2_rt.engines.tensorrt_backend.compiling`.

A compiler that crashes takes its process with it, so each plan has one. It reads a job from standard input, as a line
of JSON, and prints what came of it in the same way; it ends at once when its parent does, which it notices by the end
of its input. PyTorch is not imported: that would take longer than most plans.

The network is strongly typed, so the graph alone decides in which type anything is computed; no builder flag chooses a
precision (those flags are gone in TensorRT 11). TF32 is off: fp32 in this project means fp32. All activations of
a plan lie in one scratch block that the executor provides, on one stream, so auxiliary streams are off too. Layers keep
their details, which tell the data types of a product's operands.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.engines.tensorrt_backend.layers import fault, layers_of_log
from scail2_rt.engines.tensorrt_backend.library import LIBRARIES, Library, process_log, process_logger
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import tensorrt as trt

PARSER_FRAME = "ModelImporter.cpp"  # lines around the parser's own errors, which say it again
NO_DRIVER = "cudaError 35"
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, usual, largest


@dataclass(frozen=True, slots=True)
class PlanJob:
    """All that a plan is compiled from.

    library            a name in `LIBRARIES`
    graph, plan, log   files: what is read, what is made, what the library says meanwhile
    inputs             name → the library's name of its type
    profiles           for each profile, input → shapes
    workspace_bytes    limit for one layer's scratch memory
    targets            architectures to compile for; none: the GPU of this machine
    timings            file of the timing cache; None for a library that has none
    fp8_products       e4m3 linears of the stage"""

    library: str
    stage: str
    graph: str
    plan: str
    log: str
    inputs: dict[str, str]
    profiles: tuple[dict[str, Shapes], ...]
    workspace_bytes: int
    optimization_level: int
    targets: tuple[str, ...] = ()
    timings: str | None = None
    fp8_products: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: seconds and peak memory of the process, or why there is no plan (a sentence; errno: of the
    system's error, if it was one)."""

    seconds: float
    peak_bytes: int
    error: str | None = None
    errno: int | None = None


def compile_plan(job: PlanJob) -> None:
    """Parse, configure, build and write one plan. Scail2Error with the library's own words; OSError of the disk."""
    library = LIBRARIES[job.library]
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.api()

    with process_log(library).writing_to(Path(job.log)):
        try:
            builder = trt.Builder(process_logger(library))
        except (TypeError, RuntimeError) as error:
            raise _failure(job, f"{library.title} could not start ({error})") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, process_logger(library))  # owns the weights until the build has returned
        if not parser.parse_from_file(job.graph):
            errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
            raise _failure(job, f"the parser of {library.title} does not take it", errors)
        _check_inputs(job, network)
        config = _configure(library, builder, job)
        _add_profiles(library, job, builder, config, network)
        cache = attach_timings(config, Path(job.timings)) if job.timings is not None else None
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _failure(job, f"{library.title} could not build it")
        if job.targets and (wrong := fault(layers_of_log(process_log(library).layers), job.fp8_products)):
            raise _failure(job, wrong)
        write_file(Path(job.plan), plan)
        if job.timings is not None:
            save_timings(config, Path(job.timings))
        del plan, parser, cache  # they had to last until here


def _configure(library: Library, builder: "trt.Builder", job: PlanJob) -> "trt.IBuilderConfig":
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.api()

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    config.max_aux_streams = 0
    config.builder_optimization_level = job.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)
    if job.targets:
        from scail2_rt.engines.tensorrt_backend.rtx_targets import set_targets

        set_targets(library, config, job.targets)
    return config


def _add_profiles(
    library: Library,
    job: PlanJob,
    builder: "trt.Builder",
    config: "trt.IBuilderConfig",
    network: "trt.INetworkDefinition",
) -> None:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.api()

    named = set(job.profiles[0]) if job.profiles else set()
    free = {tensor.name for tensor in _inputs(network) if any(size < 0 for size in tuple(tensor.shape))}
    if free - named:
        raise _failure(job, f"its inputs {', '.join(sorted(free - named))} have sizes without a range")
    for profile in job.profiles:
        target = builder.create_optimization_profile()
        for name, shapes in profile.items():
            try:
                target.set_shape(name, *(trt.Dims(list(shape)) for shape in shapes))
            except ValueError as error:
                raise _failure(job, f"{library.title} refuses the sizes {shapes} of {name} ({error})") from error
        if config.add_optimization_profile(target) < 0:
            raise _failure(job, f"{library.title} refuses its profile {dict(profile)}")


def _inputs(network: "trt.INetworkDefinition") -> "list[trt.ITensor]":
    return [network.get_input(index) for index in range(network.num_inputs)]


def _check_inputs(job: PlanJob, network: "trt.INetworkDefinition") -> None:
    """Names and types of what the parser made are those of the stage."""
    have = {tensor.name: tensor.dtype.name for tensor in _inputs(network)}
    if have != job.inputs:
        raise _failure(job, f"the parser gave it the inputs {have} instead of {job.inputs}")


def _parser_error(error: "trt.ParserError") -> str:
    at = f" at node {error.node()} ({error.node_operator()} {error.node_name()!r})" if error.node() >= 0 else ""
    return f"{error.code().name}: {error.desc()}{at}"


def _failure(job: PlanJob, what: str, messages: Sequence[str] = ()) -> Scail2Error:
    """The stage, its ONNX file, what went wrong and what the library said about it."""
    said = process_log(LIBRARIES[job.library]).recent()
    noise = (PARSER_FRAME, NO_DRIVER) if job.targets else (PARSER_FRAME,)  # without a GPU a driver is not missed
    said = [text for text in said if not any(part in text for part in noise)]
    return refusal(job, what, [*messages, *(text for text in said if not any(text in known for known in messages))])


def refusal(job: PlanJob, what: str, said: Iterable[str]) -> Scail2Error:
    texts = [text.rstrip(" .") for text in said]
    quoted = f" {LIBRARIES[job.library].title} said: {'; '.join(texts)}." if texts else ""
    return Scail2Error(f"stage {job.stage} cannot be built from {job.graph}: {what}.{quoted} Its log is {job.log}.")


def attach_timings(config: "trt.IBuilderConfig", path: Path) -> "trt.ITimingCache":
    """Give a build what earlier ones measured; what another GPU or version measured is dropped. The result must be kept
    until the build has returned."""
    known = path.read_bytes() if path.is_file() else b""
    for data in (known, b"") if known else (b"",):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    raise Scail2Error("TensorRT refused even an empty timing cache; its installation seems to be damaged.")


def save_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Keep what a finished build knows."""
    cache = config.get_timing_cache()
    if cache is None:
        raise Scail2Error("TensorRT lost the timing cache during a build; its installation seems to be damaged.")
    write_file(path, cache.serialize())


def write_file(path: Path, data: "bytes | trt.IHostMemory") -> None:
    """Replace a file atomically; it survives a crash of the machine."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def outcome_of(job: PlanJob) -> Outcome:
    """Do a job here."""
    started = time.monotonic()
    error, errno = None, None
    try:
        compile_plan(job)
    except Scail2Error as problem:
        error = str(problem)
    except OSError as problem:
        error, errno = str(problem), problem.errno
    return Outcome(time.monotonic() - started, _peak_bytes(), error, errno)


def _peak_bytes() -> int:
    """Peak memory of this process; 0 where the system does not tell. (`getrusage` counts what the parent held when it
    started the process.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def decode_job(line: str) -> PlanJob:
    """The job in a line of JSON, its lists as the tuples that they were."""
    document = json.loads(line)
    document["profiles"] = tuple(
        {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()} for profile in document["profiles"]
    )
    return PlanJob(**{**document, "targets": tuple(document["targets"])})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    job = decode_job(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answer
    print(json.dumps(dataclasses.asdict(outcome_of(job))), file=result, flush=True)


if __name__ == "__main__":
    main()
