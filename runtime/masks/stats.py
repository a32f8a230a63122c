"""Statistics of the frames of a mask, which `masks.lint`, `masks.windows` and `masks.framing` use.

They allow for H.264 and JPEG coding: areas below `SPECK` of a frame are ignored, and a colour outside the palette
counts only if it covers a flat region, which edges never are. Such a colour matters because the model reads
(255, 128, 0), for example, as red, which would silently bind two characters to one.

`MaskStats` accepts frames one after another, so a mask video is read once, a few frames at a time, at its own size.
Shares, boxes and colour changes are computed on a grid of about 256 rows or columns, shapes on one of about 512.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.findings import Ranges, ranges
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
from scail2_rt.runtime.media.kept_results import KeptResults

REGION = 0.002  # share of a frame from which a flat colour outside the palette counts
SAME_COLOUR = 40  # largest difference in any channel at which two flat colours count as equal
_SATURATED = 64  # difference of the channels from which a colour is not grey
SHORT_GAP = 8  # frames: a character that is absent for longer may have left the picture
_ROW_SHARE = 0.006  # share of a row that a character must cover for the row to count for its height
JUMP = 0.35  # share of its area that a character gains or loses from one frame to the next
JUMP_AT_EDGE = 0.6  # the same at a side of the frame or beside another character, where a runner loses 40 %
_BACKGROUND = [0, BLACK, UNCLEAR]  # labels
_FRAMES_AT_ONCE = 8


def flat_strangers(frame: np.ndarray) -> list[tuple[RGB, float]]:
    """(colour, share of the frame) of flat areas whose colour is not in the palette, largest first.

    frame: uint8 [H, W, 3]. The grid has about 128 points on the shorter side. A point counts if its four neighbours
    have the same colour, which excludes soft edges and blurred chroma.
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
    """A flat colour outside the palette, the frames that show it, and the largest share of a frame that it covers."""

    colour: RGB
    frames: list[int]
    share: float

    @property
    def is_grey(self) -> bool:
        return max(self.colour) - min(self.colour) < _SATURATED


@dataclass(frozen=True, slots=True)
class ColourChange:
    """A region has the colour `after` in `frame`, and `before` one frame earlier."""

    frame: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Jump:
    """A character covers the share `after` in `frame`, and `before` one frame earlier."""

    frame: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Position of a character in the N frames that show it, as numbers of grid points.

    frames                    numbers of the frames, [N]
    rows, columns             points of the character in each row [N, R] and column [N, C] of the grid
    row_edges, column_edges   edges of the rows [R + 1] and columns [C + 1], as shares of the sides"""

    frames: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    row_edges: np.ndarray
    column_edges: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Points of the character in each frame, [N]."""
        return self.rows.sum(1)

    def inside(self, part: Part) -> np.ndarray:
        """Points of the character inside a part of the frame, [N]. Exact if the part has the full height or width, as
        windows do; otherwise an estimate that treats rows and columns as independent."""
        in_rows = self.rows @ _covered(self.row_edges, *part[:2])
        in_columns = self.columns @ _covered(self.column_edges, *part[2:])
        return in_rows * in_columns / np.maximum(self.total, 1)

    def sizes(self, part: Part) -> np.ndarray:
        """Reference size for the loss in each frame, [N]: the points of the character, but at least their median if it
        touches a side of the frame at which the part cuts."""
        lines = self.rows if part[1] - part[0] < part[3] - part[2] else self.columns
        at_border = (lines[:, 0] > 0) | (lines[:, -1] > 0)
        return np.where(at_border, np.maximum(self.total, np.median(self.total)), self.total)

    def heights(self, part: Part) -> np.ndarray:
        """Height of the bounding box inside a part, relative to the part, [N]; 0 if the character is not in it. Rows of
        a character that the part cuts at the left or right count completely."""
        first, last = (int(np.abs(self.row_edges - edge).argmin()) for edge in part[:2])
        last = max(last, first + 1)
        least = max(
            2, round(self.columns.shape[1] * (part[3] - part[2]) * _ROW_SHARE)
        )  # a speck above it does not count
        covered = (self.rows[:, first:last] >= least) & (self.inside(part) > 0)[:, None]
        spans = covered.shape[1] - covered.argmax(1) - covered[:, ::-1].argmax(1)
        return np.where(covered.any(1), spans / (last - first), 0.0)


def _covered(edges: np.ndarray, begin: float, end: float) -> np.ndarray:
    """Share of each interval between two edges that is between begin and end, [len(edges) - 1]."""
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)
    return np.clip(inside / np.diff(edges), 0, 1)


class MaskStats:
    """Statistics of the frames given to `add`; frames count from 0. All properties can be read at any time.

    name    of the mask, in messages
    start   number of the first frame in its file, None for an image"""

    def __init__(self, name: str = "mask", start: int | None = None) -> None:
        self.name, self.start = name, start
        self.mode: Mode = "animate"  # of a video: the one that its first frames suggest
        self._histograms: list[np.ndarray] = []
        self._profiles: list[dict[int, tuple[np.ndarray, np.ndarray]]] = []  # label → pixels by row, by column
        self._shapes: list[dict[int, Shape]] = []  # by label
        self._net: list[np.ndarray] = []  # net share of the frame that each character gained from background, [6]
        self.shape_step = 1  # step of the grid for shapes, in pixels
        self._last: np.ndarray | None = None
        self._edges = (np.zeros(1), np.zeros(1))  # edges of the rows and columns of the grid, as shares of the sides
        self.shape = (0, 0)  # of the frames, (H, W)
        self.strangers: list[Stranger] = []
        self.changes: list[ColourChange] = []

    def add(self, frames: np.ndarray) -> None:
        """Add frames, uint8 [T, H, W, 3], in order."""
        for frame in frames:
            self.shape = frame.shape[:2]
            for colour, share in flat_strangers(frame):
                self._add_stranger(colour, share)
            # finer for shapes, so that a gap of two pixels between arm and body connects the background there
            self.shape_step = max(1, min(self.shape) // 512)
            every = max(1, min(self.shape) // (256 * self.shape_step))
            fine = codes(frame[:: self.shape_step, :: self.shape_step])
            seen, step = fine[::every, ::every], every * self.shape_step
            labels = CLEAR_LABEL[seen]
            moved = np.diag(np.bincount(labels.ravel(), minlength=9))
            if self._last is not None and self._last.shape == labels.shape:
                moved = np.bincount(self._last.astype(np.intp).ravel() * 9 + labels.ravel(), minlength=81).reshape(9, 9)
                self.changes += _changes(moved, self.frames)
            self._last = labels
            gained = moved[_BACKGROUND, 1:BLACK].sum(0) - moved[1:BLACK, _BACKGROUND].sum(1)
            self._net.append(gained / labels.size)
            self._shapes.append(shapes(MODEL_LABEL[fine]))
            sides = zip(labels.shape, self.shape, strict=True)
            rows, columns = (np.minimum(np.arange(count + 1) * step / side, 1) for count, side in sides)
            self._edges = rows, columns
            self._profiles.append(_profiles(labels))
            self._histograms.append(np.bincount(seen.ravel(), minlength=CODES) / seen.size)

    def _add_stranger(self, colour: RGB, share: float) -> None:
        """Add a flat colour of the current frame to the similar one found earlier, or to the list."""
        for known in self.strangers:
            if max(abs(a - b) for a, b in zip(known.colour, colour, strict=True)) <= SAME_COLOUR:
                known.share = max(known.share, share)
                known.frames.append(self.frames)
                return
        self.strangers.append(Stranger(colour, [self.frames], share))

    @property
    def frames(self) -> int:
        return len(self._histograms)

    def where(self, frames: Iterable[int]) -> Ranges:
        """These frames as ranges of numbers in the file, () for an image."""
        return () if self.start is None else ranges(frames, self.start)

    def _per_frame(self, table: np.ndarray, kinds: int) -> np.ndarray:
        """Share of the pixels of each kind in each frame, [T, kinds]. table: code → kind."""
        counts = np.array(self._histograms).reshape(-1, CODES)
        return np.stack([counts[:, table == kind].sum(1) for kind in range(kinds)], axis=1)

    @property
    def labels(self) -> np.ndarray:
        """Share of each clear label (seven classes, black, unclear) in each frame, float [T, 9]."""
        return self._per_frame(CLEAR_LABEL, UNCLEAR + 1)

    @property
    def shares(self) -> np.ndarray:
        """Share of each class in each frame without fringes (`class_shares` with `clean`), float [T, 7]."""
        return self.labels[:, :BLACK]

    @property
    def inexact(self) -> np.ndarray:
        """Share of the pixels of each frame that are not exactly a mask colour, float [T]."""
        return self._per_frame(EXACT, 2)[:, 0]

    def profile(self, character: str) -> Profile:
        """The profile of a character over the frames in which it covers at least `SPECK`."""
        label = list(COLOURS).index(character)
        shown = np.flatnonzero(self.shares[:, label] >= SPECK)
        found = [self._profiles[frame][label] for frame in shown]
        rows, columns = (
            np.array([counts[axis] for counts in found], np.float32).reshape(len(found), len(self._edges[axis]) - 1)
            for axis in (0, 1)
        )
        return Profile(shown, rows, columns, *self._edges)

    def heights(self, part: Part = (0.0, 1.0, 0.0, 1.0)) -> dict[str, float]:
        """Character → its height inside a part of the mask, relative to the part: median over the frames that show
        it."""
        medians = {}
        for name in self.characters:
            found = self.profile(name).heights(part)
            if (found > 0).any():
                medians[name] = float(np.median(found[found > 0]))
        return medians

    @property
    def first_frames(self) -> dict[str, int]:
        """Colour → the first frame in which it covers at least `SPECK`."""
        present = self.shares >= SPECK
        return {name: int(present[:, i].argmax()) for i, name in enumerate(COLOURS) if present[:, i].any()}

    @property
    def characters(self) -> tuple[str, ...]:
        return tuple(name for name in CHARACTERS if name in self.first_frames)

    def shapes(self, character: str) -> dict[int, Shape]:
        """Frame → shape of the character, for frames in which it covers at least `SPECK`."""
        label = list(COLOURS).index(character)
        shown = np.flatnonzero(self.shares[:, label] >= SPECK).tolist()
        return {frame: self._shapes[frame][label] for frame in shown if label in self._shapes[frame]}

    def jumps(self, character: str) -> list[Jump]:
        """Frames in which the area of a character changes suddenly because it gains from or loses to the background.

        The change is relative to the largest of the area before, the area after and the median area, because a
        character that enters at the border is small at first. Area that characters cover or uncover of each other does
        not count."""
        label = list(COLOURS).index(character)
        share = self.shares[:, label]
        shown = share >= SPECK
        net = np.array(self._net)[:, label - 1]
        both = shown.copy()  # shown in this frame and in the one before
        both[1:] &= shown[:-1]
        both[:1] = False
        before = np.roll(share, 1)
        usual = np.maximum(np.maximum(share, before), np.median(share[shown]) if shown.any() else 1)
        least = np.minimum(np.sign(net) * (share - before), np.abs(net))
        at_edge = np.array([self._at_edge(frame, label) for frame in range(self.frames)])
        at_edge[1:] |= at_edge[:-1]
        found = np.flatnonzero(both & (least > np.where(at_edge, JUMP_AT_EDGE, JUMP) * usual)).tolist()
        return [Jump(frame, float(share[frame - 1]), float(share[frame])) for frame in found]

    def _at_edge(self, frame: int, label: int) -> bool:
        """Whether a character touches the left or right side of the frame, or another character."""
        shape, profile = self._shapes[frame].get(label), self._profiles[frame].get(label)
        sides = profile is not None and bool(profile[1][0] or profile[1][-1])
        return sides or (shape is not None and shape.beside)

    def short_gaps(self, colour: str) -> list[int]:
        """Frames without a character in gaps of at most `SHORT_GAP` frames between frames that show it."""
        present = np.flatnonzero(self.shares[:, list(COLOURS).index(colour)] >= SPECK)
        gaps = [range(a + 1, b) for a, b in itertools.pairwise(present) if 1 < b - a <= SHORT_GAP + 1]
        return [int(frame) for gap in gaps for frame in gap]


def _changes(pairs: np.ndarray, frame: int) -> list[ColourChange]:
    """Characters whose region changes colour in `frame`. pairs: grid points by label one frame earlier and now, [9, 9].

    More than half of the region must change to one other colour, and not by occlusion: the other colour must grow by
    more than half of the changed area, or must itself change to this colour."""
    n = len(CHARACTERS)
    moved = pairs[1 : n + 1, 1 : n + 1]  # [a, b]: points of character a that now are character b
    old, new = pairs.sum(1)[1 : n + 1], pairs.sum(0)[1 : n + 1]
    least = SPECK * pairs.sum()
    found = []
    for a in np.flatnonzero(old >= least):
        b = int(np.argmax(np.where(np.arange(n) == a, -1, moved[a])))
        changed = moved[a, b] > old[a] / 2
        grown = new[b] - old[b] > moved[a, b] / 2
        swapped = old[b] >= least and moved[b, a] > old[b] / 2
        if changed and (grown or swapped):
            found.append(ColourChange(frame, CHARACTERS[int(a)], CHARACTERS[b]))
    return found


def _profiles(labels: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Label of each character in the frame → its points by row and by column, uint16."""
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=BLACK)[1:BLACK]) + 1
    found = {}
    for label in present.tolist():
        own = labels == label
        found[label] = tuple(np.count_nonzero(own, axis=axis).astype(np.uint16) for axis in (1, 0))
    return found


def guess_mode(frames: np.ndarray) -> Mode:
    """The mode that a driving mask is made for: white background shows the scene (replace), black hides it (animate).

    frames: the first frames of the driving mask, uint8 [T, H, W, 3].
    """
    white = np.mean([class_shares(frame)[0] for frame in frames])
    black = np.mean([(frame <= OFF_BELOW).all(-1).mean() for frame in frames])
    return "replace" if white > max(black, SPECK) else "animate"


def image_stats(mask: np.ndarray, name: str = "mask") -> MaskStats:
    """Statistics of one mask image, uint8 [H, W, 3]."""
    stats = MaskStats(name)
    stats.add(mask[None])
    return stats


_FOUND = KeptResults[MaskStats](count=4)


def video_stats(source: ClipSource, start: int = 0, frames: int | None = None, tell: Tell = untold) -> MaskStats:
    """Statistics of a mask video from frame `start` on. frames: their number, None: to the end. Raises InputError if it
    cannot be read or has no frame there."""
    return _FOUND.get(source, (start, frames), lambda: _video_stats(source, start, frames, tell))


def _video_stats(source: ClipSource, start: int, frames: int | None, tell: Tell) -> MaskStats:
    stats = MaskStats(str(source), start)
    with open_video(source, start, tell=tell) as reader:
        while frames is None or stats.frames < frames:
            chunk = reader.read(_FRAMES_AT_ONCE if frames is None else min(_FRAMES_AT_ONCE, frames - stats.frames))
            if not len(chunk):
                break
            if not stats.frames:
                stats.mode = guess_mode(chunk)
            stats.add(chunk)
    if not stats.frames:
        raise InputError(
            f"{source} has no frame from number {start} on: start earlier, or give the complete mask video."
        )
    return stats
