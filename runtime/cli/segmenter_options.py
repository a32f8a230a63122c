"""The options of masks that are made inside, for `generate` and `masks make`. Only click is imported here."""

import click

from scail2_rt.runtime.cli.sections import PATH, option

SEGMENTERS = ("auto", "sam2", "sam3")  # runtime.masks.make.options.SEGMENTERS
SORTS = ("left-to-right", "area")  # runtime.masks.make.options.SORTS

MAKING = (
    option(
        "--segmenter",
        type=click.Choice(SEGMENTERS),
        default="auto",
        show_default=True,
        help="What cuts figures out. auto: SAM 3 where `download --segmenter sam3` has put it, else SAM 2.",
    ),
    option("--segmenter-weights", type=PATH, metavar="DIR", help="A folder that holds a segmenter, taken as it is."),
    option(
        "--segmenter-device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where it runs. auto: the GPU, if there is one and --vram-limit lets it in.",
    ),
    option(
        "--mask-prompt",
        metavar="TEXT",
        help='What to look for, parts ended by full stops, as in "person. dog.".  [default: human. character.]',
    ),
    option(
        "--max-characters",
        type=int,
        default=2,
        show_default=True,
        metavar="N",
        help="How many figures are kept, the surest.",
    ),
    option(
        "--sort",
        type=click.Choice(SORTS),
        default="left-to-right",
        show_default=True,
        help="Which figure is the first: the leftmost, or the largest.",
    ),
    option(
        "--point",
        "points",
        multiple=True,
        metavar="[FRAME:]X,Y[:COLOUR]",
        help="A figure by a point on it, in pixels of the driving video's frame FRAME (the first by default) or of the "
        "reference (image:X,Y); may be repeated.",
    ),
    option(
        "--box",
        "boxes",
        multiple=True,
        metavar="[FRAME:]X0,Y0,X1,Y1[:COLOUR]",
        help="A figure by a box around it, as with --point.",
    ),
    option(
        "--pairs",
        default="",
        metavar="LIST",
        help="Who drives whom, as in 1=2,2=1: the driving video's figure 1 moves the reference's figure 2.  "
        "[default: 1=1,2=2, …; with fewer references than drivers the nearest]",
    ),
    option(
        "--one-to-many",
        is_flag=True,
        help="Of several driving figures a reference takes the one that its mask overlaps most in the first frame.",
    ),
    option(
        "--image-from",
        type=PATH,
        metavar="FILE",
        help="The reference's figures, cut out by another tool: SAM3_TRACK_DATA (.pt, .npz, .safetensors), a black and "
        "white matte, or an image with alpha.",
    ),
    option(
        "--driving-from",
        type=PATH,
        metavar="FILE",
        help="The driving video's figures, as with --image-from, or a folder.",
    ),
)
