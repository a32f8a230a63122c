"""Files like ComfyUI's repackaged ones, made from a checkpoint's Wan tensors by inverting the reader's conversion:
Hugging Face's names for umT5 and CLIP, and 8-bit weights with scales in every supported form."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scail2_rt.export.checkpoint.hf_names import CLIP_TO_WAN, UMT5_TO_WAN
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.kernels.errors import InputError

Tensors = dict[str, Tensor]
LARGEST = 448.0  # of e4m3
PREFIX = "model.diffusion_model."
LINEARS = r"(.*\.)?blocks\.\d+\.(self_attn|cross_attn|ffn)\.(q|k|v|o|k_img|v_img|0|2)\.weight"


def tensors_of(source: TensorSource) -> Tensors:
    return {name: source.get(name).clone() for name in source.keys()}  # noqa: SIM118


def opened_dit(path: Path) -> TensorSource:
    """The transformer of a file that is opened alone."""
    return open_checkpoint(path, components=("dit",)).sources["dit"]


def assert_same(source: TensorSource, tensors: Tensors) -> None:
    """Names, types, shapes and values, also of a few rows."""
    assert set(source.keys()) == set(tensors)
    for name, tensor in tensors.items():
        found = source.get(name)
        assert (source.dtype(name), source.shape(name)) == (found.dtype, tuple(found.shape)), name
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
        if found.dim() > 1 and len(found) > 7:
            assert torch.equal(source.rows(name, 3, 7), found[3:7]), name


def refused(path: Path, **arguments: Any) -> str:
    """The sentence that `open_checkpoint` refuses a path with."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, **arguments)
    return str(caught.value)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    number = re.search(r"\.(\d+)\.", name)
    template = name if number is None else f"{name[: number.start(1)]}{{i}}{name[number.end(1) :]}"
    inverse = {ours: theirs for theirs, ours in table.items()}
    return inverse[template].format(i=number.group(1) if number else "")


def hugging_face_umt5(wan: Tensors) -> Tensors:
    """With the tokenizer and the unused copy of the embedding that such files carry."""
    tensors = {_renamed(name, UMT5_TO_WAN): tensor for name, tensor in wan.items()}
    extra = {"spiece_model": torch.arange(50, dtype=torch.uint8)}
    return {**tensors, **extra, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def hugging_face_clip(wan: Tensors) -> Tensors:
    """q, k and v apart; no leading dimensions on class token and position table; a projection for the unused head."""
    tensors: Tensors = {"vision_model.embeddings.position_ids": torch.arange(257)[None]}
    for name, tensor in wan.items():
        if match := re.fullmatch(r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(weight|bias)", name):
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                stored = f"vision_model.encoder.layers.{match[1]}.self_attn.{which}_proj.{match[2]}"
                tensors[stored] = part.clone()
        elif name == "visual.head":
            tensors["visual_projection.weight"] = tensor.t().contiguous()
        elif name == "log_scale":
            tensors["logit_scale"] = tensor
        elif name in ("visual.cls_embedding", "visual.pos_embedding"):
            tensors[_renamed(name, CLIP_TO_WAN)] = tensor.squeeze(0).squeeze(0).contiguous()
        else:
            tensors[_renamed(name, CLIP_TO_WAN)] = tensor
    return tensors


def quantised(tensors: Tensors, pattern: str, rows: bool = False) -> tuple[Tensors, dict[str, Tensor], Tensors]:
    """Quantise matching weights to e4m3. Returns (all tensors as stored, weight → scale, their values in fp32)."""
    stored, scales, meant = dict(tensors), {}, dict(tensors)
    for name, tensor in tensors.items():
        if re.fullmatch(pattern, name):
            values = tensor.float()
            largest = values.abs().amax(1, keepdim=True) if rows else values.abs().max()
            scales[name] = (largest / LARGEST).clamp_min(1e-12)
            stored[name] = (values / scales[name]).to(torch.float8_e4m3fn)
            meant[name] = stored[name].float() * scales[name]
    return stored, scales, meant


def fp8_scaled(
    tensors: Tensors, pattern: str, form: str, rows: bool = False
) -> tuple[Tensors, dict[str, str], Tensors]:
    """(tensors of the file, its metadata, their values). form: "scale_weight" (the older one), "comfy_quant"
    (JSON tensors), "metadata" (described in the file's metadata alone), "uint8" (comfy_quant, bytes as uint8)."""
    stored, scales, meant = quantised(tensors, pattern, rows)
    file, metadata = dict(stored), dict[str, str]()
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in scales}
    for weight, scale in scales.items():
        layer = weight.removesuffix(".weight")
        if form == "scale_weight":
            file[f"{layer}.scale_weight"] = scale
            file[f"{layer}.scale_input"] = torch.ones(())
            continue
        file[f"{layer}.weight_scale"] = scale
        file[f"{layer}.input_scale"] = torch.full((), 0.5)
        if form == "uint8":
            file[weight] = file[weight].view(torch.uint8)
        if form != "metadata":
            note = json.dumps({**layers[layer], "full_precision_matrix_mult": True}).encode()
            file[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if form == "scale_weight":
        prefix = PREFIX if all(name.startswith(PREFIX) for name in tensors) else ""
        file[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if form == "metadata":  # layers are named there without the prefix
        bare = {layer.removeprefix(PREFIX): note for layer, note in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": bare})
    return file, metadata, meant


def diffusers_vae(wan: Tensors) -> Tensors:
    """Under the names of diffusers' `AutoencoderKLWan`."""
    words = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    words |= {"shortcut": "conv_shortcut", "middle.0": "mid_block.resnets.0", "middle.2": "mid_block.resnets.1"}
    words |= {"middle.1": "mid_block.attentions.0", "head.0": "norm_out", "head.2": "conv_out"}
    tensors = {}
    for name, tensor in wan.items():
        for ours, theirs in words.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("encoder.downsamples.", "encoder.down_blocks.")
        name = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", name)
        name = re.sub(r"^conv1\.", "quant_conv.", re.sub(r"^conv2\.", "post_quant_conv.", name))
        if match := re.match(r"decoder\.upsamples\.(\d+)\.", name):
            level, place = divmod(int(match[1]), 4)
            inside = "upsamplers.0" if place == 3 else f"resnets.{place}"
            name = f"decoder.up_blocks.{level}.{inside}.{name[match.end() :]}"
        tensors[name] = tensor
    return tensors


def diffusers_dit(wan: Tensors) -> Tensors:
    """Tensors under the names of diffusers' `WanTransformer3DModel`; tensors that it lacks keep their names."""
    words = {"time_embedding.0": "condition_embedder.time_embedder.linear_1", "head.head": "proj_out"}
    words |= {"time_embedding.2": "condition_embedder.time_embedder.linear_2", "norm3": "norm2"}
    words |= {"text_embedding.0": "condition_embedder.text_embedder.linear_1"}
    words |= {"text_embedding.2": "condition_embedder.text_embedder.linear_2"}
    words |= {"time_projection.1": "condition_embedder.time_proj", "head.modulation": "scale_shift_table"}
    words |= {"img_emb.proj.0": "condition_embedder.image_embedder.norm1", "modulation": "scale_shift_table"}
    words |= {"img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj", "cross_attn": "attn2"}
    words |= {"img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2", "self_attn": "attn1"}
    words |= {"img_emb.proj.4": "condition_embedder.image_embedder.norm2", ".o.": ".to_out.0.", ".q.": ".to_q."}
    words |= {".k.": ".to_k.", ".v.": ".to_v.", ".k_img.": ".add_k_proj.", ".v_img.": ".add_v_proj."}
    words |= {".norm_k_img.": ".norm_added_k.", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    tensors = {}
    for name, tensor in wan.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    return tensors
