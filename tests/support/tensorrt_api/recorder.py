"""A module that replaces a TensorRT library and binds every call to the genuine signatures.

Its enums have the genuine members and values. Its classes are the wrapped stand-ins of `fakes`: methods that the real
class lacks cannot be defined or called, arguments must match one of the real overloads, and only attributes that the
real class allows can be set. Callback classes must initialise their base and define the methods that the bindings look
up. Every call is recorded in `calls`.
"""

import enum
import functools
import importlib.machinery
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.tensorrt_api import fakes
from tests.support.tensorrt_api.bindings import library_of
from tests.support.tensorrt_api.rules import ALIGNMENT, Violation, demand
from tests.support.tensorrt_api.surface import Surface, surface

CALLBACKS = {
    "ILogger": ("log",),
    "IErrorRecorder": (
        "get_error_code",
        "get_error_desc",
        "get_num_errors",
        "has_overflowed",
        "clear",
        "report_error",
    ),
}


@dataclass
class Settings:
    """The faults of the simulated TensorRT."""

    parser_errors: list[str] = field(default_factory=list)
    build_error: str | None = None
    execute_error: str | None = None
    no_gpu: bool = False
    no_context: bool = False
    refuse_profile: bool = False
    foreign_timings: bool = False
    foreign_cache: bool = False
    scratch_bytes: int = 1000


class FakeDevice:
    """The executor's device: CPU memory, a stream that is only a number, and a switch for "a graph is recorded"."""

    torch_device = torch.device("cpu")
    handle = 0x51

    def __init__(self) -> None:
        self.recording = False
        self.open = False
        self.waits = 0

    @contextmanager
    def stream(self) -> Iterator[int]:
        self.open = True
        try:
            yield self.handle
        finally:
            self.open = False

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        block = torch.empty(count * dtype.itemsize + ALIGNMENT, dtype=torch.uint8)
        start = -block.data_ptr() % ALIGNMENT
        return block[start : start + count * dtype.itemsize].view(dtype).view(list(shape))

    def capturing(self) -> bool:
        return self.recording

    def synchronize(self) -> None:
        demand(not self.recording, "the device was awaited while a CUDA graph was recorded")
        self.waits += 1


class HostMemory(bytes):
    """A result in host memory, through the buffer protocol."""


class Recorder:
    """One simulated installation of TensorRT."""

    def __init__(self, version: str) -> None:
        self.library = library_of(version)
        self.surface: Surface = surface(version)
        self.settings = Settings()
        self.device = FakeDevice()
        self.calls: list[tuple[str, str]] = []
        self.built: list[Path] = []
        self.loaded_timings: list[list[str]] = []
        self.loaded_kernels: list[list[str]] = []
        self._logger: Any = None
        self._enums = {name: enum.IntEnum(name, members) for name, members in self.surface.enums.items() if members}
        self._classes = {
            name: self._wrapped(name, kind)
            for name, kind in vars(fakes).items()
            if inspect.isclass(kind) and issubclass(kind, fakes.Fake) and name in self.surface.classes
        }
        self.module = types.ModuleType(self.library.module)
        self.module.__spec__ = importlib.machinery.ModuleSpec(
            self.library.module, None
        )  # other modules check whether there is one
        members: Mapping[str, Any] = {**self._enums, **self._classes, "__version__": self.surface.version}
        for name, value in members.items():
            if "." not in name:
                setattr(self.module, name, value)
        self._classes["ILogger"].Severity = self._enums["ILogger.Severity"]
        self._sessions: dict[str, Any] = {}

    def make(self, name: str, *arguments: Any) -> Any:
        """An object that TensorRT returns; its initialisation is not recorded as a call."""
        made = object.__new__(self._classes[name])
        self._classes[name]._plain_init(made, *arguments)  # type: ignore[attr-defined]
        return made

    def dims(self, shape: Any) -> Any:
        return self.make("Dims", shape)

    def enum(self, name: str, member: str) -> Any:
        return self._enums[name][member]

    def host_memory(self, data: bytes) -> HostMemory:
        return HostMemory(data)

    def note_logger(self, logger: Any) -> None:
        demand(self._logger in (None, logger), "a second logger: TensorRT keeps the first and warns")
        self._logger = logger

    def log(self, severity: str, text: str, logger: Any = None) -> None:
        """A message, from a thread of TensorRT's."""
        target = logger if logger is not None else self._logger
        self._in_thread(lambda: target.log(self._enums["ILogger.Severity"][severity], text))

    def check_stream(self, handle: int) -> None:
        demand(handle == self.device.handle and self.device.open, f"work went to the stream {handle}")

    def compute(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The results of the plan's ONNX file in ONNX Runtime."""
        import onnxruntime

        if graph not in self._sessions:
            self._sessions[graph] = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        results = self._sessions[graph].run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(result) for result in results]

    def _in_thread(self, work: Callable[[], None]) -> None:
        raised: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join()
        if raised:
            raise Violation(f"a callback raised {raised[0]!r}; TensorRT would print and ignore it") from raised[0]

    def _wrapped(self, name: str, kind: type) -> type:
        """`kind` under the rules of the genuine class `name`."""
        body: dict[str, Any] = {"_r": self, "__setattr__": self._guarded_set(name), "__getattr__": self._unknown(name)}
        for attribute, value in vars(kind).items():
            if isinstance(value, property):
                demand(self.surface.settable(name, attribute) is not None, f"{name} has no property {attribute}")
            elif inspect.isfunction(value) and not attribute.startswith("_"):
                body[attribute] = self._bound(name, attribute, value)  # which fits nothing in a version without it
        body["_plain_init"] = kind.__init__  # type: ignore[misc]
        if name in CALLBACKS:
            body["__init_subclass__"] = classmethod(functools.partial(self._check_callbacks, name))
        if self.surface.method(name, "__init__"):
            body["__init__"] = self._bound(name, "__init__", kind.__init__)  # type: ignore[misc]
        else:
            body["__init__"] = self._not_made_by_us(name)
        return type(name, (kind,), body)

    def _bound(self, owner: str, method: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
        overloads = self.surface.method(owner, method)

        def call(this: Any, *arguments: Any, **named: Any) -> Any:
            self.calls.append((owner, method))
            for overload in overloads:
                try:
                    bound = overload.bind(*arguments, **named)
                except TypeError:
                    continue
                if all(self._accepts(overload.parameters[n].annotation, v) for n, v in bound.arguments.items()):
                    return implementation(this, *bound.arguments.values())
            raise Violation(f"{owner}.{method}{arguments}{named or ''} fits none of {list(map(str, overloads))}")

        return call

    def _accepts(self, annotation: str, value: Any) -> bool:
        """Whether the bindings would convert this argument."""
        if annotation in ("int", "typing.SupportsInt"):
            return hasattr(value, "__index__")
        if annotation in ("str", "tuple", "list", "builtins.bool"):
            return isinstance(value, {"str": str, "tuple": tuple, "list": list, "builtins.bool": bool}[annotation])
        if annotation == "Dims":
            return isinstance(value, self._classes["Dims"] | tuple | list)
        if annotation.startswith(("list[", "collections.abc.Sequence[")):
            return isinstance(value, list | tuple)
        if annotation == "typing_extensions.Buffer":
            return isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "madvise")
        if annotation in self._enums or annotation in self._classes:
            return isinstance(value, self._enums.get(annotation) or self._classes[annotation])
        return True

    def _guarded_set(self, owner: str) -> Callable[..., None]:
        def set_attribute(this: Any, name: str, value: Any) -> None:
            if name.startswith("_") or type(this).__name__ != owner:  # from our code, or of a class that it derives
                object.__setattr__(this, name, value)
                return
            demand(self.surface.settable(owner, name) is True, f"{owner}.{name} cannot be set")
            self.calls.append((owner, name))
            this._property(name, value)

        return set_attribute

    def _unknown(self, owner: str) -> Callable[..., Any]:
        def get_attribute(this: Any, name: str) -> Any:
            if self.surface.method(owner, name) or self.surface.settable(owner, name) is not None:
                raise Violation(f"{owner}.{name} is genuine, but the recorder does not play it")
            raise AttributeError(f"{owner!r} object has no attribute {name!r}")

        return get_attribute

    def _not_made_by_us(self, owner: str) -> Callable[..., None]:
        def refuse(this: Any, *arguments: Any) -> None:
            raise Violation(f"{owner} cannot be made by an application")

        return refuse

    def _check_callbacks(self, owner: str, derived: type, **_: Any) -> None:
        """A class of ours derived from a callback class: its methods are those that the bindings look up."""
        for method in CALLBACKS[owner]:
            demand(f"\0{method}\0".encode() in self.surface.binary, f"the bindings look up no {method}")
            ours = vars(derived).get(method)
            demand(inspect.isfunction(ours), f"{derived.__name__} lacks {method}")
            genuine = self.surface.method(owner, "num_errors" if method == "get_num_errors" else method)[0]
            have = len(inspect.signature(ours).parameters) - 1  # type: ignore[arg-type]
            demand(have == len(genuine.parameters), f"{derived.__name__}.{method} takes {have} arguments")
        begin = derived.__init__  # type: ignore[misc]

        def initialise(this: Any, *arguments: Any) -> None:
            begin(this, *arguments)
            demand(getattr(this, "_initialised", False), f"{derived.__name__} does not initialise {owner}")

        derived.__init__ = initialise  # type: ignore[misc]
