"""The warm session as one of ComfyUI's models.

Its memory management then does for the engines what it does for every model: others make room before they load, and
when another model needs the memory, or the user says "unload models", the session is closed. All of a session goes at
once: what it holds on the GPU belongs to recorded steps that read fixed addresses."""

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher


class EngineModel(ModelPatcher):
    """close: gives back what the session holds. held: bytes that it counts as holding on the device."""

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__(torch.nn.Module(), management.get_torch_device(), torch.device("cpu"), size=1)
        self._close, self.held = close, 0

    def make_room(self, needed: int) -> None:
        """Have `needed` bytes free on ComfyUI's device for the session, those that it holds already among them."""
        self.size = max(needed, 1)
        management.load_models_gpu([self])

    def others(self) -> int:
        """Bytes that other models of ComfyUI hold on the device."""
        models = [loaded for loaded in management.current_loaded_models if loaded.model not in (None, self)]
        return sum(int(loaded.model_loaded_memory()) for loaded in models if loaded.device == self.load_device)

    def loaded_size(self) -> int:
        return self.held

    def current_loaded_device(self) -> Any:
        return self.load_device if self.held else self.offload_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """The session loads by itself, when it runs."""
        self.held = self.size
        return 0

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_: Any) -> int:
        freed = self.held
        self._close()
        return freed

    def detach(self, unpatch_all: bool = True) -> Any:
        """With `unpatch_all` the model leaves the device; without, ComfyUI only takes it off its list for a moment."""
        if unpatch_all:
            self.partially_unload(self.offload_device)
        return self.model
