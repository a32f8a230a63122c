"""The node that makes colour masks from the graph's masks or with a segmenter, checks them and shows the findings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.animate_node import Shown, told
from scail2_rt.runtime.comfyui.clip_inputs import driving_clip
from scail2_rt.runtime.comfyui.findings import examined, masks_alone, sheet, told_text
from scail2_rt.runtime.comfyui.frames import TensorFrames
from scail2_rt.runtime.comfyui.mask_inputs import ORDER, SORTS, MaskStyle, parse_figures
from scail2_rt.runtime.comfyui.requests import Given
from scail2_rt.runtime.comfyui.segmenting import segmented
from scail2_rt.runtime.comfyui.types import CATEGORY, MODES, ColourMask, driving_input, mask_input, reference_input
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.make.options import AUTHORS_PROMPT, SEGMENTERS, MaskOptions
from scail2_rt.runtime.masks.make.options import SORTS as SORTS_MADE


class MakeMasks(io.ComfyNode):
    """Makes masks from SAM 3 tracks, mattes or colour-coded images; shows findings and a contact sheet."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Scail2Masks",
            display_name="SCAIL-2 Masks",
            category=CATEGORY,
            description="Makes and checks colour masks, from SAM 3 tracks, MASKs, colour-coded images or a segmenter.",
            inputs=[
                reference_input(),
                driving_input(),
                mask_input("reference_mask", "Characters in the reference image", optional=True),
                mask_input("driving_mask", "Characters in the driving clip", optional=True),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    tooltip="animate keeps the background of the reference image, replace the scene of the driving "
                    "clip. Sets the background colours of the masks.",
                ),
                io.Boolean.Input(
                    "set_background",
                    default=True,
                    tooltip="Also replace the background of colour-coded images by that of the mode. ComfyUI's own "
                    "node paints a black background for the reference in both modes.",
                ),
                io.Combo.Input("colour", options=list(ORDER), tooltip="Colour of the character in a MASK."),
                io.Combo.Input(
                    "sort", options=list(SORTS), tooltip="Order in which the characters of a track get colours."
                ),
                io.String.Input("figures", default="", tooltip="Characters of a track to use, as in 0,2; empty: all."),
                *segmenter_inputs(),
            ],
            outputs=[
                ColourMask.Output("reference_masks", display_name="reference_mask"),
                ColourMask.Output("driving_masks", display_name="driving_mask"),
                io.String.Output("findings", display_name="findings"),
            ],
        )

    @classmethod
    def execute(cls, mode: str, **inputs: Any) -> Any:
        with torch.inference_mode(False), told():
            style = {"colour": inputs["colour"], "sort": inputs["sort"], "figures": parse_figures(inputs["figures"])}
            styles = MaskStyle.pair(mode, repaint=inputs["set_background"], **style)
            driving = driving_clip(inputs["driving"], 16).source
            masks, notes = masks_of(mode, driving, inputs)
            given = Given(inputs["image"], driving, *masks, styles)
            result = masks_alone(examined(given, mode))
            text = "\n".join([told_text(result), *notes])
            host.show_text(text)
            picture = ui.PreviewImage(sheet(given, result, windows=False))
            return io.NodeOutput(given.references()[1], given.mask_clip().frames, text, ui=picture)


def segmenter_inputs() -> list[Any]:
    """The inputs for the segmenter, which is used if no masks are connected."""
    return [
        io.Combo.Input("segmenter", options=list(SEGMENTERS), optional=True, tooltip="Used if no masks are connected."),
        io.String.Input("segmenter_weights", default="", optional=True, tooltip="Folder; empty: the downloaded one."),
        io.String.Input("mask_prompt", default=AUTHORS_PROMPT, optional=True, tooltip="What to segment."),
        io.Int.Input("max_characters", default=2, min=1, max=len(ORDER), optional=True),
        io.String.Input(
            "points",
            default="",
            optional=True,
            tooltip="[frame:]x,y[:colour], separated by spaces; image:x,y is a point in the reference image.",
        ),
        io.String.Input("boxes", default="", optional=True, tooltip="[frame:]x0,y0,x1,y1[:colour], see points."),
    ]


def masks_of(mode: Any, driving: ClipSource, inputs: Mapping[str, Any]) -> tuple[tuple[Any, Any], tuple[str, ...]]:
    """((reference mask, driving mask), notes): the connected masks, or those of the segmenter and its notes. Raises
    InputError if only one mask is connected or masks cannot be made."""
    connected = inputs.get("reference_mask"), inputs.get("driving_mask")
    if None not in connected:
        return connected, ()
    if connected != (None, None):
        raise InputError(
            "Only one of reference_mask and driving_mask is connected. Connect both, or none to let the node make them."
        )
    images = TensorFrames(inputs["image"], "reference image")
    if len(images) > 1:
        raise InputError(f"The node makes masks for one reference image, not {len(images)}. Connect masks for them.")
    prompt = inputs.get("mask_prompt", AUTHORS_PROMPT)
    options = MaskOptions(
        mode=mode,
        segmenter=inputs.get("segmenter", "auto"),
        weights=Path(weights).expanduser() if (weights := inputs.get("segmenter_weights", "").strip()) else None,
        prompt=None if prompt == AUTHORS_PROMPT else prompt,
        max_characters=inputs.get("max_characters", 2),
        sort=inputs["sort"] if inputs["sort"] in SORTS_MADE else SORTS_MADE[0],
        points=tuple(inputs.get("points", "").split()),
        boxes=tuple(inputs.get("boxes", "").split()),
    )
    made = segmented(images[0], driving, options, host.make_room, Shown())
    return (made.reference, made.driving), made.notes
