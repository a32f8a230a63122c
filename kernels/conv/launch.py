"""Launch of the Triton convolution kernels: grids, descriptors and arguments derived from the frames' shapes."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scail2_rt.kernels.conv.config import ConvConfig
from scail2_rt.kernels.conv.conv_triton import conv_kernel, norm_kernel
from scail2_rt.kernels.conv.ops import GROUP_STEP, NORM_FLOOR, ConvCall, ConvWeights, Frames, Norm


def launch_conv(call: ConvCall, clock: Tensor, config: ConvConfig, fused: bool, planar: Tensor | None) -> None:
    """Run `conv` of `ops.py`, with its norm `fused` or omitted. TMA supports stride 1 only.

    Raises ValueError for operands that the kernel would access out of bounds."""
    _check(call, clock, config, planar)
    src, weights, frames, residual = call.src, call.weights, call.frames, call.residual
    raw, normed, norm = call.destinations(fused)
    kt, ky, kx = weights.taps
    src_height, src_width = (size - 2 for size in src.data.shape[1:3])
    height, width = src_height // weights.stride, src_width // weights.stride
    tiles = triton.cdiv(height * (src.pitch if config.tma else width), config.rows)
    blocks = triton.cdiv(weights.c_out, config.columns)
    top, left = weights.origin(0)
    dst = raw or normed or residual
    dst_pitch, dst_rows = (dst.pitch, dst.data[0, :, :, 0].numel()) if dst is not None else (1, 1)
    nowhere = Frames(src.data)
    r, w, n = residual or nowhere, raw or nowhere, normed or nowhere
    boxes = (config.columns0, config.columns1 or config.columns0)
    conv_kernel[(tiles * frames * weights.phase_count * blocks,)](
        _source(src, weights, config) if config.tma else src.data,
        *(_box(weights.matrix, columns, config.depth) if config.tma else weights.matrix for columns in boxes),
        weights.bias,
        clock,
        r.data,
        w.data,
        n.data,
        norm.gamma if norm is not None else weights.bias,
        planar if planar is not None else weights.bias,
        frames,
        height,
        width,
        src.pitch,
        src.data[0, :, :, 0].numel(),
        src.ring,
        src.counter,
        src.offset,
        top,
        left,
        1.0 / src.scale,
        weights.matrix.shape[1],
        weights.c_in,
        weights.c_out,
        dst_pitch,
        dst_rows,
        r.ring,
        r.counter,
        r.offset,
        1.0 / r.scale,
        w.ring,
        w.counter,
        w.offset,
        w.scale,
        n.ring,
        n.counter,
        n.offset,
        float(norm.channels if norm is not None else 1),
        _floor(norm),
        KT=kt,
        KY=ky,
        GROUP=kx * weights.c_in,
        SPAN=(kx if config.merged else 1) * weights.c_in,
        GROUP_PITCH=triton.cdiv(kx * weights.c_in, GROUP_STEP) * GROUP_STEP,
        STRIDE=weights.stride,
        TIME_STRIDE=weights.time_stride,
        PHASES=weights.phase_count,
        COLUMN_BLOCKS=blocks,
        ROWS=config.rows,
        COLUMNS0=config.columns0,
        COLUMNS1=config.columns1,
        DEPTH=config.depth,
        STAGES=config.stages,
        TMA=config.tma,
        HAS_RESIDUAL=residual is not None,
        HAS_RAW=raw is not None,
        HAS_NORM=norm is not None,
        SILU=norm is not None and norm.silu,
        PLANAR=len(planar) if planar is not None else 0,
        num_warps=config.warps,
    )


def launch_norm(src: Frames, dst: Frames, norm: Norm, clock: Tensor, frames: int) -> None:
    """Run `rms_norm_frames` of `ops.py`. Raises ValueError unless src and dst have the same frame size."""
    if src.data.shape[1:] != dst.data.shape[1:]:
        raise ValueError(f"a norm cannot go from frames of {tuple(src.data.shape[1:])} to {tuple(dst.data.shape[1:])}")
    bordered_height, pitch, channels = src.data.shape[1:]
    pixels = (bordered_height - 2) * (pitch - 2)
    block = max(16, triton.next_power_of_2(channels))
    rows = max(1, 4096 // block)
    norm_kernel[(triton.cdiv(pixels, rows), frames)](
        src.data,
        dst.data,
        norm.gamma,
        clock,
        pixels,
        pitch - 2,
        pitch,
        bordered_height * pitch,
        channels,
        src.ring,
        src.counter,
        src.offset,
        1.0 / src.scale,
        dst.ring,
        dst.counter,
        dst.offset,
        float(norm.channels),
        _floor(norm),
        ROWS=rows,
        BLOCK=block,
        SILU=norm.silu,
        num_warps=4,
    )


def _floor(norm: Norm | None) -> float:
    return NORM_FLOOR / math.sqrt(norm.channels) if norm is not None else 0.0


def _source(src: Frames, weights: ConvWeights, config: ConvConfig) -> Any:
    """Describe the frames as overlapping rows of kx pixels each, one pixel apart, or as rows of single pixels."""
    kx, channels = weights.taps[2] if config.merged else 1, weights.c_in
    rows = src.data.numel() // channels - kx + 1
    return TensorDescriptor(src.data, [rows, kx * channels], [channels, 1], [config.rows, config.depth])


def _box(matrix: Tensor, columns: int, depth: int) -> Any:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [columns, depth])


def _check(call: ConvCall, clock: Tensor, config: ConvConfig, planar: Tensor | None) -> None:
    """Raise ValueError for operands that the kernel would access out of bounds."""
    src, weights = call.src, call.weights
    if src.data.shape[3] != weights.c_in or not src.data.is_contiguous():
        raise ValueError(f"the convolution takes {weights.c_in} channels, the frames have {src.data.shape[3]}")
    if config.tma and weights.stride != 1:
        raise ValueError("TMA tiles need stride 1")
    if clock.dtype != torch.int32:
        raise ValueError("the clock must be int32")
    factor = 2 if weights.phases == "space" else 1
    size = tuple((side - 2) // weights.stride * factor for side in src.data.shape[1:3])
    if max(src.data[0].numel(), size[0] * size[1] * weights.c_out) >= 2**30:
        raise ValueError("a frame is too large for 32-bit offsets")
    for frames in (call.raw, call.residual, call.normed):
        if frames is not None and frames.data.shape[1:] != (size[0] + 2, size[1] + 2, weights.c_out):
            raise ValueError(f"the convolution gives {size} × {weights.c_out}, not {tuple(frames.data.shape[1:])}")
    if planar is not None and (planar.shape[2:] != size or not planar.is_contiguous()):
        raise ValueError(f"the convolution gives {size}, not {tuple(planar.shape[2:])}")
