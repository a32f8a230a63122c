"""Row operations: fused operations on single tokens. On a CPU the PyTorch twins run, from which the ONNX graphs are
also traced; on a GPU each is one Triton launch (`launch`), and the GEMM is `torch._scaled_mm`.

A `RowForm` describes the operand of the next GEMM. Each operation that feeds a GEMM returns its rows in that form:
cast, or e4m3 with one scale per row. The project's fp8 rule has two halves: `quantise_rows` divides each row by its
scale and rounds it to e4m3; `fp8_linear` multiplies two e4m3 matrices with fp32 accumulation, then applies row scale ×
column scale and the bias. The e4m3 GEMM sees unit scales only; TensorRT fuses this form.

The twins round to the form's type before e4m3, and round the GEMM's result before the scales, as the exported graphs
do. The GPU rounds once, from fp32, which is at least as accurate: about 3 % of the e4m3 codes differ, by one step.

`out` receives a result: rows of a larger tensor, or the storage of the input.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.errors import Scail2Error

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_GEMM = (8, 9)  # minimum compute capability

Quantised = tuple[Tensor, Tensor]  # (e4m3 [L, C], fp32 scales [L, 1])
Rows = Tensor | Quantised


@dataclass(frozen=True, slots=True)
class RowForm:
    """The form of a GEMM's operand rows: in `dtype`, or rounded from it to e4m3 with one scale per row."""

    dtype: torch.dtype
    quantised: bool = False


@dataclass(frozen=True, slots=True)
class Affine:
    """The affine map after normalisation: ·weight + bias, or for a modulation ·(1 + weight) + bias. Both fp32 [C]."""

    weight: Tensor
    bias: Tensor
    modulates: bool = False


def modulation(shift: Tensor, scale: Tensor) -> Affine:
    """Return the affine map ·(1 + scale) + shift; each fp32 [C]."""
    return Affine(scale, shift, modulates=True)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Compute LayerNorm over the last dimension in fp32. x [L, C] → [L, C] fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x) · weight over the last dimension in fp32. x [L, C], weight [C] → [L, C] fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rms_norm_rows(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Compute `rms_norm`, returned in x's type. x [L, C], weight fp32 [C]; out [L, C] may be x."""
    if not x.is_cuda:
        return _into(rms_norm(x, weight, eps).to(x.dtype), out)
    from scail2_rt.kernels.rows import launch

    x = x.contiguous()
    out = _like(x, x.dtype, out)
    launch.rms_rows(x, weight, eps, out)
    return out


def norm_rows(x: Tensor, affine: Affine, eps: float, form: RowForm) -> Rows:
    """Compute LayerNorm and affine map in fp32, then the operand. x fp32 [L, C] → [L, C] in `form`."""
    if not x.is_cuda:
        return as_rows(_normed(x, affine, eps), form)
    return _norm_on_gpu(x, affine, eps, form)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Compute LN(x)·(1 + scale) + shift in fp32, cast to `dtype`. x [L, C] fp32, shift, scale [C] fp32 → [L, C]."""
    return cast(Tensor, norm_rows(x, modulation(shift, scale), eps, RowForm(dtype)))


def norm_modulate_quant(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Quantised:
    """Compute `norm_modulate`, quantised: x [L, C] fp32 → (e4m3 [L, C], fp32 [L, 1])."""
    return cast(Quantised, norm_rows(x, modulation(shift, scale), eps, RowForm(dtype, quantised=True)))


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, affine: Affine, eps: float, form: RowForm, out: Tensor | None = None
) -> tuple[Tensor, Rows]:
    """Compute `gate_residual` and `norm_rows` of its result: (x + gate·y fp32 [L, C], its norm in `form`).

    x fp32 [L, C], y [L, C], gate fp32 [C] or None for 1; out fp32 [L, C] may be x."""
    if not x.is_cuda:
        x = gate_residual(x, y, gate, out)
        return x, norm_rows(x, affine, eps, form)
    out = _like(x, torch.float32, out)
    return out, _norm_on_gpu(x, affine, eps, form, y, gate, out)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Compute x + gate·y in fp32. x fp32 [L, C], y [L, C], gate fp32 [C] or None for 1 → fp32 [L, C]; out may be x."""
    if not x.is_cuda:
        return _into(x + (y.float() if gate is None else gate * y.float()), out)
    from scail2_rt.kernels.rows import launch

    x = x.contiguous()
    out = _like(x, torch.float32, out)
    launch.residual_rows(x, y.contiguous(), gate, out)
    return out


def gelu(h: Tensor) -> Tensor:
    """Compute GELU (tanh form) in fp32, returned in h's type. h [L, F]."""
    return cast(Tensor, gelu_rows(h, RowForm(h.dtype)))


def gelu_rows(h: Tensor, form: RowForm, reuse: bool = False) -> Rows:
    """Compute GELU (tanh form) in fp32, then the operand: h [L, F] → [L, F] in `form`. `reuse`: may overwrite h."""
    if not h.is_cuda:
        return as_rows(F.gelu(h.float(), approximate="tanh").to(h.dtype), form)
    return _activation_on_gpu(h, form, gelu=True, reuse=reuse)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU (tanh form) of x · weightᵀ + bias: one GEMM whose epilogue applies it to the fp32 sums (cuBLASLt's
    GELU_BIAS). GPU only. x [L, C], weight [O, C], bias [O], all of one 16-bit type → [L, O] in that type."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def gelu_quant(h: Tensor) -> Quantised:
    """Compute `gelu`, quantised: h [L, F] → (e4m3 [L, F], fp32 [L, 1])."""
    return cast(Quantised, gelu_rows(h, RowForm(h.dtype, quantised=True)))


def as_rows(x: Tensor, form: RowForm) -> Rows:
    """Convert x [L, C] of any float type to a GEMM's operand: cast, and quantised if the form says so."""
    x = x.to(form.dtype)
    return quantise_rows(x) if form.quantised else x


def quantise_rows(x: Tensor) -> Quantised:
    """Quantise to e4m3 with one scale per row: x [L, C] → (e4m3 [L, C], fp32 scales [L, 1]) with x ≈ data · scale.

    In the twin, the quotient is rounded to x's type before it is rounded to e4m3, as in TensorRT's form."""
    if x.is_cuda:
        return cast(Quantised, _activation_on_gpu(x, RowForm(x.dtype, quantised=True), gelu=False))
    scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    return torch.ops.scail2.to_e4m3((x.float() / scale).to(x.dtype)), scale


def fp8_linear(
    rows: Quantised,
    columns: Quantised,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    fast_accumulation: bool = True,
) -> Tensor:
    """Compute (data @ weightᵀ) · row scale · column scale + bias.

    rows e4m3 [L, C] and fp32 [L, 1], columns e4m3 [O, C] and fp32 [O], bias [O] → [L, O] in `dtype`.
    `fast_accumulation`: accumulate all K products in the tensor core's accumulator, which loses small addends once the
    sum is large; otherwise the accumulator is added to fp32 registers every few steps. GPU only.
    The twin rounds the product to `dtype` before the scales (the rule of the exported graphs), the GPU after them.
    Raises Scail2Error on a GPU without an e4m3 GEMM, or for a type or size that it does not support."""
    (data, row_scale), (weight, column_scale) = rows, columns
    if data.is_cuda:
        _check_gemm(data, weight, dtype)
        bias = None if bias is None else bias.to(dtype)
        scales = {"scale_a": row_scale, "scale_b": column_scale[None]}
        if out is None:
            out = torch.empty(data.shape[0], weight.shape[0], dtype=dtype, device=data.device)
        torch._scaled_mm(
            data, weight.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast_accumulation, out=out, **scales
        )
        return out
    product = torch.ops.scail2.e4m3_matmul(data, weight, dtype).float()
    y = product * row_scale * column_scale
    return _into((y if bias is None else y + bias.float()).to(dtype), out)


def quantise_columns(weight: Tensor) -> Quantised:
    """Quantise to e4m3 with one scale per output channel: weight [O, C] → (e4m3 [O, C], fp32 [O])."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / E4M3_MAX).clamp_min(1e-12)
    return (weight / scale[:, None]).to(E4M3), scale


def _normed(x: Tensor, affine: Affine, eps: float) -> Tensor:
    if affine.modulates:
        return layer_norm(x, eps) * (1 + affine.weight) + affine.bias
    return layer_norm(x, eps, affine.weight, affine.bias)


def _norm_on_gpu(
    x: Tensor,
    affine: Affine,
    eps: float,
    form: RowForm,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    x_out: Tensor | None = None,
) -> Rows:
    from scail2_rt.kernels.rows import launch

    data, scales = _operand(x, form)
    offset = 1.0 if affine.modulates else 0.0
    y = None if y is None else y.contiguous()
    launch.norm_rows(x.float().contiguous(), affine.weight, affine.bias, offset, eps, data, scales, y, gate, x_out)
    return data if scales is None else (data, scales)


def _activation_on_gpu(h: Tensor, form: RowForm, gelu: bool, reuse: bool = False) -> Rows:
    from scail2_rt.kernels.rows import launch

    h = h.contiguous()
    data, scales = (h, None) if reuse and form == RowForm(h.dtype) else _operand(h, form)
    launch.activation_rows(h, data, scales, gelu)
    return data if scales is None else (data, scales)


def _operand(x: Tensor, form: RowForm) -> tuple[Tensor, Tensor | None]:
    """Allocate memory for rows shaped like x in `form`."""
    data = torch.empty(x.shape, dtype=E4M3 if form.quantised else form.dtype, device=x.device)
    return data, torch.empty(x.shape[0], 1, device=x.device) if form.quantised else None


def _like(x: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Return `out`, or new memory of x's shape. Raises ValueError for an `out` that a kernel cannot write."""
    if out is None:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.shape != x.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; a contiguous {dtype} {list(x.shape)} is needed")
    return out


def _into(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _check_gemm(data: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise Scail2Error if this GPU cannot run the e4m3 GEMM, or not with these sizes or this output type."""
    capability = torch.cuda.get_device_capability(data.device)
    if capability < E4M3_GEMM:
        raise Scail2Error(
            f"an e4m3 GEMM needs a GPU of compute capability 8.9 or later, this one has "
            f"{capability[0]}.{capability[1]}. Use an engine folder in bf16."
        )
    if dtype != torch.bfloat16 or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise Scail2Error(
            f"an e4m3 GEMM on a GPU returns bf16 and needs dimensions that are multiples of 16, not {dtype} and a "
            f"weight of {list(weight.shape)}. Use an engine folder in bf16."
        )


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
