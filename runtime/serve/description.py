"""The description of a video's fields in `/openapi.json`."""

from typing import Any

from scail2_rt.runtime.core.request import ANCHORS, NOISE_DEVICES, SCHEDULERS
from scail2_rt.runtime.core.window import FITS
from scail2_rt.runtime.jobs.options import PRESETS
from scail2_rt.runtime.serve.fields import FLAGS, NUMBERS, REFERENCES, WHOLE

ABOUT = {
    "prompt": "Description of the video (a description, not an instruction).",
    "input_reference": "Reference image of the character: a file, {file_id} or {url}.",
    "video_reference": "Driving clip; gives motion, frame rate and audio: a file, {file_id} or {url}.",
    "mask_reference": "Colour mask of input_reference.",
    "video_mask_reference": "Colour mask of video_reference.",
    "extra_refs": "Other views of the character: [[image, mask], …], each {file_id} or {url}.",
    "masks_id": "Id of a POST /v1/masks job whose masks are used. Without it and without masks, masks are made first.",
    "mask_prompt": "Making masks: text that names what to segment, as in 'human. character.'.",
    "max_characters": "Making masks: the largest number of characters.",
    "sort": "Making masks: order of the characters, left-to-right or area.",
    "points": "Making masks: characters by points on them, ['[frame:|image:]x,y[:colour]', …].",
    "boxes": "Making masks: characters by boxes, ['[frame:|image:]x0,y0,x1,y1[:colour]', …].",
    "pairs": "Making masks: driving character = reference character, as in '1=2,2=1'.",
    "one_to_many": "Making masks: give each reference character the driving character that its mask overlaps most.",
    "model": "Name of the model in /v1/models; default: the only one.",
    "size": "WxH of the video in pixels, multiples of 32; default: derived from the scene.",
    "seconds": "Length of the video in seconds; default: the length of the driving clip.",
    "preset": f"One of {', '.join(PRESETS)}: sets scheduler, steps, shift and guidance; each field overrides it.",
    "mode": "auto, animate (background of the reference image) or replace (scene of the driving clip).",
    "fit": f"How inputs of another aspect ratio fill the frame: {', '.join(FITS)}.",
    "negative_prompt": "Description of what to avoid (used when guidance is above 1).",
    "scheduler": f"One of {', '.join(SCHEDULERS)}.",
    "steps": "Denoising steps per segment.",
    "shift": "Shift of the noise schedule towards high noise.",
    "guidance": "Guidance scale; at 1 or less each step runs one guidance pass instead of two.",
    "seed": "Seed of the noise.",
    "noise_device": f"Device that draws the noise: {', '.join(NOISE_DEVICES)}.",
    "start": "Index of the first driving frame.",
    "frames": "Number of driving frames; default: to the end.",
    "segment_length": "Frames per segment, 4n+1.",
    "segment_overlap": "Frames that a segment shares with the previous one, 4n+1.",
    "overlap_blend": "Fade the last N frames of the overlap from one segment into the next.",
    "anchor_color": f"Match the colours of later segments to: {', '.join(ANCHORS)}.",
    "fit_reference": "Replace mode: scale the reference character to the height of the driving character.",
    "allow_mask_problems": "Continue with masks that the check calls unusable.",
    "codec": "h264, hevc, av1 or vp9.",
    "crf": "Constant rate factor; 0 is lossless.",
    "metadata": "Store the settings and the hashes of the inputs in the video; default: false.",
}


def video_body() -> dict[str, Any]:
    """The request body, for `openapi_extra` of the calls that create a job."""
    properties: dict[str, dict[str, Any]] = {
        name: _schema(name) | {"description": about} for name, about in ABOUT.items()
    }
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


def _schema(name: str) -> dict[str, Any]:
    if name in (*WHOLE, "max_characters"):
        return {"type": "integer"}
    if name in NUMBERS:
        return {"type": "number"}
    if name in (*FLAGS, "one_to_many"):
        return {"type": "boolean"}
    if name in ("points", "boxes"):
        return {"type": "array", "items": {"type": "string"}}
    return {"type": "array" if name == "extra_refs" else "string"}
