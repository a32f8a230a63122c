"""The linear layer of the engine stages, and the weights of their norms.

`Linear` implements the precision rule, so that a stage reads like the model: weights in the storage type, GEMM operands
in the compute type, and, for fp8, the unit-scale e4m3 rule of `kernels.rows.ops`. A row operation that feeds a linear
uses its `form` and passes the rows to `project`; `forward` takes rows of any float type.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.precision import Accumulation, Numerics
from scail2_rt.export.models.weights import parameter
from scail2_rt.kernels.rows.ops import (
    E4M3,
    Affine,
    Quantised,
    RowForm,
    Rows,
    as_rows,
    fp8_linear,
    gelu_linear,
    gelu_rows,
)


class Linear(nn.Module):
    """y = x·Wᵀ + b. x [L, in] of any float type → [L, out] in `numerics.compute`.

    Parameters: weight [out, in], bias [out] in the storage type; under fp8 weight is e4m3 and `scale` fp32 [out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        numerics: Numerics,
        bias: bool = True,
        accumulation: Accumulation = "fast",
    ) -> None:
        super().__init__()
        self.numerics, self.accumulation = numerics, accumulation
        self.form = RowForm(numerics.compute, numerics.fp8)
        weight_type = E4M3 if numerics.fp8 else numerics.storage
        self.weight = parameter(out_features, in_features, dtype=weight_type)
        self.scale = parameter(out_features) if numerics.fp8 else None
        self.bias = parameter(out_features, dtype=numerics.storage) if bias else None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.project(as_rows(x, self.form), out)

    def project(self, rows: Rows, out: Tensor | None = None) -> Tensor:
        """Compute the product for rows [L, in] in `form`; written to `out` [L, out] if given."""
        compute = self.numerics.compute
        if self.scale is not None:
            fast = self.accumulation == "fast"
            return fp8_linear(cast(Quantised, rows), (self.weight, self.scale), self.bias, compute, out, fast)
        rows = cast(Tensor, rows)  # by `form`
        weight = self.weight.to(compute)
        bias = None if self.bias is None else self.bias.to(compute)
        if out is None:
            return F.linear(rows, weight, bias)
        if bias is None:
            return torch.mm(rows, weight.t(), out=out)
        return torch.addmm(bias, rows, weight.t(), out=out)

    def project_gelu(self, rows: Rows, form: RowForm) -> Rows:
        """Compute GELU (tanh form) of the product, as rows in `form`; reuses the product's buffer if `form` allows it.

        On a GPU, a 16-bit GEMM applies GELU in its epilogue; otherwise it is a row operation."""
        compute = self.numerics.compute
        sixteen_bit = self.scale is None and compute in (torch.bfloat16, torch.float16)
        if sixteen_bit and self.bias is not None and self.weight.is_cuda and form == RowForm(compute):
            return gelu_linear(cast(Tensor, rows), self.weight.to(compute), self.bias.to(compute))
        return gelu_rows(self.project(rows), form, reuse=True)


class Norm(nn.Module):
    """The affine weights of a norm: `weight` and, for a LayerNorm, `bias`; fp32."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(dim)
        self.bias = parameter(dim) if bias else None

    @property
    def affine(self) -> Affine:
        """The weights as the affine map of a LayerNorm."""
        return Affine(self.weight, cast(Tensor, self.bias))
