"""How segments meet: what a segment takes over from the one before, and how the overlap is shown.

Every later segment starts from the last O frames of the one before ("history"). `official` encodes those pixel frames,
rounded to bf16, as a clip of their own. `latents` spares the round trip: after a segment of 4n+1 frames the last 4k of
them are exactly its last k latents, which are taken over; only the first history latent, which stands for one frame
where the latent at that place stands for four, is made anew from that frame.

The overlap exists twice, decoded from either segment. Without a fade the earlier version is shown; with one, its last
frames pass linearly into the later version, for which they are held back until the later segment is decoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import latent_frames
from scail2_rt.runtime.core.request import ANCHORS, HISTORIES
from scail2_rt.runtime.pipeline.vae import encode_clip


@dataclass(frozen=True, slots=True)
class Joins:
    """history: `official` or `latents`; blend: how many of the overlap's last frames fade from segment to segment;
    anchor_color: `off`, `first` or `previous` (`runtime.pipeline.anchor`)."""

    history: str = "official"
    blend: int = 0
    anchor_color: str = "off"

    def __post_init__(self) -> None:
        for value, offered in ((self.history, HISTORIES), (self.anchor_color, ANCHORS)):
            if value not in offered:
                raise InputError(f"{value!r} is not offered: use one of {', '.join(offered)}.")
        if self.blend < 0:
            raise InputError(f"The number of blended frames must be 0 or more, not {self.blend}.")


OFFICIAL = Joins()


@dataclass(frozen=True, slots=True)
class History:
    """The end of a segment. shown: its last O frames as they are seen, fp32 [3, O, H, W] in -1..1; decoded: the same
    before colours were corrected; latent: the last (O-1)/4 latents [16, (O-1)/4, h, w], or None where they are not
    known."""

    shown: Tensor
    decoded: Tensor
    latent: Tensor | None = None

    @classmethod
    def of(cls, pixels: Tensor) -> "History":
        """Frames that nothing was done to."""
        return cls(pixels, pixels)

    def after(self, shown: Tensor, decoded: Tensor, overlap: int) -> "History":
        """The last `overlap` frames when these have followed."""
        seen = torch.cat([self.shown, shown], dim=1)[:, -overlap:]
        if self.shown is self.decoded and shown is decoded:
            return History.of(seen)
        return History(seen, torch.cat([self.decoded, decoded], dim=1)[:, -overlap:])

    def to(self, device: torch.device | str) -> "History":
        if self.decoded is self.shown:
            return replace(History.of(self.shown.to(device)), latent=_moved(self.latent, device))
        return History(self.shown.to(device), self.decoded.to(device), _moved(self.latent, device))


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True, slots=True)
class Carry:
    """All that a segment leaves to the next. finished: segments done so far; history: None when nothing is to follow;
    anchor: the state of the colour anchor."""

    finished: int = 0
    history: History | None = None
    anchor: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Carry":
        history = None if self.history is None else self.history.to(device)
        return Carry(self.finished, history, {name: value.to(device) for name, value in self.anchor.items()})


def encode_history(engines: EngineSet, kind: str, history: History) -> tuple[Tensor, Tensor]:
    """→ the frames that were encoded [3, n, H, W], and the history's latents [16, (O-1)/4+1, h, w]."""
    pixels = history.shown if kind == "official" else history.decoded[:, :1]
    pixels = pixels.to(torch.bfloat16).float()
    clean = encode_clip(engines, pixels)
    if kind == "official":
        return pixels, clean
    wanted = latent_frames(history.decoded.shape[1]) - 1
    if history.latent is None or history.latent.shape[1] != wanted:
        raise ValueError(f"history latents need the last {wanted} latents of the segment before")
    return pixels, torch.cat([clean, history.latent.to(clean.device)], dim=1)


def cross_fade(shown: Tensor, start: int, history: History | None, overlap: int, blend: int) -> Tensor:
    """Frames [3, n, H, W] from number `start` of a segment on, of which the overlap's last `blend` are faded in: at the
    i-th of them (from 1) the segment's own picture has the weight i / (blend + 1)."""
    first, last = max(overlap - blend - start, 0), min(overlap - start, shown.shape[1])
    if history is None or first >= last:
        return shown
    before = history.shown.to(shown.device)
    before = before[:, before.shape[1] - overlap + start :][:, first:last]
    steps = torch.arange(start + first, start + last, device=shown.device) - (overlap - blend) + 1
    weight = (steps / (blend + 1)).view(1, -1, 1, 1)
    faded = before + weight * (shown[:, first:last] - before)
    return torch.cat([shown[:, :first], faded, shown[:, last:]], dim=1)
