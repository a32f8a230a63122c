"""Stand-ins for the few classes of ComfyUI that the nodes use, for tests where ComfyUI is not installed.

Every call is bound to the signature that `comfyui_signatures` recorded from ComfyUI in `comfyui_interface.json`, so a
parameter that ComfyUI does not have raises TypeError. The stand-ins implement only what the nodes need; `python -m
tests.parity.comfyui` runs the same nodes in the real program."""

import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

RECORD = json.loads(Path(__file__).with_name("comfyui_interface.json").read_text())
MODULES = ("comfy_api", "comfy_api.latest", "comfy", "comfy.model_management", "comfy.model_patcher", "comfy.utils")
MODULES = (*MODULES, "server", "comfy_execution", "comfy_execution.utils", "folder_paths")


def signature_of(name: str) -> inspect.Signature:
    """The recorded signature. Raises KeyError if there is none."""
    namespace: dict[str, Any] = {}
    exec(f"def f({RECORD['signatures'][name].replace('=', '=None')}): ...", namespace)
    return inspect.signature(namespace["f"])


def bound(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, wrapped so that arguments must match the recorded signature."""
    signature = signature_of(name)

    def call(*words: Any, **options: Any) -> Any:
        signature.bind(*words, **options)
        return function(*words, **options)

    return call


def recorder(name: str, **fixed: Any) -> Callable[..., SimpleNamespace]:
    """Makes a record of the arguments by their names."""
    signature = signature_of(name)
    return lambda *words, **options: SimpleNamespace(**signature.bind(*words, **options).arguments, **fixed)


class ComfyNode:
    """`io.ComfyNode`: a node's class is never instantiated here."""


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ModelPatcher:
    """As far as the stand-in for `load_models_gpu` needs it."""

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0) -> None:
        signature_of("comfy.model_patcher:ModelPatcher").bind(model, load_device, offload_device, size)
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.parent = None

    def model_size(self) -> int:
        return self.size


class Video:
    """`VideoFromFile` and `VideoFromComponents`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def get_stream_source(self) -> Any:
        return self.source

    def get_components(self) -> Any:
        return self.source


class VideoFromFile(Video):
    pass


class VideoFromComponents(Video):
    pass


class Host:
    """Records progress [(share, picture)], texts by node and models to load; also has values that a test sets."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.node = SimpleNamespace(prompt_id="p", node_id="7", list_index=0)
        self.progress: list[tuple[float, Any]] = []
        self.texts: list[tuple[str, str]] = []
        self.loaded: list[Any] = []
        self.required: list[float] = []
        self.interrupted = threading.Event()

    def set_progress(self, value: int, total: int, preview: Any) -> None:
        self.progress.append((value / total, preview))

    def load_models_gpu(self, models: list[Any], memory_required: float = 0) -> None:
        self.required.append(memory_required)
        for model in models:
            if model not in self.loaded:
                self.loaded.append(model)
            model.partially_load(model.load_device, 1e32, force_patch_weights=False)

    def said(self, text: tuple[str, str]) -> None:
        self.texts.append(text)

    def unload(self) -> None:
        """The button "unload models"."""
        for model in self.loaded:
            model.detach(True)
        self.loaded.clear()

    def throw(self) -> None:
        if self.interrupted.is_set():
            self.interrupted.clear()
            raise InterruptProcessingException

    def file(self, kind: str, name: str) -> str:
        if not (self.models / kind / name).is_file():
            raise FileNotFoundError(name)
        return str(self.models / kind / name)


class InterruptProcessingException(Exception):
    pass


class ProgressBar:
    def __init__(self, host: Host, total: int, node_id: str) -> None:
        assert node_id == host.node.node_id
        self._host, self._total = host, total
        self.update_absolute = partial(bound("comfy.utils:ProgressBar.update_absolute", ProgressBar._update), self)

    def _update(self, value: int, preview: Any = None) -> None:
        self._host.set_progress(value, self._total, preview)


def _io() -> SimpleNamespace:
    kinds: dict[str, dict[str, Any]] = {}
    for name in RECORD["signatures"]:
        path = name.partition(":io.")[2].split(".")
        if len(path) == 2 and path[1] in ("Input", "Output"):
            kinds.setdefault(path[0], {})[path[1]] = recorder(name, kind=path[0])
    made = {name: SimpleNamespace(io_type=name.upper(), **roles) for name, roles in kinds.items()}

    def custom(io_type: str) -> SimpleNamespace:
        roles = {r: recorder(f"comfy_api.latest:io.Image.{r}", kind=io_type) for r in ("Input", "Output")}
        return SimpleNamespace(io_type=io_type, **roles)

    schema = recorder("comfy_api.latest:io.Schema")
    output = bound("comfy_api.latest:io.NodeOutput", NodeOutput)
    return SimpleNamespace(**made, Custom=custom, Schema=schema, NodeOutput=output, ComfyNode=ComfyNode)


def _modules(host: Host) -> dict[str, dict[str, Any]]:
    api = "comfy_api.latest"
    text = bound("server:PromptServer.send_progress_text", lambda self, text, node_id: host.said((node_id, text)))
    management = "comfy.model_management"
    return {
        api: {
            "io": _io(),
            "ui": SimpleNamespace(PreviewImage=recorder(f"{api}:ui.PreviewImage")),
            "ComfyExtension": type("ComfyExtension", (), {}),
            "InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile, VideoFromComponents=VideoFromComponents),
            "Types": SimpleNamespace(VideoComponents=recorder(f"{api}:Types.VideoComponents")),
        },
        management: {
            "processing_interrupted": host.interrupted.is_set,
            "throw_exception_if_processing_interrupted": host.throw,
            "InterruptProcessingException": InterruptProcessingException,
            "get_torch_device": lambda: torch.device("cpu"),
            "load_models_gpu": bound(
                f"{management}:load_models_gpu", lambda *words, **options: host.load_models_gpu(*words, **options)
            ),
            "current_loaded_models": [],
        },
        "comfy.utils": {"ProgressBar": bound("comfy.utils:ProgressBar", partial(ProgressBar, host))},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy_execution.utils": {"get_executing_context": lambda: host.node},
        "server": {
            "PromptServer": SimpleNamespace(
                instance=SimpleNamespace(send_progress_text=lambda *words: text(None, *words))
            )
        },
        "folder_paths": {
            "models_dir": str(host.models),
            "folder_names_and_paths": {},
            "get_filename_list": bound(
                "folder_paths:get_filename_list",
                lambda folder_name: sorted(path.name for path in (host.models / folder_name).glob("*")),
            ),
            "get_temp_directory": lambda: str(host.models.parent / "temp"),
            "get_full_path_or_raise": bound("folder_paths:get_full_path_or_raise", host.file),
        },
    }


@contextmanager
def standing_in(models: Path) -> Iterator[Host]:
    """Install the stand-ins as ComfyUI's modules and import the nodes again. models: ComfyUI's `models` folder."""
    host = Host(models)
    for name in MODULES:
        sys.modules[name] = ModuleType(name)
    for name, contents in _modules(host).items():
        vars(sys.modules[name]).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield host
    finally:
        ours = [name for name in sys.modules if name.startswith("scail2_rt.runtime.comfyui.")]
        for name in (*MODULES, *ours):
            del sys.modules[name]
