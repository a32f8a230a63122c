"""Launch of `hopper_attention.cu`: 8-bit self-attention in CUDA C++ for Hopper (sm_90). See its header."""

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scail2_rt.kernels.cuda.nvrtc import Kernel, launch, pointer, tensor_map, unavailable

if TYPE_CHECKING:
    from scail2_rt.kernels.attention.eight_bit import Prepared8

WIDTH = 128  # head width
KEYS = 128  # keys per tile
ROWS = 192  # query rows per block


def kernel(stages: int = 4) -> Kernel:
    """Return the kernel with rings of `stages` tiles. Shared memory: 1024 bytes to align, Q, both rings, barriers."""
    shared = 1024 + ROWS * WIDTH + 2 * stages * KEYS * WIDTH + 8 + 32 * stages
    return Kernel(Path(__file__).with_suffix(".cu"), 2 * ROWS + 128, shared, (("STAGES", stages),))


DEFAULT = kernel()


def available() -> str | None:
    """Return None if this process can run the kernel on the current GPU, else the reason. Compiles it if necessary."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _availability(torch.cuda.current_device())


@functools.cache
def _availability(device: int) -> str | None:
    return unavailable(DEFAULT, device)


def hopper_attention(prepared: "Prepared8", out: Tensor, build: Kernel = DEFAULT) -> Tensor:
    """Compute softmax attention over all `prepared.tokens` = L tokens; writes and returns `out` bf16 [L, H·128].

    Raises ValueError unless V is fp8 (`v_scale` present), the head width is 128, and all tensors are contiguous on one
    sm_90 GPU."""
    heads, padded = _checked_shapes(prepared, out)
    if heads == 0 or prepared.tokens == 0:
        return out
    tensors = (prepared.q_scale, prepared.k_scale, prepared.v_scale, prepared.v_shift, out)
    numbers = (prepared.tokens, padded // KEYS, heads)
    arguments: list[Any] = [
        tensor_map(prepared.q, (WIDTH, padded, heads), (WIDTH, ROWS, 1), 128),
        tensor_map(prepared.k, (WIDTH, padded, heads), (WIDTH, KEYS, 1), 128),
        tensor_map(prepared.v, (padded, WIDTH, heads), (KEYS, WIDTH, 1), 128),
        *(pointer(t) for t in tensors if t is not None),  # _checked_shapes raises if one is None
        *(ctypes.c_int(n) for n in numbers),
    ]
    blocks = -(-prepared.tokens // ROWS)  # blocks of one head are neighbours: they read the same keys
    launch(build, (blocks, heads), arguments, out.device)
    return out


def _checked_shapes(prepared: "Prepared8", out: Tensor) -> tuple[int, int]:
    """Return (heads, padded length). Raises ValueError on any other operand: the kernel does not check its pointers."""
    heads, padded, width = prepared.q.shape
    if prepared.v_scale is None or prepared.v_shift is None:
        raise ValueError("the Hopper kernel multiplies by fp8 V; these operands hold V in 16 bits. Pass fp8 V.")
    if width != WIDTH or padded != -(-prepared.tokens // KEYS) * KEYS:
        raise ValueError(
            f"q {list(prepared.q.shape)} for {prepared.tokens} tokens: needs head width {WIDTH}, padding to {KEYS}"
        )
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("q", prepared.q, (heads, padded, WIDTH), torch.int8),
        ("k", prepared.k, (heads, padded, WIDTH), torch.int8),
        ("v", prepared.v, (heads, WIDTH, padded), torch.float8_e4m3fn),
        ("q_scale", prepared.q_scale, (heads, padded), torch.float32),
        ("k_scale", prepared.k_scale, (heads, padded // KEYS), torch.float32),
        ("v_scale", prepared.v_scale, (heads, WIDTH), torch.float32),
        ("v_shift", prepared.v_shift, (heads, WIDTH), torch.float32),
        ("out", out, (prepared.tokens, heads * WIDTH), torch.bfloat16),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != out.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"needed: contiguous {dtype} {list(shape)} on {out.device}"
            )
    if out.device.type != "cuda":
        raise ValueError(f"the Hopper kernel needs tensors on a GPU, not on {out.device}")
    return heads, padded
