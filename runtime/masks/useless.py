"""Findings about masks that are useless for animation: characters in fragments, with holes, noisy, exchanged with the
background, or whose area jumps.

Thresholds were measured on 188 characters in mask videos. Good masks (exact masks of drawn characters, and masks of a
trained segmenter) have at most 7 pieces, 5 holes and 9 % of the outline in holes, and change by at most 11 % of their
area between frames. Masks of a segmenter with random weights have 11 to 137 pieces with at least 26 % of the character
outside the largest, or 13 to 60 holes, and change by up to 74 %. Specks and pinholes: at most 14 with 0.2 % of the area
in drawn masks with thin hair and after H.264 at crf 40; about 5,000 with 13 % if 1 % of the pixels of a 960x540 mask
are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.findings import Finding, percent, ranges_text
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.areas import Shape, least_area
from scail2_rt.runtime.masks.make.cuts import USUAL, CutFinder
from scail2_rt.runtime.masks.palette import BLACK, PALETTE, SPECK
from scail2_rt.runtime.masks.stats import SHORT_GAP, Jump, MaskStats
from scail2_rt.runtime.media.clips import open_video

PIECES, SCATTERED = 10, 0.1  # a character with this many pieces and this share outside the largest is fragmented
HOLES, HOLLOW = 8, 0.05  # a character with this many holes and this share of the outline in them is perforated
HOLLOW_ALONE = 0.2  # the share alone, with any number of holes; arms on the hips enclose up to 7 %
SPECKS, NOISY = 50, 0.02  # a character with this many specks and pinholes, and this share of its area, is noisy
EXCHANGED = 3, 0.98  # sides of the picture, and share of each, that a character exchanged with the background covers
_REPAIRABLE = 0.25  # share in pieces or holes below which `masks clean` is recommended
_MARGIN = 1.25  # recommended `masks clean --speck` relative to the largest area to remove
_MAKE = "`scail2-rt masks make`"

CleanCommand = Callable[[str, str], str]  # a mask's name, options → the command


def shape_findings(stats: MaskStats, clean: CleanCommand) -> list[Finding]:
    """Findings about characters in fragments, with holes, noisy or exchanged with the background."""
    up_to = "" if stats.start is None else "up to "
    shown = {colour: stats.shapes(colour) for colour in stats.characters}
    keep = min((shape.main for each in shown.values() for shape in each.values()), default=0)
    found = []
    for colour, shapes in shown.items():
        if broken := {t: s for t, s in shapes.items() if s.pieces >= PIECES and s.scattered >= SCATTERED}:
            worst = max(broken.values(), key=lambda shape: shape.scattered)
            count = max(s.pieces for s in broken.values())
            says = f"is in fragments{_where(stats, broken)}: it has {up_to}{count} pieces, with {up_to}"
            says += f"{percent(worst.scattered)} of its area outside the largest one."
            area = max(s.second for s in broken.values()) if worst.scattered < _REPAIRABLE else keep
            remedy = _remedy(stats, area, keep, clean)
            found.append(_finding("fragments", colour, stats, says, remedy, broken))
        if hollow := {t: s for t, s in shapes.items() if _is_hollow(s)}:
            worst = max(hollow.values(), key=lambda shape: shape.hollow)
            count = max(s.holes for s in hollow.values())
            says = f"has {up_to}{counted(count, 'hole')}{_where(stats, hollow)}, which cover {up_to}"
            says += f"{percent(worst.hollow)} of its filled outline."
            area = max(s.largest_hole for s in hollow.values()) if worst.hollow < _REPAIRABLE else keep
            remedy = _remedy(stats, area, keep, clean)
            found.append(_finding("holes", colour, stats, says, remedy, hollow))
        if noisy := {t: s for t, s in shapes.items() if s.specks >= SPECKS and s.noisy >= NOISY}:
            count = max(s.specks for s in noisy.values())
            says = f"is noisy{_where(stats, noisy)}: {up_to}{count} specks and pinholes, with {up_to}"
            says += f"{percent(max(s.noisy for s in noisy.values()))} of its area."
            area = round(least_area(stats.shape[0] * stats.shape[1] // stats.shape_step**2))
            remedy = _remedy(stats, area, keep, clean)
            found.append(_finding("noise", colour, stats, says, remedy, noisy))
        if exchanged := _exchanged(stats, colour):
            background = "white" if stats.shares[:, 0].mean() >= stats.labels[:, BLACK].mean() else "black"
            pairs = ((colour, background), (background, colour))
            maps = " ".join(f"--map {','.join(map(str, PALETTE[old]))}={new}" for old, new in pairs)
            says = f"covers three sides of the picture or more{_where(stats, exchanged)}, as the background does."
            remedy = f"If the two are exchanged, {clean(stats.name, maps)} exchanges them back; for a grey matte use "
            remedy += "`scail2-rt masks from-grey --invert`."
            found.append(_finding("exchanged", colour, stats, says, remedy, exchanged))
    return found


def _exchanged(stats: MaskStats, colour: str) -> list[int]:
    """Frames where a character covers the sides of the picture, if these are most of those that show it."""
    sides, share = EXCHANGED
    shown = stats.profile(colour)
    rows, columns = shown.rows / shown.columns.shape[1], shown.columns / shown.rows.shape[1]
    covered = np.stack([rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]], 1) >= share
    frames: list[int] = shown.frames[covered.sum(1) >= sides].tolist()
    background = stats.shares[:, 0] + stats.labels[:, BLACK]
    frames = [frame for frame in frames if background[frame] >= SPECK]
    return frames if 2 * len(frames) > len(shown.frames) else []


def _is_hollow(shape: Shape) -> bool:
    return (shape.holes >= HOLES and shape.hollow >= HOLLOW) or shape.hollow >= HOLLOW_ALONE


def _where(stats: MaskStats, frames: Iterable[int]) -> str:
    return "" if stats.start is None else f" in {ranges_text(stats.where(frames))}"


def _remedy(stats: MaskStats, area: int, keep: int, clean: CleanCommand) -> str:
    """The remedy that removes areas of up to `area` grid points and keeps pieces of `keep` or more."""
    if area * _MARGIN < keep / 2:
        speck = round(area * _MARGIN * stats.shape_step**2) + 1
        command = clean(stats.name, f"--speck {speck}")
        return (
            f"Use {command} to fill areas below {speck} pixels with the colour around them, or make it again ({_MAKE})."
        )
    return f"It is useless for animation: make it again ({_MAKE}), or repaint it."


def _finding(rule: str, colour: str, stats: MaskStats, says: str, remedy: str, frames: Iterable[int]) -> Finding:
    says = f"The {colour} character of {stats.name} {says}"
    return Finding("warning", rule, stats.name, says, remedy, stats.where(frames))


def jump_findings(stats: MaskStats, driving: ClipSource | None = None, tell: Tell = untold) -> list[Finding]:
    """Findings about characters whose area jumps between frames, except at scene cuts of the driving clip.

    Without a driving clip, cuts are unknown, so only jumps that are reversed within `SHORT_GAP` frames are reported.
    Raises InputError if the driving clip cannot be read."""
    start = stats.start or 0
    jumps = {colour: stats.jumps(colour) for colour in stats.characters}
    cuts: set[int] = set()
    if driving is not None and any(jumps.values()):
        cuts = scene_cuts(driving, sorted({j.frame + start for found in jumps.values() for j in found}), tell)
    found = []
    for colour, all_of in jumps.items():
        kept = [jump for jump in all_of if jump.frame + start not in cuts]
        frames = _jumping(kept, alone=driving is not None)
        if not frames:
            continue
        worst = max((jump for jump in kept if jump.frame in frames), key=lambda jump: abs(jump.after - jump.before))
        says = f"jumps in area at {ranges_text(stats.where(frames))}, from {_area(worst.before)} to"
        says += f" {_area(worst.after)} of the picture"
        says += f" at frame {worst.frame + start}" if len(frames) > 1 else ""
        says += ", where the driving clip has no cut." if driving is not None else "."
        remedy = f"Look at these frames with `scail2-rt masks preview`. Repaint them, or make the mask again ({_MAKE})."
        found.append(_finding("area jump", colour, stats, says, remedy, frames))
    return found


def _area(share: float) -> str:
    return f"{100 * share:.1f} %"


def _jumping(jumps: Sequence[Jump], alone: bool) -> list[int]:
    """Frames from a jump to the jump that reverses it; with `alone`, also the frames of jumps that none reverses."""
    frames: list[int] = []
    reversed_at = 0
    for number, jump in enumerate(jumps):
        if jump.frame == reversed_at:
            continue
        back = next((k for k in jumps[number + 1 :] if (k.after > k.before) != (jump.after > jump.before)), None)
        if back is not None and back.frame - jump.frame <= SHORT_GAP:
            frames += range(jump.frame, back.frame)
            reversed_at = back.frame
        elif alone:
            frames.append(jump.frame)
    return frames


def scene_cuts(driving: ClipSource, frames: Sequence[int], tell: Tell = untold) -> set[int]:
    """The frames, of these in ascending order, that begin a new scene of the driving clip. Raises InputError if it
    cannot be read."""
    finder, cuts = CutFinder(), set()
    first = max(frames[0] - USUAL, 0)
    with open_video(driving, first, tell=tell) as reader:
        for number in range(first, frames[-1] + 1):
            read = reader.read(1)
            if not len(read):
                break
            if finder.cut_before(read[0]):
                cuts.add(number)
    return cuts & set(frames)
