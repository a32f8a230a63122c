"""Masks that the service makes: for a video job without masks, or for a masks job, which makes only them.

The masks are written to `video.masks/` in the job's folder (a local run puts them beside `video.mp4` in the same way)
and linked under the names of the inputs. `look` does the checks that need no neural network.
"""

import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Listener

if TYPE_CHECKING:
    from scail2_rt.runtime.masks.make.make import Masks
    from scail2_rt.runtime.masks.make.options import MaskOptions
    from scail2_rt.runtime.session.session import Session

FOLDER = "video.masks"
INPUTS = ("mask_reference", "video_mask_reference")
ROOM_BYTES = 6 << 30  # free GPU memory for a segmenter; with less, the engines' weights are released first


def mask_options(masking: Mapping[str, Any], options: Mapping[str, Any]) -> "MaskOptions":
    """`MaskOptions` from a job's masking options and video options. Raises InputError for invalid ones."""
    from scail2_rt.runtime.masks.make.options import MaskOptions

    given = {"prompt" if name == "mask_prompt" else name: value for name, value in masking.items()}
    shared = {name: options[name] for name in ("mode", "start", "frames") if options.get(name) is not None}
    given |= {name: tuple(given[name]) for name in ("points", "boxes") if name in given}
    if given.get("weights") is not None:
        given["weights"] = Path(given["weights"])
    return MaskOptions(**given, **shared)


def look(folder: Path, options: Mapping[str, Any], masking: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a job whose masks are made: those of the video with these masks, as `check_process.facts_of`. Raises
    InputError if the masks cannot be made."""
    from scail2_rt.runtime.core.geometry import oriented, plan_segments
    from scail2_rt.runtime.core.request import DEFAULT_SIZE
    from scail2_rt.runtime.masks.make.make import plan_masks
    from scail2_rt.runtime.media.clips import nearest_frames
    from scail2_rt.runtime.media.images import load_image

    image, clip = folder / "input_reference", folder / "video_reference"
    rate = _rate(options)
    asked = mask_options(masking, _own_frames(options, clip))
    plan = plan_masks(image, clip, folder / FOLDER, asked)
    scene = load_image(image).shape[:2] if asked.mode != "replace" else (plan.video.height, plan.video.width)
    height, width = options.get("size") or oriented(DEFAULT_SIZE, *scene)
    given = [options.get("segment_length", 81), options.get("segment_overlap", 5)]
    frames = plan.frames
    if rate is not None:
        frames = len(nearest_frames(plan.video, rate)[options.get("start", 0) :][: options.get("frames")])
    return {
        "frames": frames,
        "height": height,
        "width": width,
        "frame_rate": str(rate or plan.video.frame_rate),
        "segments": len(plan_segments(frames, *given)),
        "mode": "animate" if asked.mode == "auto" else asked.mode,
        "warnings": list(plan.video.warnings),
        "framing": "",
    }


def make(session: "Session", job: Mapping[str, Any], folder: Path, heard: Listener, cancel: Event) -> "Masks":
    """Make the masks of a job, unless an earlier attempt has finished them, and link them as inputs. heard: progress
    listener; cancel: makes this raise Cancelled."""
    from scail2_rt.runtime.masks.make.make import make_masks

    _make_room(session)
    image, clip = folder / "input_reference", folder / "video_reference"
    asked = mask_options(job["masking"], _own_frames(job["options"], clip))
    masks = make_masks(image, clip, folder / FOLDER, asked, on_progress=heard, cancel=cancel)
    for made, name in zip((masks.mask_image, masks.mask_video), INPUTS, strict=True):
        (folder / name).unlink(missing_ok=True)
        os.link(made, folder / name)
    return masks


def _rate(options: Mapping[str, Any]) -> Fraction | None:
    return Fraction(options["fps"]) if options.get("fps") is not None else None


def _own_frames(options: Mapping[str, Any], clip: Path) -> dict[str, Any]:
    """Options whose `start` and `frames` count the clip's own frames, as masks are made of these."""
    from scail2_rt.runtime.media.clips import own_span

    start, frames = own_span(clip, _rate(options), options.get("start", 0), options.get("frames"))
    return {**options, "start": start, "frames": frames}


def _make_room(session: "Session") -> None:
    """If less than `ROOM_BYTES` of GPU memory is free, release the engines' weights. The next video loads them."""
    import torch

    if session.engines.device.type == "cuda" and torch.cuda.mem_get_info(session.engines.device)[0] < ROOM_BYTES:
        session.constants.drop()
        session.engines.release("")
        torch.cuda.empty_cache()


def take_over(made: Iterable[Path], folder: Path) -> None:
    """Link the masks of an earlier job as inputs of this one. Raises InputError if they do not exist."""
    try:
        for file in made:
            os.link(file, folder / file.name)
    except FileNotFoundError:
        raise InputError(
            "The job masks_id has no masks: it is unfinished or failed. Wait for it, or make masks again."
        ) from None
