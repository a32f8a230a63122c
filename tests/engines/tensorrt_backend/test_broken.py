"""The recorder detects wrong use of TensorRT: one build and one run per injected fault."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.store import STORE_NAME, StoreReader
from scail2_rt.engines.observer import SilentObserver
from scail2_rt.engines.torch_backend.engine import TorchEngine
from scail2_rt.export.models.precision import FP32
from scail2_rt.kernels.errors import Scail2Error
from tests.support.onnx_case import example_inputs
from tests.support.tensorrt_api.bindings import ALL
from tests.support.tensorrt_api.broken import Fault, broken
from tests.support.tensorrt_api.installed import (
    CONFIG,
    card,
    forget_logger,
    in_process,
    installed,
    make_folder,
    small_stages,
)
from tests.support.tensorrt_api.recorder import Recorder
from tests.support.tensorrt_api.rules import ALIGNMENT

STAGES = {name: stage for name, stage in small_stages().items() if name in ("dit.head", "vae.picture")}

FAULTS = [
    # the network and its parser
    Fault("compiling", "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)", ""),
    Fault("compiling", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
    Fault("compiling", "1 << int(trt.Net", "int(trt.Net"),
    Fault("compiling", "parser.parse_from_file(job.graph)", "parser.parse_from_file(Path(job.graph))"),
    Fault("compiling", "parser.parse_from_file(", "parser.parse_file("),
    Fault("compiling", "        config = _configure(", "        del parser\n        config = _configure("),
    Fault("compiling", "trt.OnnxParser(network, process_logger(library))", "trt.OnnxParser(network, trt.ILogger())"),
    # its configuration
    Fault("compiling", "    config.max_aux_streams = 0\n", ""),
    Fault("compiling", "max_aux_streams = 0", "max_auxiliary_streams = 0"),
    Fault("compiling", "    config.clear_flag(trt.BuilderFlag.TF32)\n", ""),
    Fault("compiling", "clear_flag(trt.BuilderFlag.TF32)", "set_flag(trt.BuilderFlag.FP8)"),
    Fault("compiling", "    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED\n", ""),
    Fault("compiling", "config.set_memory_pool_limit(", "str("),
    Fault("compiling", "set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, ", "set_memory_pool_limit("),
    Fault("compiling", "level = job.optimization_level", "level = 0"),
    Fault("builder", "_level,\n        options.targets,", "_level,\n        (),"),
    Fault("rtx_targets", "num_compute_capabilities = len(targets)", "num_compute_capabilities = 3"),
    Fault("rtx_targets", ", index):", ", 0):"),
    # its profiles
    Fault("compiling", "in profile.items():", "in list(profile.items())[1:]:"),
    Fault("compiling", "if config.add_optimization_profile(target) < 0:", "if False:"),
    Fault("compiling", "target.set_shape(name, *(", "target.set_shape(*("),
    Fault("profiles", "shape.append(factor * ranges", "shape.append(ranges"),
    Fault("profiles", 'return {"h": short, "w": long}, {"h": long, "w": short}', 'return ({"h": short, "w": long},)'),
    # the timing cache
    Fault("compiling", "            save_timings(config, Path(job.timings))\n", "            pass\n"),
    Fault("compiling", "attach_timings(config, Path(job.timings)) if job.timings is not None else None", "None"),
    Fault("compiling", "cache = attach_timings(", "_ = attach_timings("),
    Fault("compiling", "set_timing_cache(cache, False)", "set_timing_cache(cache, True)"),
    Fault("compiling", 'for data in (known, b"") if known else (b"",):', 'for data in (b"",):'),
    Fault("builder", "if library.timing_cache else None", ""),
    # the result
    Fault("compiling", "        write_file(Path(job.plan), plan)\n", ""),
    Fault("compiling", "build_serialized_network(network, config)", "build_serialized_network(config, network)"),
    # kernels that are compiled on the card
    Fault(
        "rtx",
        "rtx.DynamicShapesKernelSpecializationStrategy.EAGER",
        "rtx.DynamicShapesKernelSpecializationStrategy.LAZY",
    ),
    Fault("rtx", "rtx.CudaGraphStrategy.DISABLED", "rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"),
    Fault(
        "rtx", "rtx.ExecutionContextAllocationStrategy.USER_MANAGED", "rtx.ExecutionContextAllocationStrategy.STATIC"
    ),
    Fault("rtx", "if not config.set_runtime_cache(self._cache):", "if False:"),
    Fault("rtx", "self._cache = config.create_runtime_cache()", "self._cache = object()"),
    Fault("rtx", "data = bytes(self._cache.serialize())", 'data = b""'),
    Fault("session", "return self._kernels.new_context(engine)", "pass"),
    # messages
    Fault("library", "            trt.ILogger.__init__(self)", "            pass"),
    Fault("library", "def get_num_errors(self)", "def number_of_errors(self)"),
    Fault("library", "severity.name, msg", "severity.label, msg"),
    Fault("session", "        self._runtime.error_recorder = self._recorder\n", ""),
    Fault("session", "        self._recorder = error_recorder(library, self._errors)\n", ""),
    Fault("session", "error_recorder = self._recorder", "error_recorder = error_recorder(self._errors)"),
    # contexts and memory
    Fault("session", "ExecutionContextAllocationStrategy.USER_MANAGED", "ExecutionContextAllocationStrategy.STATIC"),
    Fault("engine", "bound.context.set_device_memory(scratch.pointer, scratch.size)", "pass"),
    Fault("engine", "memory(scratch.pointer, ", "memory(scratch.pointer + 8, "),
    Fault("engine", "(scratch.pointer, scratch.size)", "(scratch.pointer, 1)"),
    Fault("engine", "session.scratch.reserve(self._engine.device_memory_size_v2)", "session.scratch.reserve(1)"),
    Fault("engine", "device_memory_size_v2", "device_memory_size_v3"),
    Fault("session", "return -(-self._block.data_ptr() // ALIGNMENT) * ALIGNMENT", "return self._block.data_ptr() + 1"),
    Fault("engine", "if profile and not context.set_optimization_profile_async(profile, stream):", "if False:"),
    Fault("engine", "profile_async(profile, stream)", "profile_async(stream, profile)"),
    Fault("engine", "            missing = context.infer_shapes()", "            missing = []"),
    Fault("engine", "if not context.set_input_shape(spec.name, shape):", "if False:"),
    # running
    Fault("engine", "for name, address in addresses.items():", "for name, address in list(addresses.items())[:-1]:"),
    Fault("engine", "for name, address in addresses.items():", "for name, address in list(addresses.items())[1:]:"),
    Fault("engine", "set_tensor_address(name, address)", "set_tensor_address(address, name)"),
    Fault("engine", "if bound.addresses.get(name) != address:", "if name not in bound.addresses:"),
    Fault("engine", "if not bound.context.execute_async_v3(stream):", "if not bound.context.execute_async_v3(0):"),
    Fault("engine", "if not bound.context.execute_async_v3(stream):", "if not bound.context.execute_v2([stream]):"),
    Fault("engine", "if not bound.context.execute_async_v3(", "if None is bound.context.execute_async_v3("),
    Fault("engine", "if capturing and (", "if False and ("),
    Fault("engine", "        bound.warm = True\n", ""),
    Fault("engine", "tensor.is_contiguous() and ", ""),
    Fault("engine", " and tensor.data_ptr() % ALIGNMENT == 0", ""),
    Fault(
        "engine",
        "device.synchronize()\n            self._contexts.clear()",
        "device\n            self._contexts.clear()",
    ),
]


@pytest.fixture(params=ALL)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recorder(version: str) -> Iterator[Recorder]:
    with installed(version) as recorder:
        yield recorder


def scenario(modules: dict[str, ModuleType], recorder: Recorder, folder: Path, version: str) -> None:
    """Build two stages and run them in every way. Raises if a rule is violated."""
    for module in ("builder", "preflight"):
        modules[module].find_gpu = lambda: modules["preflight"].GpuFacts(*card(version), 100 << 30)
    modules["children"].Child = in_process(modules["compiling"])
    library = modules["library"].LIBRARIES[recorder.library.name]
    forget_logger(modules["library"])
    layout = make_folder(folder, STAGES, FP32)
    stages = folder / "stages"
    targets = ("sm89", "sm120") if library.targets else ()
    options = modules["profiles"].PlanOptions(targets=targets)
    plan = ArtefactPlan(folder, CONFIG, "fp32", STAGES, {}, layout, options)
    modules["builder"].build_plans(plan, SilentObserver(), library)
    graphs = [f"{name}.trt.onnx" for name in STAGES]
    if library.timing_cache:
        assert recorder.loaded_timings == [graphs[:i] for i in range(len(graphs))]
        assert json.loads(modules["plans"].timings_path(stages, library).read_text()) == graphs
    plans = [json.loads(modules["plans"].plan_path(stages, name, library).read_text()) for name in STAGES]
    assert all(made["targets"] == [target.upper() for target in targets] for made in plans)
    recorder.settings.refuse_profile = True
    other = replace(plan, options=replace(options, max_rows=99))
    _must_fail(lambda: modules["builder"].build_plans(other, SilentObserver(), library))
    recorder.settings.refuse_profile = False
    session = modules["session"].TensorRTSession(library, recorder.device, folder)
    _run(modules, recorder, session, stages, "dit.head", [{"rows": 4}, {"rows": 9}])
    _run(modules, recorder, session, stages, "vae.picture", [{"h": 4, "w": 90}, {"h": 90, "w": 4}])
    session.close()
    if library.targets:
        assert json.loads((folder / "kernels" / modules["rtx"].CACHE).read_bytes()) == graphs


def _run(
    modules: dict[str, ModuleType],
    recorder: Recorder,
    session: object,
    stages: Path,
    name: str,
    sizes: list[dict[str, int]],
) -> None:
    engine = modules["engine"].TensorRTEngine(
        STAGES[name], FP32, modules["plans"].plan_path(stages, name, session.library), session, "build again"
    )
    expected = TorchEngine(STAGES[name], FP32, StoreReader(stages / STORE_NAME), torch.device("cpu"))
    for recording in (False, True):
        for values in sizes:
            for seed in (1, 2):
                given = example_inputs(STAGES[name], FP32, values, seed)
                given[0] = _placed(given[0].transpose(-1, -2), 0).transpose(-1, -2)  # aligned, in another order
                given[1:] = [_placed(x, 64) for x in given[1:]]  # in order, not aligned
                recorder.device.recording = recording
                actual = engine(*given)
                recorder.device.recording = False
                torch.testing.assert_close(actual, expected(*given), atol=1e-5, rtol=1e-5)
    recorder.device.recording = True
    unseen = {symbol: size * 2 for symbol, size in sizes[0].items()}
    _must_fail(lambda: engine(*example_inputs(STAGES[name], FP32, unseen, 1)))
    recorder.device.recording = False
    recorder.settings.execute_error = "a kernel failed"
    _must_fail(lambda: engine(*example_inputs(STAGES[name], FP32, sizes[0], 1)))
    recorder.settings.execute_error = None
    waits = recorder.device.waits
    engine.close()
    assert recorder.device.waits > waits, "weights were freed while work may have been running"


def _placed(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A contiguous copy whose address is `offset` bytes above an aligned one."""
    room = torch.empty(x.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + offset
    return room[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def _must_fail(call: object) -> None:
    with pytest.raises(Scail2Error):
        call()  # type: ignore[operator]


def test_nothing_broken_passes(recorder: Recorder, version: str, tmp_path: Path) -> None:
    with broken(None) as modules:
        scenario(modules, recorder, tmp_path / "e", version)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    """By one of the versions."""
    for version in ALL:
        with installed(version) as recorder, broken(fault) as modules:
            try:
                scenario(modules, recorder, tmp_path / version, version)
            except (Exception, pytest.fail.Exception) as error:
                print(f"{version}: {type(error).__name__}: {error}")
                return
    pytest.fail("nothing noticed it")
