"""The transformer and the VAE under diffusers' tensor names, given their Wan names: one tensor for one.

diffusers keeps every tensor as it is and only names it anew, in the decoder by level and place in the level. The
patch embeddings of pose and masks, which its Wan class does not have, keep their names. umT5 and CLIP under Hugging
Face's names are `hf_names.py`. Source: huggingface/diffusers, `models/transformers/transformer_wan.py`,
`models/autoencoders/autoencoder_kl_wan.py`, and its converter in `loaders/single_file_utils.py`.
"""

import re
from collections.abc import Mapping

from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View

DIT_SIGN = re.compile(r"blocks\.\d+\.attn1\.(to_[qkv]|norm_q)\.weight")
VAE_SIGN = re.compile(r"encoder\.down_blocks\.\d+\.norm1\.gamma|decoder\.up_blocks\.\d+\.resnets\.\d+\.norm1\.gamma")

_EMBEDDER = "condition_embedder"
DIT_TO_WAN: dict[str, str] = {  # modules, and the modulations, which are parameters
    f"{_EMBEDDER}.time_embedder.linear_1": "time_embedding.0",
    f"{_EMBEDDER}.time_embedder.linear_2": "time_embedding.2",
    f"{_EMBEDDER}.text_embedder.linear_1": "text_embedding.0",
    f"{_EMBEDDER}.text_embedder.linear_2": "text_embedding.2",
    f"{_EMBEDDER}.time_proj": "time_projection.1",
    f"{_EMBEDDER}.image_embedder.norm1": "img_emb.proj.0",
    f"{_EMBEDDER}.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    f"{_EMBEDDER}.image_embedder.ff.net.2": "img_emb.proj.3",
    f"{_EMBEDDER}.image_embedder.norm2": "img_emb.proj.4",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    "blocks.{i}.scale_shift_table": "blocks.{i}.modulation",
    "blocks.{i}.norm2": "blocks.{i}.norm3",
    "blocks.{i}.ffn.net.0.proj": "blocks.{i}.ffn.0",
    "blocks.{i}.ffn.net.2": "blocks.{i}.ffn.2",
    **{
        f"blocks.{{i}}.{theirs}.{inner}": f"blocks.{{i}}.{ours}.{wan}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for inner, wan in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("add_k_proj", "k_img"),
            ("add_v_proj", "v_img"),
            ("norm_added_k", "norm_k_img"),
        )
    },
}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_VAE_WHOLE = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_VAE_HALF = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}  # of encoder and decoder


def dit_view(source: TensorSource, inner: Mapping[str, str]) -> View:
    """The transformer by its Wan names. `inner`: diffusers' name → name in the source (a prefix may be before it)."""
    return View(source, {dit_to_wan(name): Rows(stored) for name, stored in inner.items()})


def vae_view(source: TensorSource, inner: Mapping[str, str]) -> View:
    """The VAE by its Wan names, as `dit_view`."""
    places = [re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", name) for name in inner]
    in_level = max((int(place.group(1)) + 1 for place in places if place), default=3)  # residual blocks of a level
    return View(source, {vae_to_wan(name, in_level): Rows(stored) for name, stored in inner.items()})


def dit_to_wan(name: str) -> str:
    """The Wan name; one that diffusers does not use stays as it is."""
    module, parameter = name, ""
    if name.endswith((".weight", ".bias")):
        module, _, parameter = name.rpartition(".")
    number = re.match(r"blocks\.(\d+)\.", module)
    template = f"blocks.{{i}}.{module[number.end() :]}" if number else module
    if template not in DIT_TO_WAN:
        return name
    target = DIT_TO_WAN[template].format(i=number.group(1) if number else "")
    return f"{target}.{parameter}" if parameter else target


def vae_to_wan(name: str, in_level: int) -> str:
    """The Wan name; `in_level`: residual blocks of a decoder level, which the up-sampler follows."""
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
