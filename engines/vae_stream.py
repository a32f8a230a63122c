"""The VAE as a stream: one latent frame per call, with a causal past that does not grow with the length of the clip.

The first call of a clip takes (decoder: returns) one pixel frame, every later one four. `StagedVAEStream` runs engine
stages and passes their caches from call to call; an executor may provide another implementation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scail2_rt.engines.backend import Executor


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count` of a frame, from top to bottom, in rows of latent cells."""

    index: int
    count: int

    def rows(self, height: int) -> tuple[int, int]:
        """Return (first row, last row + 1) for a latent of this height; the last parts may be smaller, or empty."""
        each = self.largest(height)
        return min(self.index * each, height), min((self.index + 1) * each, height)

    def largest(self, height: int) -> int:
        """Return the rows of the first part, which is the largest."""
        return -(-height // self.count)


class VAEStream(Protocol):
    """One half of the VAE at a position in a clip."""

    def reset(self) -> None:
        """Forget the clip; the next call begins a new one."""

    def step(self, x: Tensor) -> Tensor:
        """Encode [3, 1 or 4, H, W] in -1..1, on any device → normalised latent [16, 1, h, w], or decode in the opposite
        direction, unclamped. fp32 on the executor's device."""
        ...

    def close(self) -> None:
        """Free the memory of the causal past."""


class StagedVAEStream:
    """Runs `<stage>_first` once after `reset()`, then `<stage>_step` with the caches of the previous call."""

    def __init__(self, executor: "Executor", stage: str) -> None:
        self.executor, self.stage = executor, stage
        self.caches: tuple[Tensor, ...] | None = None

    def reset(self) -> None:
        self.caches = None

    def step(self, x: Tensor) -> Tensor:
        name = f"{self.stage}_{'first' if self.caches is None else 'step'}"
        dtype = self.executor.numerics(name).compute if "encode" in name else torch.float32
        x = x.to(self.executor.device)[None].to(dtype)
        result, *caches = self.executor.run(name, x, *(self.caches or ()))
        self.caches = tuple(caches)
        return result[0].float()

    def close(self) -> None:
        self.caches = None
