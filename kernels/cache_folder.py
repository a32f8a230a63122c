"""Cache folders: traced graphs, prompt encodings, compiled kernels and other data that can be computed again."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """Return $SCAIL2_RT_CACHE, else scail2-rt in $XDG_CACHE_HOME, else in ~/.cache, else (without a home folder) in the
    system's temporary folder."""
    if own := os.environ.get("SCAIL2_RT_CACHE"):
        return Path(own)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification says to ignore relative paths
        return xdg / "scail2-rt"
    try:
        return Path.home() / ".cache" / "scail2-rt"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "scail2-rt"


def kernel_directory() -> Path:
    """Return the folder of kernels compiled by NVRTC: $SCAIL2_RT_KERNELS, or `kernels` in the cache folder."""
    own = os.environ.get("SCAIL2_RT_KERNELS")
    return Path(own) if own else cache_directory() / "kernels"


def use_kernel_cache(directory: Path) -> None:
    """Let Triton and NVRTC cache kernels in `directory`, unless the user has set a folder or it is not writable."""
    with contextlib.suppress(OSError):
        directory.mkdir(exist_ok=True)
        if os.access(directory, os.W_OK):
            for variable in ("TRITON_CACHE_DIR", "SCAIL2_RT_KERNELS"):
                os.environ.setdefault(variable, str(directory))
