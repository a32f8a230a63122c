"""Our TensorRT modules are well typed against the genuine bindings of both versions, and mistakes in them are not."""

import ast
from pathlib import Path

import pytest

from tests.support.tensorrt_api.bindings import VERSIONS, Unavailable
from tests.support.tensorrt_api.broken import MODULES, Fault
from tests.support.tensorrt_api.stubs import repaired, stubs
from tests.support.tensorrt_api.types import REPOSITORY, type_errors

REMOVED = [  # in 11; still there in 10.13
    Fault("builder", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
    Fault("builder", "clear_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP16)"),
    Fault("builder", "clear_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP8)"),
    Fault("engine", "device_memory_size_v2", "device_memory_size"),
    Fault("builder", "network = builder.", "builder.platform_has_fast_fp16; network = builder."),
]
WRONG = [
    Fault("builder", "parser.parse_from_file(str(files.graph))", "parser.parse_from_file(files.graph)"),
    Fault("builder", "parser.parse_from_file(", "parser.parse_file("),
    Fault("builder", "        if plan is None:\n", "        if False:\n"),
    Fault("builder", "build_serialized_network(network, config)", "build_serialized_network(config, network)"),
    Fault("builder", "set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, ", "set_memory_pool_limit("),
    Fault("builder", "ProfilingVerbosity.DETAILED", "ProfilingVerbosity.VERBOSE"),
    Fault("builder", "max_aux_streams = 0", 'max_aux_streams = "0"'),
    Fault("builder", "max_aux_streams = 0", "max_auxiliary_streams = 0"),
    Fault("builder", "trt.DataType.HALF", "trt.DataType.FLOAT16"),
    Fault("builder", "trt.Dims(list(shape)) for", "list(shape) for"),
    Fault("plans", "set_timing_cache(cache, False)", "set_timing_cache(cache)"),
    Fault("plans", "bytes(cache.serialize())", "cache.serialise()"),
    Fault("progress", "trt.IProgressMonitor.__init__", "trt.ProgressMonitor.__init__"),
    Fault("progress", "return progress.step(", "progress.step("),
    Fault("progress", "phase_name: str, step: SupportsInt", "phase_name: str"),
    Fault("library", "def log(self, severity: trt.ILogger.Severity, msg: str)", "def log(self, severity: str)"),
    Fault("session", "        if engine is None:\n", "        if False:\n"),
    Fault("session", "error_recorder = self._recorder", "error_recorder = self._errors"),
    Fault("session", "deserialize_cuda_engine(plan)", "deserialize_cuda_engine(str(path))"),
    Fault("engine", "        if context is None:\n", "        if False:\n"),
    Fault("engine", "set_tensor_address(name, address)", "set_tensor_address(address, name)"),
    Fault("engine", "execute_async_v3(stream)", "execute_async_v2(stream)"),
    Fault("engine", "context.infer_shapes()", "context.infer_shape()"),
    Fault("engine", "USER_MANAGED", "USER"),
]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_types(version: str, tmp_path: Path) -> None:
    """One run of mypy: over the real modules, and over a copy of one for each mistake."""
    removed = REMOVED if version.startswith("11.") else []
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


@pytest.mark.parametrize("version", VERSIONS)
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
