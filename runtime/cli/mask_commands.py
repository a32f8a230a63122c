"""The command group `scail2-rt masks`: check, show, mend and make the colour masks of a case, without weights.

Only click is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

    from scail2_rt.runtime.core.progress import Tell
    from scail2_rt.runtime.masks.check import CheckResult
    from scail2_rt.runtime.masks.files import Source
    from scail2_rt.runtime.masks.palette import Role
    from scail2_rt.runtime.masks.sources import Matte

UNUSABLE = 2  # exit code of a check that found an error
_PROBING, _CHECKING = 0.05, 0.2  # shares of the work of writing a mask and of a preview


CASE_OPTIONS = in_section(
    "Inputs (mask files, a case folder, or the four files of a case)", CASE, *FILES, MODE, SIZE, FIT
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
        help="Frame rate of the video made from a folder of images; give the driving clip's.  [default: 25]",
    ),
)
_PURPOSE = (
    option(
        "--mode",
        type=click.Choice(["animate", "replace"]),
        required=True,
        help="What the mask is for. A background that shows becomes white (the reference's in animate mode, the "
        "driving clip's in replace mode); one that does not becomes black.",
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
        help="Pixels of this 8-bit level and above belong to the character.",
    ),
)


@click.group(invoke_without_command=True)
@click.pass_context
def masks(ctx: click.Context) -> None:
    """Check, show, mend and make the colour masks of a case. Only `make` needs weights.

    White: background that shows. Black: what is hidden. Red, green, blue, yellow, magenta, cyan: one colour per
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

    It finds wrong colours, soft edges, fragments, holes, specks, a character exchanged with the background, areas that
    jump, and what does not fit the mode or the frame.
    Exit code 0 when they can be used, warnings or not; 2 when an error was found, which generate refuses."""
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
        help="Frames on the sheet. Frames with findings of the check are preferred.",
    ),
    OVERWRITE,
)
@reporting
def preview(files: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Lay the masks over the pictures: a contact sheet (masks.png) and a video of all frames (masks.mp4).

    Hidden parts are dark and hatched, characters tinted and outlined, pixels in no class orange. For a case, a border
    shows the part of each picture that the output frame shows. At most one of FILES may be a video. The video is at
    most 1280 pixels wide or high."""
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
        help="Make the background white or black: pixels of the other one change.",
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

    Near colours become the mask colour, fringes of video and JPEG coding take the colour of their area, specks are
    removed. The result is lossless."""
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
    """Make a mask from the alpha channel of FILE (image, video or folder of images): the character is where it is
    opaque.

    Videos with alpha: ProRes 4444, PNG and QuickTime Animation in .mov, VP8 and VP9 in .webm, animated WebP, GIF."""
    from scail2_rt.runtime.masks.sources import masks_from_alpha

    _write(file, options, as_json, lambda source, tell: masks_from_alpha(source, _matte(source, options), tell))


@masks.command(cls=SectionCommand)
@click.argument("matte", type=PATH)
@WRITE_OPTIONS
@in_section("Mask", *_MATTE, option("--invert", is_flag=True, help="The character is dark, not bright."))
@reporting
def from_grey(matte: Path, as_json: bool, **options: Any) -> None:
    """Make a mask from the grey MATTE (image, video or folder of images): the character is where it is bright."""
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
    """Make a mask from LABELS: an indexed or grey image whose pixels are numbers, a folder of them, or a grey video.

    A video must be lossless, or its labels far apart (0, 128, 255)."""
    from scail2_rt.runtime.masks.sources import masks_from_labels, parse_order

    order = parse_order(options["order"])

    def frames(source: Source, tell: Tell) -> Iterator[np.ndarray]:
        return masks_from_labels(source, order, _background(source, options), tell)

    _write(labels, options, as_json, frames)


def _checked(files: tuple[Path, ...], options: dict[str, Any], tell: Tell) -> tuple[CheckResult, Any]:
    """Return what the check says, and the files of the case if it is one."""
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
        return check_files(files, tell), None
    if files:
        raise InputError(f"{files[0]} was given beside a case: check mask files by themselves or the files of a case.")
    mode = case.mode if options["case"] is not None else options["mode"]
    return check_case(case, options["extra_refs"], mode, options["size"], options["fit"], tell=tell), case


def _write(
    file: Path, options: dict[str, Any], as_json: bool, frames: Callable[[Source, Tell], Iterable[np.ndarray]]
) -> None:
    """Write the mask that `frames` makes from a source."""
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
