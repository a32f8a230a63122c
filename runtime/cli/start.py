"""The console script `scail2-rt`. Ctrl-C during an import ends the process with one line.

At any other time Ctrl-C raises `KeyboardInterrupt`, which `main` turns into the same line. Commands that write files
change the handler before they do (`jobs.stopping`). Only that module is imported before the handler is installed.
"""

import os
import signal
from types import FrameType

from scail2_rt.runtime.jobs.stopping import importing

INTERRUPTED = 130


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores the signal
        signal.signal(signal.SIGINT, interrupt)
    from scail2_rt.runtime.cli.main import main as run

    run()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: exit if an import is running, else raise KeyboardInterrupt."""
    if importing(frame):
        os.write(2, b"error: interrupted\n")
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt
