"""The engines among ComfyUI's models, with its real memory management and a simulated GPU of 24 GB.

    PYTHON -m tests.parity.comfyui_room FOLDER     (ComfyUI's Python and folder; no GPU is needed)

Nothing is loaded: models are sizes, and the simulated GPU has the remaining memory. Prints one line per check; exit
code 1 if one fails."""

import importlib
import sys
from typing import Any

import torch

GB = 10**9
CARD = torch.device("meta")  # stands for the card
SIZE = 24 * GB


def main(folder: str) -> int:
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    management: Any = importlib.import_module("comfy.model_management")
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    engine_model = importlib.import_module("scail2_rt.runtime.comfyui.engine_model").EngineModel

    class Other(patcher):  # type: ignore[misc, valid-type]
        """A model with a size in bytes, which loads and unloads completely."""

        held = 0

        def __init__(self, size: int) -> None:
            super().__init__(torch.nn.Module(), CARD, torch.device("cpu"), size=size)

        def loaded_size(self) -> int:
            return self.held

        def current_loaded_device(self) -> torch.device:
            return CARD if self.held else torch.device("cpu")

        def partially_load(self, device: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
            self.held = self.size
            return 0

        def partially_unload(self, device: Any, memory_to_free: float = 0, **_: Any) -> int:
            freed, self.held = self.held, 0
            return freed

        def detach(self, unpatch_all: bool = True) -> Any:
            self.held = 0 if unpatch_all else self.held
            return self.model

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        left = SIZE - sum(m.model.loaded_size() for m in management.current_loaded_models if m.model is not None)
        return (left, 0) if torch_free_too else left

    management.get_torch_device = lambda: CARD
    management.get_free_memory = free
    management.vram_state = management.VRAMState.NORMAL_VRAM
    closed: list[int] = []

    def close() -> None:
        closed.append(engines.held)
        engines.held = 0

    engines, other = engine_model(close), Other(12 * GB)
    failed = 0

    def check(name: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'} {name}")

    management.load_models_gpu([other])
    engines.make_room(18 * GB)
    check("18 GB of engines: another model of 12 GB leaves", (engines.held, other.held) == (18 * GB, 0))
    engines.make_room(18 * GB)
    engines.make_room(20 * GB)
    check("again, and larger: they stay open", (engines.held, closed) == (20 * GB, []))
    management.load_models_gpu([other])
    check("the other model again: they are closed", (other.held, engines.held, closed) == (12 * GB, 0, [20 * GB]))
    engines.make_room(5 * GB)
    check("5 GB of engines: both stay, and the other one counts", (other.held, engines.others()) == (12 * GB,) * 2)
    management.unload_all_models()
    check("unload models: both leave", (other.held, engines.held, len(closed)) == (0, 0, 2))
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1]) else 0)
