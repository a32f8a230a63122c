"""Inputs that are difficult for low-precision attention, their preparation, and all implementations to test.

outlier_channels   every 32nd channel of q and k is 4 times as large as the others
outlier_tokens     every 29th token of q and k is 6 times as large in one head, and in V 10 times everywhere
sinks              four keys that every query wants
equal_keys         one key for all tokens: the mean of V
huge_v, tiny_v     V of thousands, and of thousandths
stepped_v          V has one of four values, in runs of tokens
smooth_v           V is a slow wave over the tokens
heavy_v            Student-t values with two degrees of freedom
offset_v           values with a large common component
constant_v         the same value in every token: a range of 0
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scail2_rt.kernels.attention import eight_bit, variants
from scail2_rt.kernels.attention.ops import EPS, PreparedQKV, prepare_qkv, self_attention
from scail2_rt.kernels.rope import Rope

CUDA = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (9, 0)
DEVICE = torch.device("cuda" if CUDA else "cpu")
FAMILIES = (
    "outlier_channels", "outlier_tokens", "sinks", "equal_keys", "huge_v", "tiny_v", "stepped_v", "smooth_v", "heavy_v",
    "offset_v", "constant_v",
)  # fmt: skip
Attention = Callable[[Tensor, Tensor, Tensor, Rope], Tensor]  # qkv [L, 3·C], q_weight, k_weight, rope → [L, C]


def make(family: str, tokens: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each fp32 [H, L, D] on the device. KeyError for an unknown family."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    q, k, v = (normal(heads, tokens, width) for _ in range(3))
    if family.endswith("_v"):
        return q, k, _values(family, v, normal)
    if family == "outlier_channels":
        q[..., ::32] *= 4
        k[..., ::32] *= 4
    elif family == "outlier_tokens":
        q[0, ::29] *= 6
        k[0, ::29] *= 6
        v[:, ::29] *= 10
    elif family == "sinks":
        wanted = 3 * torch.nn.functional.normalize(normal(heads, 1, width), dim=-1)
        q += wanted
        k[:, :4] += 4 * wanted
    else:
        k = {"equal_keys": k[:, :1].expand_as(k).clone()}[family]
    return q, k, v


def _values(family: str, v: Tensor, normal: Callable[..., Tensor]) -> Tensor:
    heads, tokens, width = v.shape
    place = torch.arange(tokens, device=v.device)[:, None] / tokens
    if family == "heavy_v":
        return v / ((normal(*v.shape) ** 2 + normal(*v.shape) ** 2) / 2).sqrt().clamp_min(0.05)
    if family == "stepped_v":
        return normal(heads, 4, width)[:, (4 * place[:, 0]).long()]
    if family == "smooth_v":
        return torch.sin(2 * math.pi * (place + normal(heads, 1, width)))
    if family == "constant_v":
        return normal(heads, 1, width).expand_as(v).clone()
    return {"huge_v": 3000 * v, "tiny_v": 3e-3 * v, "offset_v": v + 20 * normal(heads, 1, width)}[family]


def operands(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Rope]:
    """The inputs of the operation: one RMS norm weight that keeps the mean square, and no rotation."""
    heads, tokens, width = q.shape
    weights = [x.square().mean().sqrt().expand(heads * width).contiguous() for x in (q, k)]
    qkv = torch.cat([x.transpose(0, 1).flatten(1) for x in (q, k, v)], dim=1).to(dtype)
    shape = tokens, width // 2
    return qkv, weights[0], weights[1], Rope(torch.ones(shape, device=q.device), torch.zeros(shape, device=q.device))


def exact(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, rows: Tensor) -> Tensor:
    """Attention in fp64 for the queries `rows` → [n, C]; non-finite values are kept."""
    q, k, v = (part.double() for part in qkv.chunk(3, dim=-1))
    q, k = (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w for x, w in ((q, q_weight), (k, k_weight)))
    q, k, v = (x.unflatten(-1, (-1, rope.head_dim)).transpose(0, 1) for x in (q, k, v))
    attended = [
        ((q[head, rows] @ k[head].T) / math.sqrt(rope.head_dim)).softmax(-1) @ v[head] for head in range(q.shape[0])
    ]
    return torch.stack(attended, 1).flatten(1)


def error(out: Tensor, want: Tensor) -> float:
    """The relative error over values that are finite in both."""
    both = out.isfinite() & want.isfinite()
    out, want = out.double()[both], want.double()[both]
    return ((out - want).norm() / want.norm().clamp_min(1e-30)).item() if both.any() else 0.0


def by_variant(name: str) -> Attention:
    """As the engines call it."""

    def attend(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> Tensor:
        return self_attention(prepare_qkv(qkv, q_weight, k_weight, rope, variants.VARIANTS[name]))

    return attend


def by_triton(fp8_pv: bool) -> Attention:
    """The Triton kernels of 8 bit, on a CPU in Triton's interpreter."""

    def attend(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> Tensor:
        from scail2_rt.kernels.attention import launch

        tokens, channels, width = qkv.shape[0], q_weight.shape[0], rope.head_dim
        v = None if fp8_pv else eight_bit.sixteen_bit_v(qkv, width)
        prepared = eight_bit.empty_prepared8(channels // width, tokens, width, v, qkv.device)
        launch.prepare_8bit(qkv, q_weight, k_weight, rope, EPS, prepared)
        out = torch.empty(tokens, channels, dtype=torch.bfloat16 if fp8_pv else qkv.dtype, device=qkv.device)
        return launch.attention_8bit(prepared, out)

    return attend


def by_triton_16bit(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> Tensor:
    from scail2_rt.kernels.attention import launch

    tokens, channels = qkv.shape[0], q_weight.shape[0]
    q, k = (qkv.new_empty(tokens, channels) for _ in range(2))
    launch.prepare_16bit(qkv, q_weight, k_weight, rope, EPS, q, k)
    q, k, v = (x.unflatten(-1, (-1, rope.head_dim)).transpose(0, 1) for x in (q, k, qkv[:, 2 * channels :]))
    made = PreparedQKV(q, k, v)
    return launch.attention_16bit(made.q, made.k, made.v, qkv.new_empty(tokens, channels))


def attentions() -> dict[str, Attention]:
    """All supported implementations: on a GPU the kernels, on a CPU their twins and Triton's kernels in the
    interpreter."""
    found: dict[str, Attention] = {}
    e4m3 = CAPABILITY >= (8, 9)
    for name in ("8bit", "8bit-triton", "8bit-bf16pv", "bf16", "sdpa"):
        variant = variants.VARIANTS[name]
        if CUDA and variant.v is not None and not e4m3:
            continue
        if CUDA or name in ("8bit", "8bit-bf16pv", "sdpa"):
            found[name if CUDA else f"{name}, twin"] = by_variant(name)
    if not CUDA:
        found["8bit, Triton"], found["8bit-bf16pv, Triton"] = by_triton(True), by_triton(False)
    found["bf16, Triton"] = by_triton_16bit
    return found


def dtype_of(name: str) -> torch.dtype:
    """The type that an attention is tested with: the interpreter's product in bf16 is wrong."""
    return torch.bfloat16 if CUDA or "Triton" not in name else torch.float16


def limit(name: str) -> float:
    """Relative error against fp64, whatever the family."""
    return 0.063 if name.startswith("8bit") else 0.016
