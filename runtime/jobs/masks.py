"""Masks that `generate` and `masks make` create. The segmenter is unloaded before engines are opened."""

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
_PARAMETERS = (*MAKING, "mode", "start", "frames")


def masks_folder(output: Path) -> Path:
    """Return the folder of the masks that were made for an output: `out/demo.mp4` → `out/demo.masks`."""
    return output.with_name(f"{output.stem}.masks")


def mask_options(given: Mapping[str, Any]) -> MaskOptions:
    """Return the mask options among a command's parameters. Raises InputError for invalid ones."""
    return MaskOptions(**{_MADE.get(name, name): given[name] for name in _PARAMETERS})


def _options_of(options: GenerateOptions) -> MaskOptions:
    given = {name: getattr(options, name) for name in _PARAMETERS}
    if options.driving is not None and options.fps is not None:  # masks are made for the clip's own frames
        rate = Fraction(options.fps)
        given["start"], given["frames"] = own_span(options.driving, rate, options.start, options.frames)
    return mask_options(given)


def _check_exist(image: Path, driving: Path) -> None:
    for label, path in (("reference image", image), ("driving clip", driving)):
        refuse_url(label, path)
        if not path.exists():
            raise InputError(f"The {label} {path} does not exist. Give a file that exists.")


def masks_of(options: GenerateOptions) -> MaskPlan | None:
    """Return the plan for making the masks of `generate --image --driving`, or None if masks are given.

    Raises InputError for inputs that do not exist, an output that cannot be written, and for mask-making options
    together with given masks."""
    if not options.makes_masks:
        defaults = MaskOptions()
        used = [name for name in MAKING if getattr(options, name) != getattr(defaults, _MADE.get(name, name))]
        if used:
            flags = ", ".join("--" + {"boxes": "box", "points": "point"}.get(n, n.replace("_", "-")) for n in used)
            applies, them = ("applies", "it") if len(used) == 1 else ("apply", "them")
            raise InputError(
                f"{flags} {applies} only if generate makes the masks. Give --image and --driving without masks, or "
                f"leave {them} out."
            )
        return None
    assert options.image is not None
    assert options.driving is not None
    folder = masks_folder(options.output)
    _check_exist(options.image, options.driving)
    refuse_second(options.video)
    request = options.request(options.image, folder / "ref_mask.png", options.driving, folder / "mask.mp4")
    check_output(options.to_video(), request)
    return plan_masks(options.image, options.driving, folder, _options_of(options))


def _tidily(listener: Listener) -> Listener:
    """Return a listener for work that writes files. It calls `stop_tidily` at the first event, before any file."""

    def on_event(event: Progress) -> None:
        stop_tidily()
        listener(event)

    return on_event


def with_masks(options: GenerateOptions, listener: Listener) -> GenerateOptions:
    """Return the options with the masks beside the output, which are made or reused."""
    assert options.image is not None
    assert options.driving is not None
    masks = make_masks(
        options.image,
        options.driving,
        masks_folder(options.output),
        _options_of(options),
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
    """The result of `masks make`: the JSON object, and the text for people."""

    document: Mapping[str, Any]
    text: str


def make_case(options: Mapping[str, Any], listener: Listener) -> MadeCase:
    """Make a case folder. options: the parameters of `masks make`.

    Raises InputError for invalid options or inputs, and if the folder holds a case and --overwrite is not given."""
    folder, image, driving = Path(options["output"]), options["image"], options["driving"]
    wanted = mask_options(options)
    _check_exist(image, driving)
    names = _case_names(image, driving)
    existing = official_files(folder)
    if existing and not options["overwrite"]:
        raise InputError(
            f"{folder} already holds a case ({existing[0].name}). Choose another folder with -o, or use --overwrite to "
            "replace it."
        )
    masks = make_masks(
        image,
        driving,
        folder,
        wanted,
        device=options["segmenter_device"],
        vram_limit=options["vram_limit"],
        on_progress=_tidily(listener),
    )
    try:
        for source, name in zip((image, driving), names, strict=True):
            _copied(source, folder / name)
    except OSError as error:
        raise Scail2Error(
            f"The masks are in {folder}, but the image and the clip could not be copied there ({error}). Free some "
            "space, then run the same command with --overwrite, which reuses the masks."
        ) from error
    made = {*names, masks.mask_image.name, masks.mask_video.name}
    for file in existing:  # of the replaced case; `generate --case` might prefer them to the new files
        if file.name not in made and not any(file.samefile(source) for source in (image, driving)):
            file.unlink()
    case = CaseFiles(folder / names[0], masks.mask_image, folder / names[1], masks.mask_video, masks.mode)
    check = check_case(case, start=wanted.start, frames=wanted.frames, tell=Work("mask check", listener))
    lines = [masks.text, *(f"note: {note}" for note in masks.notes)]
    lines += [f"{finding.severity} ({finding.rule}): {finding.says}" for finding in check.findings]
    part = f" --start {wanted.start}" if wanted.start else ""
    part += f" --frames {wanted.frames}" if wanted.frames is not None else ""
    quoted = shlex.quote(str(folder.absolute()))
    lines.append(f"case: {folder}; run it with `scail2-rt generate ENGINES --case {quoted}{part} -o out.mp4`")
    return MadeCase({"case": str(folder), "masks": plain(masks), "check": check.as_json}, "\n".join(lines))


def _case_names(image: Path, driving: Path) -> tuple[str, str]:
    """Return the official names with the extensions of the files. Raises InputError for other extensions."""
    ending = image.suffix.lower()
    if f"ref{ending}" not in IMAGES:
        known = ", ".join(name.removeprefix("ref") for name in IMAGES if name.startswith("ref."))
        raise InputError(
            f"{image} has {_extension(image)}, but a case needs an image with one of {known}. Save it as one of them."
        )
    if driving.suffix.lower() not in VIDEO_ENDINGS:
        known = ", ".join(VIDEO_ENDINGS)
        raise InputError(
            f"{driving} has {_extension(driving)}, but a case needs a driving clip with one of {known}. Convert it."
        )
    return f"ref{ending}", f"rendered_v2{driving.suffix.lower()}"


def _extension(path: Path) -> str:
    return f"the extension {path.suffix}" if path.suffix else "no extension"


def _copied(source: Path, target: Path) -> None:
    """Copy atomically. Nothing is done if both are the same file."""
    if target.exists() and target.samefile(source):
        return
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
