"""`scail2-rt masks make`. Only click is imported here, so that `--help` is fast."""

from typing import Any

import click

from scail2_rt.runtime.cli.config import config_option
from scail2_rt.runtime.cli.output import show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting
from scail2_rt.runtime.cli.segmenter_options import MAKING
from scail2_rt.runtime.cli.types import MemorySize


@click.command(cls=SectionCommand)
@config_option
@in_section(
    "Inputs",
    option("--image", type=PATH, required=True, metavar="FILE", help="Reference image: the character."),
    option("--driving", type=PATH, required=True, metavar="FILE", help="Driving clip: the motion."),
    option(
        "--mode",
        type=click.Choice(["animate", "replace"]),
        default="animate",
        show_default=True,
        help="animate keeps the reference's background; replace keeps the driving clip's scene.",
    ),
    option("--start", type=int, default=0, show_default=True, metavar="FRAME", help="First driving frame to use."),
    option("--frames", type=int, metavar="N", help="Number of driving frames to use.  [default: to the end]"),
)
@in_section("Characters", *MAKING)
@in_section(
    "Output",
    option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The case folder to write."),
    option("--overwrite", is_flag=True, help="Replace the case in the folder."),
    option("--vram-limit", type=MemorySize(), metavar="SIZE", help="GPU memory that the segmenter may use."),
)
@reporting
def make(as_json: bool, **options: Any) -> None:
    """Make the masks of a reference image and a driving clip.

    The result is a case folder for `generate --case`. It holds the image, the clip, both masks and masks.png, a contact
    sheet. Needs a segmenter: `scail2-rt download --segmenter sam2`."""
    from scail2_rt.runtime.cli.progress import open_progress
    from scail2_rt.runtime.jobs.masks import make_case

    with stdout_for(as_json), open_progress() as listener:
        made = make_case(options, listener)
    show(made.document, made.text, as_json)
