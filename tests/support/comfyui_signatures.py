"""Writes `comfyui_interface.json`: the signatures of the ComfyUI functions that the nodes use, from a checkout of it.

    PYTHON -m tests.support.comfyui_signatures FOLDER     (PYTHON: that of ComfyUI; from the root of this repository)

The stand-ins of `comfyui_standins` bind every call to these signatures. Only names and parameters are recorded."""

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("comfyui_interface.json")
IO = "comfy_api.latest:io"
WIDGETS = ("Boolean", "Int", "Float", "String", "Combo")
CONNECTIONS = ("Image", "Mask", "Audio", "Video")
NAMES = (
    "comfy_api.latest:ComfyExtension",
    "comfy_api.latest:ComfyExtension.get_node_list",
    "comfy.utils:ProgressBar",
    "comfy.utils:ProgressBar.update_absolute",
    "comfy_api.latest:InputImpl.VideoFromFile",
    "comfy_api.latest:InputImpl.VideoFromFile.get_stream_source",
    "comfy_api.latest:InputImpl.VideoFromFile.get_components",
    "comfy_api.latest:InputImpl.VideoFromComponents",
    "comfy_api.latest:InputImpl.VideoFromComponents.get_components",
    "comfy_api.latest:Types.VideoComponents",
    "comfy_api.latest:ui.PreviewImage",
    f"{IO}.Custom",
    f"{IO}.Schema",
    f"{IO}.NodeOutput",
    f"{IO}.MultiType.Input",
    *(f"{IO}.{kind}.Input" for kind in (*WIDGETS, *CONNECTIONS)),
    *(f"{IO}.{kind}.Output" for kind in (*CONNECTIONS, "String")),
    f"{IO}.ComfyNode.define_schema",
    f"{IO}.ComfyNode.execute",
    f"{IO}.ComfyNode.fingerprint_inputs",
    "comfy.model_management:processing_interrupted",
    "comfy.model_management:throw_exception_if_processing_interrupted",
    "comfy.model_management:InterruptProcessingException.__init__",
    "comfy.model_management:get_torch_device",
    "comfy.model_management:free_memory",
    "comfy.model_management:load_models_gpu",
    "comfy.model_management:LoadedModel",
    "comfy.model_management:LoadedModel.model_unload",
    "comfy.model_management:LoadedModel.model_loaded_memory",
    "comfy.model_patcher:ModelPatcher",
    "comfy.model_patcher:ModelPatcher.model_size",
    "comfy.model_patcher:ModelPatcher.loaded_size",
    "comfy.model_patcher:ModelPatcher.current_loaded_device",
    "comfy.model_patcher:ModelPatcher.partially_load",
    "comfy.model_patcher:ModelPatcher.partially_unload",
    "comfy.model_patcher:ModelPatcher.detach",
    "comfy_execution.utils:get_executing_context",
    "comfy_execution.utils:CurrentNodeContext",
    "folder_paths:get_filename_list",
    "folder_paths:get_full_path_or_raise",
    "folder_paths:get_temp_directory",
    "server:PromptServer.send_progress_text",
)


def parameters(name: str) -> str:
    """Names of the parameters as in `id, optional=, *, lazy=`: those with `=` have a default."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    bare = inspect.Signature.empty
    signature = inspect.signature(found).replace(return_annotation=bare)
    kept = [p.replace(annotation=bare, default=bare if p.default is bare else 0) for p in signature.parameters.values()]
    return str(signature.replace(parameters=kept))[1:-1].replace("=0", "=").replace(", /", "")


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.install_util")  # before ComfyUI puts another `utils` on the path
    version = importlib.import_module("comfyui_version").__version__
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(parameters(name))}" for name in NAMES)
    RECORD.write_text(f'{{"comfyui": {json.dumps(version)},\n "signatures": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
