"""One engine stage in TensorRT.

A plan is loaded once. Every set of input shapes gets a separate execution context, prepared on first use (profile,
shapes, scratch memory), so a CUDA graph captured at one shape stays valid when the stage also runs at another.
TensorRT is given an address only when it changes, not on every call: inputs come from static chunk buffers or from
PyTorch's allocator, which returns the same blocks call after call, and so do outputs. (Output buffers owned by the
engine would be overwritten by the next call while the caller still uses them, and would cost their size 160 times.)
TensorRT finishes its set-up in the first enqueue after a shape was set, which must not be captured: a stage has to run
once at a shape before it is captured there, as `verify` does.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scail2_rt.engines.onnx_backend.engine import concrete_size, symbol_sizes
from scail2_rt.engines.tensorrt_backend.profiles import PICTURE_MULTIPLE, TYPE_NAMES, InputRange
from scail2_rt.engines.tensorrt_backend.session import ALIGNMENT, Device, TensorRTSession
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.models.vae import PIXELS_PER_CELL
from scail2_rt.export.stages.spec import ROWS, StageDefinition
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    import tensorrt as trt

MAX_CONTEXTS = 4  # prepared shapes per stage, in addition to those captured in a CUDA graph

Shapes = tuple[tuple[int, ...], ...]


class _Context:
    """An execution context for one set of input shapes."""

    def __init__(self, context: "trt.IExecutionContext") -> None:
        self.context = context
        self.addresses: dict[str, int] = {}
        self.scratch = 0
        self.warm = False  # whether it was enqueued since its shapes and memory were set
        self.recorded = False


class TensorRTEngine:
    """A stage as a callable on tensors of the session's device.

    plan      file of the serialised engine; session: shared by all stages of a device; remedy: the command that
              builds the plan again, for messages

    Raises InputError if the plan is missing or was built for another GPU, version or stage signature; Scail2Error if
    TensorRT fails."""

    def __init__(
        self, definition: StageDefinition, numerics: Numerics, plan: Path, session: TensorRTSession, remedy: str
    ) -> None:
        self.name, self.remedy = definition.name, remedy
        self.inputs, self.outputs = definition.io(numerics)
        self._session = session
        self._engine: trt.ICudaEngine | None = session.load(plan, self.name, remedy)
        self._contexts: OrderedDict[Shapes, _Context] = OrderedDict()
        self._check_tensors(self._engine, plan)
        self.profiles = _profiles(self._engine, [spec.name for spec in self.inputs])
        session.scratch.reserve(self._engine.device_memory_size_v2)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the stage; returns new tensors in the types of the specs."""
        sizes = symbol_sizes(self.name, self.inputs, inputs)
        device = self._session.device
        tensors = [
            _readable(tensor.to(device.torch_device, spec.dtype), device)
            for spec, tensor in zip(self.inputs, inputs, strict=True)
        ]
        outputs = tuple(
            device.empty([concrete_size(dim, sizes) for dim in spec.dims], spec.dtype) for spec in self.outputs
        )
        addresses = {spec.name: tensor.data_ptr() for spec, tensor in zip(self.inputs, tensors, strict=True)}
        addresses |= {spec.name: tensor.data_ptr() for spec, tensor in zip(self.outputs, outputs, strict=True)}
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        with device.stream() as stream:
            self._enqueue(self._ready(shapes, stream, device.capturing()), addresses, stream)
        return outputs

    def plan_report(self) -> str:
        """Return the engine inspector's JSON: every layer with its operands' data types (plans keep these details)."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._session.library.api()

        if self._engine is None:
            raise Scail2Error(f"stage {self.name} was closed before it was inspected.")
        inspector = self._engine.create_engine_inspector()
        if inspector is None:
            raise self._failure("gave no engine inspector")
        return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    def close(self) -> None:
        """Wait for running work, then free the contexts and the weights."""
        if self._engine is not None:
            self._session.device.synchronize()
            self._contexts.clear()
            self._engine = None

    def _ready(self, shapes: Shapes, stream: int, capturing: bool) -> _Context:
        """Return the context of these shapes, with scratch memory; prepares it unless a graph is being captured."""
        if self._engine is None:
            raise Scail2Error(f"stage {self.name} was closed before it was called.")
        scratch = self._session.scratch
        bound = self._contexts.get(shapes)
        if capturing and (bound is None or not bound.warm or bound.scratch != scratch.pointer):
            raise Scail2Error(
                f"stage {self.name} was captured in a CUDA graph at the shapes {[list(shape) for shape in shapes]} "
                "before it ran at them. Run it once at these shapes, then capture it."
            )
        if bound is None:
            bound = self._new_context(self._engine, shapes, stream)
            self._contexts[shapes] = bound
        self._contexts.move_to_end(shapes)
        if bound.scratch != scratch.pointer:
            bound.context.set_device_memory(scratch.pointer, scratch.size)
            bound.scratch, bound.warm = scratch.pointer, False
        if capturing:
            bound.recorded = True
            scratch.keep()
        return bound

    def _new_context(self, engine: "trt.ICudaEngine", shapes: Shapes, stream: int) -> _Context:
        self._drop_oldest()
        self._session.forget()
        profile = self._profile_for(shapes)
        context = self._session.new_context(engine)
        if context is None:
            raise self._failure("gave no execution context")
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise self._failure(f"refused its profile {profile}")
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                raise self._failure(f"refused the shape {list(shape)} of {spec.name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._failure(f"could not infer its shapes ({error})") from error
        if missing:
            raise self._failure(f"lacks the shapes of {', '.join(missing)}")
        return _Context(context)

    def _enqueue(self, bound: _Context, addresses: Mapping[str, int], stream: int) -> None:
        self._session.forget()
        for name, address in addresses.items():
            if bound.addresses.get(name) != address:
                if not bound.context.set_tensor_address(name, address):
                    raise self._failure(f"refused the address of {name}")
                bound.addresses[name] = address
        if not bound.context.execute_async_v3(stream):
            raise self._failure("could not be run")
        bound.warm = True

    def _drop_oldest(self) -> None:
        idle = [shapes for shapes, bound in self._contexts.items() if not bound.recorded]
        if len(idle) >= MAX_CONTEXTS:
            self._session.device.synchronize()
            del self._contexts[idle[0]]

    def _profile_for(self, shapes: Shapes) -> int:
        for index, ranges in enumerate(self.profiles):
            if all(limit.holds(shape) for limit, shape in zip(ranges, shapes, strict=True)):
                return index
        raise InputError(self._too_large(shapes))

    def _too_large(self, shapes: Shapes) -> str:
        """Return the error: the plan's limits, the requested sizes, and the option that changes the limits."""
        sizes = {symbol: size for symbol, size in self._symbols(shapes).items() if symbol}
        largest = [self._symbols(tuple(limit.largest for limit in ranges)) for ranges in self.profiles]
        if {"h", "w"} <= set(sizes):
            asked = [sizes[symbol] * PIXELS_PER_CELL for symbol in ("h", "w")]
            built = " and ".join("x".join(str(known[s] * PIXELS_PER_CELL) for s in ("h", "w")) for known in largest)
            fitting = "x".join(str(-(-side // PICTURE_MULTIPLE) * PICTURE_MULTIPLE) for side in sorted(asked))
            return (
                f"stage {self.name} was built for frames of at most {built} pixels, and this one has "
                f"{asked[0]}x{asked[1]}. Request a smaller size, or build for larger ones with: {self.remedy} "
                f"--max-picture {fitting}"
            )
        built = " or ".join(", ".join(f"{symbol} = {known[symbol]}" for symbol in sizes) for known in largest)
        asked_text = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
        option = f". Lower --max-rows, or build again with: {self.remedy}" if ROWS in sizes else ""
        return f"stage {self.name} was built for at most {built}, not for {asked_text}{option}."

    def _symbols(self, shapes: Shapes) -> dict[str, int]:
        return symbol_sizes(self.name, self.inputs, [torch.empty(shape, device="meta") for shape in shapes])

    def _check_tensors(self, engine: "trt.ICudaEngine", plan: Path) -> None:
        """Raise InputError unless the plan's tensors have the stage's names, directions and types."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._session.library.api()

        have = {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            have[name] = engine.get_tensor_mode(name), engine.get_tensor_dtype(name).name
        want = {spec.name: (trt.TensorIOMode.INPUT, TYPE_NAMES[spec.dtype]) for spec in self.inputs}
        want |= {spec.name: (trt.TensorIOMode.OUTPUT, TYPE_NAMES[spec.dtype]) for spec in self.outputs}
        if have != want:
            different = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
            raise InputError(
                f"the plan {plan} is not of the stage {self.name} of this version: its tensors {', '.join(different)} "
                f"differ. Build it again with: {self.remedy}"
            )

    def _failure(self, what: str) -> Scail2Error:
        return self._session.failure(f"{self._session.library.title} failed in the stage {self.name}, which {what}")


def _profiles(engine: "trt.ICudaEngine", inputs: Sequence[str]) -> list[list[InputRange]]:
    """Return the ranges of the inputs for each optimisation profile, in their order."""
    count = max(engine.num_optimization_profiles, 1)
    return [[_range(engine, name, index) for name in inputs] for index in range(count)]


def _range(engine: "trt.ICudaEngine", name: str, profile: int) -> InputRange:
    fixed = tuple(engine.get_tensor_shape(name))
    if min(fixed, default=0) >= 0:
        return InputRange(fixed, fixed, fixed)
    return InputRange(*(tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)))


def _readable(tensor: Tensor, device: Device) -> Tensor:
    """Return the tensor as TensorRT can read it, contiguous and aligned; copied only if necessary."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return device.empty(tensor.shape, tensor.dtype).copy_(tensor)
