"""Compiles one plan in a separate process: `python -m scail2_rt.engines.tensorrt_backend.compiling`.

A crash of the compiler ends its process, so each plan has a process. It reads a job as one line of JSON from standard
input, and prints the outcome in the same form. It ends at once when its parent ends, which it detects by the end of its
input. PyTorch is not imported: that would take longer than most plans.

The network is strongly typed, so the graph alone determines the type of every operation; no builder flag sets a
precision (TensorRT 11 has removed these flags). TF32 is off: fp32 in this project means fp32. All activations of a plan
lie in one scratch block that the executor provides, on one stream, so auxiliary streams are off too. Layers keep their
details, which include the data types of a product's operands.
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

PARSER_FRAME = "ModelImporter.cpp"  # lines around the parser's errors that repeat them
NO_DRIVER = "cudaError 35"
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, usual, largest


@dataclass(frozen=True, slots=True)
class PlanJob:
    """All inputs of a plan.

    library            a name in `LIBRARIES`
    graph, plan, log   files: the input, the output, the library's messages
    inputs             name → the library's name of its type
    profiles           for each profile, input → shapes
    workspace_bytes    limit of one layer's scratch memory
    targets            architectures to compile for; none: this machine's GPU
    timings            file of the timing cache; None for a library without one
    fp8_products       number of the stage's e4m3 linears"""

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
    """Result of a job: seconds and peak memory of the process, or why there is no plan (a sentence; errno: number of
    the operating system's error, if there was one)."""

    seconds: float
    peak_bytes: int
    error: str | None = None
    errno: int | None = None


def compile_plan(job: PlanJob) -> None:
    """Parse, configure, build and write one plan. Raises Scail2Error with the library's messages, or OSError."""
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
            raise _failure(job, f"the parser of {library.title} rejects it", errors)
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
        del plan, parser, cache  # they had to exist until here


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
                raise _failure(job, f"{library.title} rejects the sizes {shapes} of {name} ({error})") from error
        if config.add_optimization_profile(target) < 0:
            raise _failure(job, f"{library.title} rejects its profile {dict(profile)}")


def _inputs(network: "trt.INetworkDefinition") -> "list[trt.ITensor]":
    return [network.get_input(index) for index in range(network.num_inputs)]


def _check_inputs(job: PlanJob, network: "trt.INetworkDefinition") -> None:
    """Check that the parsed inputs have the stage's names and types."""
    have = {tensor.name: tensor.dtype.name for tensor in _inputs(network)}
    if have != job.inputs:
        raise _failure(job, f"the parser gave the inputs {have} instead of {job.inputs}")


def _parser_error(error: "trt.ParserError") -> str:
    at = f" at node {error.node()} ({error.node_operator()} {error.node_name()!r})" if error.node() >= 0 else ""
    return f"{error.code().name}: {error.desc()}{at}"


def _failure(job: PlanJob, what: str, messages: Sequence[str] = ()) -> Scail2Error:
    """Make an error with the stage, its ONNX file, the problem and the library's messages."""
    said = process_log(LIBRARIES[job.library]).recent()
    noise = (PARSER_FRAME, NO_DRIVER) if job.targets else (PARSER_FRAME,)  # with targets, no GPU driver is needed
    said = [text for text in said if not any(part in text for part in noise)]
    return refusal(job, what, [*messages, *(text for text in said if not any(text in known for known in messages))])


def refusal(job: PlanJob, what: str, said: Iterable[str]) -> Scail2Error:
    """Make the error for a stage that cannot be compiled. what: the problem; said: the library's messages."""
    texts = [text.rstrip(" .") for text in said]
    quoted = f" {LIBRARIES[job.library].title} said: {'; '.join(texts)}." if texts else ""
    return Scail2Error(f"stage {job.stage} cannot be built from {job.graph}: {what}.{quoted} Its log is {job.log}.")


def attach_timings(config: "trt.IBuilderConfig", path: Path) -> "trt.ITimingCache":
    """Pass earlier measurements to a build; those of another GPU or version are dropped.

    The result must be kept until the build has returned. Raises Scail2Error if TensorRT rejects an empty cache."""
    known = path.read_bytes() if path.is_file() else b""
    for data in (known, b"") if known else (b"",):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    raise Scail2Error("TensorRT rejected an empty timing cache. Reinstall TensorRT.")


def save_timings(config: "trt.IBuilderConfig", path: Path) -> None:
    """Save the measurements of a finished build. Raises Scail2Error if there are none."""
    cache = config.get_timing_cache()
    if cache is None:
        raise Scail2Error("TensorRT lost the timing cache during a build. Reinstall TensorRT.")
    write_file(path, cache.serialize())


def write_file(path: Path, data: "bytes | trt.IHostMemory") -> None:
    """Replace a file atomically and durably (it survives a crash of the machine)."""
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
    """Run a job in this process."""
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
    """Return the peak memory of this process; 0 if the system does not report it. (`getrusage` includes the memory of
    the parent when it started the process.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def decode_job(line: str) -> PlanJob:
    """Parse a job from a line of JSON, and convert its lists back to tuples."""
    document = json.loads(line)
    document["profiles"] = tuple(
        {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()} for profile in document["profiles"]
    )
    return PlanJob(**{**document, "targets": tuple(document["targets"])})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Compile the job on standard input and print its outcome."""
    job = decode_job(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keep a library's prints out of the answer
    print(json.dumps(dataclasses.asdict(outcome_of(job))), file=result, flush=True)


if __name__ == "__main__":
    main()
