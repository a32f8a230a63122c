"""The umT5 encoder in plain PyTorch, with the tensor names of the Wan 2.1 checkpoint.

The reference of the text stages: complete padded batches, all arithmetic in the type of its weights. Every layer has a
relative-position table, attention without scaling, a tanh-gated feed-forward, and no biases.
Source: Wan2.1 `wan/modules/t5.py`.
"""

import math

import torch
from torch import Tensor, nn

from scail2_rt.export.models.config import UMT5Config


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each key position relative to each query position: int64 [length, length], row = query.

    Half of the buckets are for keys after the query. In each half, the nearer half of the buckets holds one distance
    per bucket, and the others grow logarithmically up to `max_distance`. All farther keys share the last bucket (T5
    paper, section 2.1)."""
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    distance = relative.abs()
    half = num_buckets // 2
    exact = half // 2
    growth = (distance.clamp_min(1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0).long()


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension; the mean in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(x.dtype)


class Attention(nn.Module):
    """Self-attention without scaling, with a position bias."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(config.dim, config.attn_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(config.attn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, position_bias: Tensor, mask: Tensor) -> Tensor:
        """Compute attention: x [B, n, C], position_bias [heads, n, n], mask [B, n] (0 = padding) → [B, n, C]."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        logits = q @ k.transpose(2, 3) + position_bias
        logits = logits.masked_fill(mask[:, None, None] == 0, torch.finfo(logits.dtype).min)
        weights = logits.float().softmax(-1).to(logits.dtype)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Feed-forward with a tanh-GELU gate: x [B, n, C] → the same shape."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.gate = nn.Sequential(gate, nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class PositionBias(nn.Module):
    """The relative-position table: a bias per bucket and head."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.buckets, config.heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """Look up the bias: int64 [n, n] → [heads, n, n]."""
        return self.embedding(buckets).permute(2, 0, 1)


class Block(nn.Module):
    """One layer: x [B, n, C], buckets int64 [n, n], mask [B, n] → [B, n, C]."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = PositionBias(config)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), mask)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """The complete encoder: token ids → hidden states."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids int64 [B, n], mask [B, n] (1 token, 0 padding) → last hidden state [B, n, C], zero at padding."""
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance).to(ids.device)
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, mask)
        return self.norm(x) * mask[..., None].to(x.dtype)
