"""All calls of ComfyUI's own functions, except the classes of its node interface.

ComfyUI's modules are imported inside the functions, because they exist only inside ComfyUI. The functions used here
are listed in `tests/support/comfyui_interface.json` with their signatures in the tested version."""

import re
import threading
from pathlib import Path
from typing import Any

import torch

FOLDER = "scail2_rt"  # folder of engine folders in ComfyUI's `models`, and its key in `extra_model_paths.yaml`
PROGRESS_TOTAL = 1000  # the progress bar counts integers up to this
PREVIEW_SIDE = 512  # pixels of the longer side
_OPTION = re.compile(r"--([a-z][a-z-]*)")
_SAME = (  # options of `generate` whose node inputs have the same name
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
    "extra-ref": "a further image in the batch of image, and its mask in reference_mask",
}


def engine_root() -> Path:
    """The folder in which engine folders are built: `models/scail2_rt`."""
    import folder_paths

    return Path(folder_paths.models_dir) / FOLDER


def engine_roots() -> list[Path]:
    """The folders in which engine folders are searched."""
    import folder_paths

    named = folder_paths.folder_names_and_paths.get(FOLDER, ((), ()))[0]
    return list(dict.fromkeys([engine_root(), *map(Path, named)]))


def model_files(kind: str) -> list[str]:
    """The names of ComfyUI's model files of a kind: diffusion_models, loras, vae …"""
    import folder_paths

    return list(folder_paths.get_filename_list(kind))


def model_file(kind: str, name: str) -> Path:
    """The path of a model file. Raises ComfyUI's FileNotFoundError if it does not exist."""
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise(kind, name))


def temporary_folder() -> Path:
    """ComfyUI's temporary folder, which ComfyUI empties when it starts."""
    import folder_paths

    return Path(folder_paths.get_temp_directory())


def make_room(needed: int) -> None:
    """Let ComfyUI unload models until `needed` bytes are free on its GPU."""
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
    """Raises ComfyUI's own exception if the prompt was cancelled, and clears the cancellation."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def node_id() -> str | None:
    """The id of the node that is being executed; None outside an execution."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.node_id


def show_progress(share: float, picture: Any = None) -> None:
    """Set the progress bar of the running node. share: 0 to 1; picture: PIL image to show, or None.
    (`ComfyAPISync().execution`, which is meant for this, is missing in ComfyUI 0.3.64.)"""
    from comfy.utils import ProgressBar

    preview = None if picture is None else ("JPEG", picture, PREVIEW_SIDE)
    ProgressBar(PROGRESS_TOTAL, node_id()).update_absolute(round(share * PROGRESS_TOTAL), preview=preview)


def show_text(text: str) -> None:
    """Show text in the running node, until it runs again. Does nothing outside an execution."""
    from server import PromptServer

    if (node := node_id()) is not None:
        PromptServer.instance.send_progress_text(text, node)


def image_dtype() -> torch.dtype:
    """The dtype of the graph's images: fp32, or the dtype set in a newer ComfyUI."""
    import comfy.model_management

    chosen = getattr(comfy.model_management, "intermediate_dtype", None)
    return torch.float32 if chosen is None else chosen()


def in_nodes_words(sentence: str) -> str:
    """Replace option names in a sentence by names of node inputs: --fit-reference → fit_reference. Options of other
    commands stay."""
    return _OPTION.sub(lambda option: _INPUTS.get(option[1], option[0]), sentence)
