"""The list of backends, and the choice between them. No other module knows their names.

The choice is made once, at start, and always comes with a printable reason. A backend named by the user is used or
refused; only `auto` chooses. A new backend is one line of `_MODULES` and one file.
"""

import functools
import importlib
from collections.abc import Collection, Mapping, Sequence

import torch

from scail2_rt.engines.backend import Backend
from scail2_rt.export.models.precision import PRECISIONS, Precision
from scail2_rt.kernels.errors import InputError

# In the order of preference of `auto` on a GPU. Without a GPU the order is reversed, without the backends that need
# one: ONNX Runtime is the fastest on a CPU. Each module defines its backend as BACKEND, or several by name as BACKENDS.
_MODULES = {
    "tensorrt": "tensorrt_backend.backend",
    "tensorrt-rtx": "tensorrt_backend.backend",
    "torch": "torch_backend.backend",
    "onnxruntime": "onnx_backend.backend",
}
BACKENDS = tuple(_MODULES)
FP8_CAPABILITY = (8, 9)


@functools.cache
def backend(name: str) -> Backend:
    """Return the backend of this name. Raises InputError if there is none."""
    if name not in _MODULES:
        raise InputError(f"backend {name!r} is unknown. Use auto, {', '.join(BACKENDS)}.")
    module = importlib.import_module(f"scail2_rt.engines.{_MODULES[name]}")
    found: Backend = module.BACKENDS[name] if hasattr(module, "BACKENDS") else module.BACKEND
    return found


def installed(name: str) -> bool:
    """Return whether the library of this backend can be imported here."""
    return backend(name).installed()


def gpu() -> str | None:
    """Return name and architecture of the current GPU, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm{major}{minor})"


def device_of(name: str) -> str:
    """Return the device type on which this backend computes on this machine: "cuda" or "cpu"."""
    return backend(name).device()


def choose_backend(
    requested: str = "auto",
    built: Collection[str] | None = None,
    obstacles: Mapping[str, str] | None = None,
    remedy: str = "scail2-rt build-engines CHECKPOINT -o ENGINES --backend torch",
) -> tuple[str, str]:
    """Return (backend, reason). `built`: the backends in an engine folder, None before a build; `obstacles`: backend →
    why `auto` must not choose it, in words; `remedy`: the command that adds a backend that runs anywhere.

    Of the installed and built backends, `auto` takes TensorRT on a GPU, then torch, then ONNX Runtime; on a CPU, ONNX
    Runtime before torch. Raises InputError if a named backend cannot be used."""
    if requested != "auto":
        if not installed(backend(requested).name):
            raise InputError(
                f"backend {requested} is not installed on this machine. Install it with {backend(requested).install} "
                "or use --backend auto."
            )
        return requested, "it was named"
    graphics = gpu()
    order = BACKENDS if graphics else tuple(name for name in reversed(BACKENDS) if not backend(name).needs_gpu)
    place = f"the GPU is {graphics}" if graphics else "this machine has no CUDA GPU"
    for position, name in enumerate(order):
        if _usable(name, built) and name not in (obstacles or {}):
            if backend(name).needs_gpu:
                return name, f"its library and plans exist, and {place}"
            return name, place + "".join(_why_not(better, built, obstacles) for better in order[:position])
    reasons = "".join(f" {text}." for text in (obstacles or {}).values())
    raise InputError(
        f"none of the backends in the engine folder ({', '.join(sorted(built or ())) or 'none'}) can run on this "
        f"machine.{reasons} Add one with: {remedy}"
    )


def _usable(name: str, built: Collection[str] | None) -> bool:
    return installed(name) and (backend(name).built_by_auto if built is None else name in built)


def _why_not(name: str, built: Collection[str] | None, obstacles: Mapping[str, str] | None) -> str:
    if obstacles and name in obstacles:
        return f" and {obstacles[name]}"
    if not installed(name):
        return f" and {name} is not installed"
    return f" and {name} is not built into the folder" if built is not None and name not in built else ""


def buildable(name: str) -> bool:
    """Can artefacts of this backend be built on this machine?"""
    if name not in _MODULES or not installed(name):
        return False
    try:
        backend(name).check_machine()
    except InputError:
        return False
    return True


def refuse_unbuildable(names: Sequence[str]) -> None:
    """Raise InputError for a backend that cannot be built on this machine."""
    for name in names:
        choose_backend(name)
        backend(name).check_machine()


def default_precision(names: Sequence[str]) -> tuple[Precision, str]:
    """Return (precision, reason): fp32 on a CPU; on a GPU fp8 if it has e4m3 GEMMs, else bf16."""
    if all(device_of(name) == "cpu" for name in names):
        return "fp32", "computation is on the CPU"
    if not torch.cuda.is_available():
        return "fp8", "plans are built for cards that have it"
    if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        return "fp8", f"the GPU is {gpu()}"
    return "bf16", f"the GPU is {gpu()}, which has no fp8"


def check_precision(precision: str) -> Precision:
    """Return `precision` if it is known. Raises InputError otherwise."""
    for known in PRECISIONS:
        if precision == known:
            return known
    raise InputError(f"precision {precision!r} is unknown. Use one of {', '.join(PRECISIONS)}.")
