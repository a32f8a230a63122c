"""Build a `Request` from the inputs of a node."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui.frames import TensorFrames
from scail2_rt.runtime.comfyui.mask_inputs import MaskFrames, MaskStyle, mask_frames
from scail2_rt.runtime.core.request import Clip, ClipSource, Request
from scail2_rt.runtime.core.window import Size
from scail2_rt.runtime.media.clips import probe


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The connected inputs.

    images                         batch of reference images, float [N, H, W, 3] in 0..1
    driving                        driving clip
    reference_mask, driving_mask   any mask type of `mask_inputs`
    styles                         conversion options for reference mask and driving mask"""

    images: Any
    driving: ClipSource
    reference_mask: Any
    driving_mask: Any
    styles: tuple[MaskStyle, MaskStyle] = (MaskStyle(), MaskStyle())

    def references(self) -> tuple[TensorFrames, MaskFrames]:
        """The reference images and their masks. Raises InputError if their numbers differ."""
        images = TensorFrames(self.images, "reference image")
        masks = mask_frames(self.reference_mask, self.styles[0], "reference mask")
        if len(images) != len(masks):
            raise InputError(
                f"The batches have {len(images)} reference image(s) and {len(masks)} reference mask(s). Connect one "
                "mask per image."
            )
        return images, masks

    def mask_clip(self) -> Clip:
        """The driving masks as a clip with the frame rate of the driving clip."""
        frames = mask_frames(self.driving_mask, self.styles[1], "driving mask")
        return Clip(frames, rate_of(self.driving), "driving mask")


def rate_of(clip: ClipSource) -> Fraction:
    """The frame rate of a clip."""
    return clip.rate if isinstance(clip, Clip) else probe(clip).frame_rate


def request_of(given: Given, options: Mapping[str, Any]) -> Request:
    """The request. options: other fields of `Request`. Raises InputError for inputs that do not fit together and for
    values out of range."""
    images, masks = given.references()
    pairs: list[tuple[np.ndarray, np.ndarray]] = [(images[i], masks[i]) for i in range(len(images))]
    (image, mask), *extra = pairs
    return Request(image, mask, given.driving, given.mask_clip(), extra_refs=tuple(extra), **options)


def frame_size(width: int, height: int) -> Size | None:
    """(H, W) of the video in pixels; None if both are 0. Raises InputError if only one is 0."""
    if bool(width) != bool(height):
        raise InputError(f"width is {width} and height {height}. Give both, or set both to 0 for the default size.")
    return (height, width) if width else None
