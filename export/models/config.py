"""Sizes of the four networks. Every field is derived from the shapes of a checkpoint's tensors, except the head widths
of the transformer and of CLIP, which a file's metadata or a `config.json` beside it may give."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """The SCAIL-2 transformer. 14B: dim 5120, heads 40, layers 40, ffn_dim 13824."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    freq_dim: int = 256
    text_dim: int = 4096
    clip_dim: int = 1280
    latent_channels: int = 16
    history_channels: int = 4
    mask_channels: int = 28
    out_channels: int = 16
    text_len: int = 512
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def in_channels(self) -> int:
        return self.latent_channels + self.history_channels


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """The Wan 2.1 causal VAE. Official size: dim 96."""

    dim: int
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True, slots=True)
class UMT5Config:
    """The umT5 encoder. XXL: vocab 256384, dim 4096, heads 64, ffn_dim 10240, layers 24."""

    vocab: int
    dim: int
    attn_dim: int
    ffn_dim: int
    heads: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class CLIPConfig:
    """The CLIP visual tower. ViT-H/14: image 224, patch 14, dim 1280, heads 16, 32 layers in the file, 31 used."""

    image_size: int
    patch: int
    dim: int
    heads: int
    layers: int
    mlp_dim: int
    eps: float = 1e-5

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The networks of one checkpoint; None for an absent component (test fixtures hold single networks)."""

    dit: DiTConfig | None = None
    vae: VAEConfig | None = None
    umt5: UMT5Config | None = None
    clip: CLIPConfig | None = None
