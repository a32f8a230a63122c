"""A clip through the VAE, one latent frame per call (`engines.vae_stream`): memory does not grow with its length.

The first latent frame holds one pixel frame, every later one holds four.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet


def frame_groups(frames: int) -> Iterator[slice]:
    """Yield the pixel frames of each latent frame: 1, 4, 4, …; up to three trailing frames belong to none."""
    yield slice(0, 1)
    for start in range(1, frames - 3, 4):
        yield slice(start, start + 4)


def encode(engines: EngineSet, groups: Iterable[Tensor]) -> Tensor:
    """Encode frame groups [3, 1 or 4, H, W] of one clip → normalised latent fp32 [16, F, h, w]."""
    stream = engines.vae_stream("vae.encode")
    try:
        return torch.cat([stream.step(group) for group in groups], dim=1)
    finally:
        stream.close()


def encode_clip(engines: EngineSet, video: Tensor) -> Tensor:
    """Encode a clip that is completely in memory, [3, T, H, W] in -1..1 → [16, F, h, w]."""
    return encode(engines, (video[:, group] for group in frame_groups(video.shape[1])))


def decode(engines: EngineSet, latent: Tensor) -> Generator[Tensor, None, None]:
    """Decode a normalised latent [16, F, h, w] → pixels [3, 1, H, W], then [3, 4, H, W] each, clamped to -1..1."""
    with closing(decode_unclamped(engines, latent)) as groups:
        for pixels in groups:
            yield pixels.clamp(-1, 1)


def decode_unclamped(engines: EngineSet, latent: Tensor) -> Generator[Tensor, None, None]:
    """Decode like `decode`, without clamping, so that infinite values remain visible."""
    stream = engines.vae_stream("vae.decode")
    try:
        for frame in latent.split(1, dim=1):
            yield stream.step(frame)
    finally:
        stream.close()
