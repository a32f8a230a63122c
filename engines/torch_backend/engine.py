"""One engine stage in PyTorch: its reference module with weights from the store.

On a CPU the weights are views of the mapped store, so loading a stage costs nothing and pages are read when used; on a
GPU they are copied there (`engines.torch_backend.loading`). The modules call the functions in `kernels`, which run
Triton on a GPU. Long token sequences are cut into row slices without copying: a stage reads a slice of its inputs and
writes a slice of its outputs.
"""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scail2_rt.engines.folder.store import TensorShape, WeightStore
from scail2_rt.engines.row_chunks import row_pieces
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.stages.spec import ROWS, StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error


def stage_tensors(definition: StageDefinition, numerics: Numerics) -> dict[str, TensorShape]:
    """Return parameter name → type and shape of a stage's weights."""
    with torch.device("meta"):
        state = definition.build(numerics).state_dict()
    return {name: TensorShape(value.dtype, tuple(value.shape)) for name, value in state.items()}


def check_stored(name: str, tensors: Mapping[str, TensorShape], store: WeightStore) -> None:
    """Raise InputError if the store holds a weight of a stage in another type or shape."""
    for parameter, expected in tensors.items():
        have = store.layout.location(f"{name}.{parameter}")
        if (have.dtype, tuple(have.shape)) != (expected.dtype, expected.shape):
            raise InputError(
                f"the weight store holds {name}.{parameter} as {have.dtype} {list(have.shape)}, this version "
                f"needs {expected.dtype} {list(expected.shape)}. Rebuild the engine folder."
            )


class TorchEngine:
    """One stage as a callable on tensors on `device`. `weights`: views of the store, or tensors on the device."""

    def __init__(
        self,
        definition: StageDefinition,
        numerics: Numerics,
        store: WeightStore,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = definition.name
        with torch.device("meta"):
            module = definition.build(numerics)
        if weights is None:
            check_stored(self.name, stage_tensors(definition, numerics), store)
            weights = store.stage(self.name, module.state_dict())
        module.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
        for name, buffer in module.named_buffers():
            if buffer.is_meta:  # a constant that the module should have created on the CPU
                raise Scail2Error(f"stage {definition.name}: {name} has no value; it is not a weight of the store.")
        self._module: torch.nn.Module | None = module.to(device).eval()
        self._writes = "out" in inspect.signature(module.forward).parameters

    def __call__(self, *inputs: Tensor, out: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Run the stage; outputs are written to `out` if given. The first of `out` may be the first input."""
        if self._module is None:
            raise ValueError(f"engine {self.name} was closed")
        with torch.inference_mode():
            if out is not None and self._writes:
                self._module(*inputs, out=out[0] if len(out) == 1 else tuple(out))
                return tuple(out)
            outputs = self._module(*inputs)
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            for target, result in zip(out or (), results, strict=False):
                target.copy_(result)
        return results if out is None else tuple(out)

    def close(self) -> None:
        self._module = None


def run_rows(
    call: "TorchEngine",
    specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    inputs: Sequence[Tensor],
    max_rows: int,
    first: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run the stage over row slices of at most `max_rows`. `first`: destination of the first output; may be the first
    input. Raises Scail2Error if row counts differ."""
    axes = [spec.row_axis for spec in specs[0]]
    lengths = {tensor.shape[axis] for tensor, axis in zip(inputs, axes, strict=True) if axis is not None}
    if len(lengths) > 1:
        raise Scail2Error(f"stage {call.name} got inputs of different row counts: {sorted(lengths)}.")
    if not lengths or (first is None and max(lengths) <= max_rows):
        return call(*inputs)
    rows = lengths.pop()
    results = [
        first if i == 0 and first is not None else _empty(spec, rows, inputs[0].device)
        for i, spec in enumerate(specs[1])
    ]
    for start, size in row_pieces(rows, max_rows):
        cut = [t if axis is None else t.narrow(axis, start, size) for t, axis in zip(inputs, axes, strict=True)]
        call(*cut, out=[t.narrow(spec.row_axis or 0, start, size) for t, spec in zip(results, specs[1], strict=True)])
    return tuple(results)


def _empty(spec: TensorSpec, rows: int, device: torch.device) -> Tensor:
    if spec.row_axis is None:
        raise Scail2Error(f"output {spec.name} has no row axis, so its stage cannot be cut into row chunks.")
    return torch.empty([rows if dim == ROWS else int(dim) for dim in spec.dims], dtype=spec.dtype, device=device)
