"""Everything that the nodes ask of ComfyUI itself, besides the classes of its node interface.

Its modules are imported inside the functions: they exist only where ComfyUI runs. What is used here is listed, with
the signatures of the snapshot that it was tried in, in `tests/support/comfyui_interface.json`."""

import re
import threading
from pathlib import Path
from typing import Any

import torch

FOLDER = "scail2_rt"  # of engine folders, in ComfyUI's `models`, and its name in `extra_model_paths.yaml`
PROGRESS_TOTAL = 1000  # of the bar, which counts whole numbers
PREVIEW_SIDE = 512  # pixels, of the longer side
_OPTION = re.compile(r"--([a-z][a-z-]*)")
_SAME = (  # options of `generate` that are inputs of the nodes
    *("allow-mask-problems", "anchor-color", "attention", "backend", "fit", "fit-reference", "frames", "guidance"),
    *("mask-prompt", "max-characters", "mode", "overlap-blend", "scheduler", "seed", "segment-length"),
    *("segment-overlap", "segmenter-weights", "shift", "start", "steps"),
)
_INPUTS = {
    **{name: name.replace("-", "_") for name in _SAME},
    "size": "width and height",
    "point": "points",
    "box": "boxes",
    "vram-limit": "vram_limit_gib",
    "extra-ref": "a further picture and mask in the reference's batches",
}


def engine_root() -> Path:
    """Where engine folders are built: `models/scail2_rt`."""
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER


def engine_roots() -> list[Path]:
    """Where engine folders are looked for."""
    import folder_paths

    named = folder_paths.folder_names_and_paths.get(FOLDER, ((), ()))[0]
    return list(dict.fromkeys([engine_root(), *map(Path, named)]))


def model_files(kind: str) -> list[str]:
    """Names of ComfyUI's model files of a kind: diffusion_models, loras, vae …"""
    import folder_paths

    return list(folder_paths.get_filename_list(kind))


def model_file(kind: str, name: str) -> Path:
    """Where such a file is; ComfyUI's FileNotFoundError when it is gone."""
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise(kind, name))


def temporary_folder() -> Path:
    """What is in it goes when ComfyUI starts again."""
    import folder_paths

    return Path(folder_paths.get_temp_directory())


def make_room(needed: int) -> None:
    """Have ComfyUI unload models until so many bytes are free on its GPU."""
    import comfy.model_management as management

    device = management.get_torch_device()
    if device.type == "cuda":
        management.free_memory(needed, device)


class Interruption(threading.Event):
    """ComfyUI's cancel button as the `cancel` of a session."""

    def is_set(self) -> bool:
        import comfy.model_management

        return bool(comfy.model_management.processing_interrupted())


def stop_if_interrupted() -> None:
    """Raises ComfyUI's own exception for a cancelled prompt, and takes the cancellation as done."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def node_id() -> str | None:
    """The node that is being executed."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.node_id


def show_progress(share: float, picture: Any = None) -> None:
    """The bar of the node that is being executed, 0 to 1, and a PIL image in it. (`ComfyAPISync().execution`, which is
    meant for this, is missing in 0.3.64.)"""
    from comfy.utils import ProgressBar

    preview = None if picture is None else ("JPEG", picture, PREVIEW_SIDE)
    ProgressBar(PROGRESS_TOTAL, node_id()).update_absolute(round(share * PROGRESS_TOTAL), preview=preview)


def show_text(text: str) -> None:
    """Text in the node that is being executed, until it runs again; nothing where no page is open."""
    from server import PromptServer

    if (node := node_id()) is not None:
        PromptServer.instance.send_progress_text(text, node)


def image_dtype() -> torch.dtype:
    """Type of the graph's pictures: fp32, or what a newer ComfyUI was told to use."""
    import comfy.model_management

    chosen = getattr(comfy.model_management, "intermediate_dtype", None)
    return torch.float32 if chosen is None else chosen()


def in_nodes_words(sentence: str) -> str:
    """A sentence of the command line for a node: --fit-reference → fit_reference. Other commands' options stay."""
    return _OPTION.sub(lambda option: _INPUTS.get(option[1], option[0]), sentence)
