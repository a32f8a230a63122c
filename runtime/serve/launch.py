"""Turn the options of `scail2-rt serve` into `Settings`: data folder, limits, number of workers."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve.server import default_data
from scail2_rt.runtime.serve.settings import Limits, Settings

SAME = (
    *("host", "port", "gpus_per_video", "key_file", "allow_hosts", "fetch_hosts", "keep_s", "disk_bytes", "model"),
    *("backend", "max_rows", "attention", "vram_limit", "no_graphs", "segmenter", "segmenter_weights"),
)


def settings_of(engines: Path, options: Mapping[str, Any]) -> Settings:
    """The settings of a service. Raises InputError for a folder without engines, a named segmenter that is not
    installed, and more GPUs than the machine has."""
    if not (engines / "manifest.json").is_file():
        from scail2_rt.engines.folder.manifest import read_manifest

        read_manifest(engines)  # raises, with the command that makes one
    if options["segmenter_weights"] is not None or options["segmenter"] != "auto":
        from scail2_rt.runtime.masks.make.folders import find_segmenter

        find_segmenter(options["segmenter"], options["segmenter_weights"])
    gpus = visible_gpus(options["backend"])
    return Settings(
        engines=engines.resolve(),
        data=Path(options["data"] or default_data()).resolve(),
        workers=workers_of(options["gpus"], options["gpus_per_video"], gpus),
        on_gpu=gpus > 0,
        warm=not options["no_warm"],
        limits=limits_of(options),
        **{name: options[name] for name in SAME},
    )


def limits_of(options: Mapping[str, Any]) -> Limits:
    """The limits for clients from the options of `serve`."""
    return Limits(
        upload_bytes=options["max_upload"],
        frames=options["max_frames"],
        queued=options["max_queue"],
        queued_per_key=options["max_queue_per_key"],
        file_bytes=options["file_quota"],
    )


def workers_of(wanted: str, each: int, present: int) -> int:
    """The number of worker processes for `--gpus N|all --gpus-per-video EACH` on a machine with `present` GPUs; 1
    without a GPU. Raises InputError for numbers that do not fit."""
    if wanted != "all" and not (wanted.isdecimal() and int(wanted) > 0):
        raise InputError(f"--gpus must be a number or all, not {wanted}.")
    if present == 0:
        if wanted not in ("all", "1") or each > 1:
            raise InputError("This machine has no GPU. Leave --gpus and --gpus-per-video out to run on the CPU.")
        return 1
    used = present if wanted == "all" else int(wanted)
    if used > present:
        raise InputError(f"--gpus {used} is more than the {present} GPUs of this machine. Give {present} or fewer.")
    if used % each:
        raise InputError(f"--gpus-per-video {each} does not divide the {used} GPUs. Give a divisor of {used}.")
    return used // each


def visible_gpus(backend: str) -> int:
    """The number of GPUs that PyTorch sees; 0 for a backend that runs on the CPU on this machine. Counted in another
    process, so that the server does not load CUDA."""
    if not (Path("/dev/nvidiactl").exists() or os.name == "nt" or Path("/dev/dxg").exists()):
        return 0
    code = (
        "import sys, torch; from scail2_rt.engines.registry import device_of; name = sys.argv[1]; "
        "print(torch.cuda.device_count() if name == 'auto' or device_of(name) == 'cuda' else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code, backend], capture_output=True, text=True, check=False)
    return int(found.stdout.strip() or 0) if found.returncode == 0 else 0
