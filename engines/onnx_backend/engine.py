"""One engine stage in ONNX Runtime.

The session maps the weight store into memory and torch tensors are bound by address on both sides: the sizes of the
outputs follow from those of the inputs, so they are allocated here and nothing is copied unless a type must change.
ONNX Runtime has no bf16 arithmetic on a CPU (and on a GPU only for some operations), so stages that compute in bf16 run
in fp32 on the values as stored: the graph casts them. The e4m3 rule then also runs in fp32, which is exact as long
as no optimiser rewrites its Q/DQ pairs; a session option sees to that.
Weights stay in the mapping: no packed and no cast copy is kept, so a model larger than the machine's memory runs. In
fp32 that costs nothing measurable; a stage of the 14B in fp8 casts for some seconds a call, whatever its row count.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.onnx.stages import split_dim
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# ONNX's numbers of the types that stages take and give, so that running needs ONNX Runtime alone
ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.int64: 7}


def onnxruntime_numerics(numerics: Numerics, device: torch.device | str = "cpu") -> Numerics:
    """The arithmetic of a stage in ONNX Runtime, and so of its file: fp32 in place of bf16, on every device, because a
    file serves them all. Storage stays as it is."""
    return numerics.in_arithmetic(torch.float32) if numerics.compute == torch.bfloat16 else numerics


class OnnxEngine:
    """A stage as a callable on torch tensors.

    numerics    those that the file was exported with (`onnxruntime_numerics`)
    providers   ONNX Runtime's execution providers; by default CUDA when `device` is one and it is installed
    InputError when ONNX Runtime is not installed or has no CUDA provider for a CUDA device, Scail2Error when the file
    cannot be loaded or a call fails."""

    def __init__(
        self,
        definition: StageDefinition,
        numerics: Numerics,
        path: Path,
        device: torch.device | str = "cpu",
        providers: Sequence[str] | None = None,
    ) -> None:
        self.name = definition.name
        self.inputs, self.outputs = definition.io(numerics)
        self.device = torch.device(device)
        self.path = path
        self._session: onnxruntime.InferenceSession | None = _session(path, self.device, providers)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The stage's outputs, in the types of the specs, on the engine's device."""
        if self._session is None:
            raise Scail2Error(f"The stage {self.name} was closed before it was called.")
        sizes = symbol_sizes(self.name, self.inputs, inputs)
        index = self.device.index or 0
        binding = self._session.io_binding()
        bound = []  # keeps what is bound alive during the run
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            tensor = tensor.to(self.device, spec.dtype).contiguous()
            bound.append(tensor)
            address = (self.device.type, index, ELEMENT_TYPES[spec.dtype], list(tensor.shape), tensor.data_ptr())
            binding.bind_input(spec.name, *address)
        outputs = tuple(
            torch.empty([concrete_size(dim, sizes) for dim in spec.dims], dtype=spec.dtype, device=self.device)
            for spec in self.outputs
        )
        for spec, tensor in zip(self.outputs, outputs, strict=True):
            address = (self.device.type, index, ELEMENT_TYPES[spec.dtype], list(tensor.shape), tensor.data_ptr())
            binding.bind_output(spec.name, *address)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise Scail2Error(f"ONNX Runtime failed in the stage {self.path}: {_sentence(error)}") from error
        binding.synchronize_outputs()
        return outputs

    def close(self) -> None:
        """Free the session and unmap its weights."""
        self._session = None


def _session(path: Path, device: torch.device, providers: Sequence[str] | None) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "The backend onnxruntime was asked for, but ONNX Runtime is not installed. "
            "Install it (pip install onnxruntime), or choose --backend torch."
        ) from error
    if providers is None:
        providers = [CPU] if device.type == "cpu" else [CUDA, CPU]
    # Without these it takes tf32 for fp32, and tries every convolution at every size.
    exact = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "device_id": str(device.index or 0)}
    missing = sorted(set(providers) - set(onnxruntime.get_available_providers()))
    if missing:
        raise InputError(
            f"This ONNX Runtime has no {' and no '.join(missing)}. "
            "Install onnxruntime-gpu instead of onnxruntime, or choose --backend torch."
        )
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it would keep the largest cast weights of every loaded stage
    options.log_severity_level = 4  # what goes wrong is raised, and so reported once
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # a Q/DQ pair is a rounding that we want
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads work between stages
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path),
            options,
            providers=[(name, exact) if name == CUDA else name for name in providers],
            disabled_optimizers=["ConstantFolding"],
        )
    except Exception as error:
        raise Scail2Error(
            f"ONNX Runtime cannot load the stage {path}: {_sentence(error)} Build the engine folder again."
        ) from error
    if providers[0] not in session.get_providers():  # it warns and goes on with the next
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its {providers[0]} (CUDA or cuDNN libraries of "
            "another version?): install the onnxruntime-gpu that fits PyTorch's CUDA, or choose --backend torch."
        )
    return session


def _sentence(error: Exception) -> str:
    """ONNX Runtime's message on one line."""
    text = " ".join(str(error).split())
    return text if text.endswith(".") else text + "."


def symbol_sizes(name: str, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> dict[str, int]:
    """The value of every symbol. Scail2Error when the tensors do not fit the specs."""
    if len(specs) != len(tensors):
        raise Scail2Error(f"The stage {name} takes {len(specs)} inputs and was given {len(tensors)}.")
    sizes = {"": 1}
    for spec, tensor in zip(specs, tensors, strict=True):
        fits = tensor.ndim == len(spec.dims)
        for dim, size in zip(spec.dims, tensor.shape, strict=False):
            factor, symbol = split_dim(dim)
            fits &= size == factor * sizes.setdefault(symbol, size // factor)
        if not fits:
            known = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items() if symbol)
            raise Scail2Error(
                f"The stage {name} was given {spec.name} of shape {list(tensor.shape)}; it takes "
                f"{[str(dim) for dim in spec.dims]}{' with ' + known if known else ''}."
            )
    return sizes


def concrete_size(dim: int | str, sizes: dict[str, int]) -> int:
    factor, symbol = split_dim(dim)
    return factor * sizes[symbol]
