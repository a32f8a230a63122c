"""umT5 and CLIP under Hugging Face's tensor names, as in files for ComfyUI, converted to Wan names.

umT5 is renamed tensor by tensor. CLIP's separate q, k and v are one tensor in Wan's file, so they are concatenated when
read; class token and position table lack a leading dimension. Other parts of a file (decoder, text tower, projection,
an embedded tokenizer) are ignored.
Sources: ComfyUI `comfy/text_encoders/t5.py` and `comfy/clip_model.py`; Wan 2.1 `wan/modules/t5.py`, `clip.py`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.tensors import Derived, TensorSource
from scail2_rt.kernels.errors import InputError

UMT5_SIGN = re.compile(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkvo]\.weight")
CLIP_SIGN = re.compile(r"vision_model\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj\.weight")

UMT5_TO_WAN: dict[str, str] = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
    "encoder.block.{i}.layer.0.layer_norm.weight": "blocks.{i}.norm1.weight",
    **{f"encoder.block.{{i}}.layer.0.SelfAttention.{x}.weight": f"blocks.{{i}}.attn.{x}.weight" for x in "qkvo"},
    "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": (
        "blocks.{i}.pos_embedding.embedding.weight"
    ),
    "encoder.block.{i}.layer.1.layer_norm.weight": "blocks.{i}.norm2.weight",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight": "blocks.{i}.ffn.gate.0.weight",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight": "blocks.{i}.ffn.fc1.weight",
    "encoder.block.{i}.layer.1.DenseReluDense.wo.weight": "blocks.{i}.ffn.fc2.weight",
}
CLIP_TO_WAN: dict[str, str] = {
    "vision_model.embeddings.class_embedding": "visual.cls_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.patch_embedding.weight",
    **{
        f"{theirs}.{parameter}": f"{ours}.{parameter}"
        for theirs, ours in {
            "vision_model.pre_layrnorm": "visual.pre_norm",  # misspelt by Hugging Face
            "vision_model.post_layernorm": "visual.post_norm",
            "vision_model.encoder.layers.{i}.layer_norm1": "visual.transformer.{i}.norm1",
            "vision_model.encoder.layers.{i}.layer_norm2": "visual.transformer.{i}.norm2",
            "vision_model.encoder.layers.{i}.self_attn.out_proj": "visual.transformer.{i}.attn.proj",
            "vision_model.encoder.layers.{i}.mlp.fc1": "visual.transformer.{i}.mlp.0",
            "vision_model.encoder.layers.{i}.mlp.fc2": "visual.transformer.{i}.mlp.2",
        }.items()
        for parameter in ("weight", "bias")
    },
}
_CLIP_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_UMT5_UNUSED = re.compile(r"spiece_model|encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight|logit_scale")
_CLIP_UNUSED = re.compile(
    r"vision_model\.embeddings\.position_ids|text_model\..*|(text|visual)_projection\.weight|logit_scale"
)


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors to concatenate along dimension 0, and the shape of the result."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


class Stacked(Derived):
    """Tensors of a source under other names, some concatenated from several; only those are copied."""

    def __init__(self, source: TensorSource, stacks: Mapping[str, Stack]) -> None:
        super().__init__(source)
        self._stacks = stacks

    def keys(self) -> Iterable[str]:
        return self._stacks.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stacks[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._stacks[name].names[0])

    def get(self, name: str) -> Tensor:
        stack = self._stacks[name]
        parts = [self._source.get(part) for part in stack.names]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts])
        return whole.reshape(stack.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        stack = self._stacks[name]
        if len(stack.names) > 1 or stack.shape[:1] != self._source.shape(stack.names[0])[:1]:
            return self.get(name)[start:stop]
        return self._source.rows(stack.names[0], start, stop).reshape(-1, *stack.shape[1:])


def umt5_view(source: TensorSource, inner: Mapping[str, str]) -> Stacked:
    """Return umT5 under Wan names. `inner`: Hugging Face name → name in the source (which may have a prefix)."""
    stacks = {}
    for name, stored in inner.items():
        if not _UMT5_UNUSED.fullmatch(name):
            stacks[_renamed(name, UMT5_TO_WAN)] = Stack((stored,), source.shape(stored))
    if "token_embedding.weight" not in stacks and (table := inner.get("encoder.embed_tokens.weight")):
        stacks["token_embedding.weight"] = Stack((table,), source.shape(table))
    return Stacked(source, stacks)


def clip_view(source: TensorSource, inner: Mapping[str, str]) -> Stacked:
    """Return CLIP's visual tower under Wan names, like `umt5_view`. Raises InputError if a layer lacks q, k or v."""
    stacks: dict[str, Stack] = {}
    fused: dict[str, dict[str, str]] = {}
    for name, stored in inner.items():
        shape = source.shape(stored)
        if match := _CLIP_QKV.fullmatch(name):
            layer, which, parameter = match.groups()
            fused.setdefault(f"visual.transformer.{layer}.attn.to_qkv.{parameter}", {})[which] = stored
        elif not _CLIP_UNUSED.fullmatch(name):
            wan = _renamed(name, CLIP_TO_WAN)
            if wan == "visual.cls_embedding":
                shape = (1, 1, math.prod(shape))
            elif wan == "visual.pos_embedding" and len(shape) == 2:
                shape = (1, *shape)
            stacks[wan] = Stack((stored,), shape)
    for wan, parts in fused.items():
        stacks[wan] = _qkv(source, wan, parts)
    return Stacked(source, stacks)


def _qkv(source: TensorSource, wan: str, parts: Mapping[str, str]) -> Stack:
    if missing := [which for which in "qkv" if which not in parts]:
        raise InputError(f"{source.files[0]} has no {'_proj, '.join(missing)}_proj for {wan}. Get the complete file.")
    names = tuple(parts[which] for which in "qkv")
    shapes: Sequence[tuple[int, ...]] = [source.shape(name) for name in names]
    if len({shape[1:] for shape in shapes}) > 1:
        raise InputError(f"{source.files[0]}: the shapes of {', '.join(names)} do not match. Give another file.")
    return Stack(names, (sum(shape[0] for shape in shapes), *shapes[0][1:]))


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Return the Wan name; an unknown name is returned unchanged, and the shape check then reports it."""
    number = re.search(r"\.(\d+)\.", name)
    template = name if number is None else f"{name[: number.start(1)]}{{i}}{name[number.end(1) :]}"
    return table[template].format(i=number.group(1) if number else "") if template in table else name
