"""Launch of `hopper_attention_16bit.cu`: 16-bit self-attention in CUDA C++ for Hopper (sm_90).

Tensor maps read q, k and v in place, each with its row stride: nothing is copied.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scail2_rt.kernels.cuda.nvrtc import Kernel, launch, pointer, tensor_map, unavailable

WIDTH = 128  # head width
KEYS = 80  # keys per tile
ROWS = 192  # query rows per block
STAGES = 4  # tiles per ring
SHARED = 1024 + 2 * WIDTH * (ROWS + 2 * STAGES * KEYS) + 8 + 32 * STAGES  # alignment, Q, both rings, barriers
KERNELS = {
    dtype: Kernel(Path(__file__).with_suffix(".cu"), 2 * ROWS + 128, SHARED, (("FP16", fp16),))
    for dtype, fp16 in ((torch.bfloat16, 0), (torch.float16, 1))
}


def available(dtype: torch.dtype) -> str | None:
    """Return None if this process can run the kernel on the current GPU, else the reason. Compiles it if necessary."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if dtype not in KERNELS:
        return f"its operands are bf16 or fp16, here they are {dtype}"
    return _availability(dtype, torch.cuda.current_device())


@functools.cache
def _availability(dtype: torch.dtype, device: int) -> str | None:
    return unavailable(KERNELS[dtype], device)


def hopper_attention_16bit(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Compute softmax attention over all L tokens, scale 1/√128; writes and returns `out` [L, H·128].

    q, k, v [H, L, 128]: views of matrices with the heads side by side; each may have a different row stride. All bf16
    or all fp16, on one sm_90 GPU. Raises ValueError for other operands."""
    _check(q, k, v, out)
    heads, tokens, _ = q.shape
    if heads == 0 or tokens == 0:
        return out
    arguments: list[Any] = [
        *(_halves(t, rows) for t, rows in ((q, ROWS), (k, KEYS), (v, KEYS))),
        pointer(out),
        *(ctypes.c_int(n) for n in (tokens, -(-tokens // KEYS), heads)),
    ]
    blocks = -(-tokens // ROWS)  # blocks of one head are neighbours: they read the same keys
    launch(KERNELS[q.dtype], (blocks, heads), arguments, out.device)
    return out


def _halves(x: Tensor, tokens: int) -> Any:
    """Describe x [H, L, 128] as [2·H halves of a head, L, 64], read in boxes of `tokens` rows of one head.

    A swizzled row of shared memory holds 64 elements."""
    heads, length, width = x.shape
    half = width // 2
    return tensor_map(x, (half, length, 2 * heads), (half, tokens, 2), 128, (x.stride(1), half))


def _check(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Raise ValueError for operands that the kernel cannot read: it does not check its pointers and strides."""
    heads, tokens, width = q.shape
    if width != WIDTH or q.dtype not in KERNELS or q.device.type != "cuda":
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} on {q.device}; needed: bf16 or fp16, {WIDTH} wide heads, on a GPU"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        aligned = x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0  # TMA requires this
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device) or not aligned or x.stride(2) != 1:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, unlike q")
        if heads > 1 and x.stride(0) != WIDTH:
            raise ValueError(f"{name} has strides {x.stride()}; needed: heads side by side, {WIDTH} elements apart")
    if out.shape != (tokens, heads * WIDTH) or (out.dtype, out.device) != (q.dtype, q.device):
        raise ValueError(f"out is {out.dtype} {list(out.shape)} on {out.device}; needed: {q.dtype} of q's shape")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}; needed: contiguous")
