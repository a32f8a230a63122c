"""Make masks with the segmenter, for graphs without masks. The only caller of `make_masks` in the nodes.

The masks are lossless files in ComfyUI's temporary folder, which ComfyUI empties when it starts. They are read a few
frames at a time."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.mask_inputs import MaskFrames, MaskStyle, frames_of_file
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import Clip, ClipSource
from scail2_rt.runtime.masks.make.make import make_masks, plan_masks
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.media.clips import clip_hash
from scail2_rt.runtime.media.images import load_mask_image


@dataclass(frozen=True, slots=True)
class Segmented:
    """Colour masks of one reference image and of a clip. notes: sentences about the segmenter's choices."""

    reference: MaskFrames
    driving: MaskFrames
    notes: tuple[str, ...]


def segmented(
    image: np.ndarray, driving: ClipSource, options: MaskOptions, room: Callable[[int], None], show: Listener
) -> Segmented:
    """Make the masks, or read those of an earlier call with the same inputs and options.

    image: uint8 [H, W, 3]; room(bytes): called before the segmenter is loaded; show: progress listener. Raises
    InputError if no segmenter is installed, no character is found or a point or box is outside its image, and
    Cancelled after ComfyUI's cancel button."""
    folder = host.temporary_folder() / "scail2_rt_masks" / _key(image, driving, options)
    plan = plan_masks(image, driving, folder, options)
    if plan.there is None and plan.segmenter is not None:
        room(plan.segmenter.memory_bytes)
    made = make_masks(image, driving, folder, options, on_progress=show, cancel=host.Interruption())
    pixels = load_mask_image(made.mask_image)
    reference = MaskFrames((1, *pixels.shape), lambda first, last: pixels[None][first:last], "the segmenter")  # type: ignore[arg-type]
    return Segmented(reference, frames_of_file(made.mask_video, MaskStyle()), made.notes)


def _key(image: np.ndarray, driving: ClipSource, options: MaskOptions) -> str:
    """The folder's name, a hash of inputs and options, so that `make_masks` finds the masks of an earlier call."""
    source = clip_hash(driving) if isinstance(driving, Clip) else str(Path(driving))
    digest = hashlib.sha256(repr((image.shape, source, options)).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]
