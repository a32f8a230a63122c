"""The rules of the mask check, which `masks check` and `generate` run. They need no weights.

A finding is an *error* if generation cannot work or would silently bind the wrong characters, a *warning* if it may be
intended, and a *note* if it is harmless (the model's threshold removes the noise of lossy coding). Each states the
frames, and the remedy with its command. The rules read the statistics of `masks.stats` only.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.findings import TOLERANCE, Finding, Framing, Ranges, ranges, ranges_text
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.core.window import Size
from scail2_rt.runtime.masks.cleaning import snapped
from scail2_rt.runtime.masks.framing import heights
from scail2_rt.runtime.masks.palette import BLACK, CHARACTERS, COLOURS, PALETTE, PALETTE_TEXT, SPECK, UNCLEAR, Mode
from scail2_rt.runtime.masks.stats import MaskStats
from scail2_rt.runtime.masks.useless import jump_findings, shape_findings
from scail2_rt.runtime.masks.windows import Pictures, cropped_findings, frame_picture, remedy_for
from scail2_rt.runtime.media.images import is_image
from scail2_rt.runtime.media.video_reader import VideoInfo

SOFT = 0.03  # share of unclear pixels above which edges cause a warning; at crf 23 it is about 1 %
ASPECT_TOLERANCE = 0.02  # relative difference of aspect ratios that is ignored


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """Facts about one mask file.

    shares     mean share of the pixels of each colour that occurs
    unclear    mean share of pixels whose channels are neither on nor off
    inexact    mean share of pixels that are not exactly a mask colour
    presence   the frames that show each character"""

    file: str
    frames: int
    height: int
    width: int
    shares: Mapping[str, float]
    unclear: float
    inexact: float
    presence: Mapping[str, Ranges]

    @classmethod
    def of(cls, stats: MaskStats) -> MaskFacts:
        labels = stats.labels
        means = dict(zip(PALETTE, labels.mean(0).tolist(), strict=False))
        presence = {
            name: ranges(np.flatnonzero(labels[:, list(PALETTE).index(name)] >= SPECK), stats.start or 0)
            for name in stats.characters
        }
        shares = {name: share for name, share in means.items() if share > 0}
        unclear, inexact = float(labels[:, UNCLEAR].mean()), float(stats.inexact.mean())
        return cls(stats.name, stats.frames, *stats.shape, shares, unclear, inexact, presence)


@dataclass(frozen=True, slots=True)
class MaskReport:
    """The result of `check_masks`. Frame numbers count from 0 in the mask video."""

    mode: Mode
    size: Size  # (H, W) of the frame
    findings: tuple[Finding, ...]
    framing: Framing
    facts: tuple[MaskFacts, ...]  # of the reference masks, and last of the driving mask


def check_masks(
    references: Sequence[MaskStats],
    driving: MaskStats,
    mode: Mode | Literal["auto"],
    pictures: Pictures,
    driving_clip: ClipSource | None = None,
) -> MaskReport:
    """Check the masks of a case. Errors in the masks are findings, for which `refuse` raises.

    references     of the reference masks, the primary reference first
    mode           auto: the one that the driving mask suggests
    driving_clip   read for scene cuts if the area of a character jumps; raises InputError if it cannot be read"""
    mode = driving.mode if mode == "auto" else mode
    named = {stats.name: stats for stats in references}.values()  # the same mask may be given for several references
    framing, cropped = _framed(driving, references, pictures, mode)
    findings = [
        *itertools.chain(*(image_findings(stats) for stats in named)),
        *video_findings(driving, driving_clip),
        *_identities(driving, named),
        *_conventions(driving, named, mode),
        *cropped,
        *_framing(framing, references[0].name, mode),
    ]
    order = ("error", "warning", "note")
    return MaskReport(
        mode=mode,
        size=framing.inputs[0].window.frame,
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
        framing=framing,
        facts=tuple(MaskFacts.of(stats) for stats in (*named, driving)),
    )


def _framed(
    driving: MaskStats, references: Sequence[MaskStats], pictures: Pictures, mode: Mode
) -> tuple[Framing, list[Finding]]:
    """The framing of the inputs, and findings about characters that it cuts."""
    frame, fit = pictures.frame(mode), pictures.fit
    names = ["driving clip", "reference", *(f"extra reference {i}" for i in range(1, len(references)))]
    stats = [driving, *references]
    shapes = [pictures.driving, *pictures.references]
    inputs = tuple(frame_picture(*about, frame, fit) for about in zip(names, stats, shapes, strict=True))
    findings: list[Finding] = []
    for framed, mask in zip(inputs, stats, strict=True):
        findings += cropped_findings(framed, mask.name, remedy_for(framed, mask), mask.start)
    tall = [heights(mask, framed.window) for mask, framed in zip(stats[:2], inputs[:2], strict=True)]
    padded = mode == "replace" and bool(inputs[0].window.margins)
    return Framing(tall[1], tall[0], fit, inputs, padded), findings


def refuse(findings: Iterable[Finding], allow: bool = False) -> None:
    """Raise InputError for the first error, unless errors are allowed."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and not allow:
        more = f" Run `scail2-rt masks check` to see {len(errors) - 1} more." if errors[1:] else ""
        raise InputError(f"{errors[0].sentence}{more} Use --allow-mask-problems to continue anyway.")


def warnings_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The sentences of all findings except notes, for a run that continues."""
    return tuple(finding.sentence for finding in findings if finding.severity != "note")


def clean_command(name: str, options: str = "") -> str:
    """The `masks clean` command that repairs a mask, in words that follow "use"."""
    path = Path(name)
    if not path.suffix:  # a mask in memory
        return f"`scail2-rt masks clean{options and f' {options}'}` on a file of this mask"
    output = path.with_name(f"{path.stem}_clean{'.png' if is_image(path) else '.mp4'}")
    words = ["scail2-rt", "masks", "clean", shlex.quote(name), "-o", shlex.quote(str(output))]
    return f"`{' '.join(words)}{options and ' ' + options}`"


def image_findings(stats: MaskStats) -> list[Finding]:
    """Findings about one mask image."""
    found = [*_strangers(stats), *_edges(stats), *shape_findings(stats, clean_command)]
    if not stats.first_frames:
        remedy = "Paint the character in its colour and the background white or black"
        if any(stranger.is_grey for stranger in stats.strangers):
            remedy += ", or make a mask from a grey matte with `scail2-rt masks from-grey`"
        says = f"{stats.name} has none of the mask colours, so the model sees no character."
        found.append(Finding("error", "no colour", stats.name, says, f"{remedy}. The colours are {PALETTE_TEXT}."))
    return found


def video_findings(stats: MaskStats, driving: ClipSource | None = None) -> list[Finding]:
    """Findings about one mask video. With its driving clip, a jump in area at a scene cut is not reported."""
    name, found = stats.name, [*_strangers(stats), *_edges(stats)]
    if not stats.characters:
        says = f"{name} shows no character in any of its {counted(stats.frames, 'frame')}."
        if largest := stats.labels[:, 1:BLACK].max():
            says = f"{says[:-1]}: a colour covers at most {100 * largest:.3f} % of one, less than {100 * SPECK} %."
        remedy = "Paint each character in the colour that it has in the reference mask"
        if stats.shares[:, 0].max() >= SPECK or any(stranger.is_grey for stranger in stats.strangers):
            remedy += ", or make a mask from a white or grey matte with `scail2-rt masks from-grey`"
        found.append(Finding("error", "no character", name, says, f"{remedy}. The colours are {PALETTE_TEXT}."))
        return found
    for colour in stats.characters:
        if gaps := stats.where(stats.short_gaps(colour)):
            says = f"The {colour} character of {name} vanishes for short times ({ranges_text(gaps)})."
            remedy = "Repair or paint these frames, because the character flickers without its mask."
            found.append(Finding("warning", "flicker", name, says, remedy, gaps))
    found += [*shape_findings(stats, clean_command), *jump_findings(stats, driving)]
    if changes := stats.changes:
        where = stats.where(change.frame for change in changes)
        kinds = sorted({f"{change.before} to {change.after}" for change in changes})
        says = f"A character of {name} changes colour ({', '.join(kinds)}) at {ranges_text(where)}."
        remedy = "Give it one colour throughout: each colour is bound to one character of the reference."
        found.append(Finding("warning", "colour change", name, says, remedy, where))
    if absent := stats.where(np.flatnonzero((stats.shares[:, 1:] < SPECK).all(1))):
        count = sum(last - first + 1 for first, last in absent)
        says = f"{name} shows no character in {count} of {counted(stats.frames, 'frame')} ({ranges_text(absent)})."
        remedy = "If the driving clip shows it there, add its mask."
        found.append(Finding("warning", "absence", name, says, remedy, absent))
    return found


def _strangers(stats: MaskStats) -> list[Finding]:
    name, found = stats.name, []
    wrong = [stranger for stranger in stats.strangers if not stranger.is_grey]
    too_many = len(stats.characters) + len(wrong) > len(CHARACTERS)
    for stranger in stats.strangers:
        where = stats.where(stranger.frames)
        at = f" in {ranges_text(where)}" if where else ""
        r, g, b = stranger.colour
        covers = f"{100 * stranger.share:.1f} %"
        if stranger.is_grey:
            says = f"{name} is grey ({r},{g},{b}) on {covers} of its pixels{at}: grey counts as hidden, like black."
            remedy = f"Use `scail2-rt masks from-grey` if it is a matte, else {clean_command(name)} to make it black."
            found.append(Finding("warning", "grey", name, says, remedy, where))
            continue
        says = f"({r},{g},{b}) covers {covers} of {name}{at}"
        if too_many:
            count = len(stats.characters) + len(wrong)
            says = f"{name} shows more than six characters ({count} colours): {says} and means nothing to the model."
            remedy = "Use at most six character colours and paint the others black"
        else:
            says += ", and is not one of the mask colours."
            remedy = "Repaint it"
        command = clean_command(name, f"--map {r},{g},{b}=COLOUR" if snapped(stranger.colour) is None else "")
        remedy += f": {command}. The colours are {PALETTE_TEXT}."
        found.append(Finding("error", "wrong colour", name, says, remedy, where))
    return found


def _edges(stats: MaskStats) -> list[Finding]:
    """Soft edges and coding noise, unless there are flat colours outside the palette, which `_strangers` reports."""
    if stats.strangers:
        return []
    unclear, inexact = stats.labels[:, UNCLEAR], stats.inexact
    name, found = stats.name, []
    soft = np.flatnonzero(unclear > SOFT)
    if len(soft):
        where = stats.where(soft)
        at = f" in {ranges_text(where)}" if where else ""
        says = f"{100 * unclear.max():.1f} % of {name}{at} is neither on nor off: soft edges, or JPEG or video coding."
        remedy = f"They belong to no character or the wrong one: use {clean_command(name)} to give each a mask colour."
        found.append(Finding("warning", "soft edges", name, says, remedy, where))
    elif inexact.max() > 0:
        says = (
            f"{100 * inexact.mean():.2f} % of {name} is not exactly a mask colour and {100 * unclear.mean():.2f} % "
            "is neither on nor off: lossy coding or soft edges."
        )
        remedy = f"This is harmless for most clips. Use {clean_command(name)} to remove it."
        found.append(Finding("note", "coding noise", name, says, remedy))
    return found


def _identities(driving: MaskStats, references: Collection[MaskStats]) -> list[Finding]:
    name, found = driving.name, []
    known = {colour for stats in references for colour in stats.characters}
    have = ", ".join(sorted(known, key=CHARACTERS.index)) or "no character"
    for colour in driving.characters:
        if colour in known:
            continue
        present = driving.where(np.flatnonzero(driving.shares[:, list(COLOURS).index(colour)] >= SPECK))
        says = (
            f"{name} shows a {colour} character in {ranges_text(present)}, but no reference mask has {colour} "
            f"({', '.join(stats.name for stats in references)}: {have})."
        )
        remedy = "Paint the character in the reference mask in the same colour, or add a reference with --extra-ref."
        if not known:
            remedy += " Use `scail2-rt masks from-grey` to make a mask from a grey or white matte."
        elif len(known) == len(driving.characters) == 1:
            r, g, b = PALETTE[colour]
            remedy += f" Or recolour the driving mask: {clean_command(name, f'--map {r},{g},{b}={have}')}."
        found.append(Finding("error", "no reference", name, says, remedy, present))
    for stats in references:
        for colour in stats.characters:
            if colour not in driving.characters:
                says = f"{stats.name} has a {colour} character that never appears in the driving mask."
                remedy = "It will be still or missing; remove it, or add it to the driving mask."
                found.append(Finding("warning", "never driven", stats.name, says, remedy))
    return found


def _conventions(driving: MaskStats, references: Iterable[MaskStats], mode: Mode) -> list[Finding]:
    """Backgrounds that contradict the mode."""
    name, found = driving.name, []
    white = driving.shares[:, 0].mean()
    if mode == "replace" and white < SPECK:
        says = f"{name} has no white background, but in replace mode the scene shows only where it is white."
        found.append(_background(name, says, "white"))
    if mode == "animate" and white >= SPECK:
        says = (
            f"{name} is white on {100 * white:.1f} % of its pixels, as in masks for replace mode. In animate mode "
            "the background of the driving mask is black."
        )
        found.append(_background(name, says, "black"))
    for stats in references:
        file, white = stats.name, stats.shares[0, 0]
        if stats.characters and mode == "animate" and white < SPECK:
            says = f"{file} has no white background, so the reference's background will not be kept."
            found.append(_background(file, says, "white"))
        if stats.characters and mode == "replace" and white >= SPECK:
            says = f"{file} has white background, which in replace mode would be kept from the reference."
            found.append(_background(file, says, "black"))
    return found


def _background(name: str, says: str, wanted: str) -> Finding:
    remedy = f"Use {clean_command(name, f'--background {wanted}')} to make it {wanted}, or use the other --mode."
    return Finding("warning", "background", name, says, remedy)


def _framing(framing: Framing, name: str, mode: Mode) -> list[Finding]:
    """In replace mode, warn if the heights of reference and driving character differ."""
    ratio = framing.ratio
    if mode != "replace" or ratio is None or not framing.differs:
        return []
    shared = [colour for colour in framing.reference if colour in framing.driving]
    heights = ", ".join(
        f"{colour} {100 * framing.reference[colour]:.0f} % against {100 * framing.driving[colour]:.0f} %"
        for colour in shared
    )
    says = (
        f"The character of {name} is {ratio:.2f} times as tall as the driving one (relative to the frame: {heights}; "
        f"up to {TOLERANCE} is fine), and in replace mode the output shows it at its size in the reference."
    )
    return [Finding("warning", "framing", name, says, "Use --fit-reference to scale the reference to match.")]


def image_pair(image: str, size: tuple[int, int], mask: str, mask_size: tuple[int, int]) -> list[Finding]:
    """Findings about the sizes (H, W) of a reference image and its mask. With different aspect ratios, the mask would
    not cover the character."""
    (height, width), (mask_height, mask_width) = size, mask_size
    if not _aspects_differ(size, mask_size):
        return _scaled(mask, mask_size, size)
    says = f"The mask {mask} is {mask_height}x{mask_width}, but its image {image} is {height}x{width} (height x width)."
    return [Finding("error", "size", mask, says, "Make the mask from this image.")]


def video_pair(driving: VideoInfo, mask: VideoInfo) -> list[Finding]:
    """Findings about the number of frames, the rate and the aspect ratio of a driving clip and its mask video."""
    found = []
    rates = ["" if driving.frame_rate == mask.frame_rate else f" at {_fps(video)}" for video in (driving, mask)]
    if driving.frames != mask.frames:
        says = (
            f"The driving clip {driving.name} has {counted(driving.frames, 'frame')}{rates[0]} but its mask "
            f"{mask.name} has {mask.frames}{rates[1]}."
        )
        remedy = " ".join(
            ["Make the mask video from this clip, with one mask per frame.", *driving.warnings, *mask.warnings]
        )
        first, end = sorted((driving.frames, mask.frames))
        found.append(Finding("error", "frame count", mask.name, says, remedy, ((first, end - 1),)))
    elif rates[0] and driving.frames > 1 and not driving.variable_frame_rate:
        says = f"The driving clip runs at {_fps(driving)} but its mask at {_fps(mask)}."
        found.append(Finding("warning", "rate", mask.name, says, "The n-th mask is used for the n-th frame."))
    size, mask_size = (driving.height, driving.width), (mask.height, mask.width)
    if _aspects_differ(size, mask_size):
        says = (
            f"The driving clip is {size[0]}x{size[1]} but its mask is {mask_size[0]}x{mask_size[1]} (height x width): "
            "both are cropped to the output's aspect ratio, so the mask may not cover the character."
        )
        found.append(Finding("warning", "size", mask.name, says, "Make the mask from this clip."))
        return found
    return [*found, *_scaled(mask.name, mask_size, size)]


def _fps(video: VideoInfo) -> str:
    return f"{float(video.frame_rate):.6g} fps"


def _scaled(mask: str, mask_size: tuple[int, int], size: tuple[int, int]) -> list[Finding]:
    """A note if a mask has the right aspect ratio but another size."""
    if mask_size == size:
        return []
    says = f"The mask {mask} is {mask_size[0]}x{mask_size[1]} and its image {size[0]}x{size[1]} (height x width)."
    return [Finding("note", "size", mask, says, "Their aspect ratios agree, so both are scaled to the same size.")]


def _aspects_differ(size: tuple[int, int], other: tuple[int, int]) -> bool:
    a, b = size[0] * other[1], size[1] * other[0]
    return abs(a - b) > max(a, b) * ASPECT_TOLERANCE
