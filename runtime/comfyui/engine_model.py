"""The open session as one of ComfyUI's models.

ComfyUI's memory management then treats the engines like any model: it unloads others before they load, and closes the
session when another model needs the memory or the user chooses "unload models". A session is always unloaded
completely, because recorded CUDA graphs refer to fixed GPU addresses."""

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher


class EngineModel(ModelPatcher):
    """close: closes the session. held: bytes of GPU memory that ComfyUI counts for the session."""

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__(torch.nn.Module(), management.get_torch_device(), torch.device("cpu"), size=1)
        self._close, self.held = close, 0

    def make_room(self, needed: int) -> None:
        """Let ComfyUI unload other models until the session can use `needed` bytes on the device, including those that
        it holds already."""
        self.size = max(needed, 1)
        management.load_models_gpu([self])

    def others(self) -> int:
        """Bytes on the device that ComfyUI's other models hold."""
        models = [loaded for loaded in management.current_loaded_models if loaded.model not in (None, self)]
        return sum(int(loaded.model_loaded_memory()) for loaded in models if loaded.device == self.load_device)

    def loaded_size(self) -> int:
        return self.held

    def current_loaded_device(self) -> Any:
        return self.load_device if self.held else self.offload_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """Only count the bytes: the session loads its weights when it runs."""
        self.held = self.size
        return 0

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_: Any) -> int:
        freed = self.held
        self._close()
        return freed

    def detach(self, unpatch_all: bool = True) -> Any:
        """With `unpatch_all`, unload the session. Without it, ComfyUI removes the model from its list only briefly."""
        if unpatch_all:
            self.partially_unload(self.offload_device)
        return self.model
