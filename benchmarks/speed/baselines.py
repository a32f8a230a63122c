"""Baselines of section `forward`: the 40 transformer blocks in plain PyTorch, with random weights.

`official`   the dataflow of the official code: fp32 weights under bf16 autocast (cast again in every call), residual
             stream and modulation in fp32, RoPE in fp64 complex arithmetic, cuDNN attention, cross-attention k and v
             of every block computed in every call
`compile`    the same block with bf16 weights, RoPE in real fp32 arithmetic (inductor does not support complex
             numbers), compiled once with torch.compile for one shape, cuDNN attention

Both omit embeddings and head, which favours the baselines by well below 1 %.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.rope import multipliers
from scail2_rt.runtime.core.geometry import Layout

EPS = 1e-6
Weights = dict[str, Tensor]
Rotate = Callable[[Tensor], Tensor]


def block_weights(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights of one block: linears in `dtype`, norms and modulation in fp32."""
    c, ffn = config.dim, config.ffn_dim
    shapes = dict.fromkeys(("q", "k", "v", "o", "cq", "ck", "cv", "cki", "cvi", "co"), (c, c))
    shapes |= {"up": (ffn, c), "down": (c, ffn)}
    weights = {}
    for name, (out, width) in shapes.items():
        weights[f"{name}.w"] = torch.randn(out, width, dtype=dtype, device=device).mul_(width**-0.5)
        weights[f"{name}.b"] = torch.zeros(out, dtype=dtype, device=device)
    for name in ("norm_q", "norm_k", "norm_cq", "norm_ck", "norm_cki", "norm3.w"):
        weights[name] = torch.ones(c, device=device)
    weights["norm3.b"] = torch.zeros(c, device=device)
    weights["modulation"] = 0.1 * torch.randn(6, c, device=device)
    return weights


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """The linear layer `name` of a block."""
    return F.linear(x, w[f"{name}.w"], w[f"{name}.b"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as in the official code: normalised in fp32, rounded to x's dtype, times the fp32 weight; the result is
    fp32."""
    full = x.float()
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention: q [L, C], k and v [M, C] → bf16 [L, C]."""
    q, k, v = (x.to(torch.bfloat16).unflatten(-1, (heads, -1)).transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)


def block(x: Tensor, time: Tensor, text: Tensor, image: Tensor, w: Weights, heads: int, rotate: Rotate) -> Tensor:
    """One transformer block: x fp32 [L, C], time fp32 [6, C], text [512, C], image [257, C] → fp32 [L, C]."""
    m, c = w["modulation"] + time, x.shape[-1]
    compute = text.dtype
    h = (F.layer_norm(x, (c,), eps=EPS) * (1 + m[1]) + m[0]).to(compute)
    q = rotate(rms(linear(h, w, "q"), w["norm_q"]))
    k = rotate(rms(linear(h, w, "k"), w["norm_k"]))
    x = x + linear(attention(q, k, linear(h, w, "v"), heads), w, "o") * m[2]
    h = F.layer_norm(x, (c,), w["norm3.w"], w["norm3.b"], EPS).to(compute)
    q = rms(linear(h, w, "cq"), w["norm_cq"])
    from_text = attention(q, rms(linear(text, w, "ck"), w["norm_ck"]), linear(text, w, "cv"), heads)
    from_image = attention(q, rms(linear(image, w, "cki"), w["norm_cki"]), linear(image, w, "cvi"), heads)
    x = x + linear(from_text + from_image, w, "co")
    h = (F.layer_norm(x, (c,), eps=EPS) * (1 + m[4]) + m[3]).to(compute)
    return x + linear(F.gelu(linear(h, w, "up"), approximate="tanh"), w, "down") * m[5]


def complex_rotation(table: Tensor, heads: int) -> Rotate:
    """RoPE as in the official code: fp64 complex multiplication, result in fp32. table: complex128 [L, D/2]."""

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)))
        return torch.view_as_real(pairs * table[:, None]).flatten(1).float()

    return rotate


def real_rotation(cos: Tensor, sin: Tensor, heads: int) -> Rotate:
    """RoPE in real fp32 arithmetic. cos, sin: fp32 [L, D/2]."""

    def rotate(x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (heads, -1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(1)

    return rotate


@contextmanager
def cudnn_attention(device: torch.device) -> Iterator[None]:
    """Restrict PyTorch's attention to cuDNN, which raises for unsupported inputs. No effect on a CPU."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


def official(config: DiTConfig, layout: Layout, device: torch.device) -> Callable[[], Tensor]:
    """A call that runs all blocks as `official`; the 14B model has 61 GiB of weights."""
    weights = [block_weights(config, torch.float32, device) for _ in range(config.layers)]
    rotate = complex_rotation(_table(config, layout, device), config.heads)

    def one(x: Tensor, time: Tensor, text: Tensor, image: Tensor, w: Weights) -> Tensor:
        return block(x, time, text, image, w, config.heads, rotate)

    return _forward(config, layout, device, weights, torch.float32, one)


def compiled(config: DiTConfig, layout: Layout, device: torch.device) -> Callable[[], Tensor]:
    """A call that runs all blocks as `compile`: bf16 weights, one compiled block function for all blocks."""
    weights = [block_weights(config, torch.bfloat16, device) for _ in range(config.layers)]
    table = _table(config, layout, device)
    rotate = real_rotation(table.real.float().contiguous(), table.imag.float().contiguous(), config.heads)

    def one(x: Tensor, time: Tensor, text: Tensor, image: Tensor, w: Weights) -> Tensor:
        return block(x, time, text, image, w, config.heads, rotate)

    fast = torch.compile(one, dynamic=False) if device.type == "cuda" else one
    return _forward(config, layout, device, weights, torch.bfloat16, fast)


def _forward(
    config: DiTConfig,
    layout: Layout,
    device: torch.device,
    weights: list[Weights],
    dtype: torch.dtype,
    call: Callable[[Tensor, Tensor, Tensor, Tensor, Weights], Tensor],
) -> Callable[[], Tensor]:
    start = torch.randn(layout.tokens, config.dim, device=device)
    time = 0.1 * torch.randn(6, config.dim, device=device)
    text, image = (torch.randn(n, config.dim, device=device, dtype=dtype) for n in (config.text_len, 257))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32)

    def forward() -> Tensor:
        x = start
        with torch.no_grad(), cudnn_attention(device), autocast:
            for w in weights:
                x = call(x, time, text, image, w)
        return x

    return forward


def _table(config: DiTConfig, layout: Layout, device: torch.device) -> Tensor:
    return multipliers(layout.frames, *layout.grid, config.head_dim).to(device)
