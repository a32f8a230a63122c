"""Launch of the row kernels: grids, launch parameters and compile-time constants derived from the rows' shapes."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from scail2_rt.kernels.rows.ops import E4M3
from scail2_rt.kernels.rows.rows_triton import _activation_kernel, _norm_kernel, _residual_kernel, _rms_kernel


class Config(NamedTuple):
    """Launch parameters of a kernel."""

    warps: int
    vec: int  # neighbouring columns per thread
    programs: int = 0  # per multiprocessor, each looping over rows; 0: one program per row
    stages: int = 1  # rows in flight per looping program


def norm_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: float,
    eps: float,
    data: Tensor,
    scales: Tensor | None,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    x_out: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write LN(x + gate·y)·(weight + offset) + bias to data, and x + gate·y to x_out if y is given.

    x fp32 [L, C]; y [L, C]; gate, weight, bias fp32 [C]; data [L, C] in any type, e4m3 with scales fp32 [L, 1]."""
    rows, c = x.shape
    config = config or _config("norm", c)
    _norm_kernel[_grid(rows, x.device, config)](
        x, y, gate, weight, bias, x_out, _bits(data), scales, rows, eps, offset,
        c, triton.next_power_of_2(c), config.vec, y is not None, gate is not None, scales is not None,
        _native(x.device), config.programs > 0, config.stages, num_warps=config.warps,
    )  # fmt: skip


def activation_rows(
    h: Tensor, data: Tensor, scales: Tensor | None, gelu: bool = True, config: Config | None = None
) -> None:
    """Write gelu(h), or h unchanged, to data. h [L, C]; data [L, C] in any type, may be h; e4m3 with scales [L, 1]."""
    rows, c = h.shape
    config = config or _config("gelu" if gelu else "quantise", c)
    _activation_kernel[_grid(rows, h.device, config)](
        h, _bits(data), scales, rows, c, triton.next_power_of_2(c), config.vec, gelu, scales is not None,
        _native(h.device), config.programs > 0, config.stages, num_warps=config.warps,
    )  # fmt: skip


def rms_rows(x: Tensor, weight: Tensor, eps: float, out: Tensor, config: Config | None = None) -> None:
    """Write x / rms(x) · weight to out. x [L, C], weight fp32 [C], out [L, C] may be x."""
    rows, c = x.shape
    config = config or _config("rms", c)
    _rms_kernel[_grid(rows, x.device, config)](
        x, weight, out, rows, eps, c, triton.next_power_of_2(c), config.vec, config.programs > 0, config.stages,
        num_warps=config.warps,
    )  # fmt: skip


def residual_rows(x: Tensor, y: Tensor, gate: Tensor | None, out: Tensor, config: Config | None = None) -> None:
    """Write x + gate·y to out. x fp32 [L, C], y [L, C], gate fp32 [C], out fp32 [L, C] may be x."""
    rows, c = x.shape
    config = config or _config("residual", c)
    _residual_kernel[_grid(rows, x.device, config)](
        x, y, gate, out, rows, c, triton.next_power_of_2(c), config.vec, gate is not None, config.programs > 0,
        config.stages,
        num_warps=config.warps,
    )  # fmt: skip


# The fastest measured on an H200 at 5,120 (norms, quantisation) and 13,824 columns (GELU)
CONFIGS = {
    "norm": Config(8, 4),
    "gelu": Config(8, 8),
    "quantise": Config(4, 8),
    "rms": Config(4, 8),
    "residual": Config(8, 4),
}


def _config(operation: str, c: int) -> Config:
    """Reduce the warps for short rows: a thread should have at least one vector."""
    config = CONFIGS[operation]
    most = max(1, triton.next_power_of_2(c) // (32 * config.vec))
    return config._replace(warps=min(config.warps, most))


def _grid(rows: int, device: torch.device, config: Config) -> tuple[int]:
    return (rows if config.programs == 0 else min(rows, config.programs * _multiprocessors(device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _native(device: torch.device) -> bool:
    """Return whether the device rounds to e4m3 in hardware. (The interpreter's cast is wrong where a carry changes the
    exponent.)"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _bits(data: Tensor) -> Tensor:
    """Return data as bytes where e4m3 is not native: Triton rejects the type there, and the kernels write its bits."""
    return data.view(torch.uint8) if data.dtype == E4M3 and not _native(data.device) else data
