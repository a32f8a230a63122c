"""The CLIP visual tower in plain PyTorch, with the tensor names of the Wan 2.1 checkpoint.

The reference of the `clip` stage: class token and patches through all blocks but the last. The module omits the
checkpoint's other tensors (`unused`). Source: Wan2.1 `wan/modules/clip.py`.
"""

import torch
from torch import Tensor, nn

from scail2_rt.export.models.config import CLIPConfig


def unused(name: str, config: CLIPConfig) -> bool:
    """Return whether a checkpoint tensor is unused: the last block, everything after it, and the logit scale."""
    return name in ("log_scale", "visual.head") or name.startswith(
        ("visual.post_norm.", f"visual.transformer.{config.layers - 1}.")
    )


class Attention(nn.Module):
    """Self-attention: x [B, n, C] → the same shape."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm block: x [B, n, C] → the same shape."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """The tensors under `visual.`."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch, config.patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.tokens, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.eps)
        self.transformer = nn.ModuleList(Block(config) for _ in range(config.layers - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(pixels), -1, -1), patches], dim=1)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer:
            x = block(x)
        return x


class CLIPVisual(nn.Module):
    """Maps pixels [B, 3, S, S], normalised by CLIP's mean and std → features [B, tokens, C], class token first."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.visual = Tower(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)
