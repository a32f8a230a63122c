"""The node that selects an engine folder, a backend and execution options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from scail2_rt.engines.backend import Execution
from scail2_rt.engines.folder.manifest import MANIFEST
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.animate_node import told
from scail2_rt.runtime.comfyui.sessions import Engines, folder_state
from scail2_rt.runtime.comfyui.types import CATEGORY
from scail2_rt.runtime.comfyui.types import Engines as EnginesType

BY_PATH = "the path below"
BACKENDS = ["auto", "torch", "onnxruntime", "tensorrt"]
ATTENTION = ["auto", "8bit", "8bit-bf16pv", "bf16", "sdpa"]


class ChooseEngines(io.ComfyNode):
    """Selects the folder. The first node that needs the engines opens them."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Scail2Engines",
            display_name="SCAIL-2 Engines",
            category=CATEGORY,
            description="Selects an engine folder, built from a checkpoint. Lists the folders in models/scail2_rt.",
            inputs=[
                io.Combo.Input("folder", options=[*found_folders(), BY_PATH]),
                io.String.Input("path", default="", tooltip=f"Path of an engine folder; set folder to '{BY_PATH}'."),
                *execution_inputs(),
            ],
            outputs=[EnginesType.Output("engines", display_name="engines")],
        )

    @classmethod
    def execute(cls, folder: str, path: str, **inputs: Any) -> Any:
        with told():
            return io.NodeOutput(Engines.of(folder_of(folder, path), inputs["backend"], execution_of(inputs)))

    @classmethod
    def fingerprint_inputs(cls, folder: str, path: str, **_: Any) -> str:
        """The state of the folder, so that a rebuilt folder is opened again."""
        return folder_state(folder_of(folder, path))


def execution_inputs() -> list[Any]:
    """The inputs for backend and execution options."""
    return [
        io.Combo.Input("backend", options=BACKENDS, default="auto", tooltip="A named backend never falls back."),
        io.Combo.Input("attention", options=ATTENTION, default="auto"),
        io.Float.Input(
            "vram_limit_gib",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.5,
            tooltip="GPU memory limit in GiB; other weights are streamed from host memory. 0: all free memory.",
        ),
    ]


def execution_of(inputs: Mapping[str, Any]) -> Execution:
    """The execution options from a node's inputs."""
    limit = round(inputs["vram_limit_gib"] * 2**30) or None
    return Execution(attention=inputs["attention"], vram_limit=limit)


def found_folders() -> list[str]:
    """The names of the engine folders in `models/scail2_rt` and in the folders that `extra_model_paths.yaml` adds."""
    names = {file.parent.name for root in host.engine_roots() for file in root.glob(f"*/{MANIFEST}")}
    return sorted(names)


def folder_of(folder: str, path: str) -> Path:
    """The path of the selected folder. Raises InputError if it does not exist."""
    if folder == BY_PATH:
        if not path.strip():
            raise InputError(
                f"folder is set to {BY_PATH!r}, but path is empty. Choose a folder, give a path, or build one with the "
                "node Build engines."
            )
        return Path(path.strip()).expanduser()
    for root in host.engine_roots():
        if (root / folder / MANIFEST).is_file():
            return root / folder
    raise InputError(f"There is no engine folder {folder} in {host.engine_root()}. Choose another one.")
