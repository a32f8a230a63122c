"""The kernels that mix tokens: preparation of q, k, v, self-attention, and the two-softmax cross-attention.

Each is one function. The tensors' device and the attention variant (`attention.variants`) select the implementation;
`prepare_qkv` receives the variant and stores it in its result. On a CPU the PyTorch twins run, against which ONNX
graphs are checked; on a GPU the Triton kernels or a library's attention. Only this module knows the operands of each
variant: `PreparedQKV` for the 16-bit variants, `Prepared8` (`kernels.attention.eight_bit`) for the 8-bit ones.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.attention import eight_bit
from scail2_rt.kernels.attention.eight_bit import Prepared8
from scail2_rt.kernels.attention.shared_rows import HeadExchange, RowShare
from scail2_rt.kernels.attention.variants import (
    CUDNN,
    FLASH,
    SAGE,
    SDPA,
    SIXTEEN_BIT,
    VARIANTS,
    AttentionVariant,
    choose_attention,
    hopper_obstacle,
)
from scail2_rt.kernels.rope import Rope, rotate
from scail2_rt.kernels.rows.ops import rms_norm

__all__ = [
    "VARIANTS", "AttentionVariant", "HeadExchange", "Prepared8", "PreparedQKV", "RowShare", "choose_attention",
    "cross_attention", "prepare_qkv", "self_attention", "shared_attention",
]  # fmt: skip

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class PreparedQKV:
    """Operands of 16-bit attention. q, k: RMS-normed and rotated; v: as projected. Each [H, L, D] in one type.

    On a GPU, q and k are views of contiguous [L, C] buffers and v is a view of qkv: every kernel returns [L, C]."""

    q: Tensor
    k: Tensor
    v: Tensor
    variant: AttentionVariant = SDPA


Prepared = PreparedQKV | Prepared8


def prepare_qkv(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Rope,
    variant: AttentionVariant = SDPA,
    share: RowShare | None = None,
) -> Prepared:
    """Apply RMS norm over all heads, then RoPE; for the 8-bit variants also Hadamard rotation and quantisation.

    qkv [L, 3·C] (q | k | v), q_weight and k_weight fp32 [C], rope for L tokens. In 16 bits, v stays a view of qkv.
    share: qkv and rope are the rows of a longer sequence that this rank holds, for `shared_attention`."""
    if variant.eight_bit:
        made = _prepare_8bit(qkv, q_weight, k_weight, rope, variant.v is not None, share)
        return replace(made, variant=variant)
    heads = q_weight.shape[0] // rope.head_dim
    v = qkv.chunk(3, dim=-1)[2].unflatten(-1, (heads, -1)).transpose(0, 1)
    if qkv.is_cuda:
        from scail2_rt.kernels.attention import launch

        q, k = (qkv.new_empty(qkv.shape[0], q_weight.shape[0]) for _ in range(2))
        launch.prepare_16bit(qkv, q_weight, k_weight, rope, EPS, q, k)
        q, k = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))
        return PreparedQKV(q, k, v, variant)
    q, k, _ = qkv.chunk(3, dim=-1)
    q, k = rms_norm(q, q_weight, EPS), rms_norm(k, k_weight, EPS)
    q, k = (rotate(t.unflatten(-1, (heads, -1)), rope).to(qkv.dtype).transpose(0, 1) for t in (q, k))
    return PreparedQKV(q, k, v, variant)


def _prepare_8bit(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, fp8_pv: bool, share: RowShare | None
) -> Prepared8:
    if not qkv.is_cuda:
        return eight_bit.prepare_8bit(qkv, q_weight, k_weight, rope, EPS, fp8_pv, share)
    from scail2_rt.kernels.attention import launch

    heads = q_weight.shape[0] // rope.head_dim
    v = None if fp8_pv else eight_bit.sixteen_bit_v(qkv, rope.head_dim)
    made = eight_bit.empty_prepared8(heads, qkv.shape[0], rope.head_dim, v, qkv.device)
    launch.prepare_8bit(qkv, q_weight, k_weight, rope, EPS, made, share)
    return made


def shared_attention(prepared: Prepared, exchange: HeadExchange, head_dim: int) -> Tensor:
    """Run `self_attention` over a sequence that several ranks share; returns this rank's rows [R, C].

    prepared: operands of this rank's R rows and all heads."""
    prepared = exchange.to_heads(prepared)
    out = exchange.attended(prepared, head_dim)
    attended = self_attention(prepared, out)
    if attended is not out:  # a library's attention returns a new tensor
        out.copy_(attended)
    return exchange.to_rows()


def self_attention(prepared: Prepared, out: Tensor | None = None) -> Tensor:
    """Compute softmax attention over all tokens, scale 1/√D, no mask, by the variant it was prepared for.

    Returns [L, C] in the attention's 16-bit type (bf16 where v was quantised); our kernels write it to `out`."""
    if isinstance(prepared, Prepared8):
        return _eight_bit_attention(prepared, out)
    q, k, v = prepared.q, prepared.k, prepared.v
    if prepared.variant == SIXTEEN_BIT:
        from scail2_rt.kernels.attention import hopper_attention_16bit, launch

        out = q.new_empty(q.shape[1], q.shape[0] * q.shape[2]) if out is None else out
        if hopper_obstacle(q.device, q.shape[2], q.dtype) is None:
            return hopper_attention_16bit.hopper_attention_16bit(q, k, v, out)
        return launch.attention_16bit(q, k, v, out)
    if prepared.variant in (FLASH, SAGE):
        return _library_attention(prepared)
    if prepared.variant == CUDNN:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    else:
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    return attended.transpose(0, 1).flatten(1)


def _eight_bit_attention(prepared: Prepared8, out: Tensor | None) -> Tensor:
    if not prepared.q.is_cuda:
        return eight_bit.attention_8bit(prepared)
    heads, _, dim = prepared.q.shape
    dtype = torch.bfloat16 if prepared.v_scale is not None else prepared.v.dtype
    out = prepared.q.new_empty(prepared.tokens, heads * dim, dtype=dtype) if out is None else out
    if prepared.variant.sm90 and hopper_obstacle(prepared.q.device, dim, prepared.q.dtype) is None:
        from scail2_rt.kernels.attention.hopper_attention import hopper_attention

        return hopper_attention(prepared, out)
    from scail2_rt.kernels.attention import launch

    return launch.attention_8bit(prepared, out)


def _library_attention(prepared: PreparedQKV) -> Tensor:
    """Run flash-attn or SageAttention, both on [1, L, H, D] → [L, C]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (prepared.q, prepared.k, prepared.v))
    if prepared.variant == FLASH:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)[0].flatten(1)
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")[0].flatten(1)


def cross_attention(q: Tensor, text_kv: Tensor, image_kv: Tensor, head_dim: int) -> Tensor:
    """Compute softmax(q·k_textᵀ)·v_text + softmax(q·k_imageᵀ)·v_image: two softmaxes, outputs added, scale 1/√D.

    q [L, C] (RMS-normed), text_kv [T, 2·C] and image_kv [I, 2·C] as k | v → [L, C] in q's type. For 16-bit tensors on a
    GPU, one Triton launch reads all three in place. fp32 tensors use the twin (tensor cores round fp32)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from scail2_rt.kernels.attention import launch

        return launch.cross_attention(q, text_kv, image_kv, head_dim, torch.empty_like(q))

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]

    def attended(kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        return F.scaled_dot_product_attention(split(q), split(k), split(v))[0].float()

    both = attended(text_kv) + attended(image_kv)
    return both.transpose(0, 1).flatten(1).to(q.dtype)
