"""Checks that an output can be written at a path, before anything is computed."""

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.containers import CONTAINERS, container_of
from scail2_rt.runtime.media.frame_files import is_frame_folder


def check_writable(path: Path, expected_bytes: int = 0, endings: Collection[str] = tuple(CONTAINERS)) -> None:
    """Raise InputError unless an output with one of these endings can be written at `path` and its disk has
    `expected_bytes` free.

    The folder need not exist, and is not created; no file remains.
    """
    if path.suffix.lower() not in endings:
        *others, last = endings
        raise InputError(f"The output {path} must end in {', '.join(others)} or {last}.")
    if container_of(path).muxer:
        check_place(path, expected_bytes)
        return
    if path.exists() and not is_frame_folder(path):
        what = "holds files that are not frames" if path.is_dir() else "is a file"
        raise InputError(f"The output {path} {what}, and a folder of PNG files would replace it: choose another name.")
    _check_parent(path, expected_bytes)


def check_place(path: Path, expected_bytes: int = 0) -> None:
    """`check_writable` for a file with any ending."""
    if path.is_dir():
        raise InputError(f"The output {path} is a folder: give a file name.")
    _check_parent(path, expected_bytes)


def _check_parent(path: Path, expected_bytes: int) -> None:
    """Raise InputError unless a folder for `path` exists or can be created, is writable and has `expected_bytes`
    free."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(
            f"The output {path} cannot be written because {folder} is a file, not a folder: choose another path."
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"The folder {folder} is not writable ({error.strerror}): choose another output.") from error
    if free < expected_bytes:
        raise InputError(
            f"The disk of {folder} has {free / 2**20:.0f} MiB free and the output may need "
            f"{expected_bytes / 2**20:.0f} MiB: free some space or choose another output."
        )
