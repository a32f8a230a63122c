"""Colour-coded masks: the 28 channels the transformer reads, and the checks that need no weights.

A channel of a mask pixel is on when its 8-bit value is above 225. Seven combinations mean something (white: background
that shows; six colours: characters), every other pixel is in no class: black, grey and soft edges are one to the model.
The checks look at masks as people have them, that is, after H.264 or JPEG: areas below `SPECK` of a frame are ignored,
and a colour outside the palette counts only where it is a flat region (edges are never flat). Such a colour is refused
because (255, 128, 0) passes the threshold as red and would silently bind two characters to one.

`MaskStats` takes frames as they come and keeps a few numbers a frame, so a mask video is read once, a few frames at a
time, at its own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from scail2_rt.export.errors import InputError
from scail2_rt.runtime.media import VideoReader

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["animate", "replace"]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {  # in channel order
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}
CHARACTERS = tuple(COLOURS)[1:]
ON_ABOVE = 225  # 8-bit: 225 is off, 226 is on
SPECK = 0.0005  # share of a frame below which a colour is taken for codec noise
REGION = 0.002  # share of a frame that a flat colour outside the palette must cover to count as meant
_OFF_BELOW = 64  # a channel above this and not on is neither off nor on: soft edge, codec noise, or a wrong colour
_SATURATED = 64  # spread between the channels from which a colour is one, and not a grey
_FRAMES_AT_ONCE = 8


def mask_latents(mask: Tensor) -> Tensor:
    """Mask frames [T, 3, H, W] fp32 in -1..1, T = 4n+1 → coverages [28, F, h, w] fp32 in 0..1 with F = n+1.

    h and w are H and W halved three times, rounded up each time. Channel = frame in group · 7 + colour; the first frame
    fills a group of its own. A driving mask is halved first (`half_resolution`), a reference mask is not (MODEL §2).
    """
    import torch
    from torch.nn import functional as F

    if mask.shape[0] % 4 != 1:
        raise ValueError(f"a mask clip has 4n+1 frames, not {mask.shape[0]}")
    size = [-(-side // 8) for side in mask.shape[-2:]]  # ceil thrice by 2 is ceil once by 8
    threshold = float(torch.tensor((ON_ABOVE - 127.5) / 127.5, dtype=torch.float32))
    pooled = []
    for chunk in mask.split(_FRAMES_AT_ONCE):
        on = chunk > threshold
        planes = [torch.stack([on[:, i] == bool(rgb[i]) for i in range(3)]).all(0) for rgb in COLOURS.values()]
        pooled.append(F.interpolate(torch.stack(planes, 1).float(), size=size, mode="area"))
    frames = torch.cat([pooled[0][:1].expand(3, -1, -1, -1), *pooled])  # [4F, 7, h, w]
    groups = frames.unflatten(0, (-1, 4)).permute(1, 2, 0, 3, 4)  # (f g) c h w -> g c f h w
    return groups.reshape(28, -1, *size)


def class_shares(frame: np.ndarray, clean: bool = False) -> np.ndarray:
    """Share of the pixels of one frame (uint8 [H, W, 3]) in each of the seven classes, in `COLOURS` order.

    As the model classifies them; with `clean` only pixels that are close to their class's colour count, which leaves
    out the fringes that lossy coding makes (a white pixel beside red can pass the threshold as yellow).
    """
    channels = np.ascontiguousarray(frame.transpose(2, 0, 1))
    on = channels > ON_ABOVE
    if clean:
        on &= ((channels <= _OFF_BELOW) | on).all(0)
    r, g, b = on
    rg, rb, gb = r & g, r & b, g & b
    n_r, n_g, n_b, n_rg, n_rb, n_gb, white = (np.count_nonzero(plane) for plane in (r, g, b, rg, rb, gb, rg & b))
    red, green, blue = n_r - n_rg - n_rb + white, n_g - n_rg - n_gb + white, n_b - n_rb - n_gb + white
    return np.array([white, red, green, blue, n_rg - white, n_rb - white, n_gb - white]) / r.size


def classes_present(frames: np.ndarray) -> dict[str, float]:
    """Mean pixel share of each of the seven colours over uint8 frames [T, H, W, 3] (or one frame [H, W, 3])."""
    frames = frames[None] if frames.ndim == 3 else frames
    shares = np.mean([class_shares(frame) for frame in frames], axis=0)
    return dict(zip(COLOURS, shares.tolist(), strict=True))


def flat_strangers(frame: np.ndarray) -> list[tuple[RGB, float]]:
    """Flat areas whose colour is neither black nor in the palette: (colour, share of the frame), largest first.

    Works on a grid of about 128 points a side; a point counts when its four neighbours on the grid have its colour, so
    soft edges and chroma bleeding do not.
    """
    step = max(1, min(frame.shape[:2]) // 128)
    grid = frame[::step, ::step].astype(np.int16)
    if min(grid.shape[:2]) < 3 or not np.any((grid > _OFF_BELOW) & (grid <= ON_ABOVE)):
        return []
    middle = grid[1:-1, 1:-1]
    neighbours = (grid[:-2, 1:-1], grid[2:, 1:-1], grid[1:-1, :-2], grid[1:-1, 2:])
    flat = np.logical_and.reduce([np.abs(middle - other).max(-1) <= 12 for other in neighbours])
    pixels = middle[flat & ((middle > _OFF_BELOW) & (middle <= ON_ABOVE)).any(-1)]
    found: list[tuple[RGB, float]] = []
    while len(pixels):
        bins, counts = np.unique(pixels // 32, axis=0, return_counts=True)
        seed = pixels[(pixels // 32 == bins[counts.argmax()]).all(-1)].mean(0)
        same = np.abs(pixels - seed).max(-1) <= 40
        colour = tuple(round(value) for value in pixels[same].mean(0).tolist())
        found.append(((colour[0], colour[1], colour[2]), float(same.sum() / middle[..., 0].size)))
        pixels = pixels[~same]
    return [(colour, share) for colour, share in found if share >= REGION]


@dataclass(slots=True)
class Stranger:
    """A flat colour outside the palette: where it was first seen and the largest share of a frame it covers."""

    colour: RGB
    frame: int
    share: float

    @property
    def is_grey(self) -> bool:
        return max(self.colour) - min(self.colour) < _SATURATED


class MaskStats:
    """Collects, frame by frame, what a mask shows. Feed it with `add`; ask it at any time."""

    def __init__(self) -> None:
        self._shares: list[np.ndarray] = []
        self.strangers: list[Stranger] = []

    def add(self, frames: np.ndarray) -> None:
        """uint8 frames [T, H, W, 3], in order."""
        for frame in frames:
            for colour, share in flat_strangers(frame):
                self._meet(colour, share)
            step = max(1, min(frame.shape[:2]) // 256)  # shares are estimates: every step-th pixel is enough
            self._shares.append(class_shares(frame[::step, ::step], clean=True))

    def _meet(self, colour: RGB, share: float) -> None:
        for known in self.strangers:
            if max(abs(a - b) for a, b in zip(known.colour, colour, strict=True)) <= 40:
                known.share = max(known.share, share)
                return
        self.strangers.append(Stranger(colour, self.frames, share))

    @property
    def frames(self) -> int:
        return len(self._shares)

    @property
    def shares(self) -> np.ndarray:
        """Share of each class in each frame without fringes (`class_shares` with `clean`), float [T, 7]."""
        return np.array(self._shares).reshape(-1, len(COLOURS))

    @property
    def first_frames(self) -> dict[str, int]:
        """Colour → first frame (counted from the first one added) where it covers more than a speck."""
        present = self.shares >= SPECK
        return {name: int(present[:, i].argmax()) for i, name in enumerate(COLOURS) if present[:, i].any()}

    @property
    def characters(self) -> tuple[str, ...]:
        return tuple(name for name in CHARACTERS if name in self.first_frames)


def guess_mode(frames: np.ndarray) -> Mode:
    """Mode that a driving mask is made for: white background shows the scene (replace), black hides it (animate).

    frames uint8 [T, H, W, 3], the first few of the driving mask.
    """
    white = np.mean([class_shares(frame)[0] for frame in frames])
    black = np.mean([(frame <= _OFF_BELOW).all(-1).mean() for frame in frames])
    return "replace" if white > max(black, SPECK) else "animate"


@dataclass(frozen=True, slots=True)
class MaskReport:
    """What `check_masks` saw. Frame numbers are counted in the mask video from 0."""

    mode: Mode
    frames: int
    height: int
    width: int
    references: tuple[tuple[str, ...], ...]  # colours of each reference mask, white included
    driving: Mapping[str, int]  # colour → first frame
    driving_shares: Mapping[str, float]  # colour → mean share of the pixels
    warnings: tuple[str, ...]


def check_masks(
    reference_masks: Sequence[np.ndarray],
    driving_mask: Path,
    mode: Mode | Literal["auto"] = "auto",
    *,
    names: Sequence[str] = (),
    start: int = 0,
    frames: int | None = None,
) -> MaskReport:
    """Reads the driving mask once and holds it against the reference masks (uint8 [H, W, 3], the primary one first).

    `names` are the reference masks' names for messages. Raises `InputError` where generation cannot work: no palette
    colour, colours outside the palette, more than six characters, no character at all, or a driving character that no
    reference has. What may be meant is a warning in the report.
    """
    names = tuple(names) or tuple(f"reference mask {i + 1}" for i in range(len(reference_masks)))
    references = [_reference_stats(mask, name) for mask, name in zip(reference_masks, names, strict=True)]
    driving, first = _driving_stats(driving_mask, start, frames)
    if mode == "auto":
        mode = guess_mode(first)
    _refuse_strangers(driving, driving_mask.name, start)
    _check_characters(driving, driving_mask.name, references, names, start)
    warnings = [*_driving_warnings(driving, driving_mask.name, mode, start)]
    for stats, name in zip(references, names, strict=True):
        warnings += _reference_warnings(stats, name, mode, driving)
    means = dict(zip(COLOURS, driving.shares.mean(0).tolist(), strict=True))
    return MaskReport(
        mode=mode,
        frames=driving.frames,
        height=first.shape[1],
        width=first.shape[2],
        references=tuple(tuple(stats.first_frames) for stats in references),
        driving={name: start + frame for name, frame in driving.first_frames.items()},
        driving_shares=means,
        warnings=tuple(warnings),
    )


_PALETTE = (
    "white (255,255,255) for background that shows, black (0,0,0) for what is hidden, and for the characters red "
    "(255,0,0), green (0,255,0), blue (0,0,255), yellow (255,255,0), magenta (255,0,255), cyan (0,255,255)"
)


def _reference_stats(mask: np.ndarray, name: str) -> MaskStats:
    stats = MaskStats()
    stats.add(mask[None])
    _refuse_strangers(stats, name, None)
    if not stats.first_frames:
        raise InputError(
            f"{name} has none of the mask colours: paint the character in its colour and the background white or "
            f"black. The colours are {_PALETTE}."
        )
    return stats


def _driving_stats(path: Path, start: int, frames: int | None) -> tuple[MaskStats, np.ndarray]:
    stats, first = MaskStats(), None
    with VideoReader(path, start) as reader:
        while frames is None or stats.frames < frames:
            wanted = _FRAMES_AT_ONCE if frames is None else min(_FRAMES_AT_ONCE, frames - stats.frames)
            chunk = reader.read(wanted)
            if not len(chunk):
                break
            first = chunk if first is None else first
            stats.add(chunk)
    if first is None:
        raise InputError(f"{path} has no frame from number {start} on: start earlier, or give the whole mask video.")
    return stats, first


def _refuse_strangers(stats: MaskStats, name: str, start: int | None) -> None:
    """Raises for flat saturated colours outside the palette; says so when that makes more than six characters."""
    strangers = [stranger for stranger in stats.strangers if not stranger.is_grey]
    if not strangers:
        return
    worst = max(strangers, key=lambda stranger: stranger.share)
    r, g, b = worst.colour
    where = "" if start is None else f" in frame {start + worst.frame}"
    what = f"({r},{g},{b}) covers {100 * worst.share:.1f} % of {name}{where}"
    count = len(stats.characters) + len(strangers)
    if count > len(CHARACTERS):
        raise InputError(
            f"{name} shows more than six characters ({count} colours): {what} and means nothing to the model. Use at "
            f"most six of its character colours and paint the others black. The colours are {_PALETTE}."
        )
    raise InputError(f"{what}, and is not one of the mask colours: repaint it. The colours are {_PALETTE}.")


def _check_characters(
    driving: MaskStats, name: str, references: Sequence[MaskStats], names: Sequence[str], start: int
) -> None:
    if not driving.characters:
        raise InputError(
            f"{name} shows no character in any of its {driving.frames} frames: paint each character in the colour that "
            f"it has in the reference mask. The colours are {_PALETTE}."
        )
    known = {colour for stats in references for colour in stats.characters}
    for colour in driving.characters:
        if colour not in known:
            have = ", ".join(sorted(known, key=CHARACTERS.index)) or "no character"
            raise InputError(
                f"{name} shows a {colour} character from frame {start + driving.first_frames[colour]} on, but no "
                f"reference mask has {colour} ({', '.join(names)}: {have}). Paint the character in the reference mask "
                f"in the same colour, or add a reference of it with --extra-ref."
            )


def _driving_warnings(stats: MaskStats, name: str, mode: Mode, start: int) -> list[str]:
    warnings = [_grey_warning(stranger, name, start) for stranger in stats.strangers if stranger.is_grey]
    white = stats.shares[:, 0].mean()
    if mode == "replace" and white < SPECK:
        warnings.append(f"{name} has no white background, but in replace mode the scene shows only where it is white.")
    if mode == "animate" and white >= SPECK:
        warnings.append(
            f"{name} is white on {100 * white:.1f} % of its pixels, which is how replace masks look; in animate mode "
            f"the driving background is black."
        )
    absent = np.flatnonzero((stats.shares[:, 1:] < SPECK).all(1))
    if len(absent):
        warnings.append(
            f"{name} shows no character in {len(absent)} of {stats.frames} frames "
            f"(the first is frame {start + absent[0]})."
        )
    return warnings


def _reference_warnings(stats: MaskStats, name: str, mode: Mode, driving: MaskStats) -> list[str]:
    warnings = [_grey_warning(stranger, name, None) for stranger in stats.strangers if stranger.is_grey]
    for colour in stats.characters:
        if colour not in driving.characters:
            warnings.append(f"{name} has a {colour} character that never appears in the driving mask.")
    white = stats.shares[0, 0]
    if stats.characters and mode == "animate" and white < SPECK:
        warnings.append(f"{name} has no white background, so the reference's background will not be kept.")
    if stats.characters and mode == "replace" and white >= SPECK:
        warnings.append(f"{name} has white background, which in replace mode would be kept from the reference.")
    return warnings


def _grey_warning(stranger: Stranger, name: str, start: int | None) -> str:
    where = "" if start is None else f" in frame {start + stranger.frame}"
    return (
        f"{name} is grey {stranger.colour} on {100 * stranger.share:.1f} % of its pixels{where}: grey counts as "
        f"hidden, like black."
    )
