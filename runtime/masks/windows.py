"""Which part of a picture the frame shows, and what of each character that leaves.

A picture of another shape than the frame is scaled to cover it and cropped in the middle (`official`), and a character
that stands elsewhere, or is longer than the frame, is lost without a word. So what a window leaves of each character is
measured from the masks, in every frame that is used, and `auto` takes the first way that keeps them: the official crop,
a window of the same size in another place, the whole picture with margins. One window serves the whole clip, since a
moving one would move the scene. A cover crop cuts one axis only, so the characters' pixels by row and by column tell
all that is needed, and the mask is decoded once.

Shares are of pixels, over the clip. A frame counts as cut where it loses a tenth of the character; where that is at the
border of the picture, a tenth of its usual size: the first sliver of somebody who walks in calls for nothing.
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

ENOUGH = 0.98  # share of a character that a window must leave for `auto` to take it
CUT = 0.9  # in a frame: leaving less of a character is worth a warning
LOST = 0.5  # over the clip: leaving less of a character is no animation of it
CROPPED = "cropped"  # rule of the findings
_PLACES = 256  # that a crop window is tried at


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that masks belong to, (H, W) each, and the frame that they are to be laid into.

    size: (H, W) of the frame, None for the default of the mode"""

    references: Sequence[Size]
    driving: Size
    fit: Fit = "auto"
    size: Size | None = None

    def frame(self, mode: Mode) -> Size:
        """(H, W) of the output. By default that of the scene that is shown: the reference's in animate, the driving
        clip's in replace mode; the official rule takes the reference's in both. InputError for an unusable size."""
        shown = self.driving if mode == "replace" and self.fit != "official" else self.references[0]
        size = self.size or oriented(DEFAULT_SIZE, *shown)
        check_size(*size)
        return size


def frame_picture(name: str, stats: MaskStats, picture: Size, frame: Size, fit: Fit) -> Framed:
    """The window for a picture, called `name` in messages, whose mask has these statistics."""
    window = choose_window(stats, picture, frame, fit)
    official = Window.official(picture, frame).part_of_mask(stats.shape)
    shares = {character: kept.share for character, kept in kept_inside(stats, official).items()}
    return Framed(name, window, kept_inside(stats, window.part_of_mask(stats.shape)), shares)


def choose_window(stats: MaskStats, picture: Size, frame: Size, fit: Fit) -> Window:
    """The window that `fit` asks for; `auto` takes the first that keeps the characters."""
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
    """Character → what a part of the mask leaves of it."""
    found = {}
    for name in stats.characters:
        profile = stats.profile(name)
        found[name] = kept(profile.frames, profile.inside(part), profile.total, profile.sizes(part))
    return found


def kept(frames: np.ndarray, inside: np.ndarray, total: np.ndarray, sizes: np.ndarray) -> Kept:
    """Of a character with `total` pixels, `inside` of them left, in each of these frames, [N] each; `sizes` is what a
    loss is held against (`Profile.sizes`)."""
    left = 1 - (total - inside) / sizes
    worst = int(left.argmin())
    share, least = inside.sum() / total.sum(), inside[worst] / total[worst]
    return Kept(float(min(share, 1.0)), float(min(least, 1.0)), tuple(frames[left < CUT].tolist()))


def _holds(characters: Mapping[str, Kept]) -> bool:
    return all(kept.share >= ENOUGH and not kept.cut for kept in characters.values())


def _cropped(stats: MaskStats, picture: Size, frame: Size) -> Window:
    """The window of the frame's shape that leaves most of the character that loses most; of several the one whose
    middle is nearest to that of all characters."""
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
    """Where a window of this length begins, as a share of the side. lines: of each character the pixels by row or
    column, and the edges of these; sizes: what losses are held against."""
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
    """Pixels of counts [N, n] that lie before each place, [N, places]."""
    sums = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)
    at = np.interp(places, edges, np.arange(len(edges)))
    whole = np.minimum(at.astype(int), len(edges) - 2)
    return sums[:, whole] + (at - whole) * (sums[:, whole + 1] - sums[:, whole])


def cropped_findings(framed: Framed, file: str, cure: str, start: int | None = None) -> list[Finding]:
    """What is said of characters that the window cuts. `start`: of the clip; None for an image."""
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
        found.append(Finding(severity, CROPPED, file, f"{says}.", cure, where))
    return found


def cure_of(framed: Framed, stats: MaskStats) -> str:
    """Which option keeps the characters that the window cuts; "" where it keeps them."""
    window = framed.window
    if _holds(framed.kept):
        return ""
    better = choose_window(stats, window.source, window.frame, "auto")
    if better.way == "official":
        return "--fit auto keeps them."
    how = "moves the window onto the characters" if better.way == "crop" else "shows the whole picture with margins"
    return f"--fit auto keeps it: it {how} (--fit {better.way})."
