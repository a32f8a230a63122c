"""The VAE as two streams over engine stages: one latent frame a call.

The first call of a clip takes (gives) one pixel frame, every later one four. The causal caches travel from call to call
inside the stream; memory does not grow with the length of the clip.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet


class VAEStream:
    """`step()` runs `<stage>_first` once after `reset()`, then `<stage>_step` with the caches of the call before.

    The torch executor on a GPU has a form of its own, whose caches are rings that stay in place."""

    def __init__(self, engines: EngineSet, stage: str) -> None:
        self.engines, self.stage = engines, stage
        self.caches: tuple[Tensor, ...] | None = None
        self.rings = engines.vae_rings(stage)
        self.reset()

    def reset(self) -> None:
        self.caches = None
        if self.rings is not None:
            self.rings.reset()

    def close(self) -> None:
        """Give back the memory of the caches."""
        self.caches = None
        if self.rings is not None:
            self.rings.free()
            torch.cuda.empty_cache()

    def step(self, x: Tensor) -> Tensor:
        """Encoder: [3, 1 or 4, H, W] in -1..1 → normalised latent [16, 1, h, w]; decoder: the way back, unclamped."""
        x = x.to(self.engines.device)
        if self.rings is not None:
            return self.rings.step(x)
        name = f"{self.stage}_{'first' if self.caches is None else 'step'}"
        x = x[None].to(self.engines.compute_dtype(name) if "encode" in name else torch.float32)
        result, *caches = self.engines.run(name, x, *(self.caches or ()))
        self.caches = tuple(caches)
        return result[0].float()


def frame_groups(frames: int) -> Iterator[slice]:
    """The pixel frames of each latent frame: 1, 4, 4, …; up to three trailing frames belong to none."""
    yield slice(0, 1)
    for start in range(1, frames - 3, 4):
        yield slice(start, start + 4)


def encode(engines: EngineSet, groups: Iterable[Tensor]) -> Tensor:
    """Frame groups [3, 1 or 4, H, W] of one clip → normalised latent fp32 [16, F, h, w]."""
    stream = VAEStream(engines, "vae.encode")
    try:
        return torch.cat([stream.step(group) for group in groups], dim=1)
    finally:
        stream.close()


def encode_clip(engines: EngineSet, video: Tensor) -> Tensor:
    """A clip held whole, [3, T, H, W] in -1..1 → [16, F, h, w]."""
    return encode(engines, (video[:, group] for group in frame_groups(video.shape[1])))


def decode(engines: EngineSet, latent: Tensor) -> Iterator[Tensor]:
    """Normalised latent [16, F, h, w] → pixel frames [3, 1, H, W], then [3, 4, H, W] each, clamped to -1..1."""
    stream = VAEStream(engines, "vae.decode")
    try:
        for frame in latent.split(1, dim=1):
            yield stream.step(frame).clamp(-1, 1)
    finally:
        stream.close()
