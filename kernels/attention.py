"""The kernels that mix tokens: preparation of q, k, v, self-attention, and the two-softmax cross-attention.

These are the PyTorch twins. `PreparedQKV` is what the preparation hands to the attention; only they know its layout.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.rope import Rope, rotate
from scail2_rt.kernels.rows import rms_norm

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class PreparedQKV:
    """q, k: RMS-normed and rotated; v: as projected. Each [H, L, D] in the attention's type."""

    q: Tensor
    k: Tensor
    v: Tensor


def prepare_qkv(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> PreparedQKV:
    """RMS norm over all heads, then RoPE.

    qkv [L, 3·C] (q | k | v), q_weight and k_weight fp32 [C], rope for L tokens."""
    heads = q_weight.shape[0] // rope.head_dim
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = rms_norm(q, q_weight, EPS), rms_norm(k, k_weight, EPS)
    q, k = (rotate(t.unflatten(-1, (heads, -1)), rope).to(qkv.dtype) for t in (q, k))
    return PreparedQKV(q.transpose(0, 1), k.transpose(0, 1), v.unflatten(-1, (heads, -1)).transpose(0, 1))


def self_attention(prepared: PreparedQKV) -> Tensor:
    """Softmax attention over all tokens, scale 1/√D, no mask. → [L, C]."""
    out = F.scaled_dot_product_attention(prepared.q[None], prepared.k[None], prepared.v[None])[0]
    return out.transpose(0, 1).flatten(1)


def cross_attention(q: Tensor, text_kv: Tensor, image_kv: Tensor, head_dim: int) -> Tensor:
    """softmax(q·k_textᵀ)·v_text + softmax(q·k_imageᵀ)·v_image: two softmaxes, outputs added.

    q [L, C] (RMS-normed), text_kv [512, 2·C] and image_kv [I, 2·C] as k | v → [L, C] in q's type."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]

    def attended(kv: Tensor) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        return F.scaled_dot_product_attention(split(q), split(k), split(v))[0].float()

    both = attended(text_kv) + attended(image_kv)
    return both.transpose(0, 1).flatten(1).to(q.dtype)
