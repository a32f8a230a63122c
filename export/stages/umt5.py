"""The text encoder as engine stages, one per layer.

umT5 is cut like the transformer: its layers are structurally identical, so they build quickly and their weights can be
streamed. The linears run in the compute type. The residual stream, the norms and the attention (at most 512 tokens, so
its cost is negligible) are fp32, because umT5 does not scale its logits. Projections of the same rows are stacked.
The token embedding is not a stage: at most 512 of its rows are read from the weight store.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import UMT5Config
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.models.weights import parameter
from scail2_rt.export.stages.layers import Linear, Norm
from scail2_rt.export.stages.spec import Specs, StageDefinition, TensorSpec
from scail2_rt.kernels.rows.ops import rms_norm

TOKENS = "n"  # text tokens: 1 to 512


class UMT5Layer(nn.Module):
    """One layer: x [n, C] fp32, buckets [n, n] int64, mask [n] fp32 (1 token, 0 padding) → x [n, C] fp32."""

    def __init__(self, config: UMT5Config, numerics: Numerics) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        self.norm1 = Norm(config.dim)
        self.qkv = Linear(config.dim, 3 * config.attn_dim, numerics, bias=False)
        self.o = Linear(config.attn_dim, config.dim, numerics, bias=False)
        self.table = parameter(config.buckets, config.heads)
        self.norm2 = Norm(config.dim)
        self.gate_up = Linear(config.dim, 2 * config.ffn_dim, numerics, bias=False)
        self.down = Linear(config.ffn_dim, config.dim, numerics, bias=False)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        x = x + self.o(self._attention(rms_norm(x, self.norm1.weight, self.eps), buckets, mask)).float()
        gate, up = self.gate_up(rms_norm(x, self.norm2.weight, self.eps)).float().chunk(2, dim=-1)
        return x + self.down(up * F.gelu(gate, approximate="tanh")).float()

    def _attention(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """Compute attention over x [n, C] → [n, attention width] fp32."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in self.qkv(x).float().chunk(3, dim=-1))
        logits = q @ k.transpose(1, 2) + F.embedding(buckets, self.table).permute(2, 0, 1)
        logits = torch.where(mask > 0, logits, torch.finfo(torch.float32).min)
        return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


class UMT5Final(nn.Module):
    """The last norm: x [n, C] fp32 → [n, C] fp32."""

    def __init__(self, config: UMT5Config, numerics: Numerics) -> None:
        super().__init__()
        self.eps = config.eps
        self.norm = Norm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm.weight, self.eps)


def _layer_io(numerics: Numerics, dim: int) -> Specs:
    x = TensorSpec("x", torch.float32, (TOKENS, dim))
    buckets = TensorSpec("buckets", torch.int64, (TOKENS, TOKENS))
    mask = TensorSpec("mask", torch.float32, (TOKENS,))
    return (x, buckets, mask), (TensorSpec("x_out", torch.float32, (TOKENS, dim)),)


def _final_io(numerics: Numerics, dim: int) -> Specs:
    return (TensorSpec("x", torch.float32, (TOKENS, dim)),), (TensorSpec("out", torch.float32, (TOKENS, dim)),)


def _layer(config: UMT5Config, index: int) -> StageDefinition:
    block = f"blocks.{index}"
    return StageDefinition(
        name=f"umt5.layers.{index}",
        build=partial(UMT5Layer, config),
        io=partial(_layer_io, dim=config.dim),
        weights={
            "norm1.weight": (f"{block}.norm1.weight",),
            "qkv.weight": tuple(f"{block}.attn.{part}.weight" for part in "qkv"),
            "o.weight": (f"{block}.attn.o.weight",),
            "table": (f"{block}.pos_embedding.embedding.weight",),
            "norm2.weight": (f"{block}.norm2.weight",),
            "gate_up.weight": (f"{block}.ffn.gate.0.weight", f"{block}.ffn.fc1.weight"),
            "down.weight": (f"{block}.ffn.fc2.weight",),
        },
        family="umt5.layers",
    )


def definitions(config: UMT5Config) -> list[StageDefinition]:
    """Return the stages `umt5.layers.0` … and `umt5.final`, in run order."""
    final = StageDefinition(
        name="umt5.final",
        build=partial(UMT5Final, config),
        io=partial(_final_io, dim=config.dim),
        weights={"norm.weight": ("norm.weight",)},
        family="umt5.final",
    )
    return [*(_layer(config, index) for index in range(config.layers)), final]
