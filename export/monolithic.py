"""The whole transformer as one ONNX graph: the baseline to compare the staged engines with.

Nothing of the model is written twice. The token-wise parts are the graphs of the engine stages themselves
(`onnx_stages.stage_model`), taken in with their weights still being references into the weight store; this module only
adds what the runtime does between the stages: patches, the time sinusoid, RMS norm, RotaryEmbedding and Attention
(opset 23), and the cut back to a latent. Making it costs eight small traces, however many blocks there are, and memory
for names, never for weights.
The rotary multipliers are inputs (their modulus is not one for driving tokens), so that one graph serves animate and
replace mode; every size is free, and N, the number of additional references, may be 0. The stage graphs are of opset 21:
what they use changed between 21 and 23 in the types it accepts, not in what it computes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.export.config import DiTConfig
from scail2_rt.export.dit import DiTInputs
from scail2_rt.export.dit_stages import definitions, table_sources
from scail2_rt.export.onnx_stages import WEIGHTS_FILE, WeightLocations, element_type, stage_model
from scail2_rt.export.precision import Numerics
from scail2_rt.export.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.rope import rope_table

if TYPE_CHECKING:
    import onnx

OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization
IR_VERSION = 11  # the one that came with opset 23
TABLES = "tables"  # the store's names for the runtime's tables: `tables.blocks.0.modulation`
CLIP_TOKENS = 257


def signature(config: DiTConfig, clip_tokens: int = CLIP_TOKENS) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec]]:
    """Inputs and output, all fp32. F latent frames; h, w latent cells (multiples of 4); N additional references, 0 or
    more; L = (N+1+F)·h/2·w/2 + F·h/4·w/4 tokens."""
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
    """What the graph takes for one forward pass, by name: the text padded to its full length, no history as zeros, no
    additional references as N = 0, and the rotary table of the layout."""
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
    """The graph, its weights as references into `weights.safetensors` beside it.

    numerics  those of each stage, usually `definition.numerics(precision)`
    store     holds `<stage>.<parameter>` of every `dit` stage, and `tables.<name>` of every runtime table

    Scail2Error when the store holds a tensor in another type or shape."""
    import onnx

    inputs, outputs = signature(config, clip_tokens)
    graph = _Graph({spec.name: element_type(spec.dtype) for spec in inputs})
    stages = {definition.name: definition for definition in definitions(config)}

    def stage(name: str, *values: str) -> tuple[str, ...]:
        definition = stages[f"dit.{name}"]
        kinds = numerics(definition)
        return graph.inline(stage_model(definition, kinds, store), definition, kinds, values)

    tables = {name: graph.weight(f"{TABLES}.{name}", store) for name in table_sources(config)}
    _transformer(graph, config, stage, tables)
    made = onnx.helper.make_graph(
        graph.nodes,
        "transformer",
        [onnx.helper.make_tensor_value_info(s.name, element_type(s.dtype), s.dims) for s in inputs],
        [onnx.helper.make_tensor_value_info(s.name, element_type(s.dtype), s.dims) for s in outputs],
        graph.initializers,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(made, opset_imports=[opset], ir_version=IR_VERSION, producer_name="scail2-rt")


def _transformer(
    graph: "_Graph", config: DiTConfig, stage: Callable[..., tuple[str, ...]], tables: Mapping[str, str]
) -> None:
    """The forward pass of `export.dit.DiT`, as nodes."""
    op, c = graph.op, config.dim
    grid = _Grid(graph)
    (x,) = stage("embed", *_patches(graph, grid))
    e, projection = stage("time", _sinusoid(graph, config.freq_dim))
    projection = op("Reshape", projection, graph.ints(6, c))
    text, image = stage("context", "text", "clip")
    cos, sin = (op("Unsqueeze", table, graph.ints(0)) for table in ("cos", "sin"))  # [1, L, D/2]
    for i in range(config.layers):
        block = f"blocks.{i}"
        mod = op("Add", projection, tables[f"{block}.modulation"])
        (qkv,) = stage(f"{block}.qkv", x, mod)
        q, k, v = op.split(qkv, 3)
        q, k = (
            graph.cast(op("RotaryEmbedding", _heads(graph, config, normed), cos, sin, interleaved=1), like=qkv)
            for normed in (
                op("RMSNormalization", graph.cast(t, "x32"), tables[f"{block}.{norm}"], epsilon=config.eps)
                for t, norm in ((q, "norm_q"), (k, "norm_k"))
            )
        )
        a = _rows(graph, c, op("Attention", q, k, _heads(graph, config, v)))
        x, q = stage(f"{block}.mid", x, a, mod)
        parts = []
        for kv in stage(f"{block}.context_kv", text, image):
            k, v = (_heads(graph, config, t) for t in op.split(kv, 2))
            parts.append(graph.cast(op("Attention", _heads(graph, config, q), k, v), "x32"))
        both = graph.cast(_rows(graph, c, op("Add", *parts)), like=q)
        (x,) = stage(f"{block}.ffn", x, both, mod)
