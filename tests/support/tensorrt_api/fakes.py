"""The recorder's stand-ins for TensorRT's objects, and the rules that they enforce.

Each class replaces one of TensorRT's, as far as a build and an execution need it. `recorder.py` checks every call
against the genuine signatures; these classes check what signatures do not express: order of calls, lifetimes, sizes,
alignments. A broken rule raises `Violation`, an AssertionError that the tested code does not catch. A plan is a small
JSON document; executing it runs the plan's ONNX file in ONNX Runtime, with the memory at the bound addresses.
"""

import ctypes
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import onnx
import torch

from tests.support.tensorrt_api.rules import ALIGNMENT, Violation, demand

TORCH_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
ONNX_TYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64"}
MEBI = 1 << 20


class Fake:
    """Base of all: `_r` is the recorder, set on the class before it is used."""

    _r: Any = None

    def _alive(self, reference: "weakref.ref[Any]", what: str) -> Any:
        found = reference()
        demand(found is not None, f"{what} was dropped while {type(self).__name__} still needed it")
        return found


class Dims(Fake):
    def __init__(self, shape: Any = ()) -> None:
        self._sizes = tuple(int(size) for size in shape)
        demand(len(self._sizes) <= 8, "Dims of more than 8 dimensions")

    def __iter__(self) -> Any:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]


class Callback(Fake):
    """A class that applications derive from; the bindings refuse one whose base was not initialised."""

    def __init__(self) -> None:
        self._initialised = True


class ILogger(Callback):
    pass


class IErrorRecorder(Callback):
    pass


class Builder(Fake):
    def __init__(self, logger: Any) -> None:
        if self._r.settings.no_gpu:
            self._r.log("ERROR", "CUDA initialization failure with error: 100", logger)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._r.note_logger(logger)
        self._logger = weakref.ref(logger)

    def create_network(self, flags: Any = 0) -> Any:
        strongly = 1 << self._r.surface.enums["NetworkDefinitionCreationFlag"]["STRONGLY_TYPED"]
        demand(int(flags) == strongly, f"network flags are {int(flags)}, not STRONGLY_TYPED alone")
        return self._r.make("INetworkDefinition")

    def create_builder_config(self) -> Any:
        return self._r.make("IBuilderConfig")

    def create_optimization_profile(self) -> Any:
        return self._r.make("IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        settings = self._r.settings
        logger = self._alive(self._logger, "the logger")
        self._alive(network._parser, "the parser, which owns the weights,")
        config._check(network)
        cache = self._alive(config._cache, "the timing cache") if self._r.library.timing_cache else None
        self._r.log("INFO", "Detected inputs and output network tensors.", logger)
        if settings.build_error is not None:
            self._r.log("ERROR", settings.build_error, logger)
            return None
        if cache is not None:
            cache._entries.append(network._path.name)
        self._r.built.append(network._path)
        profiles = [{name: [list(s) for s in shapes] for name, shapes in p._shapes.items()} for p in config._profiles]
        plan = {
            "graph": str(network._path),
            "inputs": [[t._name, t._type, list(t._shape)] for t in network._inputs],
            "outputs": network._outputs,
            "profiles": profiles,
            "version": self._r.surface.version,
            "scratch": settings.scratch_bytes,
            "targets": config._targets,
        }
        return self._r.host_memory(json.dumps(plan).encode())


class INetworkDefinition(Fake):
    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._path = Path()
        self._parser: Any = lambda: None

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]


class ITensor(Fake):
    def __init__(self) -> None:
        self._name, self._type, self._shape = "", "", ()

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> Any:
        return self._r.dims(self._shape)

    @property
    def dtype(self) -> Any:
        return self._r.enum("DataType", self._type)


class ParserError(Fake):
    def __init__(self, text: str = "") -> None:
        self._text = text

    def code(self) -> Any:
        return self._r.enum("ErrorCode", "UNSUPPORTED_NODE")

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return 7

    def node_name(self) -> str:
        return "node_7"

    def node_operator(self) -> str:
        return "Resize"


class OnnxParser(Fake):
    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network
        self._r.note_logger(logger)
        network._parser = weakref.ref(self)

    def parse_from_file(self, model: str) -> bool:
        if self._r.settings.parser_errors:
            return False
        path = Path(model)
        graph = onnx.load(path, load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.external_data:
                place = {entry.key: entry.value for entry in tensor.external_data}
                size = (path.parent / place["location"]).stat().st_size
                demand(int(place["offset"]) + int(place["length"]) <= size, f"{tensor.name} lies outside its file")
        self._network._path = path
        for value in graph.input:
            tensor = self._r.make("ITensor")
            kind, shape = value.type.tensor_type.elem_type, value.type.tensor_type.shape
            tensor._name, tensor._type = value.name, ONNX_TYPES[kind]
            tensor._shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in shape.dim)
            self._network._inputs.append(tensor)
        self._network._outputs = [
            [
                value.name,
                ONNX_TYPES[value.type.tensor_type.elem_type],
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            ]
            for value in graph.output
        ]
        return True

    @property
    def num_errors(self) -> int:
        return len(self._r.settings.parser_errors)

    def get_error(self, index: int) -> Any:
        return self._r.make("ParserError", self._r.settings.parser_errors[index])


class IOptimizationProfile(Fake):
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = tuple(min), tuple(opt), tuple(max)
        ordered = all(a <= b <= c for a, b, c in zip(*shapes, strict=True))
        if not ordered:
            raise ValueError("The shapes are not min <= opt <= max")
        self._shapes[input] = shapes


class ITimingCache(Fake):
    def __init__(self, data: Any = b"") -> None:
        self._entries: list[str] = json.loads(bytes(data) or b"[]")

    def serialize(self) -> Any:
        return self._r.host_memory(json.dumps(self._entries).encode())


class IBuilderConfig(Fake):
    def __init__(self) -> None:
        self._profiles: list[Any] = []
        self._set: dict[str, Any] = {}
        self._workspace = 0
        self._tf32 = True
        self._cache: Any = None
        self._targets: list[str] = []

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        demand(pool.name == "WORKSPACE", f"a limit for the pool {pool.name}")
        self._workspace = int(pool_size)

    def clear_flag(self, flag: Any) -> None:
        demand(flag.name == "TF32", f"the flag {flag.name} was cleared")
        self._tf32 = False

    def set_flag(self, flag: Any) -> None:
        raise Violation(f"the flag {flag.name} was set; a strongly typed build sets none")

    def add_optimization_profile(self, profile: Any) -> int:
        if self._r.settings.refuse_profile:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        return self._r.make("ITimingCache", serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        demand(not ignore_mismatch, "timings of another GPU would be accepted")
        if self._r.settings.foreign_timings and cache._entries:
            return False
        self._r.loaded_timings.append(list(cache._entries))
        self._cache = weakref.ref(cache)
        return True

    def get_timing_cache(self) -> Any:
        return self._cache() if self._cache is not None else None

    def _property(self, name: str, value: Any) -> None:
        self._set[name] = value
        if name == "num_compute_capabilities":
            self._targets = [""] * value

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        demand(index < len(self._targets), "a target was set beyond their number")
        self._targets[index] = compute_capability.name
        return True

    def _check(self, network: Any) -> None:
        """Check the conditions for starting a build."""
        demand(MEBI <= self._workspace <= 64 << 30, "no explicit workspace limit")
        demand(self._set.get("max_aux_streams") == 0, "auxiliary streams are not off")
        demand(1 <= self._set.get("builder_optimization_level", 3) <= 5, "the timing cache would be ignored")
        verbosity = self._set.get("profiling_verbosity")
        demand(verbosity is not None and verbosity.name == "DETAILED", "the inspector would see no data types")
        demand(not self._tf32, "TF32 is on")
        if self._r.library.timing_cache:
            demand(self._cache is not None, "no timing cache")
        else:
            demand(self._cache is None, "a timing cache, of which this library knows nothing")
            demand(bool(self._targets) and "" not in self._targets, "no target, or fewer than announced")
        for tensor in network._inputs:
            if -1 not in tensor._shape:
                continue
            demand(bool(self._profiles), f"no profile for the dynamic input {tensor._name}")
            for profile in self._profiles:
                demand(tensor._name in profile._shapes, f"a profile lacks the dynamic input {tensor._name}")
                for shape in profile._shapes[tensor._name]:
                    fits = len(shape) == len(tensor._shape)
                    fits &= all(want in (-1, have) for want, have in zip(tensor._shape, shape, strict=False))
                    demand(fits, f"the profile gives {tensor._name} the shape {shape}, its graph has {tensor._shape}")


class Runtime(Fake):
    def __init__(self, logger: Any) -> None:
        if self._r.settings.no_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._r.note_logger(logger)
        self._logger = weakref.ref(logger)
        self._recorder: Any = None

    def _property(self, name: str, value: Any) -> None:
        demand(name == "error_recorder", f"the runtime's {name} was set")
        self._recorder = weakref.ref(value)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        demand(self._recorder is not None, "an engine was loaded before the error recorder was set")
        try:
            plan = json.loads(bytes(memoryview(serialized_engine)))
        except ValueError:
            plan = {"version": "?"}
        if plan["version"] != self._r.surface.version:
            self._r.log("ERROR", "The engine plan file is not compatible with this version", self._logger())
            return None
        return self._r.make("ICudaEngine", plan, self)


class ICudaEngine(Fake):
    def __init__(self, plan: Any = None, runtime: Any = None) -> None:
        self._plan, self._runtime = plan, weakref.ref(runtime)
        self._tensors = {name: (kind, shape, "INPUT") for name, kind, shape in plan["inputs"]}
        self._tensors |= {name: (kind, shape, "OUTPUT") for name, kind, shape in plan["outputs"]}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self._plan["profiles"]), 1)

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._plan["scratch"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._r.enum("TensorIOMode", self._tensors[name][2])

    def get_tensor_dtype(self, name: str) -> Any:
        return self._r.enum("DataType", self._tensors[name][0])

    def get_tensor_shape(self, name: str) -> Any:
        return self._r.dims([size if isinstance(size, int) else -1 for size in self._tensors[name][1]])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return [self._r.dims(shape) for shape in self._plan["profiles"][profile_index][name]]

    def create_runtime_config(self) -> Any:
        return self._r.make("IRuntimeConfig", self)

    def create_execution_context(self, how: Any) -> Any:
        if self._r.library.compiles_here:
            demand(how.name == "USER_MANAGED", f"a context with {how.name} memory")
        else:
            how._check(self)
        if self._r.settings.no_context:
            return None
        return self._r.make("IExecutionContext", self)

    def create_engine_inspector(self) -> Any:
        return self._r.make("EngineInspector", self)


class IRuntimeCache(Fake):
    def __init__(self) -> None:
        self._kernels: list[str] = []

    def deserialize(self, blob: Any) -> bool:
        demand(not self._kernels, "kernels were read after some had been compiled")
        if self._r.settings.foreign_cache:
            return False
        self._kernels = json.loads(bytes(blob))
        self._r.loaded_kernels.append(list(self._kernels))
        return True

    def serialize(self) -> Any:
        return self._r.host_memory(json.dumps(self._kernels).encode())


class IRuntimeConfig(Fake):
    def __init__(self, engine: Any = None) -> None:
        self._engine = weakref.ref(engine)
        self._strategy = "STATIC"
        self._set: dict[str, str] = {}
        self._cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy.name

    def create_runtime_cache(self) -> Any:
        return self._r.make("IRuntimeCache")

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = weakref.ref(cache)
        return True

    def _property(self, name: str, value: Any) -> None:
        self._set[name] = value.name

    def _check(self, engine: Any) -> None:
        """Check the conditions for making a context, which compiles its kernels."""
        demand(self._engine() is engine, "the configuration of another engine")
        demand(self._strategy == "USER_MANAGED", f"a context with {self._strategy} memory")
        specialised = self._set.get("dynamic_shapes_kernel_specialization_strategy", "LAZY")
        demand(specialised in ("EAGER", "NONE"), f"{specialised}: kernels may change between a call and its recording")
        demand(self._set.get("cuda_graph_strategy", "DISABLED") == "DISABLED", "two would record the same graph")
        demand(self._cache is not None, "a context without the runtime cache")
        cache = self._alive(self._cache, "the runtime cache")
        name = Path(engine._plan["graph"]).name
        if name not in cache._kernels:
            cache._kernels.append(name)


class EngineInspector(Fake):
    def __init__(self, engine: Any = None) -> None:
        self._engine = weakref.ref(engine)

    def get_engine_information(self, format: Any) -> str:
        demand(format.name == "JSON", f"the report is wanted as {format.name}")
        return json.dumps({"Layers": [{"Name": tensor} for tensor in self._engine()._tensors]})


class IExecutionContext(Fake):
    def __init__(self, engine: Any = None) -> None:
        self._engine = weakref.ref(engine)
        self._plan = engine._plan
        self._inputs = {name: (kind, shape) for name, kind, shape in self._plan["inputs"]}
        self._shapes = {n: tuple(shape) for n, (_, shape) in self._inputs.items() if -1 not in shape}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._profile, self._inferred, self._warm, self._thread = 0, False, False, threading.get_ident()

    def _changed(self) -> None:
        demand(not self._r.device.recording, "a context was set up while a CUDA graph was recorded")
        self._warm = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._r.check_stream(stream_handle)
        demand(0 <= profile_index < len(self._plan["profiles"]), f"there is no profile {profile_index}")
        self._changed()
        self._profile, self._shapes, self._inferred = profile_index, {}, False
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._changed()
        sizes, fixed = tuple(shape), tuple(self._inputs[name][1])
        if -1 in fixed:
            low, _, high = self._plan["profiles"][self._profile][name]
            if not all(a <= b <= c for a, b, c in zip(low, sizes, high, strict=True)):
                self._r.log("ERROR", f"{name}: {sizes} is outside of profile {self._profile}")
                return False
        elif sizes != fixed:
            return False
        self._shapes[name], self._inferred = sizes, False
        return True

    def infer_shapes(self) -> list[str]:
        self._inferred = True
        return [name for name in self._inputs if name not in self._shapes]

    def set_device_memory(self, memory: int, size: int) -> None:
        self._changed()
        demand(memory > 0 and memory % ALIGNMENT == 0, f"scratch at {memory} is not aligned to {ALIGNMENT} bytes")
        demand(size >= self._plan["scratch"], f"scratch has {size} bytes, the engine needs {self._plan['scratch']}")
        ctypes.memset(memory, 0xAB, size)  # it must exist
        self._memory = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        demand(name in self._inputs or name in {o[0] for o in self._plan["outputs"]}, f"there is no tensor {name}")
        demand(memory > 0 and memory % ALIGNMENT == 0, f"{name} at {memory} is not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._r.check_stream(stream_handle)
        engine = self._alive(self._engine, "the engine")
        runtime = self._alive(engine._runtime, "the runtime")
        self._alive(runtime._logger, "the logger")
        recorder = self._alive(runtime._recorder, "the error recorder")
        demand(self._inferred, "shapes were never checked with infer_shapes")
        demand(self._memory is not None, "no scratch memory was set")
        missing = [n for n in (*self._inputs, *(o[0] for o in self._plan["outputs"])) if n not in self._addresses]
        demand(not missing, f"enqueued without the addresses of {missing}")
        demand(
            self._warm or not self._r.device.recording, "the first enqueue after a change was recorded in a CUDA graph"
        )
        if self._r.settings.execute_error is not None:
            recorder.report_error(self._r.enum("ErrorCodeTRT", "FAILED_EXECUTION"), self._r.settings.execute_error)
            demand(recorder.get_num_errors() > 0, "the error recorder lost an error")
            return False
        self._warm = True
        ctypes.memset(self._memory[0], 0xCD, self._memory[1])  # type: ignore[index]
        self._run()
        return True

    def _run(self) -> None:
        inputs = {n: self._view(n, kind, self._shapes[n]) for n, (kind, _) in self._inputs.items()}
        results = self._r.compute(self._plan["graph"], inputs)
        for (name, kind, dims), result in zip(self._plan["outputs"], results, strict=True):
            demand(len(dims) == result.ndim, f"{name} has another rank than its graph")
            self._view(name, kind, tuple(result.shape)).copy_(result)

    def _view(self, name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = TORCH_TYPES[kind]
        count = int(torch.Size(shape).numel())
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype).view(shape)
