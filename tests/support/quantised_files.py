"""Quantised files as published, made from a checkpoint's tensors with the formats' own libraries: the stored tensors,
and their values by the library's dequantiser. Names, types and metadata are those of published files."""

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.repackaged import LARGEST, LINEARS, Tensors


@dataclass(frozen=True, slots=True)
class Made:
    """stored: the file's tensors; meant: their values; metadata: of the file; shown: the name that `inspect` prints."""

    stored: Tensors
    meant: Tensors
    shown: str
    metadata: dict[str, str]

    def save(self, path: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in self.stored.items()}, path, metadata=self.metadata)
        return path


def matching(tensors: Tensors, pattern: str = LINEARS) -> list[str]:
    return [name for name in tensors if re.fullmatch(pattern, name)]


def _made(tensors: Tensors, weights: dict[str, tuple[Tensors, Tensor]], shown: str, metadata: Any = None) -> Made:
    """weights: name → (the tensors that replace it, their values)."""
    stored = {name: tensor for name, tensor in tensors.items() if name not in weights}
    meant = dict(tensors) | {name: value for name, (_, value) in weights.items()}
    for parts, _ in weights.values():
        stored |= parts
    return Made(stored, meant, shown, metadata or {"format": "pt"})


def comfy(tensors: Tensors, layout: str, note: dict[str, Any], shown: str, **how: Any) -> Made:
    """One of ComfyUI's formats, by the layout class of `comfy-kitchen`. `comfy_quant` tensors name it in the file."""
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed (the extra `comfy`)")
    import comfy_kitchen.tensor as layouts

    weights = {}
    text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    for name in matching(tensors):
        kind = getattr(layouts, layout)
        data, params = kind.quantize(tensors[name].float(), **how)
        parts = {f"{name}{end}": part for end, part in kind.state_dict_tensors(data, params).items()}
        parts[f"{name.removesuffix('weight')}comfy_quant"] = text.clone()
        weights[name] = parts, kind.dequantize(data, params)
    return _made(tensors, weights, shown)


def comfy_int8(tensors: Tensors) -> Made:
    note = {"format": "int8_tensorwise", "per_row": True}
    return comfy(tensors, "TensorWiseINT8Layout", note, "int8_tensorwise (ComfyUI)", per_channel=True)


def comfy_int8_one_scale(tensors: Tensors) -> Made:
    return comfy(tensors, "TensorWiseINT8Layout", {"format": "int8_tensorwise"}, "int8_tensorwise (ComfyUI)")


def comfy_convrot(tensors: Tensors, group: int = 256) -> Made:
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    shown = "int8_tensorwise convrot (ComfyUI)"
    how: dict[str, Any] = {"per_channel": True, "convrot": True, "convrot_groupsize": group}
    return comfy(tensors, "TensorWiseINT8Layout", note, shown, **how)


def comfy_mxfp8(tensors: Tensors) -> Made:
    return comfy(tensors, "TensorCoreMXFP8Layout", {"format": "mxfp8"}, "mxfp8 (ComfyUI)")


def comfy_nvfp4(tensors: Tensors) -> Made:
    return comfy(tensors, "TensorCoreNVFP4Layout", {"format": "nvfp4"}, "nvfp4 (ComfyUI)")


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one fp32 scale per row, [R, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def lightx2v_int8(tensors: Tensors) -> Made:
    weights = {}
    for name in matching(tensors):
        data, scale = int8_rows(tensors[name])
        weights[name] = {name: data, f"{name}_scale": scale}, data.float() * scale
    return _made(tensors, weights, "int8 (LightX2V)")


def quanto_int8(tensors: Tensors) -> Made:
    """In bf16 around the weights, with the scales of activations that are not used."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    weights = {}
    for name in matching(tensors):
        scale = int8_rows(tensors[name])[1].bfloat16()
        data = (tensors[name].float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
        layer = name.removesuffix(".weight")
        ones = {f"{layer}.{side}_scale": torch.ones((), dtype=torch.bfloat16) for side in ("input", "output")}
        weights[name] = {f"{name}._data": data, f"{name}._scale": scale, **ones}, data.float() * scale.float()
    return _made(tensors, weights, "int8 (quanto)", {"quantization_format": "quanto", "format": "pt"})


def fp8_blocks(tensors: Tensors, block: int = 128) -> Made:
    """`weight_scale_inv`: one number for `block` x `block` weights, the last ones smaller."""
    weights = {}
    for name in matching(tensors):
        weight = tensors[name].float()
        rows, columns = weight.shape
        scale = torch.empty(-(-rows // block), -(-columns // block))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scale[i, j] = part.abs().max() / LARGEST
        spread = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        data = (weight / spread).to(torch.float8_e4m3fn)
        weights[name] = {name: data, f"{name}_scale_inv": scale}, data.float() * spread
    return _made(tensors, weights, "fp8 in blocks (weight_scale_inv)")


FORMS: dict[str, Callable[[Tensors], Made]] = {
    "comfy_int8": comfy_int8,
    "comfy_int8_one_scale": comfy_int8_one_scale,
    "comfy_convrot": comfy_convrot,
    "comfy_mxfp8": comfy_mxfp8,
    "comfy_nvfp4": comfy_nvfp4,
    "quanto_int8": quanto_int8,
    "fp8_blocks": fp8_blocks,
    "lightx2v_int8": lightx2v_int8,
}


def write_gguf(
    path: Path, tensors: Tensors, kind: str, names: str = LINEARS, architecture: str = "wan", vocabulary: int = 0
) -> Tensors:
    """A GGUF file with the matching tensors in a type that the library can write. Returns the values of its tensors.
    Tensors of more than four dimensions are folded, as in published converters; the metadata has their shapes."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra `gguf`)")
    writer = gguf.GGUFWriter(str(path), architecture)
    if vocabulary:
        writer.add_array("tokenizer.ggml.tokens", [f"piece{i}" for i in range(vocabulary)])
        writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(vocabulary)])
    meant = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        number = gguf.GGMLQuantizationType[kind if re.fullmatch(names, name) else "F32"]
        data = gguf.quantize(values, number)
        writer.add_tensor(name, data, raw_dtype=number)
        meant[name] = torch.from_numpy(np.array(gguf.dequantize(data, number))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def hollow_file(path: Path, shapes: Mapping[str, tuple[int, ...]], form: str) -> None:
    """A safetensors file of the form whose data is a hole, which reads as zero and takes neither disk nor memory."""
    header: dict[str, Any] = {}
    notes: dict[str, bytes] = {}
    end = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal end
        length = math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + length]}
        end += length

    for name, shape in shapes.items():
        if not re.fullmatch(LINEARS, name):
            add(name, "F32", shape, 4)
            continue
        rows, columns = shape
        scales = f"{name}_scale"
        tiles = (-(-rows // 128) * 128, -(-columns // (16 if form == "nvfp4" else 32) // 4) * 4)
        if form in ("int8_tensorwise", "convrot", "lightx2v"):
            add(name, "I8", shape, 1)
            add(scales, "F32", (rows, 1), 4)
        elif form == "mxfp8":
            add(name, "F8_E4M3", shape, 1)
            add(scales, "F8_E8M0", tiles, 1)
        elif form == "nvfp4":
            add(name, "U8", (rows, columns // 2), 1)
            add(scales, "F8_E4M3", tiles, 1)
            add(f"{scales}_2", "F32", (), 4)
        elif form == "quanto":
            add(f"{name}._data", "I8", shape, 1)
            add(f"{name}._scale", "F32", (rows, 1), 4)
        else:
            add(name, "F8_E4M3", shape, 1)
            add(f"{scales}_inv", "F32", (-(-rows // 128), -(-columns // 128)), 4)
        if form in ("int8_tensorwise", "convrot", "mxfp8", "nvfp4"):
            rotated = {"convrot": True, "convrot_groupsize": 256} if form == "convrot" else {}
            note = json.dumps({"format": "int8_tensorwise" if rotated else form, **rotated}).encode()
            notes[f"{name.removesuffix('weight')}comfy_quant"] = note
            add(f"{name.removesuffix('weight')}comfy_quant", "U8", (len(note),), 1)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, note in notes.items():
            file.seek(start + header[name]["data_offsets"][0])
            file.write(note)


def hollow_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]], kind: str, names: str = LINEARS) -> None:
    """A GGUF file whose matching tensors are zero in the type."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra `gguf`)")
    writer = gguf.GGUFWriter(str(path), "wan")
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    for name, shape in shapes.items():
        if re.fullmatch(names, name):
            writer.add_tensor(name, np.zeros((*shape[:-1], shape[-1] // block * size), np.uint8), raw_dtype=number)
        else:
            if len(shape) > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            writer.add_tensor(name, np.zeros((shape[0], math.prod(shape[1:])) if len(shape) > 4 else shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
