"""The complete transformer as one ONNX graph: the baseline for comparisons with the staged engines.

No part of the model is duplicated. The token-wise parts are the graphs of the engine stages
(`onnx.stages.stage_model`), inlined with their weights as references into the weight store. This module adds only the
operations that the runtime runs between the stages: patches, the time sinusoid, RMS norm, RotaryEmbedding and Attention
(opset 23), and the selection of the latent's rows. It needs eight small traces, whatever the number of blocks, and no
memory for weights. The rotary multipliers are inputs (their modulus is not one for driving tokens), so that one graph
serves animate and replace mode. Every size is free, and N, the number of additional references, may be 0. The angles of
the time sinusoid are fp32 here (fp64 in the runtime): at most 1e-4 rad off. The stage graphs use opset 21: between 21
and 23, their operators changed only in the types they accept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.export.models.dit import DiTInputs
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.onnx.stages import WEIGHTS_FILE, WeightLocations, element_type, stage_model
from scail2_rt.export.stages.dit import definitions, table_sources
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.rope import rope_table

if TYPE_CHECKING:
    import onnx

OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
IR_VERSION = 11  # released with opset 23
TABLES = "tables"  # prefix of the runtime's tables in the store: `tables.blocks.0.modulation`
CLIP_TOKENS = 257


def signature(config: DiTConfig, clip_tokens: int = CLIP_TOKENS) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec]]:
    """Return inputs and output, all fp32. F latent frames; h, w latent cells (multiples of 4); N additional references,
    0 or more; L = (N+1+F)·h/2·w/2 + F·h/4·w/4 tokens."""
    z, mask = config.latent_channels, config.mask_channels
    dims: dict[str, tuple[int | str, ...]] = {
        "latent": (z, "F", "h", "w"),
        "history_mask": (config.history_channels, "F", "h", "w"),
        "reference": (z, 1, "h", "w"),
        "reference_mask": (mask, "F+1", "h", "w"),
        "driving": (z, "F", "h/2", "w/2"),
        "driving_mask": (mask, "F", "h/2", "w/2"),
        "additional_refs": (z, "N", "h", "w"),
        "additional_masks": (mask, "N", "h", "w"),
        "text": (config.text_len, config.text_dim),
        "clip": (clip_tokens, config.clip_dim),
        "timestep": (1,),
        "cos": ("L", config.head_dim // 2),
        "sin": ("L", config.head_dim // 2),
    }
    inputs = tuple(TensorSpec(name, torch.float32, shape) for name, shape in dims.items())
    return inputs, (TensorSpec("velocity", torch.float32, (config.out_channels, "F", "h", "w")),)


def graph_inputs(config: DiTConfig, inputs: DiTInputs, timestep: float) -> dict[str, Tensor]:
    """Return the graph's inputs for one forward pass, by name: the text padded to its full length, zeros for no
    history, N = 0 for no additional references, and the layout's rotary table."""
    _, frames, height, width = inputs.latent.shape
    empty = inputs.latent.new_zeros(config.latent_channels + config.mask_channels, 0, height, width)
    refs, masks = inputs.additional_refs, inputs.additional_masks
    if refs is None or masks is None:
        refs, masks = empty.split([config.latent_channels, config.mask_channels])
    history = inputs.history_mask
    rope = rope_table(frames, height // 2, width // 2, config.head_dim, refs.shape[1], inputs.replace)
    tensors = {
        "latent": inputs.latent,
        "history_mask": inputs.latent.new_zeros(config.history_channels, frames, height, width)
        if history is None
        else history,
        "reference": inputs.reference,
        "reference_mask": inputs.reference_mask,
        "driving": inputs.driving,
        "driving_mask": inputs.driving_mask,
        "additional_refs": refs,
        "additional_masks": masks,
        "text": F.pad(inputs.text, (0, 0, 0, config.text_len - inputs.text.shape[0])),
        "clip": inputs.clip,
        "timestep": torch.tensor([timestep]),
        "cos": rope.cos,
        "sin": rope.sin,
    }
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def transformer_model(
    config: DiTConfig,
    numerics: Callable[[StageDefinition], Numerics],
    store: WeightLocations,
    clip_tokens: int = CLIP_TOKENS,
) -> "onnx.ModelProto":
    """Return the graph, its weights as references into `weights.safetensors` beside it.

    numerics  types of each stage, usually `definition.numerics(precision)`
    store     holds `<stage>.<parameter>` of every `dit` stage, and `tables.<name>` of every runtime table

    Raises Scail2Error if the store holds a tensor in another type or shape."""
    import onnx

    inputs, outputs = signature(config, clip_tokens)
    graph = _Graph(config, {spec.name: spec.dtype for spec in inputs})
    stages = {definition.name: definition for definition in definitions(config)}

    def stage(name: str, *values: str) -> tuple[str, ...]:
        definition = stages[f"dit.{name}"]
        kinds = numerics(definition)
        return graph.inline(stage_model(definition, kinds, store), definition, kinds, values)

    tables = {name: graph.weight(f"{TABLES}.{name}", store) for name in table_sources(config)}
    _transformer(graph, stage, tables)
    inputs_info, outputs_info = (
        [onnx.helper.make_tensor_value_info(spec.name, element_type(spec.dtype), spec.dims) for spec in specs]
        for specs in (inputs, outputs)
    )
    made = onnx.helper.make_graph(graph.nodes, "transformer", inputs_info, outputs_info, graph.initializers)
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(made, opset_imports=[opset], ir_version=IR_VERSION, producer_name="scail2-rt")


Stage = Callable[..., tuple[str, ...]]  # stage name, input values → output values


def _transformer(graph: "_Graph", stage: Stage, tables: Mapping[str, str]) -> None:
    """Append the forward pass of `export.models.dit.DiT` as nodes."""
    op, config = graph.op, graph.config
    grid = _Grid.of(graph)
    e, projection = stage("time", _sinusoid(graph))
    projection = op("Reshape", projection, graph.ints(6, config.dim))
    text, image = stage("context", "text", "clip")
    rope = tuple(op("Unsqueeze", table, graph.ints(0)) for table in ("cos", "sin"))  # [1, L, D/2]
    (x,) = stage("embed", *_tokens(graph, grid))
    for i in range(config.layers):
        block = f"blocks.{i}"
        mod = op("Add", projection, tables[f"{block}.modulation"])
        (qkv,) = stage(f"{block}.qkv", x, mod)
        q, k, v = graph.split(qkv, 3)
        q, k = (_rotated(graph, t, tables[f"{block}.norm_{name}"], rope) for t, name in ((q, "q"), (k, "k")))
        attended = _attention(graph, q, k, _heads(graph, v))
        x, q = stage(f"{block}.mid", x, _rows(graph, attended), mod)
        q = _heads(graph, q)
        of_text, of_image = (
            graph.cast(attend(graph, q, *(_heads(graph, t) for t in graph.split(kv, 2))), torch.float32)
            for attend, kv in zip((_attention, _spelt_out), stage(f"{block}.context_kv", text, image), strict=True)
        )
        (x,) = stage(f"{block}.ffn", x, _rows(graph, op("Add", of_text, of_image)), mod)
    video = op("Slice", x, grid.video_start, op("Add", grid.video_start, grid.video_rows), graph.ints(0))
    (rows,) = stage("head", video, op("Add", tables["head.modulation"], e))
    patches = op("Reshape", rows, graph.shape(grid.frames, grid.rows, grid.columns, 2, 2, config.out_channels))
    patches = op("Transpose", patches, perm=[5, 0, 1, 3, 2, 4])
    size = graph.shape(config.out_channels, grid.frames, grid.height, grid.width)
    op("Reshape", patches, size, result="velocity")


def _rotated(graph: "_Graph", t: str, weight: str, rope: tuple[str, ...]) -> str:
    """Append RMS norm over all heads and RoPE, both in fp32. t [L, C] → [1, H, L, D] in t's type."""
    normed = graph.op(
        "RMSNormalization", graph.cast(t, torch.float32), weight, axis=-1, epsilon=graph.config.eps, stash_type=1
    )
    turned = graph.op("RotaryEmbedding", _heads(graph, normed), *rope, interleaved=1)
    return graph.cast(turned, graph.types[t])


def _attention(graph: "_Graph", q: str, k: str, v: str) -> str:
    """Append softmax attention, scale 1/√D, [1, H, L, D] each.

    By the operator's definition, a 16-bit softmax is summed in 16 bits (bf16 over 512 keys: 14 % off) unless the node
    asks for fp32, which TensorRT's parsers reject; their fused kernels sum in fp32 anyway. In fp32 there is no fused
    kernel, and the node would need an attribute unknown to ONNX to allow decomposition, so plain nodes are used."""
    if graph.types[q] == torch.float32:
        return _spelt_out(graph, q, k, v)
    return graph.op("Attention", q, k, v)


def _spelt_out(graph: "_Graph", q: str, k: str, v: str) -> str:
    """Append the same in plain nodes with an fp32 softmax. A second Attention node on the same q crashes the compiler
    of TensorRT for RTX 1.7, so this form is used for the few keys of the image."""
    keys = graph.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = graph.cast(graph.op("MatMul", q, keys), torch.float32)
    scale = graph.constant(torch.tensor(graph.config.head_dim**-0.5))
    weights = graph.op("Softmax", graph.op("Mul", scores, scale), axis=-1)
    return graph.op("MatMul", graph.cast(weights, graph.types[v]), v)


def _heads(graph: "_Graph", t: str) -> str:
    """Append a reordering [L, C] → [1, H, L, D]."""
    split = graph.op("Reshape", t, graph.ints(1, -1, graph.config.heads, graph.config.head_dim))
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _rows(graph: "_Graph", t: str) -> str:
    """Append a reordering [1, H, L, D] → [L, C]."""
    return graph.op("Reshape", graph.op("Transpose", t, perm=[0, 2, 1, 3]), graph.ints(-1, graph.config.dim))


def _sinusoid(graph: "_Graph") -> str:
    """Append [cos | sin] of timestep · 10000^(-i/half), [1, width]; the frequencies are rounded from fp64."""
    half = graph.config.freq_dim // 2
    frequencies = graph.constant((10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)).float())
    angle = graph.op("Mul", graph.op("Unsqueeze", "timestep", graph.ints(1)), frequencies)
    return graph.op("Concat", graph.op("Cos", angle), graph.op("Sin", angle), axis=1)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Sizes as int64 values [1]: frames F, h, w, the token grid h/2 and w/2, and the position of the video's rows."""

    frames: str
    height: str
    width: str
    rows: str
    columns: str
    video_start: str
    video_rows: str

    @classmethod
    def of(cls, graph: "_Graph") -> "_Grid":
        op, two = graph.op, graph.ints(2)
        frames, height, width = (graph.size("latent", axis) for axis in (1, 2, 3))
        rows, columns = op("Div", height, two), op("Div", width, two)
        frame = op("Mul", rows, columns)
        references = op("Add", graph.size("additional_refs", 1), graph.ints(1))
        return cls(frames, height, width, rows, columns, op("Mul", references, frame), op("Mul", frames, frame))


def _tokens(graph: "_Graph", grid: _Grid) -> tuple[str, str, str]:
    """Append the inputs of the embed stage for the complete sequence: additional references | reference | video |
    driving.

    The history channels are 1 for references and driving; the last value flags the driving rows."""
    op, config = graph.op, graph.config
    one = graph.constant(torch.ones(1))
    channels = config.history_channels

    def ones_like(latent: str) -> str:
        return op("Expand", one, graph.shape(channels, *(graph.size(latent, axis) for axis in (1, 2, 3))))

    references = op("Concat", "additional_refs", "reference", axis=1)
    frames = op("Concat", references, "latent", axis=1)
    history = op("Concat", ones_like(references), "history_mask", axis=1)
    masks = op("Concat", "additional_masks", "reference_mask", axis=1)
    driving = op("Concat", "driving", ones_like("driving"), axis=0)
    half = [op("Div", size, graph.ints(2)) for size in (grid.rows, grid.columns)]
    full = [grid.rows, grid.columns]
    parts = {
        "latent": ((op("Concat", frames, history, axis=0), full), (driving, half), config.in_channels),
        "mask": ((masks, full), ("driving_mask", half), config.mask_channels),
    }
    rows: dict[str, list[str]] = {
        name: [_patchify(graph, value, size, depth) for value, size in (wide, narrow)]
        for name, (wide, narrow, depth) in parts.items()
    }
    flags = [
        op("Expand", graph.constant(torch.full((1, 1), value)), graph.shape(graph.size(part, 0), 1))
        for value, part in zip((0.0, 1.0), rows["mask"], strict=True)
    ]
    latent, mask, flag = (op("Concat", *values, axis=0) for values in (rows["latent"], rows["mask"], flags))
    return latent, mask, flag


def _patchify(graph: "_Graph", value: str, size: list[str], channels: int) -> str:
    """Append `export.models.dit.patchify` with `size` = (h/2, w/2): [C, T, h, w] → [T·h/2·w/2, C·4]."""
    cells = graph.op("Reshape", value, graph.shape(channels, -1, size[0], 2, size[1], 2))
    return graph.op("Reshape", graph.op("Transpose", cells, perm=[1, 2, 4, 0, 3, 5]), graph.ints(-1, channels * 4))


class _Graph:
    """Nodes and initialisers in order, and the type of every value."""

    def __init__(self, config: DiTConfig, inputs: Mapping[str, torch.dtype]) -> None:
        self.config = config
        self.types = dict(inputs)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._ints: dict[tuple[int, ...], str] = {}

    def op(self, kind: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """Append a node with one output, which has the type of the first input."""
        return self._node(kind, inputs, [result or f"{kind}_{len(self.nodes)}"], attributes)[0]

    def split(self, value: str, count: int) -> list[str]:
        """Append a split into equal parts along the last axis."""
        names = [f"Split_{len(self.nodes)}_{i}" for i in range(count)]
        return self._node("Split", (value,), names, {"axis": -1, "num_outputs": count})

    def _node(self, kind: str, inputs: tuple[str, ...], outputs: list[str], attributes: dict[str, Any]) -> list[str]:
        import onnx

        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, f"{kind}_{len(self.nodes)}", **attributes))
        self.types |= dict.fromkeys(outputs, self.types[inputs[0]])
        return outputs

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """Append a cast to another type; a value that has the type is returned unchanged."""
        if self.types[value] == dtype:
            return value
        result = self.op("Cast", value, to=element_type(dtype))
        self.types[result] = dtype
        return result

    def constant(self, tensor: Tensor) -> str:
        """Store a small tensor in the graph."""
        import onnx

        name = f"constant_{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        self.types[name] = tensor.dtype
        return name

    def ints(self, *values: int) -> str:
        """Return an int64 constant [n]; equal constants are stored once."""
        if values not in self._ints:
            self._ints[values] = self.constant(torch.tensor(values))
        return self._ints[values]

    def size(self, value: str, axis: int) -> str:
        """Append int64 [1]: one dimension of a value."""
        result = self.op("Shape", value, start=axis, end=axis + 1)
        self.types[result] = torch.int64
        return result

    def shape(self, *sizes: int | str) -> str:
        """Append a shape made of fixed sizes and int64 values [1]."""
        return self.op("Concat", *(self.ints(size) if isinstance(size, int) else size for size in sizes), axis=0)

    def weight(self, name: str, store: WeightLocations) -> str:
        """Add the store's tensor `name` by reference."""
        import onnx

        offset, length, dtype, shape = store.location(name)
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=element_type(dtype))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, entry in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=entry)
        self.initializers.append(tensor)
        self.types[name] = dtype
        return name

    def inline(
        self, model: "onnx.ModelProto", definition: StageDefinition, numerics: Numerics, values: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Inline a stage's graph, its names prefixed by the stage's name, and return the names of its outputs.

        Inputs of another type than the stage needs are cast."""
        inputs, outputs = definition.io(numerics)
        names = {"": ""}
        for spec, value in zip(inputs, values, strict=True):
            names[spec.name] = self.cast(value, spec.dtype)
        for initializer in model.graph.initializer:
            self.initializers.append(initializer)
            names[initializer.name] = initializer.name = f"{definition.name}.{initializer.name}"
        for node in model.graph.node:
            for inner in node.output:
                names.setdefault(inner, f"{definition.name}/{inner}")
            node.name = f"{definition.name}/{node.name}"
            for field in (node.input, node.output):
                field[:] = [names[inner] for inner in field]
            self.nodes.append(node)
        self.types |= {names[spec.name]: spec.dtype for spec in outputs}
        return tuple(names[spec.name] for spec in outputs)
