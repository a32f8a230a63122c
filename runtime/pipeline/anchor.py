"""Colour anchor: keep the colours of later segments close to an earlier one by matching the background.

Mean and deviation of each LAB channel over the background are matched by an affine map, which is applied to the
complete frame. Background is every pixel that the driving mask assigns to no character, without a margin around the
characters. The target depends on the mode. `animate` shows the reference's background, which does not move: the anchor
segment leaves first and second moments of every pixel, and a later frame is compared with the moments of the same
pixels that it shows, so a character that moves across the frame does not count as a change of colour. `replace` shows
the driving clip's scene, which may change: a frame's statistics are compared with those of its driving frame, and
later segments keep the relation between the two that the anchor segment had.

The map is computed per group of decoded frames, with a linear transition from one group to the next, not per segment:
the drift grows within a segment, and a single map would cause a visible step at its start.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.runtime.masks.palette import ON_ABOVE
from scail2_rt.runtime.media.colour import lab_to_rgb, rgb_to_lab
from scail2_rt.runtime.pipeline.driving import DrivingClip
from scail2_rt.runtime.pipeline.preprocess import normalise_video

_FLAT = 1.0  # LAB units added to both deviations: the deviation of a flat background carries no information
_LARGEST_SHIFT, _LARGEST_GAIN = 12.0, 1.25  # beyond these the content differs; it is not drift
_SMALLEST_REGION = 0.02  # fraction of a group's pixels that must be background
_MARGIN = 32  # margin around the characters: a 32nd of the shorter side
_DARK = 64  # 8-bit: a mask pixel above it in any channel is not black background


def background(mask: Tensor) -> Tensor:
    """Return the background of a driving mask: uint8 [n, 3, H, W] → bool [n, H, W], not near a character."""
    character = (mask > _DARK).any(1) & ~(mask > ON_ABOVE).all(1)
    margin = max(min(mask.shape[-2:]) // _MARGIN, 1)
    size = 2 * margin + 1
    near = F.max_pool2d(character[:, None].float(), (size, 1), stride=1, padding=(margin, 0))
    return F.max_pool2d(near, (1, size), stride=1, padding=(0, margin))[:, 0] == 0


def statistics(lab: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [3] and standard deviation [3] of lab [3, n, H, W] under weight [n, H, W]."""
    total = weight.sum()
    mean = (lab * weight).sum((1, 2, 3)) / total
    variance = ((lab - mean.view(3, 1, 1, 1)).square() * weight).sum((1, 2, 3)) / total
    return mean, variance.sqrt()


class Plate:
    """A background that does not move: count [H, W], and sums [3, H, W] of LAB and of LAB² over a segment."""

    def __init__(self, count: Tensor, total: Tensor, squares: Tensor) -> None:
        self.count, self.total, self.squares = count, total, squares

    def add(self, lab: Tensor, region: Tensor, driving: Tensor) -> None:
        weight = region.float()
        self.count = self.count + weight.sum(0)
        self.total = self.total + (lab * weight).sum(1)
        self.squares = self.squares + (lab.square() * weight).sum(1)

    def known(self, region: Tensor) -> Tensor:
        """Return the part of `region` [n, H, W] that was seen as background before."""
        return region & (self.count > 0)

    def target(self, region: Tensor, driving: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation [3] over time and position, pixels counted as often as in `region`."""
        weight = region.sum(0, dtype=torch.float32)
        count = self.count.clamp_min(1)
        mean_at = self.total / count
        over_time = (self.squares / count - mean_at.square()).clamp_min(0)
        mean, over_place = statistics(mean_at[:, None], weight[None])
        return mean, ((over_time * weight).sum((1, 2)) / weight.sum() + over_place.square()).sqrt()

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total, "squares": self.squares}

    @classmethod
    def empty(cls, height: int, width: int, device: torch.device) -> "Plate":
        zeros = torch.zeros(7, height, width, device=device)
        return cls(zeros[0], zeros[1:4], zeros[4:])


class Scene:
    """A background that the driving clip shows: its difference from a segment, summed over `count` frames. shift [3]
    is the difference of the means, ratio [3] the difference of the logarithms of the deviations."""

    def __init__(self, count: Tensor, shift: Tensor, ratio: Tensor) -> None:
        self.count, self.shift, self.ratio = count, shift, ratio

    def add(self, lab: Tensor, region: Tensor, driving: Tensor) -> None:
        if not region.any():
            return
        (mean, deviation), (there, spread) = (statistics(part, region.float()) for part in (lab, driving))
        self.count = self.count + lab.shape[1]
        self.shift = self.shift + lab.shape[1] * (mean - there)
        self.ratio = self.ratio + lab.shape[1] * ((deviation + _FLAT) / (spread + _FLAT)).log()

    def known(self, region: Tensor) -> Tensor:
        return region & (self.count > 0)

    def target(self, region: Tensor, driving: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = statistics(driving, region.float())
        return mean + self.shift / self.count, (deviation + _FLAT) * (self.ratio / self.count).exp() - _FLAT

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "shift": self.shift, "ratio": self.ratio}

    @classmethod
    def empty(cls, height: int, width: int, device: torch.device) -> "Scene":
        return cls(torch.zeros((), device=device), torch.zeros(3, device=device), torch.zeros(3, device=device))


def open_anchor(
    choice: str, mode: str, clip: DrivingClip, state: Mapping[str, Tensor], device: torch.device
) -> "ColourAnchor | None":
    """Return the anchor for the segment of `clip`, or None if colours are not anchored ("off")."""
    return None if choice == "off" else ColourAnchor(choice, mode == "replace", clip, state, device)


class ColourAnchor:
    """Corrects the frames of one segment with `shade`, in decoding order.

    choice: `first` matches every later segment to the first, `previous` to the preceding one. `state`: the result of
    `state()` after the preceding segment; empty for the first segment, which is not corrected."""

    def __init__(
        self, choice: str, replace: bool, clip: DrivingClip, state: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.clip, self.device = clip, device
        self.kind: type[Plate] | type[Scene] = Scene if replace else Plate
        self.anchor = self.kind(**{name: value.to(device) for name, value in state.items()}) if state else None
        collects = self.anchor is None or choice == "previous"
        self.seen = self.kind.empty(clip.frames.shape[2], clip.frames.shape[3], device) if collects else None
        self.map: tuple[Tensor, Tensor] | None = None  # gain and bias [3] of the preceding group

    def shade(self, start: int, pixels: Tensor) -> Tensor:
        """Correct frames [3, n, H, W] in -1..1, which begin at frame `start` of the segment → the same shape."""
        group = slice(start, start + pixels.shape[1])
        region = background(self.clip.mask[group].to(self.device))
        driving = torch.empty(0, device=self.device)
        if self.kind is Scene:
            region &= (self.clip.mask[group].to(self.device) > ON_ABOVE).all(1)  # exclude the frame's margins
            frames = normalise_video(self.clip.frames[group].to(self.device))
            driving = rgb_to_lab(frames.transpose(0, 1).add(1).div(2))
        lab = rgb_to_lab(pixels.add(1).div(2))
        shown = pixels
        if self.anchor is not None:
            gain, bias = self._maps(self.anchor, lab, region, driving)
            corrected = gain * lab + bias
            # added as a difference, so that an identity map leaves the pixels bit-identical
            shown = (pixels + 2 * (lab_to_rgb(corrected) - lab_to_rgb(lab))).clamp(-1, 1)
            lab = corrected
        if self.seen is not None:
            self.seen.add(lab, region, driving)
        return shown

    def state(self) -> dict[str, Tensor]:
        """Return the statistics that the next segment is matched to."""
        kept = self.seen or self.anchor
        assert kept is not None
        return kept.state()

    def _maps(self, anchor: Plate | Scene, lab: Tensor, region: Tensor, driving: Tensor) -> tuple[Tensor, Tensor]:
        """Return gain and bias [3, n, 1, 1] per frame: a transition from the preceding group's map to this group's."""
        before, known = self.map, anchor.known(region)
        if known.float().mean() >= _SMALLEST_REGION:
            mean, deviation = statistics(lab, known.float())
            target, spread = anchor.target(known, driving)
            gain = ((spread + _FLAT) / (deviation + _FLAT)).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
            self.map = gain, mean + (target - mean).clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT) - gain * mean
        elif before is None:
            self.map = torch.ones(3, device=self.device), torch.zeros(3, device=self.device)
        assert self.map is not None
        old, frames = before or self.map, lab.shape[1]
        ramp = (torch.arange(1, frames + 1, device=self.device) / frames).view(1, -1)
        gain, bias = (a[:, None] + ramp * (b - a)[:, None] for a, b in zip(old, self.map, strict=True))
        return gain[..., None, None], bias[..., None, None]
