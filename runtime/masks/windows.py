"""Chooses the window through which the output frame shows an image, and measures how much of each character it keeps.

The official centre crop scales an image to cover the frame. A character that is not in the centre, or is longer than
the frame, is lost silently. Therefore the visible part of each character is measured from the masks in all used frames,
and `auto` selects the first of three windows that keeps the characters: the official crop, a crop of the same size in
another place, or the complete image with margins. A clip has one window, because a moving one would move the scene. A
crop that covers the frame cuts along one axis only, so the pixels of a character by row and by column suffice, and the
mask is decoded once.

Shares are of pixels over the clip. A frame counts as cut if it loses more than a tenth of the character, or, if the
character touches the border of the image, more than a tenth of its median size: a character that enters is small at
first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scail2_rt.runtime.core.findings import Finding, Framed, Kept, Severity, percent, ranges, ranges_text
from scail2_rt.runtime.core.geometry import check_size, oriented
from scail2_rt.runtime.core.request import DEFAULT_SIZE
from scail2_rt.runtime.core.window import Fit, Part, Size, Window
from scail2_rt.runtime.masks.palette import Mode
from scail2_rt.runtime.masks.stats import MaskStats

ENOUGH = 0.98  # share of a character that a window must keep for `auto` to choose it
CUT = 0.9  # share of a character in a frame below which the check warns
LOST = 0.5  # share of a character over the clip below which the check reports an error
CROPPED = "cropped"  # rule of the findings
_PLACES = 256  # number of positions that are tried for a crop window


@dataclass(frozen=True, slots=True)
class Pictures:
    """Sizes (H, W) of the reference images and the driving clip, and how to place them in the output frame.

    size: (H, W) of the frame; None: the default of the mode"""

    references: Sequence[Size]
    driving: Size
    fit: Fit = "auto"
    size: Size | None = None

    def frame(self, mode: Mode) -> Size:
        """(H, W) of the output. By default it has the orientation of the scene that is shown: the reference's in
        animate mode, the driving clip's in replace mode; with `official`, the reference's in both. Raises InputError
        unless both sides are multiples of 32."""
        shown = self.driving if mode == "replace" and self.fit != "official" else self.references[0]
        size = self.size or oriented(DEFAULT_SIZE, *shown)
        check_size(*size)
        return size


def frame_picture(name: str, stats: MaskStats, picture: Size, frame: Size, fit: Fit) -> Framed:
    """Choose the window for an input, called `name` in messages, whose mask has these statistics."""
    window = choose_window(stats, picture, frame, fit)
    official = Window.official(picture, frame).part_of_mask(stats.shape)
    shares = {character: kept.share for character, kept in kept_inside(stats, official).items()}
    return Framed(name, window, kept_inside(stats, window.part_of_mask(stats.shape)), shares)


def choose_window(stats: MaskStats, picture: Size, frame: Size, fit: Fit) -> Window:
    """The window that `fit` selects; for `auto`, the first that keeps the characters."""
    if fit == "pad":
        return Window.padded(picture, frame)
    if fit == "crop":
        return _cropped(stats, picture, frame)
    official = Window.official(picture, frame)
    if fit == "official" or _holds(kept_inside(stats, official.part_of_mask(stats.shape))):
        return official
    cropped = _cropped(stats, picture, frame)
    return cropped if _holds(kept_inside(stats, cropped.part)) else Window.padded(picture, frame)


def kept_inside(stats: MaskStats, part: Part) -> dict[str, Kept]:
    """Character → how much of it a part of the mask keeps."""
    found = {}
    for name in stats.characters:
        profile = stats.profile(name)
        found[name] = kept(profile.frames, profile.inside(part), profile.total, profile.sizes(part))
    return found


def kept(frames: np.ndarray, inside: np.ndarray, total: np.ndarray, sizes: np.ndarray) -> Kept:
    """How much of a character is kept, from arrays [N] over the frames that show it.

    frames          frame numbers
    inside, total   visible pixels and all pixels of the character
    sizes           reference sizes for the loss (`Profile.sizes`)"""
    left = 1 - (total - inside) / sizes
    worst = int(left.argmin())
    share, least = inside.sum() / total.sum(), inside[worst] / total[worst]
    return Kept(float(min(share, 1.0)), float(min(least, 1.0)), tuple(frames[left < CUT].tolist()))


def _holds(characters: Mapping[str, Kept]) -> bool:
    """Whether a window keeps all characters."""
    return all(kept.share >= ENOUGH and not kept.cut for kept in characters.values())


def _cropped(stats: MaskStats, picture: Size, frame: Size) -> Window:
    """The crop window that keeps most of the character that loses most. Of equal windows, the one whose centre is
    nearest to the centre of all characters."""
    top, bottom, left, right = Window.official(picture, frame).part
    rows = bottom - top < right - left
    length = min(bottom - top, right - left)
    profiles = [stats.profile(name) for name in stats.characters]
    place = top if rows else left
    if profiles and length < 1:
        lines = [
            (profile.rows, profile.row_edges) if rows else (profile.columns, profile.column_edges)
            for profile in profiles
        ]
        sizes = [profile.sizes((top, bottom, left, right)) for profile in profiles]
        place = _best_place(lines, sizes, length)
    return Window.cropped(picture, frame, *((place, left) if rows else (top, place)))


def _best_place(lines: Sequence[tuple[np.ndarray, np.ndarray]], sizes: Sequence[np.ndarray], length: float) -> float:
    """Position at which a window of this length begins; both are shares of the side.

    lines   for each character: pixels by row or column [N, n], and edges of these [n + 1]
    sizes   for each character: reference sizes for the loss, [N]"""
    touched = np.logical_or.reduce([(counts > 1).any(0) for counts, _ in lines])
    edges = lines[0][1]
    wanted = 0.5
    if touched.any():
        first, last = int(touched.argmax()), len(touched) - int(touched[::-1].argmax())
        wanted = (edges[first] + edges[last]) / 2
    nearest = min(max(wanted - length / 2, 0), 1 - length)
    places = np.append(np.linspace(0, 1 - length, _PLACES + 1), nearest)
    share, left = np.ones(len(places)), np.ones(len(places))
    for (counts, _), size in zip(lines, sizes, strict=True):
        inside = _before(counts, edges, places + length) - _before(counts, edges, places)  # [N, places]
        total = counts.sum(1)[:, None]
        share = np.minimum(share, inside.sum(0) / total.sum())
        left = np.minimum(left, (1 - (total - inside) / size[:, None]).min(0))
    holds = (share >= ENOUGH) & (left >= CUT)
    order = np.lexsort((-np.abs(places - nearest), np.round(left, 3), np.round(share, 3), holds))
    return float(places[order[-1]])


def _before(counts: np.ndarray, edges: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Number of pixels, of counts [N, n], before each place, [N, places]."""
    sums = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)
    at = np.interp(places, edges, np.arange(len(edges)))
    low = np.minimum(at.astype(int), len(edges) - 2)
    return sums[:, low] + (at - low) * (sums[:, low + 1] - sums[:, low])


def cropped_findings(framed: Framed, file: str, remedy: str, start: int | None = None) -> list[Finding]:
    """Findings about characters that the window cuts. start: first frame of the clip; None for an image."""
    height, width = framed.window.frame
    found = []
    for colour, kept in framed.kept.items():
        if kept.share >= LOST and not kept.cut:
            continue
        where = () if start is None else ranges(kept.cut, start)
        says = f"The {height}x{width} frame shows {percent(kept.share)} of the {colour} character of {file}"
        if where:
            says += f"; in {ranges_text(where)} it shows less than {percent(CUT)} (least: {percent(kept.least)})"
        severity: Severity = "error" if kept.share < LOST else "warning"
        found.append(Finding(severity, CROPPED, file, f"{says}.", remedy, where))
    return found


def remedy_for(framed: Framed, stats: MaskStats) -> str:
    """The sentence about the option that keeps the characters; "" if the window keeps them."""
    window = framed.window
    if _holds(framed.kept):
        return ""
    better = choose_window(stats, window.source, window.frame, "auto")
    if better.way == "official":
        return "Use --fit auto to keep them."
    how = "moves the window onto the characters" if better.way == "crop" else "shows the complete image with margins"
    return f"Use --fit auto, which {how} (--fit {better.way})."
