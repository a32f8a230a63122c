"""Module names of diffusers' `WanTransformer3DModel` and what they are called in the Wan branch.

`{i}` is the block number. A fused module (`to_qkv` and its like, after `fuse_projections`) stands for several Wan
modules stacked along dimension 0. The modulations are parameters themselves.
Source: diffusers `models/transformers/transformer_wan.py` and its conversion script for Wan.
"""

import re

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}

DIFFUSERS_TO_WAN: dict[str, tuple[str, ...]] = {
    "condition_embedder.time_embedder.linear_1": ("time_embedding.0",),
    "condition_embedder.time_embedder.linear_2": ("time_embedding.2",),
    "condition_embedder.time_proj": ("time_projection.1",),
    "condition_embedder.text_embedder.linear_1": ("text_embedding.0",),
    "condition_embedder.text_embedder.linear_2": ("text_embedding.2",),
    "condition_embedder.image_embedder.norm1": ("img_emb.proj.0",),
    "condition_embedder.image_embedder.ff.net.0.proj": ("img_emb.proj.1",),
    "condition_embedder.image_embedder.ff.net.2": ("img_emb.proj.3",),
    "condition_embedder.image_embedder.norm2": ("img_emb.proj.4",),
    "scale_shift_table": ("head.modulation",),
    "proj_out": ("head.head",),
    "blocks.{i}.scale_shift_table": ("blocks.{i}.modulation",),
    "blocks.{i}.norm2": ("blocks.{i}.norm3",),
    "blocks.{i}.ffn.net.0.proj": ("blocks.{i}.ffn.0",),
    "blocks.{i}.ffn.net.2": ("blocks.{i}.ffn.2",),
    **{f"blocks.{{i}}.attn1.{theirs}": (f"blocks.{{i}}.self_attn.{ours}",) for theirs, ours in _ATTENTION.items()},
    **{
        f"blocks.{{i}}.attn2.{theirs}": (f"blocks.{{i}}.cross_attn.{ours}",)
        for theirs, ours in {**_ATTENTION, **_IMAGE}.items()
    },
    "blocks.{i}.attn1.to_qkv": tuple(f"blocks.{{i}}.self_attn.{x}" for x in "qkv"),
    "blocks.{i}.attn2.to_kv": ("blocks.{i}.cross_attn.k", "blocks.{i}.cross_attn.v"),
    "blocks.{i}.attn2.to_added_kv": ("blocks.{i}.cross_attn.k_img", "blocks.{i}.cross_attn.v_img"),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def diffusers_to_wan(module: str) -> tuple[str, ...] | None:
    """Wan modules of a diffusers module (without prefix); None when the table does not know it."""
    number = _BLOCK.match(module)
    template = module if number is None else f"blocks.{{i}}.{module[number.end() :]}"
    targets = DIFFUSERS_TO_WAN.get(template)
    if targets is None:
        return None
    return tuple(target.format(i=number.group(1) if number else "") for target in targets)
