"""`doctor`: the hardware and libraries of this machine, the backend that `auto` chooses and why, and advice.

It must work on a machine where libraries are missing or broken. Each library is probed separately, and a probe returns
text instead of raising: "not installed", or "broken" with the library's message. GPUs are listed by the driver's tool,
so that a PyTorch without CUDA can be distinguished from a machine without a GPU. Importing PyTorch takes most of the
time.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

if TYPE_CHECKING:
    from scail2_rt.engines.observer import BuildObserver

MISSING = "not installed"
DRIVER_TOOL = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,memory.free,memory.total,driver_version",
    "--format=csv,noheader,nounits",
)
TOOL_TIMEOUT_S = 3
ENCODERS = {
    "h264": ("libx264", "h264_nvenc"),
    "hevc": ("libx265", "hevc_nvenc"),
    "av1": ("libsvtav1", "libaom-av1", "av1_nvenc"),
    "vp9": ("libvpx-vp9",),
}
FP8_CAPABILITY = (8, 9)
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # engines.tensorrt_backend.library.TENSORRT_RTX
GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU, as reported by the driver."""

    name: str
    capability: tuple[int, int]
    free_gib: float
    total_gib: float
    driver: str


@dataclass(frozen=True, slots=True)
class Library:
    """A library. detail: "not installed", "broken: …", or its features."""

    name: str
    version: str | None
    detail: str
    usable: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The results, in the order of the text. engines, engines_open: None if no folder was named; backend: None if none
    can run."""

    python: str
    system: str
    cpu_count: int
    ram_free_gib: float | None
    ram_total_gib: float | None
    disk: str
    disk_free_gib: float | None
    gpus: tuple[GPU, ...]
    cuda: str
    libraries: tuple[Library, ...]
    encoders: dict[str, tuple[str, ...]]
    backend: str | None
    reason: str
    advice: tuple[str, ...]
    segmenters: tuple[str, ...]
    engines: str | None
    engines_open: bool | None

    @property
    def text(self) -> str:
        """All results as text, one line per fact."""
        rows = [("Python", f"{self.python} on {self.system}, {counted(self.cpu_count, 'CPU core')}")]
        rows.append(("memory", _of(self.ram_free_gib, self.ram_total_gib, "available")))
        rows.append(("disk", f"{_gib(self.disk_free_gib)} free at {self.disk}"))
        for gpu in self.gpus:
            major, minor = gpu.capability
            rows.append(
                (
                    "GPU",
                    f"{gpu.name}, sm{major}{minor}, {_of(gpu.free_gib, gpu.total_gib, 'free')}, driver {gpu.driver}",
                )
            )
        if not self.gpus:
            rows.append(("GPU", "none reported by the NVIDIA driver"))
        rows.append(("CUDA", self.cuda))
        for library in self.libraries:
            rows.append((library.name, ", ".join(part for part in (library.version, library.detail) if part)))
        codecs = [f"{codec} ({', '.join(found)})" for codec, found in self.encoders.items() if found]
        rows.append(("encoders", ", ".join(codecs) or "none"))
        choice = f"auto chooses {self.backend}, because {self.reason}" if self.backend else self.reason
        rows.append(("backend", choice))
        rows += [("advice" if not i else "", line) for i, line in enumerate(self.advice)]
        rows += [("segmenters" if not i else "", line) for i, line in enumerate(self.segmenters)]
        if self.engines is not None:
            rows.append(("engines", self.engines))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _gib(amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.1f} GiB"


def _of(free: float | None, total: float | None, word: str) -> str:
    return f"{_gib(free)} {word} of {_gib(total)}"


def diagnose(engines: Path | None = None, observer: "BuildObserver | None" = None) -> Diagnosis:
    """Examine this machine and, if named, an engine folder, all of whose files are read. `observer` receives the
    progress of that.

    Raises InputError for a path that does not exist or is not an engine folder. Other problems are in the result."""
    if engines is not None and not engines.exists():
        raise InputError(f"{engines.absolute()} does not exist. Give the path of an engine folder.")
    if engines is not None and not (engines / "manifest.json").is_file():
        raise InputError(
            f"{engines.absolute()} is not an engine folder, because it has no manifest.json. Build one with: scail2-rt "
            "build-engines CHECKPOINT -o ENGINES"
        )
    if observer is not None:
        observer.note("checking the libraries of this machine, which takes a few seconds")
    libraries = (_torch(), _triton(), _tensorrt(), _tensorrt_rtx(), _onnxruntime(), _pyav())
    by_name = {library.name: library for library in libraries}
    cuda, torch_sees_gpu = _cuda(by_name["PyTorch"])
    gpus = gpus_of_driver() or (_gpus_of_torch() if torch_sees_gpu else ())
    backend, reason = _choice(by_name["PyTorch"])
    opened: tuple[str, bool] | None = None if engines is None else _opens(engines, by_name["PyTorch"], observer)
    place = engines if engines is not None and engines.is_dir() else Path.cwd()
    free, total = _memory()
    return Diagnosis(
        python=platform.python_version(),
        system=platform.platform(terse=True),
        cpu_count=os.cpu_count() or 1,
        ram_free_gib=free,
        ram_total_gib=total,
        disk=str(place),
        disk_free_gib=_attempt(lambda: shutil.disk_usage(place).free / GIB),
        gpus=gpus,
        cuda=cuda,
        libraries=libraries,
        encoders=_encoders(),
        backend=backend,
        reason=reason,
        advice=_advice(gpus, by_name, torch_sees_gpu),
        segmenters=_segmenters(),
        engines=None if opened is None else opened[0],
        engines_open=None if opened is None else opened[1],
    )


def _attempt(probe: Callable[[], Any]) -> Any:
    """Return the result of a probe, or None if it raises."""
    try:
        return probe()
    except Exception:  # a broken library may raise anything
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _probe(name: str, module: str, packages: tuple[str, ...], describe: Callable[[ModuleType], str]) -> Library:
    """Import a library and describe it. packages: distributions that contain it."""
    versions = (_attempt(partial(importlib.metadata.version, package)) for package in packages)
    version = next((found for found in versions if found), None)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module and version is None:
            return Library(name, None, MISSING, False)
        return Library(name, version, f"broken: {_one_line(error)}", False)
    except Exception as error:  # for example a library for another CUDA version
        return Library(name, version, f"broken: {_one_line(error)}", False)
    try:
        return Library(name, version or getattr(imported, "__version__", None), describe(imported), True)
    except Exception as error:
        return Library(name, version, f"broken: {_one_line(error)}", False)


def _torch() -> Library:
    def describe(torch: Any) -> str:
        built = torch.version.cuda
        return f"built for CUDA {built}" if built else "built for the CPU only"

    return _probe("PyTorch", "torch", ("torch",), describe)


def _triton() -> Library:
    return _probe("Triton", "triton", ("triton", "triton-windows"), lambda triton: "")


def _tensorrt() -> Library:
    def describe(tensorrt: Any) -> str:
        tensorrt.Logger()  # without its libraries the import succeeds and this fails
        return ""

    packages = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt", "tensorrt-cu13-bindings")
    return _probe("TensorRT", "tensorrt", packages, describe)


def _tensorrt_rtx() -> Library:
    def describe(tensorrt_rtx: Any) -> str:
        from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX

        tensorrt_rtx.Logger()
        return f"builds on any machine, runs on {', '.join(TENSORRT_RTX.targets)}"

    return _probe("TensorRT for RTX", "tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), describe)


def _onnxruntime() -> Library:
    def describe(onnxruntime: Any) -> str:
        return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())

    return _probe("ONNX Runtime", "onnxruntime", ("onnxruntime", "onnxruntime-gpu"), describe)


def _pyav() -> Library:
    def describe(av: Any) -> str:
        return f"FFmpeg {getattr(av, 'ffmpeg_version_info', 'unknown')}"

    return _probe("PyAV", "av", ("av",), describe)


def _encoders() -> dict[str, tuple[str, ...]]:
    """Return codec → its encoders in this PyAV. Hardware encoders are listed if FFmpeg has them, even without a GPU."""

    def available() -> set[str]:
        import av

        return set(av.codecs_available)

    found: set[str] = _attempt(available) or set()
    return {codec: tuple(name for name in names if name in found) for codec, names in ENCODERS.items()}


def gpus_of_driver() -> tuple[GPU, ...]:
    """Return the GPUs listed by the driver's tool; empty if it is missing or fails."""

    def ask() -> tuple[GPU, ...]:
        done = subprocess.run(DRIVER_TOOL, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True)
        return tuple(_parse_gpu(line) for line in done.stdout.splitlines() if line.strip())

    return _attempt(ask) or ()


def _gpus_of_torch() -> tuple[GPU, ...]:
    """Return the GPUs that PyTorch sees, for containers without the driver's tool."""

    def ask() -> tuple[GPU, ...]:
        import torch

        found = []
        for index in range(torch.cuda.device_count()):
            free, total = (amount / GIB for amount in torch.cuda.mem_get_info(index))
            capability = torch.cuda.get_device_capability(index)
            found.append(GPU(torch.cuda.get_device_name(index), capability, free, total, "unknown"))
        return tuple(found)

    return _attempt(ask) or ()


def _parse_gpu(line: str) -> GPU:
    """Parse one line of the tool: name, capability, free MiB, total MiB, driver."""
    name, capability, free, total, driver = (part.strip() for part in line.rsplit(",", 4))
    major, _, minor = capability.partition(".")
    return GPU(name, (int(major), int(minor)), float(free) / 1024, float(total) / 1024, driver)


def _cuda(torch_library: Library) -> tuple[str, bool]:
    """Return (text about CUDA in PyTorch, whether PyTorch sees a GPU)."""
    if not torch_library.usable:
        return "unknown: PyTorch cannot be used", False

    def ask() -> tuple[str, bool]:
        import torch

        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA GPU", False
        return f"{torch.version.cuda}, PyTorch sees {counted(torch.cuda.device_count(), 'GPU')}", True

    return _attempt(ask) or ("unknown: PyTorch's CUDA query fails", False)


def _choice(torch_library: Library) -> tuple[str | None, str]:
    """Return (the backend that `auto` chooses for a new folder, the reason)."""
    if not torch_library.usable:
        return None, "no backend can run without PyTorch: pip install torch"
    try:
        from scail2_rt.engines.registry import choose_backend

        return choose_backend()
    except Exception as error:
        return None, _one_line(error)


def _advice(gpus: tuple[GPU, ...], libraries: dict[str, Library], torch_sees_gpu: bool) -> tuple[str, ...]:
    """Return what to install or change for a faster backend, the most effective first."""
    torch, runtime = libraries["PyTorch"], libraries["ONNX Runtime"]
    lines = []
    if not torch.usable:
        lines.append("PyTorch is needed by every backend: pip install torch")
    if not gpus and not torch_sees_gpu:
        if not runtime.usable:
            lines.append('ONNX Runtime is the fastest backend on a CPU: pip install "scail2-rt[cpu]"')
        lines.append("videos of usable size need an NVIDIA GPU; use this machine for small tests only")
        return tuple(lines)
    if torch.usable and not torch_sees_gpu:
        lines.append(
            "PyTorch does not see the GPU: install a CUDA build that the driver supports (pytorch.org/get-started)"
        )
    if any(f"sm{major}{minor}" in RTX_TARGETS for major, minor in (gpu.capability for gpu in gpus)):
        if not libraries["TensorRT for RTX"].usable:
            lines.append(
                'TensorRT for RTX plans: pip install "scail2-rt[tensorrt-rtx]", then scail2-rt build-engines '
                "CHECKPOINT -o ENGINES --backend tensorrt-rtx, then scail2-rt verify ENGINES --checkpoint CHECKPOINT "
                "(docs/tensorrt-rtx.md)"
            )
    elif not libraries["TensorRT"].usable:
        lines.append(
            'TensorRT plans: pip install "scail2-rt[tensorrt]", then scail2-rt build-engines CHECKPOINT -o ENGINES '
            "--backend tensorrt"
        )
    if not libraries["Triton"].usable:
        lines.append('Triton kernels: pip install "scail2-rt[gpu]"')
    if gpus and max(gpu.capability for gpu in gpus) < FP8_CAPABILITY:
        lines.append("the GPU has no fp8, which needs sm89 or newer: build with --precision bf16")
    return tuple(lines) or ("nothing is missing",)


def _segmenters() -> tuple[str, ...]:
    """Return a line about each segmenter in the cache folder, with its size, or how to get one."""
    from scail2_rt.runtime.masks.make.folders import NAMES, open_folder, segmenter_cache

    lines = []
    version = _attempt(partial(importlib.metadata.version, "transformers"))
    for name in NAMES:
        if (segmenter_cache() / name).is_dir():
            try:
                found = open_folder(segmenter_cache() / name)
            except Exception as error:
                lines.append(_one_line(error))
                continue
            alone = " without Grounding DINO" if name == "sam2" and found.detector is None else ""
            lines.append(
                f"{name}{alone} in {found.model}: {found.weight_bytes / GIB:.1f} GiB of weights, an estimated "
                f"{found.memory_bytes / GIB:.1f} GiB in memory"
            )
    if not lines:
        lines.append("none in the cache folder: download one with: scail2-rt download --segmenter sam2")
    if version is None:
        lines.append('transformers is not installed: pip install "scail2-rt[masks]"')
    return tuple(lines)


def _opens(directory: Path, torch_library: Library, observer: "BuildObserver | None") -> tuple[str, bool]:
    """Return (text about opening and checking the folder, whether it opens and is undamaged)."""
    if not torch_library.usable:
        return f"{directory} cannot be opened without PyTorch", False
    try:
        from scail2_rt.engines.engine_set import open_engines
        from scail2_rt.engines.folder.damage import check_health
        from scail2_rt.engines.registry import backend

        with open_engines(directory) as engines:
            health = check_health(directory, engines.manifest, observer)
            if health.damages:
                return health.text, False
            sizes = {stage.name: stage.weight_bytes for stage in engines.manifest.stages}
            notes = [backend(name).memory_note(sizes) for name in engines.manifest.backends]
            text = f"{directory} opens: {engines.choice}; {health.text}"
            return "; ".join([text, *(note for note in notes if note)]), True
    except Exception as error:
        return f"{directory} cannot be opened: {' '.join(str(error).split())}", False


def _memory() -> tuple[float | None, float | None]:
    """Return (available, total) host memory in GiB; None for a value that the system does not report."""

    def linux() -> tuple[float, float]:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        return kib["MemAvailable"] * 1024 / GIB, kib["MemTotal"] * 1024 / GIB

    def posix() -> tuple[None, float]:
        return None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB

    return _attempt(linux) or _attempt(posix) or (None, None)
