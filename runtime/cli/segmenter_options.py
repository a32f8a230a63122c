"""The options for making masks, shared by `generate` and `masks make`. Only click is imported here."""

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
        help="Model that finds the characters. auto: SAM 3 if `download --segmenter sam3` was run, else SAM 2.",
    ),
    option(
        "--segmenter-weights",
        type=PATH,
        metavar="DIR",
        help="Folder of a segmenter.  [default: one in the cache folder]",
    ),
    option(
        "--segmenter-device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Device of the segmenter. auto: the GPU, if there is one and --vram-limit allows it.",
    ),
    option(
        "--mask-prompt",
        metavar="TEXT",
        help='What to look for, each part with a full stop, as in "person. dog.".  [default: human. character.]',
    ),
    option(
        "--max-characters",
        type=int,
        default=2,
        show_default=True,
        metavar="N",
        help="Maximum number of characters. Those with the highest confidence are kept.",
    ),
    option(
        "--sort",
        type=click.Choice(SORTS),
        default="left-to-right",
        show_default=True,
        help="Order of the characters: from left to right, or by area, the largest first.",
    ),
    option(
        "--point",
        "points",
        multiple=True,
        metavar="[FRAME:]X,Y[:COLOUR]",
        help="Select a character by a point on it, in pixels of frame FRAME of the driving clip (by default the first) "
        "or of the reference image (image:X,Y); may be repeated.",
    ),
    option(
        "--box",
        "boxes",
        multiple=True,
        metavar="[FRAME:]X0,Y0,X1,Y1[:COLOUR]",
        help="Select a character by a box around it; FRAME as for --point; may be repeated.",
    ),
    option(
        "--pairs",
        default="",
        metavar="LIST",
        help="Which character drives which, as in 1=2,2=1: character 1 of the driving clip moves character 2 of the "
        "reference image.  [default: 1=1,2=2, …; if the clip has more characters, the nearest]",
    ),
    option(
        "--one-to-many",
        is_flag=True,
        help="If the clip has more characters than the reference image, each reference follows the one that its mask "
        "overlaps most in the first frame.",
    ),
    option(
        "--image-from",
        type=PATH,
        metavar="FILE",
        help="Segmentation of the reference image by another tool: SAM3_TRACK_DATA (.pt, .npz, .safetensors), a black "
        "and white matte, or an image with alpha.",
    ),
    option(
        "--driving-from",
        type=PATH,
        metavar="FILE",
        help="Segmentation of the driving clip by another tool: a file as for --image-from, or a folder of images.",
    ),
)
