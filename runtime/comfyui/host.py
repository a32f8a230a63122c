"""Everything that the nodes ask of ComfyUI itself, besides the classes of its node interface.

Its modules are imported inside the functions: they exist only where ComfyUI runs. What is used here is listed, with
the signatures of the snapshot that it was tried in, in `tests/support/comfyui_interface.json`."""

import re
import threading
from pathlib import Path
from typing import Any

import torch

FOLDER = "scail2_rt"  # of engine folders, in ComfyUI's `models`, and its name in `extra_model_paths.yaml`
_OPTION = re.compile(r"--([a-z][a-z-]*)")


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
    """The bar of the node that is being executed, 0 to 1, and a PIL image under it."""
    from comfy_api.latest import ComfyAPISync

    ComfyAPISync().execution.set_progress(share, 1.0, node_id(), picture)


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
    """A sentence of the command line for a node, whose inputs have the options' names: --fit-reference →
    fit_reference."""
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), sentence)
