"""Engine stages as ONNX files without weights.

`torch.onnx.export` traces the stage's module, so the graph and the PyTorch form always agree. The weights are *inputs*
of the traced function and become initialisers afterwards: nothing can fold or copy one, they use no memory, and each
becomes a reference (offset, length) into the engine folder's weight store. Stages of one family share a graph; only the
references differ. A trace takes seconds (a VAE stage half a minute), so graphs are also kept in the disk cache, under a
key of everything that a graph depends on.
The e4m3 operations become QuantizeLinear and DequantizeLinear with the scalar scale 1 around one MatMul, the form that
TensorRT fuses. Opset 21 is the newest in which RMS norms remain plain fp32 operations, which TensorRT 10.13 supports.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.stages.spec import Dim, StageDefinition, TensorSpec
from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import onnx

OPSET = 21
WEIGHTS_FILE = "weights.safetensors"
EXAMPLE_SIZES = (5, 7, 11, 13, 17)  # of the symbols during tracing: all different, none 0 or 1
TRACERS = ("torch", "onnxscript", "onnx", "onnx-ir")  # packages that affect a graph's form


class WeightLocations(Protocol):
    """Location of tensors in the weight store: offset and length in bytes from the start of its file, type, shape."""

    def location(self, name: str) -> tuple[int, int, torch.dtype, tuple[int, ...]]: ...


def split_dim(dim: Dim) -> tuple[int, str]:
    """Split a dimension into factor and symbol: 5120 → (5120, ""), "rows" → (1, "rows"), "8*h" → (8, "h")."""
    if isinstance(dim, int):
        return dim, ""
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1), symbol


def export_stage(definition: StageDefinition, numerics: Numerics, path: Path, store: WeightLocations) -> None:
    """Write one stage as ONNX.

    path      the file; `weights.safetensors`, which it refers to, must be in the same folder (ONNX Runtime follows no
              reference out of it)
    store     location of each tensor `<stage name>.<parameter name>` in that file

    Raises Scail2Error if the store holds a tensor in another type or shape than the stage needs; OSError if the file
    cannot be written."""
    path.write_bytes(stage_model(definition, numerics, store).SerializeToString(deterministic=True))


def stage_model(definition: StageDefinition, numerics: Numerics, store: WeightLocations) -> "onnx.ModelProto":
    """Return the stage's graph with its weights as references into `weights.safetensors`."""
    import onnx

    weightless = stage_graph(definition, numerics)
    model = onnx.ModelProto()
    model.CopyFrom(weightless)
    used = {name for node in model.graph.node for name in node.input}
    inputs = {spec.name for spec in definition.io(numerics)[0]}
    weights = [value for value in weightless.graph.input if value.name not in inputs]
    del model.graph.input[len(inputs) :]
    for value in weights:
        if value.name in used:  # a stage may have weights of layers that it skips
            model.graph.initializer.append(_reference(value, f"{definition.name}.{value.name}", store))
    return model


def _reference(value: "onnx.ValueInfoProto", name: str, store: WeightLocations) -> "onnx.TensorProto":
    """Return the initialiser that refers to the store's tensor `name`. Raises Scail2Error for another type or shape."""
    import onnx

    offset, length, dtype, shape = store.location(name)
    needed = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    data_type = value.type.tensor_type.elem_type
    if element_type(dtype) != data_type or tuple(shape) != needed:
        raise Scail2Error(
            f"The weight store holds {name} as {dtype} {list(shape)}, but the stage needs "
            f"{onnx.TensorProto.DataType.Name(data_type)} {list(needed)}. Build the engine folder again."
        )
    tensor = onnx.TensorProto(name=value.name, dims=needed, data_type=data_type)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=entry)
    return tensor


def element_type(dtype: torch.dtype) -> int:
    """Return ONNX's number of a tensor type."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
        torch.int64: TensorProto.INT64,
    }[dtype]


@dataclass(frozen=True)
class _Trace:
    """Everything that a graph depends on; equal values have equal graphs."""

    family: str
    module: str  # the module that defines the stage's class
    recipe: object  # the class and its arguments
    numerics: Numerics
    definition: StageDefinition = field(compare=False)

    def kept(self) -> Path | None:
        """Return the graph's file in the disk cache; None if the recipe has no stable text form."""
        text = repr((self.family, self.recipe, self.numerics, OPSET, _sources(self.module)))
        if " at 0x" in text:
            return None
        return cache_directory() / "graphs" / f"{hashlib.sha256(text.encode()).hexdigest()}.onnx"


def stage_graph(definition: StageDefinition, numerics: Numerics) -> "onnx.ModelProto":
    """Return the graph of the stage's family. Its inputs are the stage's inputs, then every weight by parameter name.

    The graph is shared between calls: do not change it."""
    build: Any = definition.build
    recipe: object = build
    if isinstance(build, functools.partial):
        recipe = (build.func.__qualname__, build.args, tuple(sorted(build.keywords.items())))
        build = build.func
    return _graph(_Trace(definition.family or definition.name, build.__module__, recipe, numerics, definition))


@functools.lru_cache(maxsize=64)
def _graph(trace: _Trace) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError

    kept = trace.kept()
    if kept is not None:
        with contextlib.suppress(OSError, DecodeError, onnx.checker.ValidationError):
            model = onnx.load(kept)
            onnx.checker.check_model(model)
            return model
    model = _traced(trace.definition, trace.numerics)
    if kept is not None:
        with contextlib.suppress(OSError):  # without a cache the next build traces again
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_bytes(model.SerializeToString(deterministic=True))
            os.replace(partial, kept)
    return model


@functools.cache
def _sources(module: str) -> str:
    """Return a digest of everything that determines a graph's form: the code of `module`, of this module and of every
    module of this project that they import, and the versions of the packages that trace."""
    digest = hashlib.sha256(repr([(name, importlib.metadata.version(name)) for name in TRACERS]).encode())
    found: set[str] = set()
    queue = [module, __name__]
    while queue:
        spec = importlib.util.find_spec(queue.pop())
        if spec is not None and spec.has_location and spec.origin is not None and spec.origin not in found:
            found.add(spec.origin)
            source = Path(spec.origin).read_text(encoding="utf-8")
            queue += re.findall(r"^\s*(?:from|import) (scail2_rt[\w.]*)", source, re.MULTILINE)
    for origin in sorted(found):
        digest.update(Path(origin).read_bytes())
    return digest.hexdigest()


class _Functional(nn.Module):
    """A module as a function of its inputs and weights, all given as inputs."""

    def __init__(self, module: nn.Module, weights: list[str], inputs: int) -> None:
        super().__init__()
        self.call = functools.partial(torch.func.functional_call, module, strict=True)  # not registered: no weights
        self.weights, self.inputs = weights, inputs

    def forward(self, *tensors: Tensor) -> object:
        return self.call(dict(zip(self.weights, tensors[self.inputs :], strict=True)), tensors[: self.inputs])


def _traced(definition: StageDefinition, numerics: Numerics) -> "onnx.ModelProto":
    """Trace the stage's module with `torch.onnx.export`: weights as inputs, named and sized by the specs."""
    import onnx

    inputs, outputs = definition.io(numerics)
    with torch.device("meta"):
        module = definition.build(numerics)
    weights = dict(module.named_parameters())
    symbols = sorted({split_dim(dim)[1] for spec in inputs for dim in spec.dims} - {""})
    sizes = dict(zip(symbols, EXAMPLE_SIZES, strict=False)) | {"": 1}
    free = {symbol: torch.export.Dim(symbol, min=1) for symbol in symbols}
    examples = [torch.empty([_size(dim, sizes) for dim in spec.dims], dtype=spec.dtype) for spec in inputs]
    examples += [torch.empty((), dtype=weight.dtype).expand(weight.shape) for weight in weights.values()]
    shapes = [
        {axis: _free(dim, free) for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)} for spec in inputs
    ]
    shapes += [{} for _ in weights]
    with _quiet():
        program = torch.onnx.export(
            torch.export.export(
                _Functional(module, list(weights), len(inputs)), tuple(examples), dynamic_shapes=(tuple(shapes),)
            ),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs] + list(weights),
            output_names=[spec.name for spec in outputs],
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _tidy(model, definition.family or definition.name, (*inputs, *outputs))
    onnx.checker.check_model(model, full_check=True)
    return model


def _size(dim: Dim, sizes: dict[str, int]) -> int:
    factor, symbol = split_dim(dim)
    return factor * sizes[symbol]


def _free(dim: Dim, free: dict[str, Any]) -> Any:
    factor, symbol = split_dim(dim)
    return free[symbol] if factor == 1 else factor * free[symbol]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    filters = [child for name, child in logging.root.manager.loggerDict.items() if name.startswith("torch.onnx")]
    levels = [(child, child.level) for child in {logger, *filters} if isinstance(child, logging.Logger)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for child, _ in levels:
            child.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for child, level in levels:
                child.setLevel(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return our e4m3 operations in ONNX: unit scales, no Cast between DequantizeLinear and MatMul, weight [out,
    in]."""
    import onnx_ir as ir
    from onnxscript import opset21

    op: Any = opset21  # its methods are typed for the Python form of ONNX functions, not for tracing

    def constant(value: float, data_type: ir.DataType) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=data_type))

    def to_e4m3(x: ir.Value) -> Any:
        assert x.dtype is not None
        return op.QuantizeLinear(x, constant(1.0, x.dtype), constant(0.0, ir.DataType.FLOAT8E4M3FN))

    def e4m3_matmul(data: ir.Value, weight: ir.Value, dtype: int) -> Any:
        scale = constant(1.0, ir.DataType(dtype))
        transposed = op.Transpose(op.DequantizeLinear(weight, scale), perm=[1, 0])
        return op.MatMul(op.DequantizeLinear(data, scale), transposed)

    return {
        torch.ops.scail2.to_e4m3.default: to_e4m3,
        torch.ops.scail2.e4m3_matmul.default: e4m3_matmul,
    }


def _tidy(model: "onnx.ModelProto", name: str, specs: tuple[TensorSpec, ...]) -> None:
    """Set names and dimensions from the specs; remove machine-specific text and attributes with default values."""
    import onnx

    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    model.graph.name, model.producer_name, model.producer_version = name, "scail2-rt", ""
    values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    for value in values.values():
        del value.metadata_props[:]
    for spec in specs:
        value = onnx.helper.make_tensor_value_info(spec.name, element_type(spec.dtype), spec.dims)
        traced = values[spec.name].type.tensor_type
        if traced.elem_type != element_type(spec.dtype) or len(traced.shape.dim) != len(spec.dims):
            raise Scail2Error(f"The stage {name} gives {spec.name} another type or rank than its specification.")
        values[spec.name].CopyFrom(value)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        defaults = onnx.defs.get_schema(node.op_type, OPSET, node.domain).attributes
        for attribute in [a for a in node.attribute if defaults[a.name].default_value == a]:
            node.attribute.remove(attribute)
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""
