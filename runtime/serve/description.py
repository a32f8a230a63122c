"""What `/openapi.json` says of the fields of a video."""

from typing import Any

from scail2_rt.runtime.core.request import ANCHORS, NOISE_DEVICES, SCHEDULERS
from scail2_rt.runtime.core.window import FITS
from scail2_rt.runtime.jobs.options import PRESETS
from scail2_rt.runtime.serve.fields import FLAGS, NUMBERS, REFERENCES, WHOLE

ABOUT = {
    "prompt": "What the video shows (a description, not an instruction).",
    "input_reference": "The character: a file, {file_id} or {url}.",
    "video_reference": "The motion, its frame rate and its sound: a file, {file_id} or {url}.",
    "mask_reference": "Colour mask of input_reference.",
    "video_mask_reference": "Colour mask of video_reference.",
    "extra_refs": "Other views of the character: [[image, mask], …], each {file_id} or {url}.",
    "masks_id": "Masks that POST /v1/masks has made. Without it and without masks, they are made first.",
    "mask_prompt": "Masks that are made: what to look for, as in 'human. character.'.",
    "max_characters": "Masks that are made: how many figures are kept.",
    "sort": "Masks that are made: which figure is the first, left-to-right or area.",
    "points": "Masks that are made: figures by points on them, ['[frame:|image:]x,y[:colour]', …].",
    "boxes": "Masks that are made: figures by boxes, ['[frame:|image:]x0,y0,x1,y1[:colour]', …].",
    "pairs": "Masks that are made: driving figure = reference figure, as in '1=2,2=1'.",
    "one_to_many": "Masks that are made: one reference figure for every driving one.",
    "model": "The name that /v1/models tells; may be left out.",
    "size": "WxH of the video, multiples of 32; left out: as the scene that is shown.",
    "seconds": "Length of the video; left out: of the driving clip.",
    "preset": f"One of {', '.join(PRESETS)}: scheduler, steps, shift and guidance, each of which overrides it.",
    "mode": "auto, animate (the reference's background) or replace (the driving video's scene).",
    "fit": f"How pictures of another shape lie in the frame: {', '.join(FITS)}.",
    "negative_prompt": "What it should not show (used when guidance is above 1).",
    "scheduler": f"One of {', '.join(SCHEDULERS)}.",
    "steps": "Denoising steps of each segment.",
    "shift": "Shift of the noise schedule towards high noise.",
    "guidance": "Guidance scale; 1 or less runs one pass per step instead of two.",
    "seed": "Seed of the noise.",
    "noise_device": f"Where noise is drawn: {', '.join(NOISE_DEVICES)}.",
    "start": "First driving frame.",
    "frames": "How many driving frames; left out: to the end.",
    "segment_length": "Frames denoised together, 4n+1.",
    "segment_overlap": "Frames that a segment takes over from the one before, 4n+1.",
    "overlap_blend": "Fade the last N frames of the overlap from one segment into the next.",
    "anchor_color": f"Hold later segments' colours to: {', '.join(ANCHORS)}.",
    "fit_reference": "Replace mode: make the reference character as tall as the driving one.",
    "allow_mask_problems": "Go on with masks that the check calls unusable.",
    "codec": "h264, hevc, av1 or vp9.",
    "crf": "Constant rate factor, 0 is lossless.",
    "metadata": "Store the settings and the hashes of the inputs in the video; by default none are stored.",
}


def video_body() -> dict[str, Any]:
    """For `openapi_extra` of the calls that take a job."""
    properties = {name: {"type": _type(name), "description": about} for name, about in ABOUT.items()}
    form = {
        name: schema | {"format": "binary"} if name in REFERENCES else schema for name, schema in properties.items()
    }
    schema = {"type": "object", "required": ["input_reference", "video_reference"]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": schema | {"properties": form}},
                "application/json": {"schema": schema | {"properties": properties}},
            },
        }
    }


def _type(name: str) -> str:
    if name in WHOLE:
        return "integer"
    if name in NUMBERS:
        return "number"
    return "boolean" if name in FLAGS else "array" if name == "extra_refs" else "string"
