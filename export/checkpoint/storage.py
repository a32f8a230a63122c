"""Storage of one weight in a quantised file, and its dequantisation: fp32 rows, computed on demand.

A weight is either a plain product with scales, computed here (`Scaled`), or in one of ComfyUI's formats, dequantised by
its library `comfy-kitchen` on the CPU (`Comfy`). Rows are independent in all formats; scales of the block formats are
stored in tiles of 128 rows, so these are cut at multiples of 128.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.kernels.errors import InputError

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
BYTES = (torch.uint8, torch.int8)  # types that older writers used for other 8-bit data
SCALE_TILE = 128  # rows per tile of block scales
MX_BLOCK, NV_BLOCK = 32, 16  # columns per scale


class Stored(Protocol):
    """One weight. format: as shown by `inspect`; parts: the file's tensors that it consists of, the data first."""

    @property
    def format(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored_type(self) -> str: ...

    def rows(self, source: TensorSource, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Scaled:
    """Data times scale. block: rows and columns per scale; None: one scale, or one per row."""

    format: str
    data: str
    scale: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return self.data, self.scale

    @property
    def stored_type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def rows(self, source: TensorSource, start: int, stop: int) -> Tensor:
        data = source.rows(self.data, start, stop)
        data = data.view(self.dtype) if data.dtype in BYTES else data
        values = data.to(torch.float32, copy=True)
        scale = source.get(self.scale).float()
        if self.block is None:
            scale = scale.reshape(-1, *[1] * (values.dim() - 1))  # [1 or rows, 1…]
            return values.mul_(scale if len(scale) == 1 else scale[start:stop])
        height, width = self.block
        each_row = scale[torch.arange(start, start + len(values)) // height]  # [R, blocks of columns]
        for i in range(scale.shape[1]):
            values[:, i * width : (i + 1) * width] *= each_row[:, i : i + 1]
        return values


@dataclass(frozen=True, slots=True)
class Comfy:
    """A weight in one of ComfyUI's formats (`kind`). scales: role → tensor; rotation: number of columns rotated
    together, 0 for none."""

    kind: str
    data: str
    scales: Mapping[str, str]
    shape: tuple[int, ...]
    rotation: int = 0
    stored_type: str = field(default="int8")

    @property
    def format(self) -> str:
        return f"{self.kind}{' convrot' if self.rotation else ''} (ComfyUI)"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.data, *self.scales.values())

    def rows(self, source: TensorSource, start: int, stop: int) -> Tensor:
        if self.kind == "int8_tensorwise":
            values = self._int8(source, start, stop)
        else:
            first = start - start % SCALE_TILE
            values = self._blocks(source, first, stop)[start - first :]
        values = values[:, : self.shape[1]]  # remove the padding to complete blocks
        if "pre_quant" in self.scales:
            values = values * source.get(self.scales["pre_quant"]).float()  # scale of the input, one per column
        return values

    def _int8(self, source: TensorSource, start: int, stop: int) -> Tensor:
        from comfy_kitchen.backends.eager import quantization as eager

        data = source.rows(self.data, start, stop)
        scale = source.get(self.scales["weight"]).float()
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)[start:stop]
        if self.rotation:
            return eager.dequantize_int8_convrot_weight(data, scale, self.rotation)
        return eager.dequantize_int8_simple(data, scale)

    def _blocks(self, source: TensorSource, first: int, stop: int) -> Tensor:
        """Dequantise rows from `first` on, a multiple of the scales' tile."""
        from comfy_kitchen.backends.eager import quantization as eager

        data = source.rows(self.data, first, stop)
        scale = source.get(self.scales["weight"])
        per_row = (data.shape[1] * 2 if self.kind == "nvfp4" else data.shape[1]) // self.block
        width = round_up(per_row, 4)
        tiles = scale.reshape(-1, width)[first : round_up(stop, SCALE_TILE)]
        if self.kind == "mxfp8":
            data = data.view(torch.float8_e4m3fn) if data.dtype in BYTES else data
            return eager.dequantize_mxfp8(data, tiles.view(torch.float8_e8m0fnu), torch.float32)
        tensor_scale = source.get(self.scales["tensor"]).float().reshape(())
        tiles = tiles.view(torch.float8_e4m3fn)
        return eager.dequantize_nvfp4(data.view(torch.uint8), tensor_scale, tiles, torch.float32)

    @property
    def block(self) -> int:
        return NV_BLOCK if self.kind == "nvfp4" else MX_BLOCK


def need_comfy_kitchen(file: str, kind: str) -> None:
    """Raise InputError that names the extra if the library is not installed; does not import it (slow)."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        raise InputError(
            f"{file} is quantised as {kind}, which needs ComfyUI's library comfy-kitchen (the extra `comfy`). Run: "
            "pip install 'scail2-rt[comfy]'"
        )


def round_up(size: int, multiple: int) -> int:
    """Round `size` up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple
