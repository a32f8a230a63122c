"""Requirements of a machine for building plans, checked before any work is done.

Each refusal is one sentence: what is needed, what is available, what to do. Disk, host and GPU memory are estimated
from the bytes of the stages' weights: a plan holds them once, and TensorRT needs up to four times the largest stage's
weights in host memory during the build.
"""

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.engines.folder.manifest import ExecutorRecord
from scail2_rt.engines.tensorrt_backend.library import Library, require_library
from scail2_rt.engines.tensorrt_backend.plans import Environment
from scail2_rt.engines.tensorrt_backend.targets import BF16_CAPABILITY, FP8_CAPABILITY, target_of
from scail2_rt.export.models.precision import Precision
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

HOST_FACTOR = 4
PROCESS_BYTES = 256 << 20  # of a compiling process, in addition to the weights
PLAN_FACTOR = 1.15  # size of a plan relative to its weights: they are padded, and kernels are included
PLAN_BYTES = 8 << 20  # of a plan without weights
SCRATCH_BYTES = 1 << 30  # GPU memory that a build needs in addition to two copies of the weights
GIB = 1 << 30
CGROUP_FILES = (  # limit and use, for cgroup version 2 and version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPU that a build would use."""

    name: str
    capability: tuple[int, int]
    free_bytes: int

    @property
    def text(self) -> str:
        return f"{self.name} ({target_of(self.capability)})"


def find_gpu() -> GpuFacts | None:
    """Return the current CUDA device, or None on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return GpuFacts(torch.cuda.get_device_name(), (major, minor), free)


def check_machine(library: Library, precision: Precision | None = None) -> None:
    """Check library and, if plans are compiled on the GPU that runs them, GPU. Raises InputError if either is missing,
    too old, or does not support the precision."""
    require_library(library)
    if not library.compiles_here:
        return
    gpu = find_gpu()
    if gpu is None:
        raise InputError(
            f"backend {library.name} builds its plans on the GPU that runs them, and PyTorch finds no CUDA GPU on "
            "this machine. Use a machine with one, or --backend onnxruntime here."
        )
    if gpu.capability < BF16_CAPABILITY:
        raise InputError(
            f"backend {library.name} needs a GPU of compute capability 8.0 or newer, and this is {gpu.text}; "
            "use --backend torch."
        )
    if precision == "fp8" and gpu.capability < FP8_CAPABILITY:
        raise InputError(
            f"precision fp8 needs a GPU of compute capability 8.9 or newer, and this is {gpu.text}; "
            "use --precision bf16."
        )


def environment(library: Library, targets: tuple[str, ...]) -> Environment:
    """Return where plans built on this machine now can run."""
    gpu = find_gpu()
    return Environment(require_library(library), ",".join(targets) or (gpu.text if gpu is not None else ""))


def check_place(library: Library, record: ExecutorRecord, remedy: str) -> None:
    """Raise InputError if a folder's plans cannot run here because of another version or GPU. `remedy`: the command
    that builds them again."""
    version, gpu = require_library(library), find_gpu()
    if gpu is None:
        raise InputError(
            f"backend {library.name} runs on an NVIDIA GPU, and PyTorch finds none on this machine. Use another "
            "backend of the folder, for example --backend torch."
        )
    card = target_of(gpu.capability)
    if library.targets and card not in library.targets:
        raise InputError(
            f"{library.title} does not run on {gpu.text}: it runs on RTX cards ({', '.join(library.targets)}), not on "
            "data-centre Hopper or Blackwell. Use --backend torch, or tensorrt."
        )
    field = f"executors.{library.name}"
    built = record.versions.get(library.name)
    if built != version:
        raise InputError(
            f"{field}.versions.{library.name}: the plans were built with {built}, and this machine has {version}; "
            f"plans run only in the version that built them. Build them again with: {remedy}"
        )
    if library.targets and card not in record.targets:
        raise InputError(
            f"{field}.targets: the plans were built for {', '.join(record.targets)}, and this is {gpu.text}. Build "
            f"them again with: {_for_targets(remedy, (*record.targets, card))}"
        )
    if library.compiles_here and record.gpu != gpu.text:
        raise InputError(
            f"{field}.gpu: the plans were built with {record.gpu}, and this machine has {gpu.text}; plans run only "
            f"where they were built. Build them again with: {remedy}"
        )


def _for_targets(command: str, targets: tuple[str, ...]) -> str:
    """A build command with these targets in place of its own."""
    words = shlex.split(command)
    if "--target" in words:
        place = words.index("--target")
        words = words[:place] + words[place + 2 :]
    return shlex.join([*words, "--target", ",".join(targets)])


def build_memory(weights: int) -> int:
    """Return the estimated bytes of host memory needed to compile a stage with `weights` bytes of weights."""
    return HOST_FACTOR * weights + PROCESS_BYTES


def resident_bytes(stage_bytes: Mapping[str, int]) -> dict[str, int]:
    """Return the weights that must be on the GPU at once, since plans include them: phase of a run → bytes."""
    phases: dict[str, int] = {}
    for stage, size in stage_bytes.items():
        component = stage.partition(".")[0]
        before = stage == "dit.context" or stage.endswith(".context_kv")
        phase = {"umt5": "text", "clip": "image", "vae": "VAE"}.get(component, "context" if before else "denoising")
        phases[phase] = phases.get(phase, 0) + size
    return phases


def check_resources(library: Library, stage_bytes: Mapping[str, int], directory: Path) -> None:
    """Raise InputError if disk, host or GPU memory is too small for the plans of these stages (name → bytes)."""
    if not stage_bytes:
        return
    largest = max(stage_bytes, key=lambda name: stage_bytes[name])
    size = stage_bytes[largest]
    disk = sum(int(weights * PLAN_FACTOR) + PLAN_BYTES for weights in stage_bytes.values())
    place = directory
    while not place.exists():
        place = place.parent
    _enough(
        f"the plans of {counted(len(stage_bytes), 'stage')} need",
        disk,
        shutil.disk_usage(place).free,
        f"on the disk of {directory}",
        "free some space, or choose another folder with -o",
    )
    what = f"building the stage {largest} ({size / GIB:.2f} GiB of weights) needs"
    _enough(
        what,
        build_memory(size),
        host_memory(),
        "of host memory",
        "close other programs, or add swap; the build continues where it stopped",
    )
    gpu = find_gpu()
    if gpu is not None and library.compiles_here:
        _enough(what, 2 * size + SCRATCH_BYTES, gpu.free_bytes, "of GPU memory", "end other programs on the GPU")


def _enough(what: str, needed: int, have: int, where: str, remedy: str) -> None:
    if have < needed:
        raise InputError(f"{what} {needed / GIB:.2f} GiB {where}, and {have / GIB:.2f} GiB are free; {remedy}.")


def host_memory(root: Path = Path("/")) -> int:
    """Return the bytes of host memory that a process can still allocate: the system's available memory, within the
    container's limit. `root` contains proc and sys."""
    available = _meminfo(root / "proc/meminfo")
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    group = root / "sys/fs/cgroup"
    for limit, used in CGROUP_FILES:
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        available = min(available, max(left + _cache_bytes(group / limit), 0))
    return available


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _cache_bytes(limit: Path) -> int:
    """Return the bytes of cached files of the container, which the kernel would free."""
    try:
        entries = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get("inactive_file", 0)) + int(entries.get("active_file", 0))
