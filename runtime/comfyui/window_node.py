"""The node that shows which part of the inputs the video's frame keeps, without running the model."""

from typing import Any

import torch
from comfy_api.latest import io, ui

from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.animate_node import told
from scail2_rt.runtime.comfyui.clip_inputs import driving_clip
from scail2_rt.runtime.comfyui.findings import examined, sheet, told_text
from scail2_rt.runtime.comfyui.mask_inputs import MaskStyle
from scail2_rt.runtime.comfyui.requests import Given, frame_size
from scail2_rt.runtime.comfyui.types import CATEGORY, driving_input, frame_inputs, mask_input, reference_input


class PreviewWindow(io.ComfyNode):
    """Shows reference images and driving frames with the border of the video's frame."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Scail2PreviewWindow",
            display_name="SCAIL-2 Preview window",
            category=CATEGORY,
            description="Shows which part of the reference image and driving clip is kept. Needs no engines.",
            is_output_node=True,
            inputs=[
                reference_input(),
                driving_input(),
                mask_input("reference_mask", "Reference mask"),
                mask_input("driving_mask", "Mask of the driving clip"),
                io.Combo.Input("mode", options=["auto", "animate", "replace"], default="auto"),
                *frame_inputs(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet"),
                io.String.Output("findings", display_name="findings"),
            ],
        )

    @classmethod
    def execute(cls, mode: str, width: int, height: int, fit: Any, **inputs: Any) -> Any:
        with torch.inference_mode(False), told():
            driving = driving_clip(inputs["driving"], 16).source
            masks = inputs["reference_mask"], inputs["driving_mask"]
            given = Given(inputs["image"], driving, *masks, MaskStyle.pair(mode))
            result = examined(given, mode, frame_size(width, height), fit)
            text = told_text(result)
            host.show_text(text)
            picture = sheet(given, result, windows=True)
            return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture))
