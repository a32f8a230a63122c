"""The SCAIL-2 transformer in plain PyTorch, with the tensor names of the Wan-branch checkpoint.

The reference for every stage, executor and kernel: one sequence, no chunks, no constants moved out of the loop, all
arithmetic in the type of its weights. Every tensor may have leading batch dimensions.
Source: SCAIL-2 `wan/modules/model_scail2.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.rope import Rope, rope_table, rotate


@dataclass(frozen=True, slots=True)
class DiTInputs:
    """Inputs of one forward pass, besides the timestep.

    latent [16, F, h, w]; history_mask [4, F, h, w] or None for zeros; driving [16, F, h/2, w/2];
    reference [16, 1, h, w]; reference_mask [28, 1+F, h, w] (the pipeline passes zeros after the first frame);
    driving_mask [28, F, h/2, w/2]; additional_refs [16, N, h, w] and additional_masks [28, N, h, w] or None;
    text [n ≤ 512, text_dim]; clip [257, clip_dim]; replace: replacement mode."""

    latent: Tensor
    driving: Tensor
    reference: Tensor
    reference_mask: Tensor
    driving_mask: Tensor
    text: Tensor
    clip: Tensor
    history_mask: Tensor | None = None
    additional_refs: Tensor | None = None
    additional_masks: Tensor | None = None
    replace: bool = False


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Compute [cos | sin] of t·10000^(-i/half) in fp64. timesteps [N] → fp32 [N, width]."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angle = timesteps.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute attention of q [L, C] over k and v [M, C] → [L, C]."""
    q, k, v = (t.to(v.dtype).unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


class SelfAttention(nn.Module):
    """Self-attention with RMS-normed and rotated q and k: x [L, C] → [L, C]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k = (
            rotate(norm(linear(x)).unflatten(-1, (self.heads, -1)), rope).flatten(-2)
            for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k))
        )
        return self.o(attention(q, k, self.v(x), self.heads))


class CrossAttention(nn.Module):
    """Attention over text [512, C] and image [257, C], outputs added: x [L, C] → [L, C]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o, self.k_img, self.v_img = (nn.Linear(config.dim, config.dim) for _ in range(6))
        self.norm_q, self.norm_k, self.norm_k_img = (RMSNorm(config.dim, config.eps) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        q = self.norm_q(self.q(x))
        from_text = attention(q, self.norm_k(self.k(text)), self.v(text), self.heads)
        from_image = attention(q, self.norm_k_img(self.k_img(image)), self.v_img(image), self.heads)
        return self.o(from_text + from_image)


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, image: Tensor, rope: Rope) -> Tensor:
        """Run the block: x [L, C], time [6, C], text [512, C], image [257, C] → [L, C]."""
        m = (self.modulation[0] + time).unsqueeze(-2).unbind(-3)
        x = x + m[2] * self.self_attn(self.norm1(x) * (1 + m[1]) + m[0], rope)
        x = x + self.cross_attn(self.norm3(x), text, image)
        return x + m[5] * self.ffn(self.norm2(x) * (1 + m[4]) + m[3])


class Head(nn.Module):
    """Modulated norm and projection of tokens to velocity patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * 4)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Project x [L, C] with modulation input e [C] → [L, 4·out_channels]."""
        m = (self.modulation[0] + e.unsqueeze(-2)).unsqueeze(-2).unbind(-3)
        return self.head(self.norm(x) * (1 + m[1]) + m[0])


class ImageEmbedding(nn.Module):
    """Maps CLIP features [257, clip_dim] → [257, C]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(config.clip_dim),
            nn.Linear(config.clip_dim, config.clip_dim),
            nn.GELU(),
            nn.Linear(config.clip_dim, config.dim),
            nn.LayerNorm(config.dim),
        )

    def forward(self, clip: Tensor) -> Tensor:
        return self.proj(clip)


class DiT(nn.Module):
    """The complete transformer: velocity = DiT(config)(inputs, t)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        c = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, c, (1, 2, 2), (1, 2, 2))
        self.patch_embedding_pose = nn.Conv3d(config.in_channels, c, (1, 2, 2), (1, 2, 2))
        self.patch_embedding_mask = nn.Conv3d(config.mask_channels, c, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, c), nn.GELU(approximate="tanh"), nn.Linear(c, c))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, c), nn.SiLU(), nn.Linear(c, c))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))
        self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    def tokens(self, inputs: DiTInputs) -> Tensor:
        """Return the patch embeddings in sequence order: [L, C]."""

        def with_channels(latent: Tensor, value: Tensor | float) -> Tensor:
            *batch, _, frames, height, width = latent.shape
            extra = latent.new_zeros(*batch, self.config.history_channels, frames, height, width) + value
            return torch.cat([latent, extra], dim=-4)

        history = 0.0 if inputs.history_mask is None else inputs.history_mask
        parts = []
        if inputs.additional_refs is not None and inputs.additional_masks is not None:
            parts.append(
                self.patch_embedding(with_channels(inputs.additional_refs, 1.0))
                + self.patch_embedding_mask(inputs.additional_masks)
            )
        video = torch.cat([with_channels(inputs.reference, 1.0), with_channels(inputs.latent, history)], dim=-3)
        parts.append(self.patch_embedding(video) + self.patch_embedding_mask(inputs.reference_mask))
        parts.append(
            self.patch_embedding_pose(with_channels(inputs.driving, 1.0))
            + self.patch_embedding_mask(inputs.driving_mask)
        )
        return torch.cat([part.flatten(-3).transpose(-1, -2) for part in parts], dim=-2)

    def rope(self, inputs: DiTInputs) -> Rope:
        """Return the rotary table of the inputs' layout, on their device."""
        frames, height, width = inputs.latent.shape[-3:]
        additional = 0 if inputs.additional_refs is None else inputs.additional_refs.shape[-3]
        table = rope_table(frames, height // 2, width // 2, self.config.head_dim, additional, inputs.replace)
        return table.to(inputs.latent.device)

    def forward(self, inputs: DiTInputs, t: float | Tensor) -> Tensor:
        """Predict the velocity [16, F, h, w] at scheduler timestep t (0…1000; for a batch, a tensor of its
        dimensions)."""
        *batch, _, frames, height, width = inputs.latent.shape
        additional = 0 if inputs.additional_refs is None else inputs.additional_refs.shape[-3]
        rope = self.rope(inputs)
        times = sinusoid(torch.as_tensor(t, dtype=torch.float64).reshape(-1), self.config.freq_dim)
        e = self.time_embedding(times.to(inputs.latent.device)).reshape(*batch, -1)
        time = self.time_projection(e).unflatten(-1, (6, -1))
        text = self.text_embedding(F.pad(inputs.text, (0, 0, 0, self.config.text_len - inputs.text.shape[-2])))
        image = self.img_emb(inputs.clip)
        x = self.tokens(inputs)
        for block in self.blocks:
            x = block(x, time, text, image, rope)
        start = (additional + 1) * (height // 2) * (width // 2)
        video = self.head(x.narrow(-2, start, frames * (height // 2) * (width // 2)), e)
        return unpatchify(video, frames, height, width)


def patchify(latent: Tensor) -> Tensor:
    """Reorder [C, F, h, w] → [F·h/2·w/2, C·4], each row in the order of the patch convolution's weight (C, 1, 2, 2)."""
    channels, frames, height, width = latent.shape
    patches = latent.view(channels, frames, height // 2, 2, width // 2, 2).permute(1, 2, 4, 0, 3, 5)
    return patches.reshape(-1, channels * 4)


def unpatchify(rows: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Reorder head rows [F·h/2·w/2, 2·2·16], channel last, → [16, F, h, w]."""
    patches = rows.unflatten(-2, (frames, height // 2, width // 2)).unflatten(-1, (2, 2, -1))
    return torch.einsum("...fhwabc->...cfhawb", patches).flatten(-4, -3).flatten(-2)
