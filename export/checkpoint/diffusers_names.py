"""Names of diffusers' Wan transformer and VAE, and the corresponding names of the Wan branch.

`{i}` is the block number. A fused module (such as `to_qkv` after `fuse_projections`), which occurs in LoRAs, stands for
several Wan modules stacked along dimension 0. The modulations are parameters, not modules. The patch embeddings of pose
and masks, which diffusers' Wan class does not have, keep their names. In the VAE's decoder a module is named by level
and position in the level. `hf_names.py` handles umT5 and CLIP under Hugging Face's names.
Source: huggingface/diffusers, `models/transformers/transformer_wan.py`, `models/autoencoders/autoencoder_kl_wan.py`,
its conversion script for Wan, and `loaders/single_file_utils.py`.
"""

import re
from collections.abc import Mapping

from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View

DIT_SIGN = re.compile(r"blocks\.\d+\.attn1\.(to_[qkv]|norm_q)\.weight")
VAE_SIGN = re.compile(r"encoder\.down_blocks\.\d+\.norm1\.gamma|decoder\.up_blocks\.\d+\.resnets\.\d+\.norm1\.gamma")

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
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_WHOLE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_VAE_HALF = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}  # in encoder and decoder
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def diffusers_to_wan(module: str) -> tuple[str, ...] | None:
    """Return the Wan modules of a diffusers module (without prefix); None if the table does not contain it."""
    number = _BLOCK.match(module)
    template = module if number is None else f"blocks.{{i}}.{module[number.end() :]}"
    targets = DIFFUSERS_TO_WAN.get(template)
    if targets is None:
        return None
    return tuple(target.format(i=number.group(1) if number else "") for target in targets)


def dit_view(source: TensorSource, inner: Mapping[str, str]) -> View:
    """Return the transformer under Wan names. `inner`: diffusers name → name in the source (perhaps prefixed)."""
    return View(source, {dit_to_wan(name): Rows(stored) for name, stored in inner.items()})


def vae_view(source: TensorSource, inner: Mapping[str, str]) -> View:
    """Return the VAE under Wan names, like `dit_view`."""
    places = [re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", name) for name in inner]
    in_level = max((int(place.group(1)) + 1 for place in places if place), default=3)  # residual blocks per level
    return View(source, {vae_to_wan(name, in_level): Rows(stored) for name, stored in inner.items()})


def dit_to_wan(name: str) -> str:
    """Return the Wan name of a tensor; a name that diffusers does not use is returned unchanged."""
    module, dot, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias"):
        module, dot, parameter = name, "", ""
    targets = diffusers_to_wan(module)
    return f"{targets[0]}{dot}{parameter}" if targets and len(targets) == 1 else name


def vae_to_wan(name: str, in_level: int) -> str:
    """Return the Wan name of a tensor. `in_level`: residual blocks per decoder level, which precede the up-sampler."""
    module, _, parameter = name.rpartition(".")
    if module in _VAE_WHOLE:
        return f"{_VAE_WHOLE[module]}.{parameter}"
    half, _, rest = module.partition(".")
    if rest in _VAE_HALF:
        return f"{half}.{_VAE_HALF[rest]}.{parameter}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(.+)", rest):
        return f"{half}.downsamples.{found[1]}.{_RESIDUAL.get(found[2], found[2])}.{parameter}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest):
        index = int(found[1]) * (in_level + 1) + int(found[2])
        return f"{half}.upsamples.{index}.{_RESIDUAL.get(found[3], found[3])}.{parameter}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", rest):
        return f"{half}.upsamples.{int(found[1]) * (in_level + 1) + in_level}.{found[2]}.{parameter}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(.+)", rest):
        return f"{half}.middle.{2 * int(found[1])}.{_RESIDUAL.get(found[2], found[2])}.{parameter}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        return f"{half}.middle.1.{found[1]}.{parameter}"
    return name
