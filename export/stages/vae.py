"""The VAE as four engine stages: first frame and later frames, of encoder and decoder.

A stage processes one chunk, with its causal caches as inputs and outputs, so an executor keeps no state: `*_first` has
no cache inputs and returns the caches that `*_step` takes and returns. Layers and parameter names are those of
`export.models.vae`; a stage's weights are its half of the checkpoint. Sizes are symbols in latent cells: a video has
8·h by 8·w pixels. The specs of the caches are derived from the layers; running the network on the meta device would
take seconds.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from scail2_rt.export.models.config import VAEConfig
from scail2_rt.export.models.precision import FP32, Numerics
from scail2_rt.export.models.vae import (
    FRAMES_PER_LATENT,
    PIXELS_PER_CELL,
    VAE,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    Upsample,
    channel_mixing,
    check_config,
    decode_chunk,
    drop_time_convs,
    encode_chunk,
)
from scail2_rt.export.stages.spec import Dim, Specs, StageDefinition, TensorSpec


class EncoderHalf(nn.Module):
    """The encoder and the convolution after it."""

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
    """Maps video [1, 3, 1, 8h, 8w] → latent [1, 16, 1, h, w] fp32, caches."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        drop_time_convs(self.encoder.downsamples)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        latent, caches = encode_chunk(self.encoder, self.conv1, video, None)
        return latent, *caches


class EncodeStep(EncoderHalf):
    """Maps video [1, 3, 4, 8h, 8w], caches → latent [1, 16, 1, h, w] fp32, caches."""

    def forward(self, video: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        latent, new = encode_chunk(self.encoder, self.conv1, video, caches)
        return latent, *new


class DecodeFirst(DecoderHalf):
    """Maps latent [1, 16, 1, h, w] fp32 → video [1, 3, 1, 8h, 8w] fp32, caches."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        drop_time_convs(self.decoder.upsamples)

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        video, caches = decode_chunk(self.decoder, self.conv2, latent, None)
        return video, *caches


class DecodeStep(DecoderHalf):
    """Maps latent [1, 16, 1, h, w] fp32, caches → video [1, 3, 4, 8h, 8w] fp32, caches."""

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        video, new = decode_chunk(self.decoder, self.conv2, latent, caches)
        return video, *new


def _multiple(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"


@cache
def _cache_dims(config: VAEConfig) -> dict[str, tuple[tuple[Dim, ...], ...]]:
    """Return the dimensions of every cache: "encode" and "decode" → one tuple per cache, in layer order."""
    with torch.device("meta"):
        vae = VAE(config)
    halves = {
        "encode": [(3, 2, PIXELS_PER_CELL), *_layer_caches(vae.encoder.downsamples, PIXELS_PER_CELL)],
        "decode": [(config.z_dim, 2, 1)],
    }
    halves["encode"] += [*_layer_caches(vae.encoder.middle, 1), (_in_channels(vae.encoder.head["2"]), 2, 1)]
    halves["decode"] += [*_layer_caches(vae.decoder.middle, 1), *_layer_caches(vae.decoder.upsamples, 1)]
    halves["decode"] += [(_in_channels(vae.decoder.head["2"]), 2, PIXELS_PER_CELL)]
    return {
        half: tuple(
            (1, channels, frames, _multiple(scale, "h"), _multiple(scale, "w")) for channels, frames, scale in caches
        )
        for half, caches in halves.items()
    }


def _in_channels(conv: Any) -> int:
    return conv.weight.shape[1]


def _layer_caches(layers: nn.ModuleList, scale: int) -> Iterator[tuple[int, int, int]]:
    """Yield (channels, frames, cells per latent cell) of the caches of these layers, which start at `scale`."""
    for layer in layers:
        if isinstance(layer, ResidualBlock):
            for conv in ("2", "6"):
                yield _in_channels(layer.residual[conv]), 2, scale
        elif isinstance(layer, Downsample):
            scale //= 2
            if layer.time_conv is not None:
                yield _in_channels(layer.time_conv), 1, scale
        elif isinstance(layer, Upsample):
            if layer.time_conv is not None:
                yield _in_channels(layer.time_conv), 2, scale
            scale *= 2


def _io(numerics: Numerics, config: VAEConfig, half: str, first: bool) -> Specs:
    """Return a stage's specs. `half` is "encode" or "decode". Caches and input pixels are in the compute type."""
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
    """Return the four stages. Raises InputError if the configuration is not that of a Wan 2.1 VAE."""
    check_config(config)
    return [
        _stage("vae.encode_first", EncodeFirst, config, "encode", True),
        _stage("vae.encode_step", EncodeStep, config, "encode", False),
        _stage("vae.decode_first", DecodeFirst, config, "decode", True),
        _stage("vae.decode_step", DecodeStep, config, "decode", False),
    ]
