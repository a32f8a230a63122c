"""SIGTERM ends a command as Ctrl-C does: nothing unfinished stays behind."""

import signal
import threading


def stop_on_sigterm() -> None:
    """For the rest of the process; signals belong to the main thread, and others leave them as they are."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
