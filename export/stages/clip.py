"""The CLIP visual tower as one engine stage.

The residual stream and the norms are fp32. The stage ends after the last-but-one block.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import CLIPConfig
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.models.weights import parameter
from scail2_rt.export.stages.layers import Linear, Norm
from scail2_rt.export.stages.spec import Specs, StageDefinition, TensorSpec
from scail2_rt.kernels.rows.ops import layer_norm


class CLIPBlock(nn.Module):
    """One pre-norm block; x [tokens, C] fp32 → the same shape and type."""

    def __init__(self, config: CLIPConfig, numerics: Numerics) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        self.norm1 = Norm(config.dim, bias=True)
        self.qkv = Linear(config.dim, 3 * config.dim, numerics)
        self.proj = Linear(config.dim, config.dim, numerics)
        self.norm2 = Norm(config.dim, bias=True)
        self.up = Linear(config.dim, config.mlp_dim, numerics)
        self.down = Linear(config.mlp_dim, config.dim, numerics)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(layer_norm(x, self.eps, self.norm1.weight, self.norm1.bias))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for t in qkv.chunk(3, dim=-1))
        attention = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        x = x + self.proj(attention).float()
        h = self.up(layer_norm(x, self.eps, self.norm2.weight, self.norm2.bias))
        return x + self.down(F.gelu(h.float())).float()


class CLIPFeatures(nn.Module):
    """Maps pixels [1, 3, S, S] in the compute type → features [tokens, C] fp32, class token first."""

    def __init__(self, config: CLIPConfig, numerics: Numerics) -> None:
        super().__init__()
        self.patch, self.eps = config.patch, config.eps
        self.patch_embedding = Linear(3 * config.patch**2, config.dim, numerics, bias=False)
        self.cls_embedding = parameter(1, config.dim)
        self.pos_embedding = parameter(config.tokens, config.dim)
        self.pre_norm = Norm(config.dim, bias=True)
        self.blocks = nn.ModuleList(CLIPBlock(config, numerics) for _ in range(config.layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        side = pixels.shape[-1] // self.patch
        patches = pixels[0].reshape(3, side, self.patch, side, self.patch).permute(1, 3, 0, 2, 4)
        patches = patches.reshape(side * side, 3 * self.patch**2)  # the order of the convolution's weight
        x = torch.cat([self.cls_embedding, self.patch_embedding(patches).float()]) + self.pos_embedding
        x = layer_norm(x, self.eps, self.pre_norm.weight, self.pre_norm.bias)
        for block in self.blocks:
            x = block(x)
        return x


def _io(numerics: Numerics, config: CLIPConfig) -> Specs:
    size = config.image_size
    pixels = TensorSpec("pixels", numerics.compute, (1, 3, size, size))
    return (pixels,), (TensorSpec("features", torch.float32, (config.tokens, config.dim)),)


def _weights(config: CLIPConfig) -> dict[str, tuple[str, ...]]:
    weights: dict[str, tuple[str, ...]] = {
        name: (f"visual.{name}",)
        for name in (
            "patch_embedding.weight",
            "cls_embedding",
            "pos_embedding",
            "pre_norm.weight",
            "pre_norm.bias",
        )
    }
    names = {
        "norm1": "norm1",
        "qkv": "attn.to_qkv",
        "proj": "attn.proj",
        "norm2": "norm2",
        "up": "mlp.0",
        "down": "mlp.2",
    }
    for index in range(config.layers - 1):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                weights[f"blocks.{index}.{ours}.{kind}"] = (f"visual.transformer.{index}.{theirs}.{kind}",)
    return weights


def definitions(config: CLIPConfig) -> list[StageDefinition]:
    """Return the CLIP tower's only stage."""
    return [
        StageDefinition(
            name="clip",
            build=partial(CLIPFeatures, config),
            io=partial(_io, config=config),
            weights=_weights(config),
            family="clip",
        )
    ]
