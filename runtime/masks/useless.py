"""Findings about mattes that no character can be animated with: fragments, holes, an area that jumps.

Thresholds were measured on 188 characters of mask videos. Good ones (drawn figures with true masks, mattes of a trained
segmenter) have at most 7 pieces and 5 holes, with 9 % of the outline in holes, and gain or lose at most 11 % of their
area between frames. Masks from a segmenter of random weights have 11 to 137 pieces with 26 % of the character or more
outside the largest, or 13 to 60 holes, and gain or lose up to 74 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scail2_rt.runtime.core.findings import Finding, percent, ranges, ranges_text
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.areas import Shape
from scail2_rt.runtime.masks.make.cuts import USUAL, CutFinder
from scail2_rt.runtime.masks.stats import SHORT_GAP, Jump, MaskStats
from scail2_rt.runtime.media.clips import open_video

PIECES, SCATTERED = 10, 0.1  # least number of pieces, and share outside the largest one, of a fragmented character
HOLES, HOLLOW = 8, 0.05  # least number of holes, and their share of the filled outline, of a perforated character
HOLLOW_ALONE = 0.2  # the same for fewer holes; arms on the hips enclose up to 7 %
_MENDED = 0.25  # share in pieces or holes up to which `masks clean` is advised
_MARGIN = 1.25  # of the area that `masks clean --speck` is told to remove over the largest one seen
_AGAIN = "make it again (`scail2-rt masks make`)"

CleanCommand = Callable[[str, str], str]  # a mask's name, options → the command


def shape_findings(stats: MaskStats, name: str, start: int | None, clean: CleanCommand) -> list[Finding]:
    """Characters in fragments or full of holes. start: number of the first frame; None for an image."""
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
    return found


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
