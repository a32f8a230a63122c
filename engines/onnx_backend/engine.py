"""One engine stage in ONNX Runtime.

The session maps the weight store into memory, and torch tensors are bound by address as inputs and outputs: output
sizes follow from input sizes, so outputs are allocated here and nothing is copied unless a type must change.
ONNX Runtime has no bf16 arithmetic on a CPU (and on a GPU only for some operations), so stages that compute in bf16 run
in fp32 on the stored values: the graph casts them. The e4m3 rule then also runs in fp32, which is exact as long as no
optimiser rewrites its Q/DQ pairs; a session option prevents this.
Weights stay in the mapping: no packed or cast copies are kept, so a model larger than host memory runs. In fp32 this
has no measurable cost; a stage of the 14B model in fp8 casts for some seconds per call, whatever its row count.
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
# ONNX type numbers of inputs and outputs, so that running needs ONNX Runtime only
ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10, torch.int64: 7}


def onnxruntime_numerics(numerics: Numerics, device: torch.device | str = "cpu") -> Numerics:
    """Return the types of a stage in ONNX Runtime, and thus in its file: fp32 in place of bf16, on every device,
    because all devices use one file. Storage is unchanged."""
    return numerics.in_arithmetic(torch.float32) if numerics.compute == torch.bfloat16 else numerics


class OnnxEngine:
    """A stage as a callable on torch tensors.

    numerics    types that the file was exported with (`onnxruntime_numerics`)
    providers   ONNX Runtime's execution providers; default: CUDA if `device` is a GPU, and the CPU
    Raises InputError if ONNX Runtime is not installed or lacks a provider; Scail2Error if the file cannot be loaded or
    a call fails."""

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
        """Run the stage; returns its outputs in the types of the specs, on the engine's device."""
        if self._session is None:
            raise Scail2Error(f"The stage {self.name} was closed before it was called. Open the engines again.")
        sizes = symbol_sizes(self.name, self.inputs, inputs)
        index = self.device.index or 0
        binding = self._session.io_binding()
        bound = []  # keeps the bound tensors alive during the run
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
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime uses a separate stream
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
            "The backend onnxruntime was requested, but ONNX Runtime is not installed. "
            "Install it with pip install onnxruntime, or use --backend torch."
        ) from error
    if providers is None:
        providers = [CPU] if device.type == "cpu" else [CUDA, CPU]
    # The defaults would use tf32 for fp32, and try every convolution algorithm at every size.
    exact = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "device_id": str(device.index or 0)}
    missing = sorted(set(providers) - set(onnxruntime.get_available_providers()))
    if missing:
        raise InputError(
            f"This ONNX Runtime has no {' and no '.join(missing)}. "
            "Install onnxruntime-gpu instead of onnxruntime, or use --backend torch."
        )
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # an arena would keep the largest cast weights of every loaded stage
    options.log_severity_level = 4  # errors are raised and reported once
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # a Q/DQ pair is an intended rounding
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch's threads run between stages
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
    if providers[0] not in session.get_providers():  # ONNX Runtime only warns and uses the next provider
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its {providers[0]} (CUDA or cuDNN libraries of "
            "another version?). Install the onnxruntime-gpu that fits PyTorch's CUDA, or use --backend torch."
        )
    return session


def _sentence(error: Exception) -> str:
    """Return ONNX Runtime's message on one line."""
    text = " ".join(str(error).split())
    return text if text.endswith(".") else text + "."


def symbol_sizes(name: str, specs: Sequence[TensorSpec], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Return the value of every symbolic dimension. Raises Scail2Error if the tensors do not fit the specs."""
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
    """Return the size of a dimension, given the values of the symbols."""
    factor, symbol = split_dim(dim)
    return factor * sizes[symbol]
