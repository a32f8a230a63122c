"""Weights of quantised files, dequantised to fp32: one tensor (or a few rows of it) at a time.

The names beside a weight show its format:
* ComfyUI: a JSON note `X.comfy_quant` (uint8 bytes), or the file's metadata `_quantization_metadata`, describes each
  layer; scales are `X.weight_scale` (and `X.weight_scale_2`). The older fp8 form has no notes but `X.scale_weight`.
* fp8 in blocks: `X.weight_scale_inv`, one number per 128 x 128 weights (the form of DeepSeek and Hugging Face).
* LightX2V: int8 or fp8 with `X.weight_scale`, without notes.  * quanto: `X.weight._data` and `X.weight._scale`.
`input_scale` and similar tensors are for activations, which the engines quantise by another rule. Any other format
raises an error that names it, and so do 8-bit integers without scales, whose values would be meaningless.
Source: Comfy-Org/ComfyUI, `QUANTIZATION.md`, `comfy/quant_ops.py`, `comfy/ops.py`; optimum-quanto, `tensor/weights`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.row_chunks import filled_by_rows
from scail2_rt.export.checkpoint.storage import (
    BYTES,
    FP8,
    SCALE_TILE,
    Comfy,
    Scaled,
    Stored,
    need_comfy_kitchen,
    round_up,
)
from scail2_rt.export.checkpoint.tensors import Derived, TensorSource
from scail2_rt.kernels.errors import InputError

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_MARKER = "scaled_fp8"
_NOTE = ".comfy_quant"
_ACTIVATIONS = (".scale_input", ".input_scale", ".output_scale")
_METADATA = "_quantization_metadata"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_DATA, _SCALE, _SHIFT = "._data", "._scale", "._shift"  # quanto
_BLOCK = 128  # rows and columns per weight_scale_inv
_GROUP = 256  # columns that convrot rotates together, unless the note gives another number
_OTHER = "get the fp16, bf16 or fp8_scaled file of this model"
_BITSANDBYTES = (".SCB", ".absmax", ".quant_map")


def plain_weights(source: TensorSource) -> TensorSource:
    """Return the source, or, if it has scales, its dequantised weights. Reads only scales and notes.

    Raises InputError for an unsupported format, a missing library, or scales that do not fit."""
    names = frozenset(source.keys())
    weights: dict[str, Stored] = {name: _quanto(source, names, name) for name in _quanto_weights(source, names)}
    notes = _notes(source, names) if any(name.endswith((*_SCALES, _NOTE)) for name in names) else {}
    scales = {f"{name.rpartition('.')[0]}.weight": name for name in sorted(names) if name.endswith(_SCALES)}
    for layer, note in notes.items():
        weight = f"{layer}.weight"
        if str(note["format"]) not in FP8:
            weights[weight] = _comfy(source, names, layer, note)
        elif weight not in scales:
            raise InputError(f"{_file(source)}: the quantised layer {layer} has no weight_scale. {_again()}")
    for weight, scale in scales.items():
        if weight not in weights:
            described = notes.get(weight.removesuffix(".weight"), {}).get("format")
            weights[weight] = _scaled(source, names, weight, scale, described)
    _refuse_bare_integers(source, names, weights)
    return Dequantised(source, weights) if weights else source


class Dequantised(Derived):
    """A source whose quantised weights are returned in fp32; scales, notes and markers are hidden."""

    def __init__(self, source: TensorSource, weights: Mapping[str, Stored]) -> None:
        super().__init__(source)
        self._weights = weights
        self.formats = {name: weight.format for name, weight in weights.items()}
        parts = {part for weight in weights.values() for part in weight.parts}
        hidden = (*_ACTIVATIONS, _NOTE)
        plain = [name for name in source.keys() if name not in parts and not name.endswith(hidden)]  # noqa: SIM118
        self._names = [*weights, *(name for name in plain if name.rpartition(".")[2] != _MARKER)]

    def keys(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape if name in self._weights else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._weights else self._source.dtype(name)

    def stored_type(self, name: str) -> str:
        """Return the tensor's type in the file."""
        if name in self._weights:
            return self._weights[name].stored_type
        return str(self._source.dtype(name)).removeprefix("torch.")

    def get(self, name: str) -> Tensor:
        if name not in self._weights:
            return self._source.get(name)
        return filled_by_rows(self.shape(name), lambda start, stop: self.rows(name, start, stop))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._weights:
            return self._source.rows(name, start, stop)
        return self._weights[name].rows(self._source, start, min(stop, self.shape(name)[0]))


def _notes(source: TensorSource, names: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Return layer → the file's description of its storage; the older form has none. The file's metadata may name
    layers without the prefix of its tensors."""
    notes: dict[str, Mapping[str, Any]] = {}
    known = set(names)
    try:
        described = json.loads(source.metadata.get(_METADATA, "{}")).get("layers", {})
        layers = {str(layer): note for layer, note in described.items()}
        for name in names:
            if name.endswith(_NOTE):
                layers[name.removesuffix(_NOTE)] = json.loads(bytes(source.get(name).flatten().tolist()))
        for bare, note in layers.items():
            layer = next((f"{p}{bare}" for p in _PREFIXES if f"{p}{bare}.weight" in known), bare)
            notes[layer] = {**note.get("params", {}), **note, "format": note["format"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{_file(source)}: its quantisation notes are damaged ({error}). {_OTHER.capitalize()}."
        ) from error
    return notes


def _comfy(source: TensorSource, names: frozenset[str], layer: str, note: Mapping[str, Any]) -> Comfy:
    """Return the weight of a layer in one of ComfyUI's formats."""
    kind = str(note["format"])
    if kind not in ("int8_tensorwise", "mxfp8", "nvfp4"):
        raise InputError(
            f"{_file(source)} is quantised as {kind} (for example {layer}), which is not supported. "
            f"{_OTHER.capitalize()}."
        )
    roles = {"weight": f"{layer}.weight_scale"} | ({"tensor": f"{layer}.weight_scale_2"} if kind == "nvfp4" else {})
    data = f"{layer}.weight"
    for name in (data, *roles.values()):
        if name not in names:
            missing = name.removeprefix(f"{layer}.")
            raise InputError(f"{_file(source)}: the {kind} layer {layer} has no {missing}. {_again()}")
    if (pre_quant := f"{layer}.pre_quant_scale") in names:
        roles["pre_quant"] = pre_quant
    need_comfy_kitchen(_file(source), f"{kind} with rotation" if note.get("convrot") else kind)
    rotation = _rotation(source, layer, note) if kind == "int8_tensorwise" else 0
    shape = source.shape(data)
    full = (shape[0], shape[1] * (2 if kind == "nvfp4" else 1)) if len(shape) == 2 else shape
    original = note.get("orig_shape")
    logical = tuple(original) if isinstance(original, list) and len(original) == 2 else full
    label = {"int8_tensorwise": "int8", "mxfp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn_x2"}[kind]
    weight = Comfy(kind, data, roles, logical, rotation, label)
    _check_comfy(source, weight, full)
    return weight


def _rotation(source: TensorSource, layer: str, note: Mapping[str, Any]) -> int:
    """Return the number of columns that were rotated together, a power of four that divides the row; 0: not rotated."""
    if not note.get("convrot"):
        return 0
    size, columns = note.get("convrot_groupsize", _GROUP), source.shape(f"{layer}.weight")[-1]
    if not isinstance(size, int) or size < 4 or 4 ** round(math.log(size, 4)) != size or columns % size:
        raise InputError(
            f"{_file(source)}: {layer} is described as rotated in groups of {size!r}, which do not fit {columns} "
            f"columns. {_OTHER.capitalize()}."
        )
    return size


def _check_comfy(source: TensorSource, weight: Comfy, full: tuple[int, ...]) -> None:
    """Raise InputError if types or sizes of the data and its scales do not fit."""
    dtype = source.dtype(weight.data)
    if weight.kind == "int8_tensorwise":
        fitting, scales = dtype == torch.int8 and len(full) == 2, {1, full[0]}
    else:
        expected = BYTES if weight.kind == "nvfp4" else (*BYTES, torch.float8_e4m3fn)
        fitting = dtype in expected and len(full) == 2 and full[1] % weight.block == 0
        scales = {round_up(full[0], SCALE_TILE) * round_up(full[1] // weight.block, 4)} if fitting else set()
    inside = len(weight.shape) == 2 and all(0 < n <= m for n, m in zip(weight.shape, full, strict=True))
    if not fitting or not inside:
        raise InputError(
            f"{_file(source)}: {weight.data} is {dtype} {list(source.shape(weight.data))}, which is not a weight in "
            f"{weight.kind}. {_OTHER.capitalize()}."
        )
    for role, name in weight.scales.items():
        allowed = {"weight": scales, "tensor": {1}, "pre_quant": {full[1]}}[role]
        if math.prod(source.shape(name)) not in allowed:
            raise InputError(_misfit(source, weight.data, name))


def _scaled(source: TensorSource, names: frozenset[str], weight: str, scale: str, described: str | None) -> Scaled:
    """Return a weight that is data times scale. described: the format given by the layer's note."""
    if weight not in names:
        raise InputError(f"{_file(source)} has {scale}, but no {weight} to scale. {_again()}")
    stored, shape = source.dtype(weight), source.shape(weight)
    integer = stored == torch.int8 and described is None
    if not integer and stored not in FP8.values() and not (described and stored == torch.uint8):
        raise InputError(
            f"{_file(source)}: {weight} is {stored} with the scale {scale}; only 8-bit floats and int8 are supported "
            f"with a scale. {_OTHER.capitalize()}."
        )
    if source.dtype(scale) not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"{_file(source)}: the scale {scale} is {source.dtype(scale)}, which is not supported. "
            f"{_OTHER.capitalize()}."
        )
    dtype = FP8[described] if described else stored
    block = _block(source, weight, scale) if scale.endswith("_inv") else None
    if block is None and math.prod(source.shape(scale)) != 1:
        sizes = source.shape(scale)
        if sizes[:1] != shape[:1] or math.prod(sizes) != shape[0]:
            raise InputError(_misfit(source, weight, scale))
    if block:
        name = "fp8 in blocks (weight_scale_inv)"
    elif integer:
        name = "int8 (LightX2V)"
    else:
        name = f"{str(dtype).removeprefix('torch.')} scaled"
    return Scaled(name, weight, scale, shape, dtype, block)


def _block(source: TensorSource, weight: str, scale: str) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None if there is one scale, or one per row."""
    shape, count = source.shape(weight), source.shape(scale)
    if math.prod(count) == 1 or (count[:1] == shape[:1] and math.prod(count) == shape[0]):
        return None
    if len(count) == len(shape) == 2 and all(count):
        if all(-(-n // _BLOCK) == c for n, c in zip(shape, count, strict=True)):
            return _BLOCK, _BLOCK
        if all(n % c == 0 for n, c in zip(shape, count, strict=True)):
            return shape[0] // count[0], shape[1] // count[1]
    raise InputError(_misfit(source, weight, scale))


def _quanto_weights(source: TensorSource, names: frozenset[str]) -> list[str]:
    """Return the weights stored by optimum-quanto. Raises InputError for its packed types (int4, int2)."""
    found = [name.removesuffix(_DATA) for name in sorted(names) if name.endswith(_DATA)]
    packed = [weight for weight in found if f"{weight}{_SHIFT}" in names]
    if packed:
        raise InputError(
            f"{_file(source)} is quantised as int4 or int2 by quanto (for example {packed[0]}), which is not "
            "supported. Get the fp16, bf16, fp8_scaled or quanto int8 file of this model."
        )
    return found


def _quanto(source: TensorSource, names: frozenset[str], weight: str) -> Scaled:
    data, scale = f"{weight}{_DATA}", f"{weight}{_SCALE}"
    if scale not in names:
        raise InputError(f"{_file(source)}: {data} has no {scale.rpartition('.')[2]} beside it. {_again()}")
    dtype, shape = source.dtype(data), source.shape(data)
    if dtype != torch.int8 and dtype not in FP8.values():
        raise InputError(
            f"{_file(source)}: {data} is {dtype}; of quanto's types, int8 and fp8 are supported. {_OTHER.capitalize()}."
        )
    count = math.prod(source.shape(scale))
    if count != 1 and (count != shape[0] or source.shape(scale)[0] != shape[0]):
        raise InputError(_misfit(source, weight, scale))
    return Scaled("int8 (quanto)" if dtype == torch.int8 else "fp8 (quanto)", data, scale, shape, dtype)


def _refuse_bare_integers(source: TensorSource, names: frozenset[str], weights: Mapping[str, Stored]) -> None:
    for name in sorted(names):
        bare = name.endswith(".weight") and name not in weights and source.dtype(name) in BYTES
        if bare and len(source.shape(name)) > 1:
            by = "bitsandbytes" if any(other.endswith(_BITSANDBYTES) for other in names) else "an unknown tool"
            raise InputError(
                f"{_file(source)}: {name} is {str(source.dtype(name)).removeprefix('torch.')} without a known scale; "
                f"it was quantised by {by}. {_OTHER.capitalize()}."
            )


def _misfit(source: TensorSource, weight: str, scale: str) -> str:
    stored = weight if weight in set(source.keys()) else f"{weight}{_DATA}"
    return (
        f"{_file(source)}: the scale {scale} is {list(source.shape(scale))} for a weight {list(source.shape(stored))}, "
        f"which is not supported. {_OTHER.capitalize()}."
    )


def _again() -> str:
    return "A part of it is missing. Get the complete file from its publisher, or the fp16, bf16 or fp8_scaled one."


def _file(source: TensorSource) -> str:
    return str(source.files[0]) if source.files else "The checkpoint"
