"""Row operations: what one token needs alone, fused. These are the PyTorch twins; they run on any device and are also
what the ONNX graphs are traced from.

The fp8 rule of the project, in two halves: `quantise_rows` divides a row by its own scale and rounds it to e4m3;
`fp8_linear` multiplies two e4m3 matrices with fp32 accumulation, then applies row scale × column scale and the bias.
The e4m3 GEMM itself sees unit scales only, the form that TensorRT fuses.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over the last dimension in fp32. x [L, C] → [L, C] fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension in fp32. x [L, C], weight [C] → [L, C] fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LN(x)·(1 + scale) + shift in fp32, cast to `dtype`. x [L, C] fp32, shift and scale [C] fp32 → [L, C]."""
    return (layer_norm(x, eps) * (1 + scale) + shift).to(dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate·y in fp32. x [L, C] fp32, y [L, C], gate [C] fp32 or None for 1 → [L, C] fp32."""
    return x + (y.float() if gate is None else gate * y.float())


def gelu(h: Tensor) -> Tensor:
    """GELU, tanh form, computed in fp32 and returned in h's type. h [L, F]."""
    return F.gelu(h.float(), approximate="tanh").to(h.dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """One e4m3 scale per row: x [L, C] → (e4m3 [L, C], fp32 scales [L, 1]) with x ≈ data · scale.

    The quotient passes through x's own type before it is rounded to e4m3, as TensorRT's form does."""
    scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    return torch.ops.scail2.to_e4m3((x.float() / scale).to(x.dtype)), scale


def norm_modulate_quant(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantise_rows(norm_modulate(...))`: x [L, C] fp32 → (e4m3 [L, C], fp32 [L, 1])."""
    return quantise_rows(norm_modulate(x, shift, scale, eps, dtype))


def gelu_quant(h: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows(gelu(h))`: h [L, F] → (e4m3 [L, F], fp32 [L, 1])."""
    return quantise_rows(gelu(h))


def fp8_linear(
    data: Tensor, row_scale: Tensor, weight: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(data @ weightᵀ) · row_scale · column_scale + bias.

    data e4m3 [L, C], row_scale fp32 [L, 1], weight e4m3 [O, C], column_scale fp32 [O], bias [O] → [L, O] in `dtype`.
    The product is rounded to `dtype` before the scales (the rule of the exported graphs)."""
    product = torch.ops.scail2.e4m3_matmul(data, weight, dtype).float()
    y = product * row_scale * column_scale
    return (y if bias is None else y + bias.float()).to(dtype)


def quantise_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One e4m3 scale per output channel: weight [O, C] → (e4m3 [O, C], fp32 [O])."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / E4M3_MAX).clamp_min(1e-12)
    return (weight / scale[:, None]).to(E4M3), scale


@torch.library.custom_op("scail2::to_e4m3", mutates_args=())
def _to_e4m3(x: Tensor) -> Tensor:
    return x.to(E4M3)


@_to_e4m3.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=E4M3)


@torch.library.custom_op("scail2::e4m3_matmul", mutates_args=())
def _e4m3_matmul(data: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (data.float() @ weight.float().T).to(dtype)


@_e4m3_matmul.register_fake
def _(data: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return data.new_empty((data.shape[0], weight.shape[0]), dtype=dtype)
