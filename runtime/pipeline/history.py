"""How segments meet: what a segment takes over from the one before, and how the overlap is shown.

Every later segment starts from the last O frames of the one before ("history"), rounded to bf16 and encoded as a clip
of their own. The overlap exists twice, decoded from either segment. Without a fade the earlier version is shown; with
one, its last frames pass linearly into the later version, for which they are held back until the later segment is
decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.pipeline.vae import encode_clip


@dataclass(frozen=True, slots=True)
class Carry:
    """All that a segment leaves to the next. finished: segments done so far; history: its last O frames as they are
    seen, fp32 [3, O, H, W] in -1..1, None when nothing is to follow; anchor: the state of the colour anchor."""

    finished: int = 0
    history: Tensor | None = None
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Carry":
        history = None if self.history is None else self.history.to(device)
        return Carry(self.finished, history, {name: value.to(device) for name, value in self.anchor.items()})


def encode_history(engines: EngineSet, history: Tensor) -> tuple[Tensor, Tensor]:
    """→ the frames that were encoded [3, O, H, W], and the history's latents [16, (O-1)/4+1, h, w]."""
    pixels = history.to(torch.bfloat16).float()
    return pixels, encode_clip(engines, pixels)


def cross_fade(shown: Tensor, start: int, history: Tensor | None, overlap: int, blend: int) -> Tensor:
    """Frames [3, n, H, W] from number `start` of a segment on, of which the overlap's last `blend` are faded in: at the
    i-th of them (from 1) the segment's own picture has the weight i / (blend + 1)."""
    first, last = max(overlap - blend - start, 0), min(overlap - start, shown.shape[1])
    if history is None or first >= last:
        return shown
    before = history.to(shown.device)
    before = before[:, before.shape[1] - overlap + start :][:, first:last]
    steps = torch.arange(start + first, start + last, device=shown.device) - (overlap - blend) + 1
    weight = (steps / (blend + 1)).view(1, -1, 1, 1)
    faded = before + weight * (shown[:, first:last] - before)
    return torch.cat([shown[:, :first], faded, shown[:, last:]], dim=1)
