"""The rotary table: for every token, D/2 complex multipliers that rotate its q and k heads.

Built once per layout in fp64 and stored as fp32 cosines and sines. The pairs of a head (channels 2i, 2i+1) are divided
among the axes t, y, x. Driving tokens have half the resolution: each uses the mean of the multipliers of the 2×2
full-resolution cells it covers, so their modulus is below one. Source: SCAIL-2 `wan/modules/model_scail2.py`
(rope_params, rope_apply).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

REPLACE_OFFSET = 120  # in replacement, references are shifted down by this many rows
DRIVING_OFFSET = 120  # driving tokens are shifted right by this many columns
THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """cos, sin: fp32 [L, D/2]."""

    cos: Tensor
    sin: Tensor

    @property
    def head_dim(self) -> int:
        return 2 * self.cos.shape[1]

    def to(self, device: torch.device | str) -> "Rope":
        return Rope(self.cos.to(device), self.sin.to(device))


def _multipliers(t: Tensor, y: Tensor, x: Tensor, head_dim: int) -> Tensor:
    """Positions [T], [H], [W] → complex128 [T, H, W, D/2]."""
    pairs = head_dim // 2
    third = pairs // 3
    axes = []
    for axis, (position, n) in enumerate(((t, pairs - 2 * third), (y, third), (x, third))):
        angle = position.double()[:, None] * THETA ** (-torch.arange(n, dtype=torch.float64) / n)
        shape = [1, 1, 1, n]
        shape[axis] = len(position)
        axes.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(len(t), len(y), len(x), n))
    return torch.cat(axes, dim=-1)


def multipliers(
    frames: int, height: int, width: int, head_dim: int, additional_refs: int = 0, replace: bool = False
) -> Tensor:
    """Return complex128 [L, D/2] in sequence order: additional references | reference | video | driving.

    frames, height, width: the video's token grid (latent frames, H/16, W/16); height and width even."""
    y, x = torch.arange(height), torch.arange(width)
    first = additional_refs + (0 if replace else 1)
    video_t = torch.arange(first, first + frames)
    references = _multipliers(torch.arange(additional_refs + 1), y + REPLACE_OFFSET * replace, x, head_dim)
    video = _multipliers(video_t, y, x, head_dim)
    full = _multipliers(video_t, y, x + DRIVING_OFFSET, head_dim)
    driving = full.view(frames, height // 2, 2, width // 2, 2, -1).mean(dim=(2, 4))
    return torch.cat([part.reshape(-1, head_dim // 2) for part in (references, video, driving)])


def rope_table(
    frames: int, height: int, width: int, head_dim: int, additional_refs: int = 0, replace: bool = False
) -> Rope:
    """Return `multipliers` as fp32 cosines and sines."""
    table = multipliers(frames, height, width, head_dim, additional_refs, replace)
    return Rope(table.real.float().contiguous(), table.imag.float().contiguous())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each neighbouring channel pair by its token's multiplier, in fp32. x [L, H, D] → fp32 [L, H, D]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
