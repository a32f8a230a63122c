"""The trained checkpoint that comes with the package, and engines built from it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scail2_rt.engines.build.build import BuildReport, BuildRequest, SilentObserver, build
from scail2_rt.engines.observer import BuildObserver
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.kernels.errors import InputError

CHECKPOINT = Path(__file__).parent / "checkpoint"
BACKEND = "torch"  # also on a CPU, because ONNX Runtime's graphs take minutes to trace the first time


def shipped_checkpoint() -> Path:
    """The folder of the checkpoint. Raises InputError if it is missing."""
    if not (CHECKPOINT / "model" / "latest").is_file():
        raise InputError(
            f"The sprite checkpoint is missing at {CHECKPOINT}. Get it from the repository, or train it with "
            "`python -m scail2_rt.benchmarks.sprites.training.train`."
        )
    return CHECKPOINT


def make_engines(
    checkpoint: Path,
    directory: Path,
    backends: Sequence[str] = (BACKEND,),
    precision: str | None = None,
    observer: BuildObserver | None = None,
) -> BuildReport:
    """Build engines in a folder that only this program uses. A folder of an older version or of another checkpoint, or
    a damaged one, is built again."""
    request = BuildRequest(checkpoint, directory, tuple(backends), precision)
    opened, watcher = open_checkpoint(checkpoint), observer or SilentObserver()
    try:
        return build(request, opened, watcher)
    except InputError as error:
        if not directory.is_dir():
            raise
        print(f"building the engines again: {error}", file=sys.stderr)
        return build(replace(request, rebuild=True), opened, watcher)
