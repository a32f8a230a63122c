"""The command group `scail2-rt masks`: check, show, mend and make the colour masks of a case, without weights.

Only click is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from scail2_rt.runtime.cli.make_command import make
from scail2_rt.runtime.cli.options import CASE, FILES, FIT, MODE, SIZE
from scail2_rt.runtime.cli.output import show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting
from scail2_rt.runtime.cli.types import CHARACTERS, ColourMap, RateType

if TYPE_CHECKING:
    import numpy as np

    from scail2_rt.runtime.masks.check import CheckResult
    from scail2_rt.runtime.masks.files import Source
    from scail2_rt.runtime.masks.palette import Role
    from scail2_rt.runtime.masks.sources import Matte

UNUSABLE = 2  # exit code of a check that found an error


CASE_OPTIONS = in_section(
    "Inputs (mask files by themselves, a case folder, or the four files of a case)", CASE, *FILES, MODE, SIZE, FIT
)
OVERWRITE = option("--overwrite", is_flag=True, help="Replace an output that exists.")
WRITE_OPTIONS = in_section(
    "Output",
    option(
        "-o", "--output", type=PATH, required=True, metavar="FILE", help="The mask to write: .png, or .mp4 of a clip."
    ),
    OVERWRITE,
    option(
        "--fps",
        type=RateType(),
        metavar="RATE",
        help="Frame rate of the video that a folder of images becomes: the driving video's.  [default: 25]",
    ),
)
_PURPOSE = (
    option(
        "--mode",
        type=click.Choice(["animate", "replace"]),
        required=True,
        help="What the mask is for. The background becomes white where it shows: the reference's in animate, the "
        "driving video's in replace mode; black elsewhere.",
    ),
    option(
        "--role",
        type=click.Choice(["reference", "driving"]),
        help="Whose mask it is.  [default: reference of an image, driving of a clip]",
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
        help="The character's colour: the same in the reference mask and the driving mask.",
    ),
    option(
        "--threshold",
        type=click.IntRange(1, 255),
        default=128,
        show_default=True,
        metavar="N",
        help="8-bit level from which on a pixel is the character's.",
    ),
)


@click.group(invoke_without_command=True)
@click.pass_context
def masks(ctx: click.Context) -> None:
    """Check, show, mend and make the colour masks of a case. No weights are needed, but by `make`.

    White: background that shows. Black: what is hidden. Red, green, blue, yellow, magenta, cyan: one colour a
    character, the same in the reference mask and the driving mask."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


masks.add_command(make)


@masks.command(cls=SectionCommand)
@click.argument("files", type=PATH, nargs=-1)
@CASE_OPTIONS
@reporting
def check(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Say what the masks of a case, or the mask FILES, show and what is wrong with them, with frame numbers.

    Exit code 0 when they can be used, warnings or not; 2 when an error was found, which generate refuses."""
    with stdout_for(as_json):
        result, _ = _checked(files, options)
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
        help="Frames on the sheet; those that the check complains of come before others.",
    ),
    OVERWRITE,
)
@reporting
def preview(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Lay the masks over the pictures: a contact sheet (masks.png) and a video of all frames (masks.mp4).

    Hidden parts are dark and hatched, characters tinted and outlined, pixels in no class orange; of a case, a border
    shows what of each picture lies in the video's frame. At most one of FILES may be a video."""
    from scail2_rt.runtime.masks.files import check_new
    from scail2_rt.runtime.masks.preview import clip_of, reference_stills, write_preview

    folder: Path = options["output"]
    with stdout_for(as_json):
        result, case = _checked(files, options)
        clip = clip_of(files, case, result)
        check_new(folder / "masks.png", ".png", options["overwrite"])
        if clip is not None:
            check_new(folder / "masks.mp4", ".mp4", options["overwrite"])
        stills = reference_stills(files, case, options["extra_refs"], result)
        sheet, video = write_preview(folder, stills, clip, options["count"])
    written = [str(path) for path in (sheet, video) if path]
    text = f"wrote {' and '.join(written)}"
    if result.framing is not None:
        text = f"{result.framing.line}\n{text}"
    if result.findings:
        text += f"; findings: {len(result.findings)} (`scail2-rt masks check` explains them)"
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
        help="Make this colour another one, as in 255,140,0=red; may be repeated.",
    ),
    option(
        "--background",
        type=click.Choice(["white", "black"]),
        help="Make the whole background white or black: what is black or white becomes the other.",
    ),
    option(
        "--speck",
        type=click.IntRange(min=0),
        metavar="N",
        help="Areas of fewer pixels take the colour around them; 0 keeps all.  [default: 1 in 10,000 of the frame]",
    ),
)
@reporting
def clean(file: Path, as_json: bool, **options: Any) -> None:
    """Give every pixel of the mask FILE (image, video or folder of images) exactly one of the mask colours.

    Near colours snap, fringes of video and JPEG coding take the colour of the area they belong to, specks go. Written
    without loss."""
    from scail2_rt.runtime.masks.cleaning import Cleaning, clean_frame
    from scail2_rt.runtime.masks.files import frames_of
    from scail2_rt.runtime.media.images import load_mask_image

    cleaning = Cleaning(dict(options["maps"]), options["background"], options["speck"])

    def frames(source: Source) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames_of(source, load_mask_image)):
            yield clean_frame(frame, cleaning, str(file) if source.kind == "image" else f"frame {number} of {file}")

    _write(file, options, as_json, frames)


@masks.command(cls=SectionCommand)
@click.argument("image", type=PATH)
@WRITE_OPTIONS
@in_section("Mask", *_MATTE)
@reporting
def from_alpha(image: Path, as_json: bool, **options: Any) -> None:
    """Make a mask of the alpha channel of IMAGE (or of a folder of images): where it is opaque the character is."""
    from scail2_rt.runtime.masks.sources import masks_from_alpha

    _write(image, options, as_json, lambda source: masks_from_alpha(source, _matte(source, options)))


@masks.command(cls=SectionCommand)
@click.argument("matte", type=PATH)
@WRITE_OPTIONS
@in_section("Mask", *_MATTE, option("--invert", is_flag=True, help="The character is dark, not bright."))
@reporting
def from_grey(matte: Path, as_json: bool, **options: Any) -> None:
    """Make a mask of the grey MATTE (image, video or folder of images): where it is bright the character is."""
    from scail2_rt.runtime.masks.sources import masks_from_grey

    _write(matte, options, as_json, lambda source: masks_from_grey(source, _matte(source, options)))


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
    """Make a mask of LABELS: an indexed or grey image whose pixels are numbers, a folder of them, or a grey video.

    A video must be lossless, or its labels far apart (0, 128, 255)."""
    from scail2_rt.runtime.masks.sources import masks_from_labels, parse_order

    order = parse_order(options["order"])
    _write(labels, options, as_json, lambda source: masks_from_labels(source, order, _background(source, options)))


def _checked(files: tuple[Path, ...], options: dict[str, Any]) -> tuple[CheckResult, Any]:
    """What the check says, and the files of the case if it is one."""
    from scail2_rt.kernels.errors import InputError
    from scail2_rt.runtime.core.case_folder import CaseInputs
    from scail2_rt.runtime.masks.check import case_files, check_case, check_files

    inputs = CaseInputs(*(options[name] for name in ("case", "image", "mask_image", "driving", "mask_video")))
    case = case_files(inputs, options["mode"])
    if case is None:
        if not files:
            raise InputError("There is nothing to check: give --case DIR, the four files of a case, or mask files.")
        of_a_case = {
            "--extra-ref": options["extra_refs"],
            "--mode": options["mode"] != "auto",
            "--size": options["size"],
            "--fit": options["fit"] != "auto",
        }
        if given := [flag for flag, value in of_a_case.items() if value]:
            raise InputError(f"{', '.join(given)} belongs to a case: give --case DIR or the four files with it.")
        return check_files(files), None
    if files:
        raise InputError(f"{files[0]} was given beside a case: check mask files by themselves or the files of a case.")
    mode = case.mode if options["case"] is not None else options["mode"]
    return check_case(case, options["extra_refs"], mode, options["size"], options["fit"]), case


def _write(file: Path, options: dict[str, Any], as_json: bool, frames: Any) -> None:
    """`frames`: Source → mask frames."""
    from scail2_rt.runtime.masks.files import check_output, open_source, write_mask

    with stdout_for(as_json):
        source = open_source(file, options["fps"])
        check_output(options["output"], source, options["overwrite"])
        written = write_mask(options["output"], source, frames(source))
    show(written, written.text, as_json)


def _background(source: Source, options: dict[str, Any]) -> tuple[int, int, int]:
    from scail2_rt.runtime.masks.palette import background_of

    role = options["role"] or ("reference" if source.kind == "image" else "driving")
    return background_of(options["mode"], cast("Role", role))


def _matte(source: Source, options: dict[str, Any]) -> Matte:
    from scail2_rt.runtime.masks.sources import Matte

    return Matte(options["colour"], _background(source, options), options["threshold"], options.get("invert", False))
