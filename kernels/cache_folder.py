"""Cache folder: traced graphs, prompt encodings and other data that can be computed again."""

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
