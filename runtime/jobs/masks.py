"""Masks made inside, behind `generate` and `masks make`: before any engine is opened, and gone from memory by then."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.case_folder import IMAGES, VIDEO_ENDINGS, CaseFiles, official_files, refuse_url
from scail2_rt.runtime.core.progress import Listener, Progress, Work
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.stopping import stop_tidily
from scail2_rt.runtime.masks.check import check_case
from scail2_rt.runtime.masks.make.make import MaskPlan, make_masks, plan_masks
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.media.clips import own_span
from scail2_rt.runtime.session.check import check_output
from scail2_rt.runtime.session.output_lock import refuse_second

_MADE = {  # fields of `GenerateOptions` → of `MaskOptions`, where they differ
    "segmenter_weights": "weights",
    "mask_prompt": "prompt",
}
MAKING = (
    "segmenter", "segmenter_weights", "mask_prompt", "max_characters", "sort", "points", "boxes", "pairs",
    "one_to_many", "image_from", "driving_from",
)  # fmt: skip
_ASKED = (*MAKING, "mode", "start", "frames")


def masks_folder(output: Path) -> Path:
    """Where the masks that were made for an output are kept: `out/demo.masks`."""
    return output.with_name(f"{output.stem}.masks")


def mask_options(given: Mapping[str, Any]) -> MaskOptions:
    """Of a command's parameters."""
    return MaskOptions(**{_MADE.get(name, name): given[name] for name in _ASKED})


def _asked_of(options: GenerateOptions) -> MaskOptions:
    given = {name: getattr(options, name) for name in _ASKED}
    if options.driving is not None and options.fps is not None:  # masks are made of the clip's own frames
        rate = Fraction(options.fps)
        given["start"], given["frames"] = own_span(options.driving, rate, options.start, options.frames)
    return mask_options(given)


def _check_there(image: Path, driving: Path) -> None:
    for label, path in (("reference image", image), ("driving video", driving)):
        refuse_url(label, path)
        if not path.exists():
            raise InputError(f"The {label} {path} does not exist.")


def masks_of(options: GenerateOptions) -> MaskPlan | None:
    """What making the masks of `generate --image --driving` would do; None where they are given. InputError for options
    of masks that are made beside masks that are given."""
    if not options.makes_masks:
        defaults = MaskOptions()
        used = [name for name in MAKING if getattr(options, name) != getattr(defaults, _MADE.get(name, name))]
        if used:
            flags = ", ".join("--" + {"boxes": "box", "points": "point"}.get(n, n.replace("_", "-")) for n in used)
            raise InputError(
                f"{flags} is for masks that are made: give --image and --driving without masks, or leave it out."
            )
        return None
    assert options.image is not None
    assert options.driving is not None
    folder = masks_folder(options.output)
    _check_there(options.image, options.driving)
    refuse_second(options.video)
    request = options.request(options.image, folder / "ref_mask.png", options.driving, folder / "mask.mp4")
    check_output(options.to_video(), request)
    return plan_masks(options.image, options.driving, folder, _asked_of(options))


def _tidily(listener: Listener) -> Listener:
    """The listener of work that writes: from its first event on, before which it writes nothing, `stop_tidily`."""

    def told(event: Progress) -> None:
        stop_tidily()
        listener(event)

    return told


def with_masks(options: GenerateOptions, listener: Listener) -> GenerateOptions:
    """The options with masks that are made, or were made before, beside the output."""
    assert options.image is not None
    assert options.driving is not None
    masks = make_masks(
        options.image,
        options.driving,
        masks_folder(options.output),
        _asked_of(options),
        device=options.segmenter_device,
        vram_limit=options.vram_limit,
        on_progress=_tidily(listener),
    )
    print(masks.text, file=sys.stderr)
    for note in masks.notes:
        print(f"masks: {note}", file=sys.stderr)
    return replace(options, mask_image=masks.mask_image, mask_video=masks.mask_video, mode=masks.mode)


@dataclass(frozen=True, slots=True)
class MadeCase:
    """What `masks make` did: the JSON object, and the text for people."""

    document: Mapping[str, Any]
    text: str


def make_case(options: Mapping[str, Any], listener: Listener) -> MadeCase:
    """A case folder. InputError where there is one already, unless it may be replaced."""
    folder, image, driving = Path(options["output"]), options["image"], options["driving"]
    asked = mask_options(options)
    _check_there(image, driving)
    names = _case_names(image, driving)
    there = official_files(folder)
    if there and not options["overwrite"]:
        raise InputError(f"{folder} holds a case already ({there[0].name}): choose another -o, or give --overwrite.")
    masks = make_masks(
        image,
        driving,
        folder,
        asked,
        device=options["segmenter_device"],
        vram_limit=options["vram_limit"],
        on_progress=_tidily(listener),
    )
    try:
        for source, name in zip((image, driving), names, strict=True):
            _copied(source, folder / name)
    except OSError as error:
        raise Scail2Error(
            f"The masks are in {folder}, and image and clip could not be copied to it ({error}): make room, then give "
            "the same command with --overwrite, which takes the masks as they are."
        ) from error
    made = {*names, masks.mask_image.name, masks.mask_video.name}
    for file in there:  # of the case before, which `generate --case` might take in place of these
        if file.name not in made and not any(file.samefile(source) for source in (image, driving)):
            file.unlink()
    case = CaseFiles(folder / names[0], masks.mask_image, folder / names[1], masks.mask_video, masks.mode)
    check = check_case(case, start=asked.start, frames=asked.frames, tell=Work("mask check", listener))
    lines = [masks.text, *(f"note: {note}" for note in masks.notes)]
    lines += [f"{finding.severity} ({finding.rule}): {finding.says}" for finding in check.findings]
    part = f" --start {asked.start}" if asked.start else ""
    part += f" --frames {asked.frames}" if asked.frames is not None else ""
    quoted = shlex.quote(str(folder.absolute()))
    lines.append(f"case: {folder}; run it with `scail2-rt generate ENGINES --case {quoted}{part} -o out.mp4`")
    return MadeCase({"case": str(folder), "masks": plain(masks), "check": check.as_json}, "\n".join(lines))


def _case_names(image: Path, driving: Path) -> tuple[str, str]:
    """The official names, with the files' own endings."""
    ending = image.suffix.lower()
    if f"ref{ending}" not in IMAGES:
        known = ", ".join(name.removeprefix("ref") for name in IMAGES if name.startswith("ref."))
        raise InputError(f"{image} ends in {ending or 'nothing'}, and a case's image in {known}: save it as one.")
    if driving.suffix.lower() not in VIDEO_ENDINGS:
        known = ", ".join(VIDEO_ENDINGS)
        raise InputError(f"{driving} ends in {driving.suffix or 'nothing'}, and a case's driving video in {known}.")
    return f"ref{ending}", f"rendered_v2{driving.suffix.lower()}"


def _copied(source: Path, target: Path) -> None:
    """Whole or not at all; a file that is there already stays."""
    if target.exists() and target.samefile(source):
        return
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
