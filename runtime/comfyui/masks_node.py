"""The node that makes colour masks of what a graph has, checks them, and shows what it found."""

from typing import Any

import torch
from comfy_api.latest import io, ui

from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.animate_node import told
from scail2_rt.runtime.comfyui.clip_inputs import driving_clip
from scail2_rt.runtime.comfyui.findings import examined, sheet, told_text
from scail2_rt.runtime.comfyui.mask_inputs import ORDER, SORTS, MaskStyle, parse_figures
from scail2_rt.runtime.comfyui.requests import Given
from scail2_rt.runtime.comfyui.types import CATEGORY, MODES, ColourMask, driving_input, mask_input, reference_input


class MakeMasks(io.ComfyNode):
    """Masks of SAM 3 tracks, mattes or coloured pictures; findings and a sheet in the node."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Scail2Masks",
            display_name="SCAIL-2 Masks",
            category=CATEGORY,
            description="Colour masks as the model wants them, from SAM 3 tracks, MASKs or coloured images; checked.",
            inputs=[
                reference_input(),
                driving_input(),
                mask_input("reference_mask", "Who is who in the reference"),
                mask_input("driving_mask", "Who is who in the driving clip"),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    tooltip="Sets the backgrounds: animate keeps the reference's, replace the driving scene.",
                ),
                io.Boolean.Input(
                    "set_background",
                    default=True,
                    tooltip="Give coloured images the background that the mode asks for, too: ComfyUI's own "
                    "node paints the reference's black in both modes.",
                ),
                io.Combo.Input("colour", options=list(ORDER), tooltip="Of the character that a MASK shows."),
                io.Combo.Input(
                    "sort", options=list(SORTS), tooltip="In what order the figures of a track get colours."
                ),
                io.String.Input("figures", default="", tooltip="Which figures of a track, as in 0,2; empty: all."),
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
            given = Given(inputs["image"], driving, inputs["reference_mask"], inputs["driving_mask"], styles)
            result = examined(given, mode)
            text = told_text(result)
            host.show_text(text)
            picture = ui.PreviewImage(sheet(given, result, windows=False))
            return io.NodeOutput(given.references()[1], given.mask_clip().frames, text, ui=picture)
