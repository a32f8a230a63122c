"""The command group `scail2-rt masks`: check, show, repair and make colour masks. Only `make` needs weights.

Only click is imported here, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.cli.make_command import make
from scail2_rt.runtime.cli.options import CASE, FILES, FIT, MODE, SIZE
from scail2_rt.runtime.cli.output import show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting
from scail2_rt.runtime.cli.types import CHARACTERS, ColourMap, RateType

if TYPE_CHECKING:
    import numpy as np

    from scail2_rt.runtime.core.progress import Tell
    from scail2_rt.runtime.masks.check import CheckResult
    from scail2_rt.runtime.masks.files import Source
    from scail2_rt.runtime.masks.palette import Role
    from scail2_rt.runtime.masks.sources import Matte

UNUSABLE = 2  # exit code of a check that found an error
_PROBING, _CHECKING = 0.05, 0.2  # progress: shares of probing (when a mask is written) and of checking (in a preview)
CASE_OPTIONS = in_section(
    "Inputs (mask files, a case folder, or the four files of a case)", CASE, *FILES, MODE, SIZE, FIT
)
OVERWRITE = option("--overwrite", is_flag=True, help="Replace an existing output.")
WRITE_OPTIONS = in_section(
    "Output",
    option(
        "-o",
        "--output",
        type=PATH,
        required=True,
        metavar="FILE",
        help="The mask to write: .png for an image, .mp4 for a clip.",
    ),
    OVERWRITE,
    option(
        "--fps",
        type=RateType(),
        metavar="RATE",
        help="Frame rate for a folder of images. Use the rate of the driving clip.  [default: 25]",
    ),
)
_PURPOSE = (
    option(
        "--mode",
        type=click.Choice(["animate", "replace"]),
        required=True,
        help="Mode that the mask is for. It decides which background stays visible and becomes white: the reference's "
        "in animate mode, the driving clip's in replace mode. The other one becomes black.",
    ),
    option(
        "--role",
        type=click.Choice(["reference", "driving"]),
        help="Whether it is a reference mask or a mask video.  [default: reference for an image, driving for a clip]",
    ),
)
_MATTE = (
    *_PURPOSE,
    option(
        "--color",
        "--colour",
        "colour",
        type=click.Choice(CHARACTERS),
        default="red",
        show_default=True,
        help="Colour of the character, the same in the reference mask and the mask video.",
    ),
    option(
        "--threshold",
        type=click.IntRange(1, 255),
        default=128,
        show_default=True,
        metavar="N",
        help="Pixels with this 8-bit level or more belong to the character.",
    ),
)


@click.group(invoke_without_command=True)
@click.pass_context
def masks(ctx: click.Context) -> None:
    """Check, show, repair and make the colour masks of a case. Only `make` needs weights.

    White: visible background. Black: hidden. Red, green, blue, yellow, magenta, cyan: one colour per character, the
    same in the reference mask and the mask video."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


masks.add_command(make)


@masks.command(cls=SectionCommand)
@click.argument("files", type=PATH, nargs=-1)
@CASE_OPTIONS
@reporting
def check(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Check the masks of a case, or the mask FILES. Prints their contents and findings, with frame numbers.

    Finds wrong colours, soft edges, fragments, holes, specks, a character exchanged with the background, sudden changes
    of area, and masks that do not fit the mode or the frame. The exit code is 2 if there are errors, which generate
    refuses, and 0 otherwise, also with warnings."""
    from scail2_rt.runtime.cli.progress import patient_progress
    from scail2_rt.runtime.core.progress import Work

    with stdout_for(as_json), patient_progress() as listener:
        result, _ = _checked(files, options, Work("mask check", listener))
    show(result.as_json if as_json else None, result.text, as_json)
    if not result.usable:
        raise click.exceptions.Exit(UNUSABLE)


@masks.command(cls=SectionCommand)
@click.argument("files", type=PATH, nargs=-1)
@CASE_OPTIONS
@in_section(
    "Output",
    option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder for masks.png and masks.mp4."),
    option(
        "--count",
        type=click.IntRange(1, 100),
        default=12,
        show_default=True,
        metavar="N",
        help="Frames on the sheet. Frames with findings come first.",
    ),
    OVERWRITE,
)
@reporting
def preview(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Show the masks on top of the images, as a contact sheet and a video.

    Writes masks.png and masks.mp4, which has all frames and is at most 1280 pixels wide or high. Hidden parts are dark
    and hatched, characters tinted and outlined, pixels without a class orange. For a case, a border shows which part of
    each image is in the output frame. At most one of FILES may be a video."""
    from scail2_rt.runtime.cli.progress import patient_progress
    from scail2_rt.runtime.core.progress import Work, within
    from scail2_rt.runtime.jobs.stopping import stop_tidily
    from scail2_rt.runtime.masks.files import check_new
    from scail2_rt.runtime.masks.preview import clip_of, reference_stills, write_preview

    folder: Path = options["output"]
    with stdout_for(as_json), patient_progress() as listener:
        work = Work("mask preview", listener)
        result, case = _checked(files, options, within(work, 0, _CHECKING))
        clip = clip_of(files, case, result)
        check_new(folder / "masks.png", ".png", options["overwrite"])
        if clip is not None:
            check_new(folder / "masks.mp4", ".mp4", options["overwrite"])
        stills = reference_stills(files, case, options["extra_refs"], result)
        stop_tidily()
        sheet, video = write_preview(folder, stills, clip, options["count"], within(work, _CHECKING, 1))
    written = [str(path) for path in (sheet, video) if path]
    text = f"wrote {' and '.join(written)}"
    if result.framing is not None:
        text = f"{result.framing.line}\n{text}"
    if result.findings:
        text += f"; {counted(len(result.findings), 'finding')} (run `scail2-rt masks check` for details)"
    show({"sheet": sheet, "video": video, "check": result.as_json}, text, as_json)


@masks.command(cls=SectionCommand)
@click.argument("file", type=PATH)
@WRITE_OPTIONS
@in_section(
    "Clean",
    option(
        "--map",
        "maps",
        type=ColourMap(),
        multiple=True,
        metavar="R,G,B=COLOUR",
        help="Replace this colour by another one, as in 255,140,0=red; may be repeated.",
    ),
    option(
        "--background",
        type=click.Choice(["white", "black"]),
        help="Make the background entirely white or black.",
    ),
    option(
        "--speck",
        type=click.IntRange(min=0),
        metavar="N",
        help="Areas of fewer pixels get the surrounding colour; 0 keeps all.  [default: 1/10,000 of the frame]",
    ),
)
@reporting
def clean(file: Path, as_json: bool, **options: Any) -> None:
    """Clean a mask: give every pixel of FILE exactly one mask colour.

    FILE is an image, a video or a folder of images. Colours close to a mask colour become that colour, fringes from
    video and JPEG coding get the colour of their area, and small specks are removed. The result is lossless."""
    from scail2_rt.runtime.masks.cleaning import Cleaning, clean_frame
    from scail2_rt.runtime.masks.files import frames_of
    from scail2_rt.runtime.media.images import load_mask_image

    cleaning = Cleaning(dict(options["maps"]), options["background"], options["speck"])

    def frames(source: Source, tell: Tell) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames_of(source, load_mask_image, tell)):
            yield clean_frame(frame, cleaning, str(file) if source.kind == "image" else f"frame {number} of {file}")

    _write(file, options, as_json, frames)


@masks.command(cls=SectionCommand)
@click.argument("file", type=PATH)
@WRITE_OPTIONS
@in_section("Mask", *_MATTE)
@reporting
def from_alpha(file: Path, as_json: bool, **options: Any) -> None:
    """Make a mask from the alpha channel of FILE. Opaque pixels are the character.

    FILE is an image, a video or a folder of images. Videos with alpha: ProRes 4444, PNG and QuickTime Animation in
    .mov, VP8 and VP9 in .webm, animated WebP, GIF."""
    from scail2_rt.runtime.masks.sources import masks_from_alpha

    _write(file, options, as_json, lambda source, tell: masks_from_alpha(source, _matte(source, options), tell))


@masks.command(cls=SectionCommand)
@click.argument("matte", type=PATH)
@WRITE_OPTIONS
@in_section("Mask", *_MATTE, option("--invert", is_flag=True, help="Dark pixels are the character."))
@reporting
def from_grey(matte: Path, as_json: bool, **options: Any) -> None:
    """Make a mask from the grey MATTE. Bright pixels are the character.

    MATTE is an image, a video or a folder of images."""
    from scail2_rt.runtime.masks.sources import masks_from_grey

    _write(matte, options, as_json, lambda source, tell: masks_from_grey(source, _matte(source, options), tell))


@masks.command(cls=SectionCommand)
@click.argument("labels", type=PATH)
@WRITE_OPTIONS
@in_section(
    "Mask",
    *_PURPOSE,
    option(
        "--order",
        default=",".join(CHARACTERS),
        show_default=True,
        metavar="LIST",
        help="Colours of labels 1, 2, …, or LABEL=COLOUR as in 128=red,255=background. Label 0 is background.",
    ),
)
@reporting
def from_labels(labels: Path, as_json: bool, **options: Any) -> None:
    """Make a mask from the label numbers in LABELS.

    LABELS is an indexed or grey image whose pixel values are label numbers, a folder of such images, or a grey video. A
    video must be lossless, or its labels must differ widely (0, 128, 255)."""
    from scail2_rt.runtime.masks.sources import masks_from_labels, parse_order

    order = parse_order(options["order"])

    def frames(source: Source, tell: Tell) -> Iterator[np.ndarray]:
        return masks_from_labels(source, order, _background(source, options), tell)

    _write(labels, options, as_json, frames)


def _checked(files: tuple[Path, ...], options: dict[str, Any], tell: Tell) -> tuple[CheckResult, Any]:
    """Return the result of the check, and the files of the case (None for mask files). Raises InputError for missing or
    contradicting inputs."""
    from scail2_rt.kernels.errors import InputError
    from scail2_rt.runtime.core.case_folder import CaseInputs
    from scail2_rt.runtime.masks.check import case_files, check_case, check_files

    inputs = CaseInputs(*(options[name] for name in ("case", "image", "mask_image", "driving", "mask_video")))
    case = case_files(inputs, options["mode"])
    if case is None:
        if not files:
            raise InputError("No masks were given. Give --case DIR, the four files of a case, or mask files.")
        of_a_case = {
            "--extra-ref": options["extra_refs"],
            "--mode": options["mode"] != "auto",
            "--size": options["size"],
            "--fit": options["fit"] != "auto",
        }
        if given := [flag for flag, value in of_a_case.items() if value]:
            verb = "applies" if len(given) == 1 else "apply"
            raise InputError(f"{', '.join(given)} {verb} only to a case. Give --case DIR or the four files.")
        return check_files(files, tell), None
    if files:
        raise InputError(f"{files[0]} and a case were both given. Give either mask files or a case.")
    mode = case.mode if options["case"] is not None else options["mode"]
    return check_case(case, options["extra_refs"], mode, options["size"], options["fit"], tell=tell), case


def _write(
    file: Path, options: dict[str, Any], as_json: bool, frames: Callable[[Source, Tell], Iterable[np.ndarray]]
) -> None:
    """Write the mask that `frames` yields for a source, uint8 RGB [H, W, 3] per frame."""
    from scail2_rt.runtime.cli.progress import patient_progress
    from scail2_rt.runtime.core.progress import Work, within
    from scail2_rt.runtime.jobs.stopping import stop_tidily
    from scail2_rt.runtime.masks.files import check_output, open_source, write_mask

    with stdout_for(as_json), patient_progress() as listener:
        work = Work("masks", listener)
        source = open_source(file, options["fps"], within(work, 0, _PROBING))
        check_output(options["output"], source, options["overwrite"])
        stop_tidily()
        written = write_mask(options["output"], source, frames(source, within(work, _PROBING, 1)))
    show(written, written.text, as_json)


def _background(source: Source, options: dict[str, Any]) -> tuple[int, int, int]:
    from scail2_rt.runtime.masks.palette import background_of

    role = options["role"] or ("reference" if source.kind == "image" else "driving")
    return background_of(options["mode"], cast("Role", role))


def _matte(source: Source, options: dict[str, Any]) -> Matte:
    from scail2_rt.runtime.masks.sources import Matte

    return Matte(options["colour"], _background(source, options), options["threshold"], options.get("invert", False))
