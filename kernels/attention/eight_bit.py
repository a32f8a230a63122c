"""8-bit attention in plain PyTorch: the quantised operands, and the arithmetic that the kernels must agree with.

Scores are int8 products. q and k are rotated by a Hadamard matrix over the head dimension. The matrix is orthogonal, so
q·k keeps its value while an outlier channel spreads over all channels. The mean key is removed: it adds one number to
all scores of a row, which softmax ignores. q has one scale per token, k one scale per 128 tokens.
P·V is e4m3 × e4m3. V has one scale per channel and its mean is removed. The average rounding error of e4m3 is added
back with the mean. Tokens are permuted inside each group of 16 so that the softmax's registers are already laid out as
the operand of the second product. The variant with 16-bit PV keeps V as projected.
The mean key is the mean of an evenly spaced subsample: any common vector is allowed. It makes the largest score of
every row ≥ 0 up to rounding, and the kernels rely on that (their running maximum starts at 0).
Int8 has no NaN. A value that is not finite therefore makes a scale NaN: that of its row of q, of its tile of k, or
scale and shift of its channel of V. Every value is multiplied by these, so NaN appears where exact attention has it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scail2_rt.kernels.attention.variants import EIGHT_BIT, EIGHT_BIT_16BIT_PV, AttentionVariant
from scail2_rt.kernels.rope import Rope, rotate
from scail2_rt.kernels.rows.ops import E4M3, E4M3_MAX, rms_norm

if TYPE_CHECKING:
    from scail2_rt.kernels.attention.shared_rows import RowShare

TILE = 128  # tokens that share one key scale; L is padded to a multiple of it
SAMPLES = 1024  # upper limit of the tokens in the mean key
INT8_MAX = 127.0
TINY = 1e-12  # lower limit of a scale: all-zero rows stay zero


@dataclass(frozen=True, slots=True)
class Prepared8:
    """Operands of 8-bit attention for `tokens` = L tokens. Lp is L rounded up to 128; rows beyond L are zero.

    q int8 [H, Lp, D] and q_scale fp32 [H, Lp], which includes log2(e)/√D: score·log2(e) = (q·k)·q_scale·k_scale;
    k int8 [H, Lp, D] and k_scale fp32 [H, Lp/128];
    v e4m3 [H, D, Lp]: token a·8 + b·2 + c of each 16 lies at b·4 + a·2 + c; the attended value is
    Σp·v/Σp · v_scale + v_shift, both fp32 [H, D]. With 16-bit PV, v is [H, L, D] as projected (a view of qkv),
    unscaled.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor | None
    v_shift: Tensor | None
    tokens: int
    variant: AttentionVariant = EIGHT_BIT


def padded_length(tokens: int) -> int:
    """Return L rounded up to a multiple of TILE."""
    return -(-tokens // TILE) * TILE


def sample_step(tokens: int) -> int:
    """Return the stride n: every n-th token enters the mean key."""
    return -(-tokens // SAMPLES)


def empty_prepared8(heads: int, tokens: int, head_dim: int, v: Tensor | None, device: torch.device) -> Prepared8:
    """Allocate uninitialised buffers. `v` is V for 16-bit PV, None for e4m3."""
    lp = padded_length(tokens)

    def floats(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=device)

    q, k = (torch.empty(heads, lp, head_dim, dtype=torch.int8, device=device) for _ in range(2))
    if v is not None:
        k_scale = floats(heads, lp // TILE)
        return Prepared8(q, floats(heads, lp), k, k_scale, v, None, None, tokens, EIGHT_BIT_16BIT_PV)
    v8 = torch.empty(heads, head_dim, lp, dtype=E4M3, device=device)
    shift, scale = floats(heads, head_dim), floats(heads, head_dim)
    return Prepared8(q, floats(heads, lp), k, floats(heads, lp // TILE), v8, scale, shift, tokens)


def sixteen_bit_v(qkv: Tensor, head_dim: int) -> Tensor:
    """Return V for 16-bit PV as [H, L, D]: a view of a 16-bit qkv [L, 3·C], a bf16 copy of an fp32 one."""
    v = qkv.chunk(3, dim=-1)[2]
    v = v.bfloat16() if v.dtype == torch.float32 else v
    return v.unflatten(-1, (-1, head_dim)).transpose(0, 1)


def hadamard(n: int) -> Tensor:
    """Return the ±1 Sylvester matrix, fp32 [n, n]; n is a power of two. Divided by √n it is orthonormal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def stored_order(tokens: int) -> Tensor:
    """Return int64 [tokens]: the token at each position of v's last axis. `tokens` is a multiple of 16."""
    return torch.arange(tokens).view(-1, 2, 4, 2).transpose(1, 2).flatten()


def _padded(x: Tensor) -> Tensor:
    """[H, L, D] → [H, Lp, D] with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, padded_length(x.shape[1]) - x.shape[1]))


def _padded_to(x: Tensor, rows: int) -> Tensor:
    """Pad x [H, L, D] with zeros to [H, rows, D]."""
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[1]))


def _int8(x: Tensor, scale: Tensor) -> Tensor:
    """Quantise x to int8. Where the scale is NaN the result is an arbitrary number."""
    return (x * (1 / scale)).round().clamp(-127, 127).to(torch.int8)


def _quantised_v(v: Tensor, share: "RowShare | None") -> tuple[Tensor, Tensor, Tensor]:
    """Quantise v fp32 [H, L, D] → e4m3 [H, D, Lp] in stored order, scale and shift fp32 [H, D].

    A constant channel (with one token, every channel is) becomes zeros with scale 1."""
    tokens, processes = (v.shape[1], 1) if share is None else (share.tokens, share.peers.size)
    mean = _over_all(v.sum(1, keepdim=True), share).sum(0) / tokens
    reach = (v - mean).abs()
    reach = reach.amax(1, keepdim=True) if v.shape[1] else torch.zeros_like(mean)
    reach = _over_all(reach, share).amax(0)
    scale = torch.where(reach == 0, 1.0, (reach / E4M3_MAX).clamp_min(TINY))
    v8 = ((v - mean) * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    left = (v - mean - v8.float() * scale).sum(1, keepdim=True)
    shift = mean / processes + left / tokens
    v8 = v8.float() if share is None else _padded_to(v8.float(), share.rows)
    order = stored_order(padded_length(v8.shape[1])).to(v.device)
    stored = _padded(v8)[:, order].to(E4M3)  # exact both ways: e4m3 has no indexing on the CPU
    return stored.transpose(1, 2).contiguous(), scale[:, 0], shift[:, 0]


def _over_all(x: Tensor, share: "RowShare | None") -> Tensor:
    """Gather x from every rank that shares the rows → [N, …]; without a share, N is 1."""
    return x[None] if share is None else share.peers.gather(x.contiguous())


def _mean_key(k: Tensor, share: "RowShare | None") -> Tensor:
    """Return the mean of the sampled tokens [H, 1, D] of k fp32 [H, L, D]."""
    step = sample_step(k.shape[1] if share is None else share.tokens)
    first = 0 if share is None else -share.first % step
    count = k[:, ::step].shape[1] if share is None else -(-share.tokens // step)
    return _over_all(k[:, first::step].sum(1, keepdim=True), share).sum(0) / count


def prepare_8bit(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Rope,
    eps: float,
    fp8_pv: bool = True,
    share: "RowShare | None" = None,
) -> Prepared8:
    """Norm, rotate and quantise qkv [L, 3·C] (q | k | v), weights fp32 [C] → `Prepared8`; all arithmetic in fp32.

    share: qkv holds R rows of a longer sequence, and so does the result. Its v_shift is then this rank's part of a sum
    over all ranks."""
    rows, head_dim = qkv.shape[0], rope.head_dim
    valid = rows if share is None else share.valid
    q, k, v = (part[:valid].unflatten(-1, (-1, head_dim)) for part in qkv.chunk(3, dim=-1))  # [L, H, D]
    turns = Rope(rope.cos[:valid], rope.sin[:valid])
    q = rotate(rms_norm(q.flatten(1), q_weight, eps).view_as(q), turns).transpose(0, 1)
    k = rotate(rms_norm(k.flatten(1), k_weight, eps).view_as(k), turns).transpose(0, 1)
    k = k - _mean_key(k, share)
    turn = hadamard(head_dim).to(qkv.device)
    q, k = (_padded(_padded_to(x @ turn, rows)) for x in (q, k))
    q_scale = (q.abs().amax(-1, keepdim=True) / INT8_MAX).clamp_min(TINY)
    tiles = k.unflatten(1, (-1, TILE))
    k_scale = (tiles.abs().amax((2, 3), keepdim=True) / INT8_MAX).clamp_min(TINY)
    q8, k8 = _int8(q, q_scale), _int8(tiles, k_scale).flatten(1, 2)
    # each rotation by the ±1 matrix leaves a factor √D, and the softmax needs log2(e)/√D
    factor = math.log2(math.e) / head_dim
    q_scale, k_scale = q_scale[..., 0] * factor, k_scale[..., 0, 0] / math.sqrt(head_dim)
    if not fp8_pv:
        whole = sixteen_bit_v(qkv, head_dim)
        return Prepared8(q8, q_scale, k8, k_scale, whole, None, None, rows, EIGHT_BIT_16BIT_PV)
    return Prepared8(q8, q_scale, k8, k_scale, *_quantised_v(v.transpose(0, 1).float(), share), rows)


def attention_8bit(prepared: Prepared8) -> Tensor:
    """Compute softmax attention on the quantised values in plain fp32 → bf16 [L, C].

    P is not rounded here. The kernels round P to e4m3 or bf16; that is part of their error against this function."""
    length = prepared.tokens
    out = []
    for head in range(prepared.q.shape[0]):
        q, k = prepared.q[head, :length].float(), prepared.k[head, :length].float()
        scale = prepared.k_scale[head].repeat_interleave(TILE)[:length]
        score = (q @ k.T) * prepared.q_scale[head, :length, None] * scale
        p = (score * math.log(2)).softmax(-1)
        out.append(p @ values(prepared, head))
    dtype = torch.bfloat16 if prepared.v_scale is not None else prepared.v.dtype
    return torch.stack(out, 1).flatten(1).to(dtype)


def values(prepared: Prepared8, head: int) -> Tensor:
    """Return V of one head as the attention reads it: dequantised, fp32 [L, D]."""
    if prepared.v_scale is None or prepared.v_shift is None:
        return prepared.v[head].float()
    stored = prepared.v[head].float()
    v = torch.empty_like(stored)
    v[:, stored_order(stored.shape[1]).to(v.device)] = stored
    return v[:, : prepared.tokens].T * prepared.v_scale[head] + prepared.v_shift[head]
