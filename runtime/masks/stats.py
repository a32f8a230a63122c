"""What a mask shows, frame by frame, in a few numbers: the facts that `masks.lint` and `masks.framing` judge.

Masks are looked at as people have them, that is, after H.264 or JPEG: areas below `SPECK` of a frame are ignored, and a
colour outside the palette counts only where it is a flat region (edges are never flat). Such a colour matters because
(255, 128, 0) passes the model's threshold as red and would silently bind two characters to one.

`MaskStats` takes frames as they come, so a mask video is read once, a few frames at a time, at its own size. Every
step-th pixel is enough for shares, boxes and changes of colour: about 256 rows or columns are looked at, and about 512
for shapes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.core.window import Part
from scail2_rt.runtime.masks.areas import Shape, shapes
from scail2_rt.runtime.masks.palette import (
    BLACK,
    CHARACTERS,
    CLEAR_LABEL,
    CODES,
    COLOURS,
    EXACT,
    MODEL_LABEL,
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
SHORT_GAP = 8  # frames: a character that is away no longer than this did not walk out of the picture
_ROW_SHARE = 0.006  # of a frame's width that a character must cover for a row to count as its own
JUMP = 0.35  # of a character's area that it gains or loses from one frame to the next
JUMP_AT_EDGE = 0.6  # the same at a side of the picture or beside another character, where a runner loses 40 %
_BACKGROUND = [0, BLACK, UNCLEAR]  # labels
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


@dataclass(frozen=True, slots=True)
class Jump:
    """In `frame` a character covers the share `after` of the frame, one frame earlier the share `before`."""

    frame: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Where a character is in the N frames that show it: how many of the pixels looked at are its own.

    frames [N]: their numbers; rows [N, R] and columns [N, C]: in each row and column
    row_edges [R + 1], column_edges [C + 1]: where rows and columns begin and end, as shares of the sides"""

    frames: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    row_edges: np.ndarray
    column_edges: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Pixels in each frame, [N]."""
        return self.rows.sum(1)

    def inside(self, part: Part) -> np.ndarray:
        """Pixels inside a part of the picture, [N]. Exact where the part has the picture's full height or width, as
        windows have; else as if rows and columns had nothing to do with each other."""
        in_rows = self.rows @ _covered(self.row_edges, *part[:2])
        in_columns = self.columns @ _covered(self.column_edges, *part[2:])
        return in_rows * in_columns / np.maximum(self.total, 1)

    def sizes(self, part: Part) -> np.ndarray:
        """What a loss in each frame is held against, [N]: the pixels that are there, or usually are (median) where the
        picture itself cuts the character, at a side at which the part cuts too."""
        lines = self.rows if part[1] - part[0] < part[3] - part[2] else self.columns
        at_border = (lines[:, 0] > 0) | (lines[:, -1] > 0)
        return np.where(at_border, np.maximum(self.total, np.median(self.total)), self.total)

    def heights(self, part: Part) -> np.ndarray:
        """Height of the bounding box inside a part, over the part's height, [N]; 0: not there. A character that the
        part cuts at a side has the height of the whole."""
        first, last = (int(np.abs(self.row_edges - edge).argmin()) for edge in part[:2])
        last = max(last, first + 1)
        least = max(2, round(self.columns.shape[1] * (part[3] - part[2]) * _ROW_SHARE))  # a speck is no head
        there = (self.rows[:, first:last] >= least) & (self.inside(part) > 0)[:, None]
        spans = there.shape[1] - there.argmax(1) - there[:, ::-1].argmax(1)
        return np.where(there.any(1), spans / (last - first), 0.0)


def _covered(edges: np.ndarray, begin: float, end: float) -> np.ndarray:
    """What share of each interval between two edges lies between begin and end, [len(edges) - 1]."""
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    return np.clip(inside / np.diff(edges), 0, 1)


class MaskStats:
    """Collects, frame by frame, what a mask shows. Feed it with `add`; ask it at any time. Frames count from 0."""

    def __init__(self) -> None:
        self._histograms: list[np.ndarray] = []
        self._profiles: list[dict[int, tuple[np.ndarray, np.ndarray]]] = []  # label → pixels by row, by column
        self._shapes: list[dict[int, Shape]] = []  # by label
        self._net: list[np.ndarray] = []  # share of the frame that each character took from the background, [6]
        self.shape_step = 1  # every so-many-th row and column is looked at for shapes
        self._last: np.ndarray | None = None
        self._edges = (np.zeros(1), np.zeros(1))  # of the rows and of the columns looked at
        self.shape = (0, 0)  # of the frames, (H, W)
        self.strangers: list[Stranger] = []
        self.changes: list[ColourChange] = []

    def add(self, frames: np.ndarray) -> None:
        """uint8 frames [T, H, W, 3], in order."""
        for frame in frames:
            self.shape = frame.shape[:2]
            for colour, share in flat_strangers(frame):
                self._meet(colour, share)
            step, self.shape_step = (max(1, min(self.shape) // rows) for rows in (256, 512))
            seen = codes(frame[::step, ::step])
            labels = CLEAR_LABEL[seen]
            moved = np.diag(np.bincount(labels.ravel(), minlength=9))
            if self._last is not None and self._last.shape == labels.shape:
                moved = np.bincount(self._last.astype(np.intp).ravel() * 9 + labels.ravel(), minlength=81).reshape(9, 9)
                self.changes += _changes(moved, self.frames)
            self._last = labels
            taken = moved[_BACKGROUND, 1:BLACK].sum(0) - moved[1:BLACK, _BACKGROUND].sum(1)
            self._net.append(taken / labels.size)
            # Finer than the rest: a gap of two pixels between an arm and the body makes no hole of what is behind it.
            self._shapes.append(shapes(MODEL_LABEL[codes(frame[:: self.shape_step, :: self.shape_step])]))
            sides = zip(labels.shape, self.shape, strict=True)
            rows, columns = (np.minimum(np.arange(count + 1) * step / side, 1) for count, side in sides)
            self._edges = rows, columns
            self._profiles.append(_profiles(labels))
            self._histograms.append(np.bincount(seen.ravel(), minlength=CODES) / seen.size)

    def _meet(self, colour: RGB, share: float) -> None:
        for known in self.strangers:
            if max(abs(a - b) for a, b in zip(known.colour, colour, strict=True)) <= SAME_COLOUR:
                known.share = max(known.share, share)
                known.frames.append(self.frames)
                return
        self.strangers.append(Stranger(colour, [self.frames], share))

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

    def profile(self, character: str) -> Profile:
        """Over the frames in which the character covers more than a speck."""
        label = list(COLOURS).index(character)
        shown = np.flatnonzero(self.shares[:, label] >= SPECK)
        found = [self._profiles[frame][label] for frame in shown]
        rows, columns = (
            np.array([counts[axis] for counts in found], np.float32).reshape(len(found), len(self._edges[axis]) - 1)
            for axis in (0, 1)
        )
        return Profile(shown, rows, columns, *self._edges)

    def heights(self, part: Part = (0.0, 1.0, 0.0, 1.0)) -> dict[str, float]:
        """Character → median over the frames that show it of its height inside a part of the mask, over the part's."""
        medians = {}
        for name in self.characters:
            found = self.profile(name).heights(part)
            if (found > 0).any():
                medians[name] = float(np.median(found[found > 0]))
        return medians

    @property
    def first_frames(self) -> dict[str, int]:
        """Colour → first frame (counted from the first one added) where it covers more than a speck."""
        present = self.shares >= SPECK
        return {name: int(present[:, i].argmax()) for i, name in enumerate(COLOURS) if present[:, i].any()}

    @property
    def characters(self) -> tuple[str, ...]:
        return tuple(name for name in CHARACTERS if name in self.first_frames)

    def shapes(self, character: str) -> dict[int, Shape]:
        """Frame → shape of the character, where it covers more than a speck."""
        label = list(COLOURS).index(character)
        shown = np.flatnonzero(self.shares[:, label] >= SPECK).tolist()
        return {frame: self._shapes[frame][label] for frame in shown if label in self._shapes[frame]}

    def jumps(self, character: str) -> list[Jump]:
        """Frames where the character's area changes suddenly at the expense or in favour of the background.

        The change is held against the area before and after, and against what the character usually covers: who walks
        in at the border is a sliver first. What another character covers or uncovers does not count, nor what a moving
        character itself uncovers of another."""
        label = list(COLOURS).index(character)
        share = self.shares[:, label]
        shown = share >= SPECK
        net = np.array(self._net)[:, label - 1]
        there = shown.copy()
        there[1:] &= shown[:-1]
        there[:1] = False
        before = np.roll(share, 1)
        usual = np.maximum(np.maximum(share, before), np.median(share[shown]) if shown.any() else 1)
        least = np.minimum(np.sign(net) * (share - before), np.abs(net))
        at_edge = np.array([self._at_edge(frame, label) for frame in range(self.frames)])
        at_edge[1:] |= at_edge[:-1]
        found = np.flatnonzero(there & (least > np.where(at_edge, JUMP_AT_EDGE, JUMP) * usual)).tolist()
        return [Jump(frame, float(share[frame - 1]), float(share[frame])) for frame in found]

    def _at_edge(self, frame: int, label: int) -> bool:
        """Whether a character touches the left or right side of the picture, or another character."""
        shape, profile = self._shapes[frame].get(label), self._profiles[frame].get(label)
        sides = profile is not None and bool(profile[1][0] or profile[1][-1])
        return sides or (shape is not None and shape.beside)

    def short_gaps(self, colour: str) -> list[int]:
        """Frames where a character is away for at most `SHORT_GAP` frames between two that show it."""
        present = np.flatnonzero(self.shares[:, list(COLOURS).index(colour)] >= SPECK)
        gaps = [range(a + 1, b) for a, b in itertools.pairwise(present) if 1 < b - a <= SHORT_GAP + 1]
        return [int(frame) for gap in gaps for frame in gap]


def _changes(pairs: np.ndarray, frame: int) -> list[ColourChange]:
    """Characters whose region has turned into another colour. pairs: pixels by label one frame earlier and now, [9, 9].

    More than half of the region has turned, and it is no occlusion: the other colour has grown by as much, or has
    itself turned into this one."""
    n = len(CHARACTERS)
    moved = pairs[1 : n + 1, 1 : n + 1]  # pixels of character a that are now character b
    old, new = pairs.sum(1)[1 : n + 1], pairs.sum(0)[1 : n + 1]
    least = SPECK * pairs.sum()
    found = []
    for a in np.flatnonzero(old >= least):
        b = int(np.argmax(np.where(np.arange(n) == a, -1, moved[a])))
        turned = moved[a, b] > old[a] / 2
        grown = new[b] - old[b] > moved[a, b] / 2
        swapped = old[b] >= least and moved[b, a] > old[b] / 2
        if turned and (grown or swapped):
            found.append(ColourChange(frame, CHARACTERS[int(a)], CHARACTERS[b]))
    return found


def _profiles(labels: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Label of each character that is there → its pixels by row and by column."""
    there = np.flatnonzero(np.bincount(labels.ravel(), minlength=BLACK)[1:BLACK]) + 1
    found = {}
    for label in there.tolist():
        own = labels == label
        found[label] = tuple(np.count_nonzero(own, axis=axis).astype(np.uint16) for axis in (1, 0))
    return found


def guess_mode(frames: np.ndarray) -> Mode:
    """Mode that a driving mask is made for: white background shows the scene (replace), black hides it (animate).

    frames uint8 [T, H, W, 3], the first few of the driving mask.
    """
    white = np.mean([class_shares(frame)[0] for frame in frames])
    black = np.mean([(frame <= OFF_BELOW).all(-1).mean() for frame in frames])
    return "replace" if white > max(black, SPECK) else "animate"


def image_stats(mask: np.ndarray) -> MaskStats:
    """Of one mask image, uint8 [H, W, 3]."""
    stats = MaskStats()
    stats.add(mask[None])
    return stats


def video_stats(
    source: ClipSource, start: int = 0, frames: int | None = None, tell: Tell = untold
) -> tuple[MaskStats, Mode]:
    """Statistics of a mask video, or of a part of it, and the mode that its first frames were made for. Reads it
    once."""
    stats, mode = MaskStats(), None
    with open_video(source, start, tell=tell) as reader:
        while frames is None or stats.frames < frames:
            chunk = reader.read(FRAMES_AT_ONCE if frames is None else min(FRAMES_AT_ONCE, frames - stats.frames))
            if not len(chunk):
                break
            mode = mode or guess_mode(chunk)
            stats.add(chunk)
    if mode is None:
        raise InputError(f"{source} has no frame from number {start} on: start earlier, or give the whole mask video.")
    return stats, mode
