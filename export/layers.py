"""The linear layer of the engine stages, and the weights of their norms.

`Linear` carries the precision rule, so that a stage reads like the model: weights in the storage type, GEMM operands
in the compute type, and, where the numerics say fp8, the unit-scale e4m3 rule of `kernels.rows`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.precision import Numerics
from scail2_rt.kernels.rows import E4M3, fp8_linear, quantise_rows


class Linear(nn.Module):
    """y = x·Wᵀ + b. x [L, in] of any float type → [L, out] in `numerics.compute`.

    Parameters: weight [out, in], bias [out] in the storage type; under fp8 weight is e4m3 and `scale` fp32 [out]."""

    def __init__(self, in_features: int, out_features: int, numerics: Numerics, bias: bool = True) -> None:
        super().__init__()
        self.numerics = numerics
        weight_type = E4M3 if numerics.fp8 else numerics.storage
        self.weight = parameter(out_features, in_features, dtype=weight_type)
        self.scale = parameter(out_features) if numerics.fp8 else None
        self.bias = parameter(out_features, dtype=numerics.storage) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        compute = self.numerics.compute
        if self.scale is not None:
            data, row_scale = quantise_rows(x.to(compute))
            return fp8_linear(data, row_scale, self.weight, self.scale, self.bias, compute)
        bias = None if self.bias is None else self.bias.to(compute)
        return F.linear(x.to(compute), self.weight.to(compute), bias)


class Norm(nn.Module):
    """The affine weights of a norm: `weight` and, for a LayerNorm, `bias`; fp32."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(dim)
        self.bias = parameter(dim) if bias else None


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised weight; its values come from the store."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
