"""Segment joins: the frames that a segment takes over from the previous one, and how the overlap is shown.

Every later segment starts from the last O frames of the previous one ("history"), rounded to bf16 and encoded as a
separate clip. The overlap is decoded twice, once from each segment. Without a fade the earlier version is shown. With a
fade, its last frames change linearly into the later version; they are held back until the later segment is decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.pipeline.vae import encode_clip


@dataclass(frozen=True, slots=True)
class Carry:
    """The state that a segment passes to the next one. finished: completed segments; history: its last O frames as
    shown, fp32 [3, O, H, W] in -1..1, None if no segment follows; anchor: the state of the colour anchor."""

    finished: int = 0
    history: Tensor | None = None
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Carry":
        history = None if self.history is None else self.history.to(device)
        return Carry(self.finished, history, {name: value.to(device) for name, value in self.anchor.items()})


def encode_history(engines: EngineSet, history: Tensor) -> tuple[Tensor, Tensor]:
    """Encode the history → the encoded frames [3, O, H, W], and their latents [16, (O-1)/4+1, h, w]."""
    pixels = history.to(torch.bfloat16).float()
    return pixels, encode_clip(engines, pixels)


def cross_fade(shown: Tensor, start: int, history: Tensor | None, overlap: int, blend: int) -> Tensor:
    """Fade in the overlap's last `blend` frames in frames [3, n, H, W], which begin at number `start` of a segment.

    At the i-th faded frame (from 1), the segment's own version has the weight i / (blend + 1)."""
    first, last = max(overlap - blend - start, 0), min(overlap - start, shown.shape[1])
    if history is None or first >= last:
        return shown
    before = history.to(shown.device)
    before = before[:, before.shape[1] - overlap + start :][:, first:last]
    steps = torch.arange(start + first, start + last, device=shown.device) - (overlap - blend) + 1
    weight = (steps / (blend + 1)).view(1, -1, 1, 1)
    faded = before + weight * (shown[:, first:last] - before)
    return torch.cat([shown[:, :first], faded, shown[:, last:]], dim=1)
