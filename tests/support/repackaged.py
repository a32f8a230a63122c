"""Files as ComfyUI's repackaged ones are, made from a checkpoint's Wan tensors by the inverse of what the reader does:
Hugging Face's names for umT5 and CLIP, and 8-bit weights with scales in every form that is read."""

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.hf_names import CLIP_TO_WAN, UMT5_TO_WAN
from scail2_rt.export.checkpoint.tensors import TensorSource

Tensors = dict[str, Tensor]
LARGEST = 448.0  # of e4m3
PREFIX = "model.diffusion_model."


def tensors_of(source: TensorSource) -> Tensors:
    return {name: source.get(name).clone() for name in source.keys()}  # noqa: SIM118


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
    """Weights that match become e4m3 → (all tensors as stored, weight → scale, what they stand for in fp32)."""
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
    """(tensors of the file, its metadata, what they stand for). form: "scale_weight" (the older one), "comfy_quant"
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
