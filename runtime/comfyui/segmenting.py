"""Masks that are made by the segmenter, where a graph has none: the one place that calls `make_masks`.

Its result is files, without loss, in ComfyUI's temporary folder, which ComfyUI empties when it starts; the masks are
read from there a few frames at a time."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.mask_inputs import MaskFrames, MaskStyle, frames_of_file
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import Clip, ClipSource
from scail2_rt.runtime.masks.make.make import make_masks, segmenter_for
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.media.clips import clip_hash
from scail2_rt.runtime.media.images import load_mask_image


@dataclass(frozen=True, slots=True)
class Segmented:
    """Colour masks of one reference and of a clip, and sentences about what was decided."""

    reference: MaskFrames
    driving: MaskFrames
    notes: tuple[str, ...]


def segmented(
    image: np.ndarray, driving: ClipSource, options: MaskOptions, room: Callable[[int], None], show: Listener
) -> Segmented:
    """image uint8 [H, W, 3]. room(bytes): is called before the segmenter is loaded. InputError where there is no
    segmenter, nobody was found, or a place lies outside its picture."""
    segmenter = segmenter_for(options)
    if segmenter is not None:
        room(segmenter.memory_bytes)
    folder = host.temporary_folder() / "scail2_rt_masks" / _key(image, driving, options)
    made = make_masks(image, driving, folder, options, on_progress=show, cancel=host.Interruption())
    pixels = load_mask_image(made.mask_image)
    reference = MaskFrames((1, *pixels.shape), lambda first, last: pixels[None][first:last], "the segmenter")  # type: ignore[arg-type]
    return Segmented(reference, frames_of_file(made.mask_video, MaskStyle()), made.notes)


def _key(image: np.ndarray, driving: ClipSource, options: MaskOptions) -> str:
    """A folder for each pair of pictures and options; in it `make_masks` finds what is there of the same."""
    source = clip_hash(driving) if isinstance(driving, Clip) else str(Path(driving))
    digest = hashlib.sha256(repr((image.shape, source, options)).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:16]
