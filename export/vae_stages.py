"""The VAE as four engine stages: first frame and later frames, of encoder and decoder.

A stage is one chunk with its causal caches as inputs and outputs, so an executor needs no state of its own: `*_first`
takes none and gives the caches that `*_step` takes and gives back. The layers, and so the parameter names, are those of
`export.vae`; the weights of a stage are its half of the checkpoint. Sizes are symbols in latent cells: a video is 8·h
by 8·w. The specs of the caches are read off a run on the meta device, where only shapes exist, at h = w = 1.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from scail2_rt.export.config import VAEConfig
from scail2_rt.export.precision import FP32, Numerics
from scail2_rt.export.spec import Dim, StageDefinition, TensorSpec
from scail2_rt.export.vae import (
    FRAMES_PER_LATENT,
    PIXELS_PER_CELL,
    VAE,
    Decoder,
    Encoder,
    channel_mixing,
    check_config,
    decode_chunk,
    drop_time_convs,
    encode_chunk,
)


class EncoderHalf(nn.Module):
    """The encoder and the convolution behind it."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__()
        self.encoder = Encoder(config, numerics)
        self.conv1 = channel_mixing(2 * config.z_dim, numerics)


class DecoderHalf(nn.Module):
    """The decoder and the convolution before it."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__()
        self.conv2 = channel_mixing(config.z_dim, numerics)
        self.decoder = Decoder(config, numerics)


class EncodeFirst(EncoderHalf):
    """video [1, 3, 1, 8h, 8w] → latent [1, 16, 1, h, w] fp32, caches."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        drop_time_convs(self.encoder.downsamples)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        latent, caches = encode_chunk(self.encoder, self.conv1, video, None)
        return latent, *caches


class EncodeStep(EncoderHalf):
    """video [1, 3, 4, 8h, 8w], caches → latent [1, 16, 1, h, w] fp32, caches."""

    def forward(self, video: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        latent, new = encode_chunk(self.encoder, self.conv1, video, caches)
        return latent, *new


class DecodeFirst(DecoderHalf):
    """latent [1, 16, 1, h, w] fp32 → video [1, 3, 1, 8h, 8w] fp32, caches."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        drop_time_convs(self.decoder.upsamples)

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        video, caches = decode_chunk(self.decoder, self.conv2, latent, None)
        return video, *caches


class DecodeStep(DecoderHalf):
    """latent [1, 16, 1, h, w] fp32, caches → video [1, 3, 4, 8h, 8w] fp32, caches."""

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        video, new = decode_chunk(self.decoder, self.conv2, latent, caches)
        return video, *new


def _multiple(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"


@cache
def _cache_dims(config: VAEConfig) -> dict[str, tuple[tuple[Dim, ...], ...]]:
    """Dimensions of every cache: "encode" and "decode" → one tuple each, in layer order."""
    with torch.device("meta"):
        vae = VAE(config)
        _, encode = vae.encode_first(torch.empty(1, 3, 1, PIXELS_PER_CELL, PIXELS_PER_CELL))
        _, decode = vae.decode_first(torch.empty(1, config.z_dim, 1, 1, 1))
    return {
        half: tuple((*x.shape[:3], _multiple(x.shape[3], "h"), _multiple(x.shape[4], "w")) for x in caches)
        for half, caches in (("encode", encode), ("decode", decode))
    }


def _io(
    numerics: Numerics, config: VAEConfig, half: str, first: bool
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """`half` is "encode" or "decode". Caches are in the compute type, and so are the pixels that go in."""
    frames = 1 if first else FRAMES_PER_LATENT
    pixels = numerics.compute if half == "encode" else torch.float32
    video = TensorSpec(
        "video", pixels, (1, 3, frames, _multiple(PIXELS_PER_CELL, "h"), _multiple(PIXELS_PER_CELL, "w"))
    )
    latent = TensorSpec("latent", torch.float32, (1, config.z_dim, 1, "h", "w"))
    source, result = (video, latent) if half == "encode" else (latent, video)
    dims = _cache_dims(config)[half]
    old = tuple(TensorSpec(f"cache_{i}", numerics.compute, d) for i, d in enumerate(dims))
    new = tuple(TensorSpec(f"cache_{i}_out", numerics.compute, d) for i, d in enumerate(dims))
    return ((source,) if first else (source, *old)), (result, *new)


def _stage(
    name: str, module: Callable[[VAEConfig, Numerics], nn.Module], config: VAEConfig, half: str, first: bool
) -> StageDefinition:
    with torch.device("meta"):
        names = list(module(config, FP32).state_dict())
    return StageDefinition(
        name=name,
        build=partial(module, config),
        io=partial(_io, config=config, half=half, first=first),
        weights={name: (name,) for name in names},
        family=name,
    )


def definitions(config: VAEConfig) -> list[StageDefinition]:
    """The four stages. InputError when the configuration is not that of a Wan 2.1 VAE."""
    check_config(config)
    return [
        _stage("vae.encode_first", EncodeFirst, config, "encode", True),
        _stage("vae.encode_step", EncodeStep, config, "encode", False),
        _stage("vae.decode_first", DecodeFirst, config, "decode", True),
        _stage("vae.decode_step", DecodeStep, config, "decode", False),
    ]
