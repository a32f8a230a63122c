"""Tensor names of the official SAT checkpoint, and the corresponding names of the Wan branch.

One table serves the checkpoint reader, SAT LoRA files and the writer of random checkpoints. A fused SAT module stands
for several Wan modules stacked along dimension 0, in the order given. `{i}` is the block number; names are modules
(append `.weight` or `.bias`), except the modulations, which are parameters.
"""

import re

SAT_PREFIX = "model.diffusion_model."

SAT_TO_WAN: dict[str, tuple[str, ...]] = {
    "mixins.patch_embed.proj": ("patch_embedding",),
    "mixins.patch_embed.proj_pose": ("patch_embedding_pose",),
    "mixins.patch_embed.proj_mask": ("patch_embedding_mask",),
    "text_embedding.{i}": ("text_embedding.{i}",),
    "time_embed.{i}": ("time_embedding.{i}",),
    "adaln_projection.{i}": ("time_projection.{i}",),
    "clip_proj.proj.{i}": ("img_emb.proj.{i}",),
    "transformer.layers.{i}.attention.query_key_value": (
        "blocks.{i}.self_attn.q",
        "blocks.{i}.self_attn.k",
        "blocks.{i}.self_attn.v",
    ),
    "transformer.layers.{i}.attention.dense": ("blocks.{i}.self_attn.o",),
    "transformer.layers.{i}.cross_attention.query": ("blocks.{i}.cross_attn.q",),
    "transformer.layers.{i}.cross_attention.key_value": ("blocks.{i}.cross_attn.k", "blocks.{i}.cross_attn.v"),
    "transformer.layers.{i}.cross_attention.dense": ("blocks.{i}.cross_attn.o",),
    "transformer.layers.{i}.post_cross_attention_layernorm": ("blocks.{i}.norm3",),
    "transformer.layers.{i}.mlp.dense_h_to_4h": ("blocks.{i}.ffn.0",),
    "transformer.layers.{i}.mlp.dense_4h_to_h": ("blocks.{i}.ffn.2",),
    "mixins.adaln_layer.adaLN_modulations.{i}": ("blocks.{i}.modulation",),
    "mixins.adaln_layer.query_layernorm_list.{i}": ("blocks.{i}.self_attn.norm_q",),
    "mixins.adaln_layer.key_layernorm_list.{i}": ("blocks.{i}.self_attn.norm_k",),
    "mixins.adaln_layer.cross_query_layernorm_list.{i}": ("blocks.{i}.cross_attn.norm_q",),
    "mixins.adaln_layer.cross_key_layernorm_list.{i}": ("blocks.{i}.cross_attn.norm_k",),
    "mixins.adaln_layer.clip_feature_key_layernorm_list.{i}": ("blocks.{i}.cross_attn.norm_k_img",),
    "mixins.adaln_layer.clip_feature_key_value_list.{i}": (
        "blocks.{i}.cross_attn.k_img",
        "blocks.{i}.cross_attn.v_img",
    ),
    "mixins.final_layer.adaLN_modulation": ("head.modulation",),
    "mixins.final_layer.linear": ("head.head",),
}


def sat_to_wan(name: str) -> tuple[str, ...] | None:
    """Return the Wan names of a SAT module or tensor (without `SAT_PREFIX`); None if the table does not contain it.

    `transformer.layers.3.attention.query_key_value.bias` gives the biases of `blocks.3.self_attn.{q,k,v}`.
    """
    suffix = ""
    if name.endswith((".weight", ".bias")):
        name, _, parameter = name.rpartition(".")
        suffix = f".{parameter}"
    number = re.search(r"\.(\d+)(?=\.|$)", name)
    template = name if number is None else f"{name[: number.start(1)]}{{i}}{name[number.end(1) :]}"
    targets = SAT_TO_WAN.get(template)
    if targets is None:
        return None
    return tuple(target.format(i=number.group(1) if number else "") + suffix for target in targets)


def wan_to_sat(tensors: set[str]) -> dict[str, tuple[str, ...]]:
    """Return SAT tensor → the Wan tensors that it stacks, for a complete set of Wan tensor names."""
    stacked: dict[str, tuple[str, ...]] = {}
    for name in sorted(tensors):
        module, _, parameter = name.rpartition(".")
        module, suffix = (module, f".{parameter}") if parameter in ("weight", "bias") else (name, "")
        number = re.search(r"\.(\d+)(?=\.|$)", module)
        index = number.group(1) if number else ""
        for sat, targets in SAT_TO_WAN.items():
            if targets[0].format(i=index) == module:
                stacked[sat.format(i=index) + suffix] = tuple(target.format(i=index) + suffix for target in targets)
    return stacked
