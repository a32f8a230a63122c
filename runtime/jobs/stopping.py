"""SIGTERM ends a command as Ctrl-C does, so that unfinished files are cleaned up."""

import signal
import threading


def stop_on_sigterm() -> None:
    """Handle SIGTERM as Ctrl-C for the rest of the process. Does nothing outside the main thread, where Python allows
    no signal handlers."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
