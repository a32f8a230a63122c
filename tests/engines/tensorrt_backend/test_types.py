"""The TensorRT modules type-check against the genuine bindings of both libraries, and mistakes in them are detected."""

import ast
from pathlib import Path

import pytest

from tests.support.tensorrt_api.bindings import ALL, RTX, Unavailable
from tests.support.tensorrt_api.broken import MODULES, Fault
from tests.support.tensorrt_api.stubs import repaired, stubs
from tests.support.tensorrt_api.types import REPOSITORY, type_errors

REMOVED = [  # in 11; still there in 10.13
    Fault("compiling", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
    Fault("compiling", "clear_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP16)"),
    Fault("compiling", "clear_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP8)"),
    Fault("engine", "device_memory_size_v2", "device_memory_size"),
    Fault("compiling", "network = builder.", "builder.platform_has_fast_fp16; network = builder."),
]
WRONG = [
    Fault("compiling", "parser.parse_from_file(job.graph)", "parser.parse_from_file(Path(job.graph))"),
    Fault("compiling", "parser.parse_from_file(", "parser.parse_file("),
    Fault("compiling", "        if plan is None:\n", "        if False:\n"),
    Fault("compiling", "build_serialized_network(network, config)", "build_serialized_network(config, network)"),
    Fault("compiling", "set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, ", "set_memory_pool_limit("),
    Fault("compiling", "ProfilingVerbosity.DETAILED", "ProfilingVerbosity.VERBOSE"),
    Fault("compiling", "max_aux_streams = 0", 'max_aux_streams = "0"'),
    Fault("compiling", "max_aux_streams = 0", "max_auxiliary_streams = 0"),
    Fault("compiling", "trt.Dims(list(shape)) for", "list(shape) for"),
    Fault("compiling", "set_timing_cache(cache, False)", "set_timing_cache(cache)"),
    Fault("compiling", "cache.serialize())", "cache.serialise())"),
    Fault("library", "def log(self, severity: trt.ILogger.Severity, msg: str)", "def log(self, severity: str)"),
    Fault("session", "        if engine is None:\n", "        if False:\n"),
    Fault("session", "error_recorder = self._recorder", "error_recorder = self._errors"),
    Fault("session", "deserialize_cuda_engine(plan)", "deserialize_cuda_engine(str(path))"),
    Fault("engine", "        if context is None:\n", "        if False:\n"),
    Fault("engine", "set_tensor_address(name, address)", "set_tensor_address(address, name)"),
    Fault("engine", "execute_async_v3(stream)", "execute_async_v2(stream)"),
    Fault("engine", "context.infer_shapes()", "context.infer_shape()"),
    Fault("session", "USER_MANAGED", "USER"),
]
OF_RTX = [
    Fault("rtx_targets", "num_compute_capabilities = len(targets)", "num_compute_capabilities = targets"),
    Fault("rtx_targets", "set_compute_capability(", "set_compute_capabilities("),
    Fault("rtx", "config.set_runtime_cache(self._cache)", "config.set_runtime_cache(self._path)"),
    Fault("rtx", "create_execution_context(config)", "create_execution_context(self._cache)"),
    Fault("rtx", "config.cuda_graph_strategy = ", "config.graph_strategy = "),
    Fault("rtx", "SpecializationStrategy.EAGER", "SpecializationStrategy.NOW"),
    Fault("rtx", "self._cache.deserialize(self._read)", "self._cache.deserialize(self._path)"),
    Fault("rtx", "if self._cache is None:\n            return", "if False:\n            return"),
]


@pytest.mark.slow
@pytest.mark.parametrize("version", ALL)
def test_types(version: str, tmp_path: Path) -> None:
    """One run of mypy: over the real modules, and over a copy of one for each mistake."""
    removed = {"11": REMOVED, RTX: OF_RTX}.get(version.partition(".")[0], [])
    copies = {tmp_path / f"copy_{i}_of_{fault.module}.py": fault for i, fault in enumerate([*WRONG, *removed])}
    for path, fault in copies.items():
        path.write_text(fault.source())
    ours = [
        REPOSITORY / ".typecheck" / "scail2_rt" / "engines" / "tensorrt_backend" / f"{module}.py" for module in MODULES
    ]
    try:
        errors = type_errors(version, [*ours, *copies], tmp_path)
    except Unavailable as error:
        pytest.skip(f"no TensorRT types: {error}")
    found = {Path(line.split(":")[0]).name for line in errors}
    assert [line for line in errors if "tensorrt_backend/" in line] == []  # other folders have an engine.py too
    assert [str(fault) for path, fault in copies.items() if path.name not in found] == []


@pytest.mark.parametrize("version", ALL)
def test_the_stubs_are_python(version: str) -> None:
    try:
        folder = stubs(version)
    except Unavailable as error:
        pytest.skip(f"no TensorRT types: {error}")
    for file in folder.rglob("*.pyi"):
        ast.parse(file.read_text())


def test_repairs() -> None:
    text = repaired(
        "class Builder:\n"
        "    def build_serialized_network(self, network: INetworkDefinition) -> IHostMemory:\n"
        "    def enqueue(self, in: list[int], out: ..., last: bool = True, size: int) -> bool:\n"
        "    name: ...\n"
    )
    assert "def build_serialized_network(self, network: INetworkDefinition) -> IHostMemory | None:" in text
    enqueue = "in_: list[int], out: typing.Any, last: builtins.bool = True, size: int = ...) -> builtins.bool:"
    assert enqueue in text
    assert "name: typing.Any" in text
