"""What a mask shows, frame by frame, in a few numbers: the facts that `masks.lint` judges.

Masks are looked at as people have them, that is, after H.264 or JPEG: areas below `SPECK` of a frame are ignored, and a
colour outside the palette counts only where it is a flat region (edges are never flat). Such a colour matters because
(255, 128, 0) passes the model's threshold as red and would silently bind two characters to one.

`MaskStats` takes frames as they come, so a mask video is read once, a few frames at a time, at its own size. Every
step-th pixel is enough for shares, boxes and changes of colour: about 256 rows or columns are looked at.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import visible_window
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.palette import (
    BLACK,
    CHARACTERS,
    CLEAR_LABEL,
    CODES,
    COLOURS,
    EXACT,
    OFF_BELOW,
    ON_ABOVE,
    RGB,
    SPECK,
    UNCLEAR,
    Mode,
    class_shares,
    codes,
)
from scail2_rt.runtime.media.clips import open_video

REGION = 0.002  # share of a frame that a flat colour outside the palette must cover to count as meant
SAME_COLOUR = 40  # largest difference in a channel up to which two flat colours are one
_SATURATED = 64  # spread between the channels from which a colour is one, and not a grey
_SHORT_GAP = 8  # frames: a character that is away no longer than this did not walk out of the picture
_ROW_SHARE = 0.006  # of a frame's width that a character must cover for a row to count as its own
FRAMES_AT_ONCE = 8


def flat_strangers(frame: np.ndarray) -> list[tuple[RGB, float]]:
    """Flat areas whose colour is neither black nor in the palette: (colour, share of the frame), largest first.

    Works on a grid of about 128 points a side; a point counts when its four neighbours on the grid have its colour, so
    soft edges and chroma bleeding do not.
    """
    step = max(1, min(frame.shape[:2]) // 128)
    grid = frame[::step, ::step].astype(np.int16)
    if min(grid.shape[:2]) < 3 or not np.any((grid > OFF_BELOW) & (grid <= ON_ABOVE)):
        return []
    middle = grid[1:-1, 1:-1]
    neighbours = (grid[:-2, 1:-1], grid[2:, 1:-1], grid[1:-1, :-2], grid[1:-1, 2:])
    flat = np.logical_and.reduce([np.abs(middle - other).max(-1) <= 12 for other in neighbours])
    pixels = middle[flat & ((middle > OFF_BELOW) & (middle <= ON_ABOVE)).any(-1)]
    found: list[tuple[RGB, float]] = []
    while len(pixels):
        bins, counts = np.unique(pixels // 32, axis=0, return_counts=True)
        seed = pixels[(pixels // 32 == bins[counts.argmax()]).all(-1)].mean(0)
        same = np.abs(pixels - seed).max(-1) <= SAME_COLOUR
        colour = tuple(round(value) for value in pixels[same].mean(0).tolist())
        found.append(((colour[0], colour[1], colour[2]), float(same.sum() / middle[..., 0].size)))
        pixels = pixels[~same]
    return [(colour, share) for colour, share in found if share >= REGION]


@dataclass(slots=True)
class Stranger:
    """A flat colour outside the palette: the frames that show it and the largest share of a frame it covers."""

    colour: RGB
    frames: list[int]
    share: float

    @property
    def is_grey(self) -> bool:
        return max(self.colour) - min(self.colour) < _SATURATED


@dataclass(frozen=True, slots=True)
class ColourChange:
    """In `frame` the region that was `before` one frame earlier has become `after`."""

    frame: int
    before: str
    after: str


class MaskStats:
    """Collects, frame by frame, what a mask shows. Feed it with `add`; ask it at any time. Frames count from 0.

    `size`: the output's (H, W). The characters' heights are then those in the part of the mask that the cropped frame
    shows, relative to its height."""

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._size = size
        self._histograms: list[np.ndarray] = []
        self._heights: list[np.ndarray] = []
        self._last: np.ndarray | None = None
        self.shape = (0, 0)  # of the frames, (H, W)
        self.strangers: list[Stranger] = []
        self.changes: list[ColourChange] = []

    def add(self, frames: np.ndarray) -> None:
        """uint8 frames [T, H, W, 3], in order."""
        for frame in frames:
            self.shape = frame.shape[:2]
            for colour, share in flat_strangers(frame):
                self._meet(colour, share)
            step = max(1, min(self.shape) // 256)
            seen = codes(frame[::step, ::step])
            labels = CLEAR_LABEL[seen]
            if self._last is not None and self._last.shape == labels.shape:
                self.changes += _changes(self._last, labels, self.frames)
            self._last = labels
            self._heights.append(self._measure(labels, step))
            self._histograms.append(np.bincount(seen.ravel(), minlength=CODES) / seen.size)

    def _meet(self, colour: RGB, share: float) -> None:
        for known in self.strangers:
            if max(abs(a - b) for a, b in zip(known.colour, colour, strict=True)) <= SAME_COLOUR:
                known.share = max(known.share, share)
                known.frames.append(self.frames)
                return
        self.strangers.append(Stranger(colour, [self.frames], share))

    def _measure(self, labels: np.ndarray, step: int) -> np.ndarray:
        """Height of each character's bounding box relative to the visible part's height, [6]; 0: not there."""
        top, bottom, left, right = visible_window(*self.shape, *(self._size or self.shape))
        visible = labels[round(top / step) : round(bottom / step), round(left / step) : round(right / step)]
        least = max(2, round(visible.shape[1] * _ROW_SHARE))  # a speck is no head
        heights = np.zeros(len(CHARACTERS))
        for i in range(len(CHARACTERS)):
            rows = np.flatnonzero(np.count_nonzero(visible == i + 1, axis=1) >= least)
            if len(rows):
                heights[i] = (rows[-1] - rows[0] + 1) / len(visible)
        return heights

    @property
    def frames(self) -> int:
        return len(self._histograms)

    def _per_frame(self, table: np.ndarray, kinds: int) -> np.ndarray:
        """Share of the pixels of each kind in each frame, [T, kinds]; `table` gives each code's kind."""
        counts = np.array(self._histograms).reshape(-1, CODES)
        return np.stack([counts[:, table == kind].sum(1) for kind in range(kinds)], axis=1)

    @property
    def labels(self) -> np.ndarray:
        """Share of each clear label in each frame: seven classes, black, unclear; float [T, 9]."""
        return self._per_frame(CLEAR_LABEL, UNCLEAR + 1)

    @property
    def shares(self) -> np.ndarray:
        """Share of each class in each frame without fringes (`class_shares` with `clean`), float [T, 7]."""
        return self.labels[:, :BLACK]

    @property
    def inexact(self) -> np.ndarray:
        """Share of the pixels of each frame that are not exactly of a mask colour, float [T]."""
        return self._per_frame(EXACT, 2)[:, 0]

    @property
    def heights(self) -> dict[str, float]:
        """Character → median over the frames that show it of its height relative to the visible frame's."""
        heights = np.array(self._heights).reshape(-1, len(CHARACTERS))
        present = self.shares[:, 1:] >= SPECK
        medians = {}
        for i, name in enumerate(CHARACTERS):
            seen = heights[present[:, i] & (heights[:, i] > 0), i]
            if len(seen):
                medians[name] = float(np.median(seen))
        return medians

    @property
    def first_frames(self) -> dict[str, int]:
        """Colour → first frame (counted from the first one added) where it covers more than a speck."""
        present = self.shares >= SPECK
        return {name: int(present[:, i].argmax()) for i, name in enumerate(COLOURS) if present[:, i].any()}

    @property
    def characters(self) -> tuple[str, ...]:
        return tuple(name for name in CHARACTERS if name in self.first_frames)

    def short_gaps(self, colour: str) -> list[int]:
        """Frames where a character is away for at most `_SHORT_GAP` frames between two that show it."""
        present = np.flatnonzero(self.shares[:, list(COLOURS).index(colour)] >= SPECK)
        gaps = [range(a + 1, b) for a, b in itertools.pairwise(present) if 1 < b - a <= _SHORT_GAP + 1]
        return [int(frame) for gap in gaps for frame in gap]


def _changes(before: np.ndarray, after: np.ndarray, frame: int) -> list[ColourChange]:
    """Characters whose region has turned into another colour from one frame's labels to the next's.

    More than half of the region has turned, and it is no occlusion: the other colour has grown by as much, or has
    itself turned into this one."""
    n = len(CHARACTERS)
    pairs = np.bincount(before.astype(np.intp).ravel() * 9 + after.ravel(), minlength=81).reshape(9, 9)
    moved = pairs[1 : n + 1, 1 : n + 1]  # pixels of character a that are now character b
    old, new = pairs.sum(1)[1 : n + 1], pairs.sum(0)[1 : n + 1]
    least = SPECK * before.size
    found = []
    for a in np.flatnonzero(old >= least):
        b = int(np.argmax(np.where(np.arange(n) == a, -1, moved[a])))
        turned = moved[a, b] > old[a] / 2
        grown = new[b] - old[b] > moved[a, b] / 2
        swapped = old[b] >= least and moved[b, a] > old[b] / 2
        if turned and (grown or swapped):
            found.append(ColourChange(frame, CHARACTERS[int(a)], CHARACTERS[b]))
    return found


def guess_mode(frames: np.ndarray) -> Mode:
    """Mode that a driving mask is made for: white background shows the scene (replace), black hides it (animate).

    frames uint8 [T, H, W, 3], the first few of the driving mask.
    """
    white = np.mean([class_shares(frame)[0] for frame in frames])
    black = np.mean([(frame <= OFF_BELOW).all(-1).mean() for frame in frames])
    return "replace" if white > max(black, SPECK) else "animate"


def image_stats(mask: np.ndarray, size: tuple[int, int] | None = None) -> MaskStats:
    """Of one mask image, uint8 [H, W, 3]."""
    stats = MaskStats(size)
    stats.add(mask[None])
    return stats


def video_stats(
    source: ClipSource, start: int = 0, frames: int | None = None, size: tuple[int, int] | None = None
) -> tuple[MaskStats, Mode]:
    """Of a mask video, or of a part of it, and the mode that its first frames were made for. Reads it once."""
    stats, mode = MaskStats(size), None
    with open_video(source, start) as reader:
        while frames is None or stats.frames < frames:
            chunk = reader.read(FRAMES_AT_ONCE if frames is None else min(FRAMES_AT_ONCE, frames - stats.frames))
            if not len(chunk):
                break
            mode = mode or guess_mode(chunk)
            stats.add(chunk)
    if mode is None:
        raise InputError(f"{source} has no frame from number {start} on: start earlier, or give the whole mask video.")
    return stats, mode
