"""Faster variants of the reference networks for training, with the same weight names and the same results.

The transformer uses few rows of text and caches its RoPE tables. The VAE processes complete clips in one pass.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.export.models import vae as layers
from scail2_rt.export.models.config import DiTConfig, VAEConfig
from scail2_rt.export.models.dit import Block, CrossAttention, DiT, DiTInputs, attention
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.models.vae import VAE, Caches, Downsample, Upsample
from scail2_rt.kernels.rope import Rope


class FoldedDiT(DiT):
    """A transformer with the same results from `text_rows` rows of text and `padding_rows` padding rows.

    All padding rows of a prompt are equal, so `padding_rows` rows represent them. The logarithm of the number of rows
    that each one represents is added to its attention scores. text of `DiTInputs`: [n ≤ text_rows, text_dim]."""

    def __init__(self, config: DiTConfig, text_rows: int, padding_rows: int) -> None:
        super().__init__(replace(config, text_len=text_rows + padding_rows))
        each = (config.text_len - text_rows) / padding_rows
        bias = F.pad(torch.full((padding_rows,), math.log(each)), (text_rows, 0))
        for block in self.blocks:
            assert isinstance(block, Block)
            block.cross_attn = FoldedCrossAttention(self.config, bias)
        self._ropes: dict[tuple[object, ...], Rope] = {}

    def rope(self, inputs: DiTInputs) -> Rope:
        """The RoPE table of a layout, cached because every step needs it and recorded CUDA graphs refer to its address.

        It is not an inference tensor, even if the first call is in inference mode, so that later calls can compute
        gradients."""
        extra = None if inputs.additional_refs is None else inputs.additional_refs.shape[-3]
        key = (inputs.latent.device, inputs.latent.shape[-3:], extra, inputs.replace)
        if key not in self._ropes:
            with torch.inference_mode(False):
                self._ropes[key] = super().rope(inputs)
        return self._ropes[key]


class FoldedCrossAttention(CrossAttention):
    """Cross-attention with `text_bias` [text_len] added to the scores of the text rows."""

    def __init__(self, config: DiTConfig, text_bias: Tensor) -> None:
        super().__init__(config)
        self.text_bias: Tensor
        self.register_buffer("text_bias", text_bias, persistent=False)

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        q = self.norm_q(self.q(x))
        from_text = biased_attention(q, self.norm_k(self.k(text)), self.v(text), self.heads, self.text_bias)
        from_image = attention(q, self.norm_k_img(self.k_img(image)), self.v_img(image), self.heads)
        return self.o(from_text + from_image)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor) -> Tensor:
    """Attention with q [L, C], k and v [M, C] and a bias [M] on the scores → [L, C]."""
    q, k, v = (t.to(v.dtype).unflatten(-1, (heads, -1)).transpose(-2, -3) for t in (q, k, v))
    mask = bias.to(q.dtype).expand(*q.shape[:-1], -1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(-2, -3).flatten(-2)


class ClipVAE(VAE):
    """A VAE that also processes complete clips in one pass. Memory grows with the length of the clip."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        for stack in (self.encoder.downsamples, self.decoder.upsamples):
            for index, layer in enumerate(stack):
                if isinstance(layer, Downsample | Upsample) and layer.time_conv is not None:
                    form = ClipDownsample if isinstance(layer, Downsample) else ClipUpsample
                    stack[index] = form(layer.time_conv.weight.shape[1], True, numerics)

    def encode_clip(self, video: Tensor) -> Tensor:
        """`encode` in one pass, for T = 4·(F-1)+1 frames: video [B, 3, T, H, W] → [B, 16, F, h, w]."""
        return self.encode_first(video)[0]

    def decode_clip(self, latent: Tensor) -> Tensor:
        """`decode` in one pass: latent [B, 16, F, h, w] → [B, 3, T, H, W]."""
        return self.decode_first(latent)[0]


class ClipDownsample(Downsample):
    """`Downsample` for a first call with several frames. A stream cannot be continued after it."""

    def in_time(self, x: Tensor, caches: Caches) -> Tensor:
        if self.time_conv is None or not caches.first or x.shape[2] == 1:
            return super().in_time(x, caches)
        later = layers.conv3d(x, *self.time_conv.weights(), stride=(2, 1, 1))
        return torch.cat([x[:, :, :1], later], dim=2)


class ClipUpsample(Upsample):
    """`Upsample` for a first call with several frames. A stream cannot be continued after it."""

    def in_time(self, x: Tensor, caches: Caches) -> Tensor:
        if self.time_conv is None or not caches.first or x.shape[2] == 1:
            return super().in_time(x, caches)
        return torch.cat([x[:, :, :1], self.doubled(x[:, :, 1:], caches, self.time_conv)], dim=2)
