"""Launch of the Triton kernels of attention and its preparation. Only `kernels.attention.ops` calls these functions."""

# mypy: ignore-errors
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scail2_rt.kernels.attention.attention_triton import _attention_8bit, _attention_16bit, _cross_attention
from scail2_rt.kernels.attention.eight_bit import TILE, Prepared8, sample_step
from scail2_rt.kernels.attention.prepare_triton import (
    _finish_statistics,
    _key_sample,
    _norm_rope,
    _quantise_qk,
    _quantise_v,
    _row_rms,
    _v_shift,
    _v_statistics,
)
from scail2_rt.kernels.rope import Rope

if TYPE_CHECKING:
    from scail2_rt.kernels.attention.shared_rows import RowShare

# sizes of the 8-bit preparation
Q_TOKENS = 64  # tokens per program that quantises q; programs for k and v take a TILE
HEADS_TOGETHER = 8  # maximum heads per program that quantises q or k
SUM_TOKENS = 512  # tokens per program that sums V


@dataclass(frozen=True, slots=True)
class Config:
    """Launch parameters: query rows and keys per tile, warps, pipeline stages."""

    rows: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 2


def prepare_16bit(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, eps: float, q: Tensor, k: Tensor
) -> None:
    """Write normed, rotated q and k, each contiguous [L, C] in qkv's type. qkv [L, 3·C] with last stride 1."""
    rows = 4  # per program
    length, channels = q.shape
    block = min(1024, triton.next_power_of_2(channels))
    _norm_rope[(triton.cdiv(length, rows), 2)](
        qkv, qkv.stride(0), q_weight, k_weight, rope.cos, rope.sin, q, k, length, channels, eps,
        D=rope.head_dim, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=device)


def _statistics(
    qkv: Tensor, k_weight: Tensor, rope: Rope, eps: float, v_scale: Tensor | None, share: "RowShare | None"
) -> tuple[Tensor, Tensor, Tensor]:
    """Read qkv the first time: returns 1/rms [2, L] of q and k, mean key [C], mean [C] of V; writes `v_scale` [H, D].

    share: means and ranges are taken over the rows of all ranks."""
    fp8_pv = v_scale is not None
    length, channels, device = qkv.shape[0], qkv.shape[1] // 3, qkv.device
    heads, dim, stride = channels // rope.head_dim, rope.head_dim, qkv.stride(0)
    tokens = length if share is None else share.tokens
    rms = _floats(device, 2, length)
    k, v = qkv[:, channels : 2 * channels], qkv[:, 2 * channels :]
    block = min(1024, triton.next_power_of_2(channels))
    _row_rms[(triton.cdiv(length, 4), 2)](qkv, stride, rms, length, channels, eps, ROWS=4, BLOCK=block)
    step = sample_step(tokens)
    first = 0 if share is None else -share.first % step
    samples = triton.cdiv(max(length - first, 0), step)
    k_chunks, v_chunks = max(triton.cdiv(samples, 32), 1), max(triton.cdiv(length, SUM_TOKENS), 1) if fp8_pv else 1
    k_partial, v_partial = _floats(device, k_chunks, channels), _floats(device, 3, v_chunks, channels)
    _key_sample[(k_chunks, heads)](
        k[first:], stride, k_weight, rms[1, first:], rope.cos[first:], rope.sin[first:], k_partial, samples, step,
        channels, T=32, D=dim,
    )  # fmt: skip
    if fp8_pv:
        _v_statistics[(v_chunks, heads)](
            v, stride, v_partial, length, channels, CHUNK=SUM_TOKENS, T=32, D=dim, STAGES=3, num_warps=4
        )
    if share is not None:
        k_partial, v_partial = _of_all(k_partial, v_partial, share)
        k_chunks = v_chunks = share.peers.size
        samples = triton.cdiv(tokens, step)
    k_mean, v_mean = _floats(device, channels), _floats(device, channels)
    _finish_statistics[(heads,)](
        v_partial, k_partial, v_mean, v_scale, k_mean, v_chunks, k_chunks, tokens, samples, channels,
        P=32, D=dim, HAS_V=fp8_pv,
    )  # fmt: skip
    return rms, k_mean, v_mean


def _of_all(k_partial: Tensor, v_partial: Tensor, share: "RowShare") -> tuple[Tensor, Tensor]:
    """Reduce this rank's partials [chunks, C] and [3, chunks, C], gather one per rank → [N, C] and [3, N, C]."""
    sums, low, high = v_partial
    own = torch.stack([k_partial.sum(0), sums.sum(0), low.amin(0), high.amax(0)])
    gathered = share.peers.gather(own).transpose(0, 1).contiguous()  # [4, N, C]
    return gathered[0], gathered[1:]


def prepare_8bit(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Rope,
    eps: float,
    out: Prepared8,
    share: "RowShare | None" = None,
) -> None:
    """Fill `out`'s buffers (including v, if it is e4m3) from qkv [L, 3·C] with last stride 1.

    share: qkv holds R rows of a longer sequence, and so does `out`; its v_shift is this rank's part of the sum."""
    channels, dim = qkv.shape[1] // 3, rope.head_dim
    fp8_pv, stride, padded = out.v_scale is not None, qkv.stride(0), out.q.shape[1]
    qkv = qkv if share is None else qkv[: share.valid]
    length, tokens = qkv.shape[0], qkv.shape[0] if share is None else share.tokens
    rms, k_mean, v_mean = _statistics(qkv, k_weight, rope, eps, out.v_scale, share)
    heads, blocks = channels // dim, padded // TILE
    group = next(n for n in range(HEADS_TOGETHER, 0, -1) if heads % n == 0)
    k, v = qkv[:, channels : 2 * channels], qkv[:, 2 * channels :]
    # each rotation by the ±1 matrix leaves a factor √D; q's factor also includes the softmax's log2(e)/√D
    q_factor, k_factor = math.log2(math.e) / dim, 1 / math.sqrt(dim)
    for source, weight, row_rms, data, scale, factor, key, size in (
        (qkv, q_weight, rms[0], out.q, out.q_scale, q_factor, False, Q_TOKENS),
        (k, k_weight, rms[1], out.k, out.k_scale, k_factor, True, TILE),
    ):
        warps = size // 16  # the same number of values per thread for q and k
        _quantise_qk[(padded // size, heads // group)](
            source, stride, weight, row_rms, rope.cos, rope.sin, k_mean, data, scale, length, padded, factor,
            D=dim, T=size, HEADS=group, KEY=key, STAGES=3, num_warps=warps,
        )  # fmt: skip
    if fp8_pv:
        residual = _floats(qkv.device, blocks, channels)
        _quantise_v[(blocks, heads)](
            v, stride, v_mean, out.v_scale, out.v, residual, length, padded, channels, T=TILE, D=dim, num_warps=8
        )
        mean = v_mean if share is None else v_mean / share.peers.size
        _v_shift[(heads,)](mean, residual, out.v_shift, blocks, tokens, channels, P=32, D=dim)


def _matrix(x: Tensor, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor:
    """Return x [n, ·] with contiguous rows as the kernel expects it: a TMA descriptor of tiles, or x unchanged."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]) if tma else x


def _major(device: torch.device) -> int:
    """Return the GPU's major compute capability. The interpreter (a CPU) runs the same kernels as sm90."""
    return 9 if device.type == "cpu" else torch.cuda.get_device_capability(device)[0]


def has_tma(device: torch.device) -> bool:
    """Return whether the device has TMA (sm90 and later). Older GPUs load tiles with ordinary loads."""
    return _major(device) >= 9


def default_config_8bit(device: torch.device, fp8_pv: bool) -> Config:
    """Return the launch parameters for 8-bit QK, as `default_config` does for 16-bit attention."""
    return Config() if _major(device) == 9 else Config(rows=64, keys=64, warps=4, stages=2 if fp8_pv else 3)


def default_config(device: torch.device, cross: bool = False) -> Config:
    """Return fixed launch parameters by compute capability.

    They fit the registers and the shared memory (99 KiB per block on sm86, sm89 and sm120)."""
    major = _major(device)
    if major == 9:
        return Config(rows=64, keys=64, warps=4, stages=3)
    if major == 10:
        return Config(rows=128, keys=128, warps=8, stages=2)
    return Config(rows=32, keys=64, warps=4, stages=2) if cross else Config(rows=128, keys=64, warps=8, stages=2)


def attention_8bit(prepared: Prepared8, out: Tensor, config: Config | None = None, tma: bool | None = None) -> Tensor:
    """Run 8-bit attention in either variant. `out` [L, C] bf16 or fp16, contiguous, is written and returned."""
    heads, padded, dim = prepared.q.shape
    fp8 = prepared.v_scale is not None
    device = prepared.q.device
    config = config or default_config_8bit(device, fp8)
    tma = has_tma(device) if tma is None else tma
    m, n = config.rows, config.keys
    q, k = prepared.q.view(-1, dim), prepared.k.view(-1, dim)
    v = prepared.v.view(-1, padded) if fp8 else flat_heads(prepared.v)
    value_tile = (dim, n) if fp8 else (n, dim)
    # Hopper's fp8 product starts from zero; elsewhere an explicit precision keeps Triton from folding `acc` into it
    imprecise = None if _major(device) == 9 else n
    _attention_8bit[(triton.cdiv(prepared.tokens, m), heads)](
        _matrix(q, m, dim, tma), _matrix(k, n, dim, tma), _matrix(v, *value_tile, tma),
        prepared.q_scale, prepared.k_scale, prepared.v_scale, prepared.v_shift, out,
        prepared.tokens, padded, v.stride(0), heads * dim,
        D=dim, M=m, N=n, FP8=fp8, TMA=tma, IMPRECISE=imprecise,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def flat_heads(x: Tensor) -> Tensor:
    """Return the [L, C] matrix of which x is a [H, L, D] view."""
    return x.transpose(0, 1).flatten(1)


def attention_16bit(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Config | None = None, tma: bool | None = None
) -> Tensor:
    """Run 16-bit attention. q, k, v: [H, L, D] views of [L, C] matrices; `out` [L, C], contiguous, is returned.

    Raises ValueError if q and k have different row strides."""
    heads, length, dim = q.shape
    tma = has_tma(q.device) if tma is None else tma
    config = config or default_config(q.device)
    m, n = config.rows, config.keys
    q, k, v = flat_heads(q), flat_heads(k), flat_heads(v)
    if q.stride(0) != k.stride(0):
        raise ValueError(f"q and k have row strides {q.stride(0)} and {k.stride(0)}; make them equal")
    _attention_16bit[(triton.cdiv(length, m), heads)](
        _matrix(q, m, dim, tma), _matrix(k, n, dim, tma), _matrix(v, n, dim, tma), out,
        length, k.stride(0), v.stride(0), heads * dim, math.log2(math.e) / math.sqrt(dim),
        D=dim, M=m, N=n, TMA=tma, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def cross_attention(
    q: Tensor, text_kv: Tensor, image_kv: Tensor, head_dim: int, out: Tensor, config: Config | None = None,
    tma: bool | None = None,
) -> Tensor:  # fmt: skip
    """Run two-softmax cross-attention. q [L, C], text_kv and image_kv [n, 2·C] as k | v; `out` [L, C] is returned.

    All are 16-bit with contiguous rows; `out` is contiguous."""
    length, channels = q.shape
    tma = has_tma(q.device) if tma is None else tma
    config = config or default_config(q.device, cross=True)
    m, n = config.rows, config.keys
    n_image = min(n, 64)  # of 257 image keys, a last tile of 64 wastes less
    _cross_attention[(triton.cdiv(length, m), channels // head_dim)](
        q, _matrix(text_kv, n, head_dim, tma), _matrix(image_kv, n_image, head_dim, tma), out,
        length, text_kv.shape[0], image_kv.shape[0], q.stride(0), text_kv.stride(0), image_kv.stride(0), channels,
        math.log2(math.e) / math.sqrt(head_dim),
        D=head_dim, M=m, N=n, N_IMAGE=n_image, TMA=tma, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
