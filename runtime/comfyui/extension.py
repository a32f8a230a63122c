"""The entry point that ComfyUI calls when it starts: returns the list of nodes."""

from typing import Any

from comfy_api.latest import ComfyExtension

from scail2_rt.runtime.comfyui.animate_node import Animate
from scail2_rt.runtime.comfyui.build_node import BuildEngines
from scail2_rt.runtime.comfyui.engines_node import ChooseEngines
from scail2_rt.runtime.comfyui.masks_node import MakeMasks
from scail2_rt.runtime.comfyui.window_node import PreviewWindow

NODES = [ChooseEngines, BuildEngines, MakeMasks, PreviewWindow, Animate]


class Scail2Extension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return NODES


async def comfy_entrypoint() -> Scail2Extension:
    """Called once by ComfyUI."""
    return Scail2Extension()
