"""Findings about mattes that no character can be animated with: fragments, holes, noise, exchanged background, an area
that jumps.

Thresholds were measured on 188 characters of mask videos. Good ones (drawn figures with true masks, mattes of a trained
segmenter) have at most 7 pieces and 5 holes, with 9 % of the outline in holes, and gain or lose at most 11 % of their
area between frames. Masks from a segmenter of random weights have 11 to 137 pieces with 26 % of the character or more
outside the largest, or 13 to 60 holes, and gain or lose up to 74 %. Specks and pinholes: at most 14, with 0.2 % of the
area, in drawn mattes with thin hair and after H.264 at crf 40; 5,000, with 13 %, when 1 % of the pixels of a 960x540
matte are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from scail2_rt.runtime.core.findings import Finding, percent, ranges, ranges_text
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.areas import Shape, least_area
from scail2_rt.runtime.masks.make.cuts import USUAL, CutFinder
from scail2_rt.runtime.masks.palette import BLACK, PALETTE, SPECK
from scail2_rt.runtime.masks.stats import SHORT_GAP, Jump, MaskStats
from scail2_rt.runtime.media.clips import open_video

PIECES, SCATTERED = 10, 0.1  # least number of pieces, and share outside the largest one, of a fragmented character
HOLES, HOLLOW = 8, 0.05  # least number of holes, and their share of the filled outline, of a perforated character
HOLLOW_ALONE = 0.2  # the same for fewer holes; arms on the hips enclose up to 7 %
SPECKS, NOISY = 50, 0.02  # least number of specks and pinholes, and their area over the character's, of a noisy one
EXCHANGED = 3, 0.98  # sides of the picture, and share of each, that a character covers that is the background
_MENDED = 0.25  # share in pieces or holes up to which `masks clean` is advised
_MARGIN = 1.25  # of the area that `masks clean --speck` is told to remove over the largest one seen
_AGAIN = "make it again (`scail2-rt masks make`)"

CleanCommand = Callable[[str, str], str]  # a mask's name, options → the command


def shape_findings(stats: MaskStats, name: str, start: int | None, clean: CleanCommand) -> list[Finding]:
    """Characters in fragments, full of holes, noisy or exchanged with the background. start: number of the first frame;
    None for an image."""
    shown = {colour: stats.shapes(colour) for colour in stats.characters}
    keep = min((shape.main for each in shown.values() for shape in each.values()), default=0)
    found = []
    for colour, shapes in shown.items():
        if broken := {t: s for t, s in shapes.items() if s.pieces >= PIECES and s.scattered >= SCATTERED}:
            worst = max(broken.values(), key=lambda shape: shape.scattered)
            up_to = "" if start is None else "up to "
            count = max(s.pieces for s in broken.values())
            says = f"is in fragments{_where(broken, start)}: {up_to}{count} pieces, with {up_to}"
            says += f"{percent(worst.scattered)} of its area outside the largest one."
            area = max(s.second for s in broken.values()) if worst.scattered < _MENDED else keep
            remedy = _remedy(stats, name, area, keep, clean)
            found.append(_finding("fragments", colour, name, says, remedy, broken, start))
        if hollow := {t: s for t, s in shapes.items() if _is_hollow(s)}:
            worst = max(hollow.values(), key=lambda shape: shape.hollow)
            count, up_to = max(s.holes for s in hollow.values()), "" if start is None else "up to "
            says = f"has {up_to}{count} hole{'' if count == 1 else 's'}{_where(hollow, start)}: {up_to}"
            says += f"{percent(worst.hollow)} of its filled outline."
            area = max(s.largest_hole for s in hollow.values()) if worst.hollow < _MENDED else keep
            remedy = _remedy(stats, name, area, keep, clean)
            found.append(_finding("holes", colour, name, says, remedy, hollow, start))
        if noisy := {t: s for t, s in shapes.items() if s.specks >= SPECKS and s.noisy >= NOISY}:
            up_to = "" if start is None else "up to "
            count = max(s.specks for s in noisy.values())
            says = f"is noisy{_where(noisy, start)}: {up_to}{count} specks and pinholes, with {up_to}"
            says += f"{percent(max(s.noisy for s in noisy.values()))} of its area."
            area = round(least_area(stats.shape[0] * stats.shape[1] // stats.shape_step**2))
            remedy = _remedy(stats, name, area, keep, clean)
            found.append(_finding("noise", colour, name, says, remedy, noisy, start))
        if exchanged := _exchanged(stats, colour):
            background = "white" if stats.shares[:, 0].mean() >= stats.labels[:, BLACK].mean() else "black"
            pairs = ((colour, background), (background, colour))
            maps = " ".join(f"--map {','.join(map(str, PALETTE[old]))}={new}" for old, new in pairs)
            says = f"covers three sides of the picture or more{_where(exchanged, start)}, as the background does."
            remedy = f"If the two are exchanged, {clean(name, maps)} exchanges them back; for a grey matte use "
            remedy += "`scail2-rt masks from-grey --invert`."
            found.append(_finding("exchanged", colour, name, says, remedy, exchanged, start))
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


def _where(frames: Iterable[int], start: int | None) -> str:
    return "" if start is None else f" in {ranges_text(ranges(frames, start))}"


def _remedy(stats: MaskStats, name: str, area: int, keep: int, clean: CleanCommand) -> str:
    """How to remove areas up to `area` grid points while pieces of `keep` stay."""
    if area * _MARGIN < keep / 2:
        speck = round(area * _MARGIN * stats.shape_step**2) + 1
        mends = clean(name, f"--speck {speck}")
        return f"{mends} gives areas below {speck} pixels the colour around them; where that is too much, {_AGAIN}."
    return f"No character can follow that: {_AGAIN}, or repaint it."


def _finding(
    rule: str, colour: str, name: str, says: str, remedy: str, frames: Iterable[int], start: int | None
) -> Finding:
    where = () if start is None else ranges(frames, start)
    return Finding("warning", rule, name, f"The {colour} character of {name} {says}", remedy, where)


def jump_findings(
    stats: MaskStats, name: str, start: int, driving: ClipSource | None = None, tell: Tell = untold
) -> list[Finding]:
    """Characters whose area jumps between frames, and not because the driving clip cuts there.

    Without a driving clip a cut cannot be told, so only a jump that is taken back within a few frames is reported."""
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
        says = f"jumps in area at {ranges_text(ranges(frames, start))}, from {_area(worst.before)} to"
        says += f" {_area(worst.after)} of the picture"
        says += f" at frame {worst.frame + start}" if len(frames) > 1 else ""
        says += ", where the driving clip has no cut." if driving is not None else "."
        remedy = "Look at these frames with `scail2-rt masks preview`, then paint them or make the mask again"
        remedy += " (`scail2-rt masks make`)."
        found.append(_finding("area jump", colour, name, says, remedy, frames, start))
    return found


def _area(share: float) -> str:
    return f"{100 * share:.1f} %"


def _jumping(jumps: Sequence[Jump], alone: bool) -> list[int]:
    """Frames between a jump and the one that takes it back; with `alone`, also those of other jumps."""
    frames: list[int] = []
    taken_back = 0
    for number, jump in enumerate(jumps):
        if jump.frame == taken_back:
            continue
        back = next((k for k in jumps[number + 1 :] if (k.after > k.before) != (jump.after > jump.before)), None)
        if back is not None and back.frame - jump.frame <= SHORT_GAP:
            frames += range(jump.frame, back.frame)
            taken_back = back.frame
        elif alone:
            frames.append(jump.frame)
    return frames


def scene_cuts(driving: ClipSource, frames: Sequence[int], tell: Tell = untold) -> set[int]:
    """Which of these frames, in ascending order, begin a new scene of the driving clip."""
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
