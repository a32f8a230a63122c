"""The connection types between nodes, and inputs that several nodes share."""

from typing import Any

from comfy_api.latest import io

from scail2_rt.runtime.core.window import FITS

CATEGORY = "SCAIL-2"
Engines = io.Custom("SCAIL2_ENGINES")  # scail2_rt.runtime.comfyui.sessions.Engines
ColourMask = io.Custom("SCAIL2_MASK")  # scail2_rt.runtime.comfyui.mask_inputs.MaskFrames
Tracks = io.Custom("SAM3_TRACK_DATA")
MODES = ["animate", "replace"]
MASKS = [ColourMask, io.Image, io.Mask, Tracks, io.Video]
CLIPS = [io.Image, io.Video]


def reference_input() -> Any:
    return io.Image.Input(
        "image", tooltip="Reference image of the character. Further images of the batch are further views (at most 6)."
    )


def driving_input(**options: Any) -> Any:
    return io.MultiType.Input(
        "driving", CLIPS, tooltip="Driving clip: a VIDEO (with frame rate and audio) or a batch of images.", **options
    )


def mask_input(name: str, whose: str, **options: Any) -> Any:
    return io.MultiType.Input(
        name,
        MASKS,
        tooltip=f"{whose}: from the Masks node; a colour-coded IMAGE or VIDEO; a MASK of one character; SAM 3 tracks.",
        **options,
    )


def frame_inputs() -> list[Any]:
    """The inputs for the size of the video's frame, and for inputs of another aspect ratio."""
    return [
        io.Int.Input("width", default=0, min=0, max=4096, step=32, tooltip="Pixels, multiple of 32; 0: default size."),
        io.Int.Input("height", default=0, min=0, max=4096, step=32, tooltip="Pixels, multiple of 32; 0: default size."),
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default="auto",
            tooltip="official: centre crop, as in the official code; crop: one window around the characters; pad: the "
            "full image with margins; auto: the first of these that keeps the characters.",
        ),
    ]
