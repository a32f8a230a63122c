"""Types of the connections between nodes, and the inputs that several nodes have."""

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
        "image", tooltip="The character. Further pictures of the batch are further views of it (at most 6)."
    )


def driving_input(**options: Any) -> Any:
    return io.MultiType.Input(
        "driving", CLIPS, tooltip="The motion: a VIDEO (with its rate and sound) or a batch of frames.", **options
    )


def mask_input(name: str, whose: str, **options: Any) -> Any:
    return io.MultiType.Input(
        name,
        MASKS,
        tooltip=f"{whose}: from the Masks node; a colour-coded IMAGE or VIDEO; a MASK of one character; SAM 3 tracks.",
        **options,
    )


def frame_inputs() -> list[Any]:
    """How large the frame is, and how pictures of another shape lie in it."""
    return [
        io.Int.Input("width", default=0, min=0, max=4096, step=32, tooltip="Multiple of 32; 0: as the scene lies."),
        io.Int.Input("height", default=0, min=0, max=4096, step=32, tooltip="Multiple of 32; 0: as the scene lies."),
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default="auto",
            tooltip="official: the middle crop of the public code; crop: one window on the characters; pad: the whole "
            "picture with margins; auto: the first that keeps the characters.",
        ),
    ]
