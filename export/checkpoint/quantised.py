"""Weights of 8-bit files as what they stand for: fp32, weight times scale.

ComfyUI's "fp8 scaled" files come in two forms. The older one has the marker `scaled_fp8` and, beside each quantised
`X.weight`, a scale `X.scale_weight`. The newer one calls the scale `X.weight_scale` and says how each layer is stored
in `X.comfy_quant` (JSON as uint8 bytes) or in the file's metadata (`_quantization_metadata`). A scale is one number or
one for each row. `scale_input` / `input_scale` speak of activations, which the engines quantise by their own rule.
Formats whose weights are rotated, packed or scaled in blocks (mxfp8, nvfp4, int8 convrot) are refused by name.
Source: comfyanonymous/ComfyUI, `QUANTIZATION.md`, `comfy/utils.py` (`convert_old_quants`), `comfy/ops.py`.
"""

import json
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.tensors import Derived, TensorSource
from scail2_rt.kernels.errors import InputError

_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SCALES = (".scale_weight", ".weight_scale")
_MARKER = "scaled_fp8"
_LAYER = ".comfy_quant"
_LEFT_OUT = (".scale_input", ".input_scale", _LAYER)
_METADATA = "_quantization_metadata"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


def plain_weights(source: TensorSource) -> TensorSource:
    """The source itself, or its weights dequantised when it holds scales. Nothing but scales and markers is read.

    InputError: a storage format that is not understood, or a scale without its weight or of another shape."""
    names = tuple(source.keys())
    if not any(name.endswith((*_SCALES, _LAYER)) for name in names):
        return source
    formats = _layer_formats(source, names)
    if strange := {layer: name for layer, name in formats.items() if name not in _FP8}:
        layer, name = next(iter(strange.items()))
        raise InputError(
            f"{_file(source)} is quantised as {name} ({len(strange)} layers, {layer} the first), which cannot be read; "
            "get the fp16, bf16 or fp8_scaled file of this model"
        )
    scales: dict[str, str] = {}
    for name in names:
        if name.endswith(_SCALES):
            weight = f"{name.rpartition('.')[0]}.weight"
            scales[weight] = name
            _check_scale(source, weight, name, weight.removesuffix(".weight") in formats)
    unscaled = [layer for layer in formats if f"{layer}.weight" not in scales]
    if unscaled:
        raise InputError(f"{_file(source)}: the quantised layer {unscaled[0]} has no weight_scale; get the file again")
    return Dequantised(source, scales, {f"{layer}.weight": _FP8[name] for layer, name in formats.items()})


class Dequantised(Derived):
    """A source whose scaled weights are given in fp32, one tensor at a time; scales and markers are not shown."""

    def __init__(
        self, source: TensorSource, scales: Mapping[str, str], stored: Mapping[str, torch.dtype] | None = None
    ) -> None:
        super().__init__(source)
        self._scales, self._stored = scales, stored or {}
        hidden = {*scales.values()}
        self._names = [
            name
            for name in source.keys()  # noqa: SIM118
            if name not in hidden and not name.endswith(_LEFT_OUT) and name.rpartition(".")[2] != _MARKER
        ]

    @property
    def scaled(self) -> int:
        """How many weights are stored in 8 bit with a scale."""
        return len(self._scales)

    def keys(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._scales else self._source.dtype(name)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in the file."""
        return self._stored.get(name, self._source.dtype(name))

    def get(self, name: str) -> Tensor:
        weight = self._source.get(name)
        if name not in self._scales:
            return weight
        if weight.dtype == torch.uint8:  # the same bytes under a type that older writers knew
            weight = weight.view(self._stored[name])
        scale = self._source.get(self._scales[name]).float().reshape(-1, *[1] * (weight.dim() - 1))  # [1 or rows, 1…]
        return weight.to(torch.float32, copy=True).mul_(scale)


def _layer_formats(source: TensorSource, names: Iterable[str]) -> dict[str, str]:
    """Layer → storage format, as far as the file says; layers of the older form are not in it. The file's metadata may
    name layers without the prefix of its tensors."""
    formats: dict[str, str] = {}
    known = set(names)
    try:
        described = json.loads(source.metadata.get(_METADATA, "{}")).get("layers", {})
        layers = {str(layer): settings for layer, settings in described.items()}
        for name in names:
            if name.endswith(_LAYER):
                layers[name.removesuffix(_LAYER)] = json.loads(bytes(source.get(name).flatten().tolist()))
        for bare, settings in layers.items():
            layer = next((f"{p}{bare}" for p in _PREFIXES if f"{p}{bare}.weight" in known), bare)
            rotated = settings.get("convrot") or settings.get("params", {}).get("convrot")
            formats[layer] = f"{settings['format']}{' with rotation' if rotated else ''}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{_file(source)}: its quantisation notes are damaged ({error}); get the file again"
        ) from error
    return formats


def _check_scale(source: TensorSource, weight: str, name: str, described: bool) -> None:
    if weight not in set(source.keys()):
        raise InputError(f"{_file(source)} has {name}, but no {weight} that it could scale; get the file again")
    stored = source.dtype(weight)
    if stored not in _FP8.values() and not (described and stored == torch.uint8):
        raise InputError(
            f"{_file(source)}: {weight} is {stored} with the scale {name}; only 8-bit floats are understood "
            "with one. Get the fp16, bf16 or fp8_scaled file of this model"
        )
    if source.dtype(name) not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"{_file(source)}: the scale {name} is {source.dtype(name)}, which is not understood")
    shape, rows = source.shape(name), source.shape(weight)[:1]
    if math.prod(shape) != 1 and (shape[:1] != rows or math.prod(shape) != rows[0]):
        raise InputError(
            f"{_file(source)}: the scale {name} is {list(shape)} for a weight {list(source.shape(weight))}; one number "
            "or one for each row is understood. Get the fp16, bf16 or fp8_scaled file of this model"
        )


def _file(source: TensorSource) -> str:
    return str(source.files[0]) if source.files else "The checkpoint"
