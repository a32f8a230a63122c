"""The console script `scail2-rt`. Ctrl-C during an import ends the process with one line.

An interrupted import leaves a module half initialised: PyTorch aborts the process, other modules print a traceback. At
any other time Ctrl-C raises `KeyboardInterrupt`, which `main` turns into the same line. The handler is installed before
any other module of the program is imported.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
IMPORTING = "<frozen importlib._bootstrap>"  # file name of a stack frame of an import


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores the signal
        signal.signal(signal.SIGINT, interrupt)
    from scail2_rt.runtime.cli.main import main as run

    run()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: exit if an import is running, else raise KeyboardInterrupt."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            os.write(2, b"error: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
