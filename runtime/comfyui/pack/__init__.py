"""SCAIL-2 in ComfyUI: this folder only registers the nodes, which are in the package `scail2_rt`.

`scail2-rt comfyui install` writes it and `scail2-rt comfyui remove` removes it."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI when it starts."""
    from scail2_rt.runtime.comfyui.extension import comfy_entrypoint as entrypoint

    return await entrypoint()
