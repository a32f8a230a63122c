"""Launch of `hopper_conv.cu`: 3×3×3 convolutions of the causal video VAE in CUDA C++ for Hopper (sm_90).

It replaces `launch.launch_conv` for fp16 frames and for the layers that hold most of the work."""

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.kernels.conv.ops import NORM_FLOOR, ConvCall, Frames
from scail2_rt.kernels.cuda.nvrtc import HOPPER, Kernel, launch, tensor_map, unavailable

CHUNK = 32  # channels per stage
FUSED_CHANNELS = 192  # maximum for a norm in the same launch: one block holds all channels of a pixel
SHARED_LIMIT = 227 * 1024
SMALL_TILE_COST = 1.07  # cost per pixel in tiles of 128 rows (they read the weights more often), relative to 192 rows


@dataclass(frozen=True, slots=True)
class ConvTile:
    """Compile-time constants of `hopper_conv.cu`, which documents them."""

    columns: int
    groups: int
    tiles: int

    @property
    def rows(self) -> int:
        return 64 * self.groups * self.tiles

    @property
    def box(self) -> int:
        """Pixels per TMA load: a tile and the two pixels its taps reach beyond it, in equal loads of at most 256."""
        pixels = self.rows + 2
        loads = -(-pixels // 256)
        return -(-pixels // (8 * loads)) * 8

    @property
    def stage_bytes(self) -> int:
        loads = -(-self.rows // self.box)
        return _up(_up(loads * self.box * 2 * CHUNK) + 3 * self.columns * 2 * CHUNK)

    @property
    def stages(self) -> int:
        return min(6, (SHARED_LIMIT - 1024) // (self.stage_bytes + 16))

    def kernel(self) -> Kernel:
        defines = {
            "COLUMNS": self.columns,
            "GROUPS": self.groups,
            "TILES": self.tiles,
            "STAGES": self.stages,
            "BOX": self.box,
        }
        shared = 1024 + self.stages * (self.stage_bytes + 16)
        return Kernel(Path(__file__).with_suffix(".cu"), 128 * (self.groups + 1), shared, tuple(defines.items()))


def _up(size: int) -> int:
    return -(-size // 1024) * 1024


NARROW = ConvTile(96, 3, 2)
WIDE = ConvTile(192, 3, 1)
WIDE_SMALL = ConvTile(192, 2, 1)


class _Frames(ctypes.Structure):
    _fields_ = [  # type: ignore[misc]
        ("data", ctypes.c_void_p),
        ("ring", ctypes.c_int),
        ("counter", ctypes.c_int),
        ("offset", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class _Problem(ctypes.Structure):
    _fields_ = [  # type: ignore[misc]
        *((name, ctypes.c_void_p) for name in ("clock", "bias", "gamma")),
        *((name, _Frames) for name in ("src", "residual", "raw", "normed")),
        *((name, ctypes.c_int) for name in ("frames", "height", "width", "pitch", "frame_rows")),
        *((name, ctypes.c_int) for name in ("c_in", "c_out", "group_pitch", "tiles")),
        ("norm_channels", ctypes.c_float),
        ("norm_floor", ctypes.c_float),
        ("silu", ctypes.c_int),
    ]


def takes(call: ConvCall, planar: Tensor | None) -> bool:
    """Return whether `launch_conv` can run this convolution: 3×3×3, stride 1, fp16, on an sm_90 GPU."""
    src, weights = call.src, call.weights
    return (
        src.data.is_cuda
        and src.data.dtype == weights.matrix.dtype == torch.float16
        and weights.implementation == "triton"
        and (weights.taps, weights.stride, weights.time_stride, weights.phases) == ((3, 3, 3), 1, 1, "none")
        and weights.c_in % CHUNK == 0
        and weights.c_out in (96, 192, 384)
        and planar is None
        and _available(src.data.device.index or 0)
    )


def launch_conv(call: ConvCall, clock: Tensor, fused: bool, tile: ConvTile | None = None) -> None:
    """Run `conv` of `ops.py` for calls that `takes` accepts, with the norm `fused` (at most 192 channels) or omitted.

    Raises ValueError for operands that the kernel does not support."""
    _check(call, clock, fused)
    src, weights, frames, residual = call.src, call.weights, call.frames, call.residual
    raw, normed, norm = call.destinations(fused)
    _, bordered_height, pitch, channels = src.data.shape
    height, width = bordered_height - 2, pitch - 2
    tile = tile or _choose(src.data.device.index or 0, height * pitch, frames, weights.c_out)
    blocks = -(-height * pitch // tile.rows) * frames * (weights.c_out // tile.columns)
    group_pitch = weights.matrix.shape[1] // 9
    problem = _Problem(
        clock.data_ptr(),
        weights.bias.data_ptr(),
        norm.gamma.data_ptr() if norm is not None else None,
        _frames(src, 1 / src.scale),
        _frames(residual, 1 / residual.scale if residual is not None else 1.0),
        _frames(raw, raw.scale if raw is not None else 1.0),
        _frames(normed, 1.0),
        *(frames, height, width, pitch, bordered_height * pitch),
        *(weights.c_in, weights.c_out, group_pitch, -(-height * pitch // tile.rows)),
        float(norm.channels) if norm is not None else 1.0,
        NORM_FLOOR / math.sqrt(norm.channels) if norm is not None else 0.0,
        int(norm is not None and norm.silu),
    )
    maps = (
        tensor_map(src.data, (channels, src.data.numel() // channels), (CHUNK, tile.box), 64),
        tensor_map(weights.matrix, (9 * group_pitch, weights.c_out), (CHUNK, tile.columns), 64),
    )
    grid = min(blocks, _multiprocessors(src.data.device.index or 0))
    launch(tile.kernel(), (grid, 1), (*maps, problem), src.data.device)


def _frames(frames: Frames | None, scale: float) -> _Frames:
    if frames is None:
        return _Frames(None, 1, 0, 0, scale)
    return _Frames(frames.data.data_ptr(), frames.ring, frames.counter, frames.offset, scale)


@functools.cache
def _choose(device: int, pixels: int, frames: int, c_out: int) -> ConvTile:
    """Choose small tiles only where large ones would leave multiprocessors idle."""
    if c_out == 96:
        return NARROW

    def cost(tile: ConvTile) -> float:
        blocks = -(-pixels // tile.rows) * frames * (c_out // tile.columns)
        rounds = -(-blocks // _multiprocessors(device))
        return rounds * tile.rows * (SMALL_TILE_COST if tile is WIDE_SMALL else 1.0)

    return min((WIDE, WIDE_SMALL), key=cost)


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _available(device: int) -> bool:
    if torch.cuda.get_device_capability(device) != HOPPER:
        return False
    return all(unavailable(tile.kernel(), device) is None for tile in (NARROW, WIDE, WIDE_SMALL))


def _check(call: ConvCall, clock: Tensor, fused: bool) -> None:
    """Raise ValueError for operands that the kernel does not support or would access out of bounds."""
    src, weights = call.src, call.weights
    if weights.taps != (3, 3, 3) or weights.phases != "none" or weights.stride != 1:
        raise ValueError("the kernel is for 3×3×3 convolutions of stride 1 between frames")
    if src.data.shape[3] != weights.c_in or weights.c_in % CHUNK or weights.c_out not in (96, 192, 384):
        raise ValueError(f"no kernel for {src.data.shape[3]} channels to {weights.c_out}")
    if fused and weights.c_out > FUSED_CHANNELS:
        raise ValueError("384 channels take two blocks: run their norm in a separate launch")
    if clock.dtype != torch.int32:
        raise ValueError("the clock must be int32")
    for frames in (src, call.raw, call.residual, call.normed):
        if frames is None:
            continue
        if frames.data.shape[1:3] != src.data.shape[1:3] or frames.data.dtype != torch.float16:
            raise ValueError(f"frames of {frames.data.dtype} {list(frames.data.shape)} beside {list(src.data.shape)}")
        if not frames.data.is_contiguous() or (frames is not src and frames.data.shape[3] != weights.c_out):
            raise ValueError(f"the convolution gives {weights.c_out} channels, not {frames.data.shape[3]}")
