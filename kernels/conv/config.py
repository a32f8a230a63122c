"""Tile sizes of the convolutions: a fixed, measured table by GPU and channels. Nothing is tuned at run time.

A program computes `rows` pixels × (columns0 + columns1) channels. The channels are two powers of two side by side,
because rounding 96 = 64 + 32 and 192 = 128 + 64 up to a power of two would waste a quarter of the tensor core's work.
Many rows keep the traffic of weights from the L2 cache low, which limits the shapes with few channels."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """Tile of one program: pixels, channels, depth of a K step, warps, pipeline stages.

    `tma`: operands are loaded through TMA descriptors (Hopper and later), else through pointers. `merged`: a row of the
    TMA view holds the kx pixels of a tap row, so that K steps cross pixels; else one pixel."""

    rows: int
    columns0: int
    columns1: int
    depth: int
    warps: int
    stages: int
    tma: bool
    merged: bool = True

    @property
    def columns(self) -> int:
        return self.columns0 + self.columns1


def choose_conv(device: torch.device, c_in: int, c_out: int, stride: int) -> ConvConfig:
    """Return the configuration for padded channel counts on this device; a CPU means Triton's interpreter."""
    if device.type != "cuda":
        return _small(c_in, c_out, stride == 1)
    return _choose(torch.cuda.get_device_capability(device), c_in, c_out, stride)


@cache
def _choose(capability: tuple[int, int], c_in: int, c_out: int, stride: int) -> ConvConfig:
    if capability[0] < 9:
        return _ampere(c_in, c_out)
    if capability[0] > 9 or c_in < 32 or 16 < c_out < 64 or stride != 1:
        return _hopper_other(c_in, c_out, capability, stride)
    if c_out <= 16:
        return ConvConfig(256, 16, 0, 32, 8, 4, True)
    if c_out == 96:
        return ConvConfig(128, 64, 32, 32 if c_in == 96 else 64, 4, 4, True, merged=c_in == 96)
    if c_out == 192:
        warps = 4 if c_in == 384 else 8
        return ConvConfig(128, 128, 64, 64 if c_in == 192 else 32, warps, 4, True)
    return ConvConfig(128, 128, 0, 64, 8, 3, True)


def _hopper_other(c_in: int, c_out: int, capability: tuple[int, int], stride: int) -> ConvConfig:
    """First and last layers and strided convolutions, and GPUs newer than Hopper (not measured: modest tiles)."""
    tma = stride == 1
    depth = 64 if c_in % 64 == 0 or c_in < 32 else 32
    if c_out <= 32:
        return ConvConfig(128, 16 if c_out <= 16 else 32, 0, depth, 4, 4, tma)
    if c_out == 96:
        return ConvConfig(128, 64, 32, depth, 4, 4 if tma else 3, tma)
    return ConvConfig(128, 128 if c_out % 128 == 0 else 64, 0, depth, 4 if capability[0] > 9 else 8, 3, tma)


def _ampere(c_in: int, c_out: int) -> ConvConfig:
    """Ampere and Ada: operands are copied asynchronously; small pipeline stages, since Ada has 99 KiB shared memory."""
    columns = (16, 0) if c_out <= 16 else (32, 0) if c_out <= 32 else (64, 32) if c_out == 96 else (64, 0)
    if c_out % 128 == 0:
        columns = (128, 0)
    return ConvConfig(128, *columns, 32, 8 if columns == (128, 0) else 4, 3, False)


def _small(c_in: int, c_out: int, tma: bool) -> ConvConfig:
    """For the interpreter, which runs one program at a time."""
    columns = (16, 0) if c_out <= 16 else (32, 0) if c_out <= 32 else (32, 16) if c_out <= 48 else (64, 32)
    return ConvConfig(64, *columns, 32 if c_in <= 32 else 64, 4, 2, tma)
