"""The console script `scail2-rt`. Ctrl-C while modules are imported ends the process with one line.

An import that is interrupted leaves half a module behind: PyTorch's aborts the process, others print a traceback. At
any other time Ctrl-C is a `KeyboardInterrupt`, which `main` turns into the same line. Nothing of the program is
imported before the handler is in place; only Python's own start comes earlier.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
IMPORTING = "<frozen importlib._bootstrap>"  # the file name of the frames of an import


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores the signal
        signal.signal(signal.SIGINT, interrupt)
    from scail2_rt.runtime.cli.main import main as run

    run()


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            os.write(2, b"error: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
