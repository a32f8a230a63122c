"""The PyTorch executor: a stage is its reference module with weights from the store.

On a CPU the weights are views of the mapped store, so loading a stage costs nothing and pages come in as they are used;
on a GPU they are copied. Arithmetic is PyTorch's own in the stage's compute type.
"""

import torch
from torch import Tensor

from scail2_rt.engines.store import StoreReader
from scail2_rt.export.errors import InputError, Scail2Error
from scail2_rt.export.precision import Numerics
from scail2_rt.export.spec import StageDefinition


class TorchEngine:
    """One stage as a callable on tensors of `device`."""

    def __init__(
        self, definition: StageDefinition, numerics: Numerics, store: StoreReader, device: torch.device
    ) -> None:
        self.name = definition.name
        with torch.device("meta"):
            module = definition.build(numerics)
        weights = store.stage(definition.name, module.state_dict())
        for name, expected in module.state_dict().items():
            have = weights[name]
            if have.shape != expected.shape or have.dtype != expected.dtype:
                raise InputError(
                    f"the weight store holds {definition.name}.{name} as {have.dtype} {list(have.shape)}, this version "
                    f"needs {expected.dtype} {list(expected.shape)}; rebuild the engine folder."
                )
        module.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.is_meta:  # a constant that the module should have made on the CPU
                raise Scail2Error(f"stage {definition.name}: {name} has no value; it is not a weight of the store.")
        self._module: torch.nn.Module | None = module.to(device).eval()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._module is None:
            raise ValueError(f"engine {self.name} was closed")
        with torch.inference_mode():
            outputs = self._module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def close(self) -> None:
        self._module = None
