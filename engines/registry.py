"""Which executor runs, in which arithmetic, and why.

The choice is made once, at the start, and always comes with a printable reason. A backend that the user named is used
or refused; only `auto` chooses. Storage follows from the precision alone, so all executors of a folder share one
store; arithmetic may differ: ONNX Runtime has no bf16 GEMM on a CPU, so files for it compute bf16 and fp8 stages in
fp32 from the same stored values.
"""

import importlib.metadata
import importlib.util
from collections.abc import Collection, Sequence

import torch

from scail2_rt.export.models.precision import PRECISIONS, Numerics, Precision
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError

BACKENDS = ("tensorrt", "torch", "onnxruntime")
BUILT_BY_AUTO = ("torch", "onnxruntime")  # plans take long to build: only who names tensorrt gets them
FP8_CAPABILITY = (8, 9)
_INSTALL = {"onnxruntime": 'pip install "scail2-rt[cpu]"', "tensorrt": 'pip install "scail2-rt[tensorrt]"'}


def installed(backend: str) -> bool:
    """Can the library of this executor be imported here?"""
    return backend == "torch" or importlib.util.find_spec(backend) is not None


def gpu() -> str | None:
    """Name and architecture of the GPU that would be used, or None on a CPU machine."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm{major}{minor})"


def device_of(backend: str) -> str:
    """ "cuda" or "cpu": where this executor computes on this machine."""
    if backend == "tensorrt":
        return "cuda"
    if not torch.cuda.is_available():
        return "cpu"
    if backend == "onnxruntime":
        import onnxruntime

        return "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    return "cuda"


def choose_backend(requested: str = "auto", built: Collection[str] | None = None) -> tuple[str, str]:
    """(backend, reason). `built`: the executors that an engine folder holds; None when a build is still to come.

    `auto` takes TensorRT when its library and plans are there, else torch on a GPU, else ONNX Runtime, else torch.
    A named backend that cannot be used is an InputError."""
    if requested != "auto":
        if requested not in BACKENDS:
            raise InputError(f"backend {requested!r} is unknown; use auto, {', '.join(BACKENDS)}.")
        if not installed(requested):
            raise InputError(
                f"backend {requested} is not installed on this machine; install it with {_INSTALL[requested]} "
                "or use --backend auto."
            )
        return requested, "it was named"
    usable = [name for name in BACKENDS if installed(name) and (name in (BUILT_BY_AUTO if built is None else built))]
    graphics = gpu()
    if "tensorrt" in usable and graphics:
        return "tensorrt", f"its library and plans are there, and the GPU is {graphics}"
    if "torch" in usable and graphics:
        return "torch", f"the GPU is {graphics}" + _why_not("tensorrt", built)
    if "onnxruntime" in usable:
        place = f"the GPU is {graphics}" + _why_not("torch", built) if graphics else "this machine has no CUDA GPU"
        return "onnxruntime", place
    if "torch" in usable:
        return "torch", "this machine has no CUDA GPU" + _why_not("onnxruntime", built)
    raise InputError(
        f"none of the executors in the engine folder ({', '.join(sorted(built or ())) or 'none'}) can run on this "
        "machine; add one with scail2-rt build-engines CHECKPOINT -o DIR --backend torch."
    )


def _why_not(backend: str, built: Collection[str] | None) -> str:
    if not installed(backend):
        return f" and {backend} is not installed"
    return f" and {backend} is not built into the folder" if built is not None and backend not in built else ""


def refuse_unbuildable(backends: Sequence[str]) -> None:
    """InputError for what cannot be built on this machine."""
    for backend in backends:
        choose_backend(backend)
        if backend == "tensorrt":
            from scail2_rt.engines.tensorrt_backend.preflight import check_machine

            check_machine()


def default_precision(backends: Sequence[str]) -> tuple[Precision, str]:
    """(precision, reason): fp32 on a CPU; on a GPU fp8 where it has e4m3 GEMMs, else bf16."""
    if all(device_of(backend) == "cpu" for backend in backends):
        return "fp32", "computation is on the CPU"
    if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        return "fp8", f"the GPU is {gpu()}"
    return "bf16", f"the GPU is {gpu()}, which has no fp8"


def check_precision(precision: str) -> Precision:
    for known in PRECISIONS:
        if precision == known:
            return known
    raise InputError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}.")


def stage_numerics(definition: StageDefinition, precision: Precision, backend: str, device: str) -> Numerics:
    """Numerics of a stage in the form that this executor runs on "cuda" or "cpu". PyTorch has no fast fp16 on a CPU:
    fp32 there."""
    numerics = definition.numerics(precision)
    if backend == "torch" and device == "cpu" and numerics.compute == torch.float16:
        return numerics.in_arithmetic(torch.float32)
    if backend == "onnxruntime":
        from scail2_rt.engines.onnx_backend.engine import onnxruntime_numerics

        return onnxruntime_numerics(numerics)
    return numerics


def versions(backend: str) -> dict[str, str]:
    """Versions of the libraries that an executor's artefacts depend on."""
    if backend == "tensorrt":
        from scail2_rt.engines.tensorrt_backend.library import require_library

        return {"tensorrt": require_library()}  # its wheels have many names
    packages = {"torch": ("torch",), "onnxruntime": ("onnx", "onnxruntime")}[backend]
    found = {}
    for package in packages:
        for distribution in (package, f"{package}-gpu"):
            try:
                found[package] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
