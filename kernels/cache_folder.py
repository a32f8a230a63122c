"""Where this program keeps what it can make again: traced graphs and prompt encodings."""

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """$SCAIL2_RT_CACHE, or scail2-rt in $XDG_CACHE_HOME, in ~/.cache, or (for a user without a home) in the system's
    folder of temporary files."""
    if own := os.environ.get("SCAIL2_RT_CACHE"):
        return Path(own)
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification says to ignore a relative one
        return xdg / "scail2-rt"
    try:
        return Path.home() / ".cache" / "scail2-rt"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "scail2-rt"
