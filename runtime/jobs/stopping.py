"""Ctrl-C and SIGTERM end a command in the same way: a `KeyboardInterrupt`, which removes what is unfinished.

An import that is interrupted leaves half a module behind: PyTorch's aborts the process, others print a traceback.
Before a command writes anything, Ctrl-C during an import ends the process at once (`runtime.cli.start`). From
`stop_tidily` on it waits for the end of the import, so that what was written can be removed. Only `signal` is imported
here: the console script needs this module before anything else.
"""

import signal
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"  # the file name of the frames of an import
LOOK_AGAIN_S = 0.02


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in the stack of a signal handler."""
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def interrupt_tidily(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT and SIGTERM, and of SIGALRM, which brings a postponed signal here again."""
    if not importing(frame):
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_S)


def forget_postponed() -> None:
    """For a command that ended before the signal came again: Python's own end no longer handles signals."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def stop_tidily() -> None:
    """For the rest of the process; signals belong to the main thread, and others leave them as they are."""
    try:
        signal.signal(signal.SIGTERM, interrupt_tidily)
    except ValueError:  # not the main thread
        return
    signal.signal(signal.SIGALRM, interrupt_tidily)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, interrupt_tidily)
