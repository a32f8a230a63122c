"""Ctrl-C and SIGTERM end a command in the same way: a `KeyboardInterrupt`, after which unfinished files are deleted.

An interrupted import leaves a module half initialised: PyTorch aborts the process, other modules print a traceback.
Before a command writes files, Ctrl-C during an import ends the process at once (`runtime.cli.start`). After
`stop_tidily`, a signal during an import is postponed to the end of the import, so that files can be deleted. Only
`signal` is imported here, because the console script needs this module before any other.
"""

import signal
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"  # file name of the stack frames of an import
RETRY_S = 0.02


def importing(frame: FrameType | None) -> bool:
    """Return whether an import is running in the stack of a signal handler."""
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def interrupt_tidily(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT and SIGTERM, and SIGALRM, which repeats a postponed signal."""
    if not importing(frame):
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, RETRY_S)


def forget_postponed() -> None:
    """Drop a postponed signal at the end of a command, because Python's own exit no longer handles signals."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def stop_tidily() -> None:
    """Postpone Ctrl-C and SIGTERM during imports, for the rest of the process. Does nothing outside the main thread,
    where Python allows no signal handlers, and on systems without interval timers (Windows)."""
    if not hasattr(signal, "setitimer"):
        return
    try:
        signal.signal(signal.SIGTERM, interrupt_tidily)
    except ValueError:  # not the main thread
        return
    signal.signal(signal.SIGALRM, interrupt_tidily)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, interrupt_tidily)
