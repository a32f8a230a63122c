"""The run report: a JSON file beside the output with everything needed to repeat the run, and its time and memory.

It is written once, atomically, when the run ends, with a status: `complete`, `partial` (stopped, finished segments are
kept) or `failed`. Hashes are SHA-256. Memory peaks are those of this process: resident host memory (operating system),
and GPU memory of PyTorch's allocator. The GPU memory in use at the end (driver) includes other libraries.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.request import Clip, ClipSource, ImageSource, Output, Request

if TYPE_CHECKING:
    from scail2_rt.engines.engine_set import EngineSet
    from scail2_rt.engines.folder.manifest import Identity

REPORT_VERSION = 2
OUTPUT_OPTIONS = ("codec", "crf", "overwrite", "resume", "metadata", "config")
PACKAGES = (
    "scail2-rt",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "triton",
    "av",
    "numpy",
    "tokenizers",
)


def report_path(output: Path) -> Path:
    """Return the path of an output's run report: `out/demo.mp4` → `out/demo.json`."""
    return output.with_suffix(".json")


def is_report(path: Path) -> bool:
    """Return whether `write_report` wrote this file. Other files of that name belong to the user and must be kept."""
    try:
        return "report_version" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks. For a folder it covers the names and hashes of its files."""
    if path.is_dir():
        files = [(file.name, file_hash(file)) for file in sorted(path.iterdir()) if file.is_file()]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def path_hash(path: Path) -> str:
    """The hash of an input: of a folder of images that of its frames, else that of the file."""
    from scail2_rt.runtime.media.clips import clip_hash, is_folder

    return clip_hash(path) if is_folder(path) else file_hash(path)


def describe_inputs(request: Request) -> dict[str, dict[str, str | None]]:
    """Return label → {"path": None for an input in memory, "sha256"} for every input of the request."""
    sources: dict[str, ImageSource | ClipSource] = {"driving": request.driving, "mask_video": request.mask_video}
    for index, (image, mask) in enumerate(request.references):
        label = f"extra_ref_{index}" if index else "image"
        sources |= {label: image, f"{label}_mask": mask}
    return {label: _described(source) for label, source in sources.items()}


def _described(source: "ImageSource | ClipSource") -> dict[str, str | None]:
    from scail2_rt.runtime.media.clips import clip_hash
    from scail2_rt.runtime.media.images import load_image

    if isinstance(source, Path):
        return {"path": str(source), "sha256": path_hash(source)}
    if isinstance(source, Clip):
        return {"path": None, "sha256": clip_hash(source)}
    pixels = load_image(source, background=(0, 0, 0))
    return {"path": None, "sha256": hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()}


def _option(value: Any) -> Any:
    """Return an option as a JSON value. Inputs in memory become text that names their type."""
    if isinstance(value, tuple):
        return [_option(item) for item in value]
    if isinstance(value, Path | Fraction | str | int | float) or value is None:
        return plain(value)
    return f"{type(value).__name__} in memory"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can affect the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory_peaks() -> dict[str, float]:
    """Return memory in GiB: the peak resident host memory of this process, if the system reports it; on a GPU also the
    allocator's peak and the memory in use according to the driver."""
    peaks = {}
    if (host := _host_peak_bytes()) is not None:
        peaks["host_peak_gib"] = host / 2**30
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        peaks["device_allocator_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peaks["device_in_use_gib"] = (total - free) / 2**30
    return {name: round(value, 3) for name, value in peaks.items()}


def _host_peak_bytes() -> int | None:
    """Return None on Windows, where Python has no `resource`. On Linux /proc is read, because `getrusage` counts the
    parent's peak in a child process."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor_name() -> str:
    """Return the CPU model. On Linux it is in /proc/cpuinfo; `platform` does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe_device(engines: "EngineSet", gpus: int = 1) -> dict[str, Any]:
    """Describe the executor, its device, the number of GPUs, and the machine."""
    name = processor_name()
    if engines.device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(engines.device)
    return {
        "backend": engines.backend,
        "reason": engines.reason,
        "device": str(engines.device),
        "name": name,
        "gpus": gpus,
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def engine_digest(identity: "Identity") -> str:
    """Return the SHA-256 of the facts that determine the weights of an engine folder: sizes, precision, checkpoint
    files and LoRAs."""
    parts = (identity.config, identity.precision, identity.sources, [lora.identity for lora in identity.loras])
    return hashlib.sha256(json.dumps(plain(parts), sort_keys=True).encode()).hexdigest()


def describe_engines(engines: "EngineSet") -> dict[str, Any]:
    """Describe the contents of the engine folder: precision, sizes, source files, LoRAs and execution options."""
    from scail2_rt.export.models.precision import FP8_ACCUMULATION  # imports torch

    manifest_file = engines.directory / "manifest.json"
    identity = engines.manifest.identity
    return {
        "directory": str(engines.directory),
        "manifest_sha256": file_hash(manifest_file),
        "digest": engine_digest(identity),
        "precision": engines.manifest.precision,
        "config": plain(engines.config),
        "sources": plain(identity.sources),
        "loras": plain(identity.loras),
        "max_rows": engines.max_rows,
        "attention": engines.attention.name,
        "cuda_graphs": engines.cuda_graphs,
        "fp8_accumulation": FP8_ACCUMULATION if engines.manifest.precision == "fp8" else None,
    }


def describe_plan(plan: Plan, output: Output) -> dict[str, Any]:
    """Describe every option, resolved, and the plan that follows from them."""
    request = plan.request
    options = {field.name: _option(getattr(request, field.name)) for field in fields(request)}
    return {
        "report_version": REPORT_VERSION,
        "options": options
        | {"output": str(output.path)}
        | {name: _option(getattr(output, name)) for name in OUTPUT_OPTIONS},
        "mode": plan.mode,
        "seed": request.seed,
        "height": plan.height,
        "width": plan.width,
        "frame_rate": str(plan.frame_rate),
        "frames": plan.frames,
        "notes": list(plan.notes),
        "segments": plain(plan.segments),
        "tokens": plan.layout.tokens,
        "inputs": describe_inputs(request),
        "mask_findings": plain(plan.masks),
        "framing": plan.framing and plan.framing.described,
        "reference_fit": plain(plan.fit),
    }


def describe_end(
    status: str, output: Path, timings: Mapping[str, float], warnings: Sequence[str], error: str | None = None
) -> dict[str, Any]:
    """Describe the end of a run. output: the result or the partial video, if it exists; timings: seconds per phase."""
    end: dict[str, Any] = {"status": status, "error": error, "output": None, "output_sha256": None}
    if output.exists():
        end |= {"output": str(output), "output_sha256": file_hash(output)}
    end["timings_s"] = {name: round(seconds, 4) for name, seconds in timings.items()}
    return end | {"memory": memory_peaks(), "warnings": list(warnings)}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report atomically, with the permissions of a new file."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".", suffix=".json", delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
