"""A `Request` of what is connected to a node."""

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
    """Pictures and masks as they are connected: a batch of reference images, a clip, and what ComfyUI calls masks.

    styles: how masks that are not coloured yet are made, of the reference and of the driving clip"""

    images: Any
    driving: ClipSource
    reference_mask: Any
    driving_mask: Any
    styles: tuple[MaskStyle, MaskStyle] = (MaskStyle(), MaskStyle())

    def references(self) -> tuple[TensorFrames, MaskFrames]:
        """The reference images and their masks, as many of each. InputError for another number of masks."""
        images = TensorFrames(self.images, "reference image")
        masks = mask_frames(self.reference_mask, self.styles[0], "reference mask")
        if len(images) != len(masks):
            raise InputError(
                f"There are {len(images)} reference images and {len(masks)} reference masks: give one mask for each."
            )
        return images, masks

    def mask_clip(self) -> Clip:
        """The driving masks, at the rate of the driving clip."""
        frames = mask_frames(self.driving_mask, self.styles[1], "driving mask")
        return Clip(frames, rate_of(self.driving), "driving mask")


def rate_of(clip: ClipSource) -> Fraction:
    return clip.rate if isinstance(clip, Clip) else probe(clip).frame_rate


def request_of(given: Given, options: Mapping[str, Any]) -> Request:
    """The request for what is connected. InputError for what does not fit together and for numbers out of range."""
    images, masks = given.references()
    pairs: list[tuple[np.ndarray, np.ndarray]] = [(images[i], masks[i]) for i in range(len(images))]
    (image, mask), *extra = pairs
    return Request(image, mask, given.driving, given.mask_clip(), extra_refs=tuple(extra), **options)


def frame_size(width: int, height: int) -> Size | None:
    """(H, W) of the video; None for 0 and 0. InputError for one of them alone."""
    if bool(width) != bool(height):
        raise InputError(f"width is {width} and height {height}: give both, or set both to 0 for the usual size.")
    return (height, width) if width else None
