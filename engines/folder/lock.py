"""One writer per folder: a second writer is refused, and a killed writer blocks nobody.

The lock is an operating-system lock on a small file in or beside the output; it ends with the process that holds it. A
file left by a killed process has no effect. The holder removes the file before it releases the lock: a process that has
already opened it detects that the file has no name any more, and does not use it as the lock. A file system without
locks (some network mounts) is written to without one, after a warning.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from scail2_rt.kernels.errors import InputError

LOCK = ".scail2-rt.lock"
PATIENCE_S = 0.2  # wait for a holder that is about to end, or that only checks


@contextlib.contextmanager
def alone(folder: Path, refusal: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an existing folder. Raises InputError with `refusal` if another holds it; calls `note` if the
    folder cannot be locked."""

    def unlocked(reason: str) -> None:
        note(f"{folder} cannot be locked ({reason}). Do not let another program write to it meanwhile.")

    with held(folder / LOCK, refusal, unlocked):
        yield


@contextlib.contextmanager
def held(path: Path, refusal: str, unlocked: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`, in an existing folder. Raises InputError with `refusal` if another process or thread
    holds it; calls `unlocked` with the reason if locking is not possible."""
    # without flock, the package would fall back to a marker file, which remains when its process is killed
    lock = FileLock(path, timeout=PATIENCE_S, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(refusal) from None
    except OSError as error:
        unlocked(error.strerror or str(error))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where open files cannot be removed, releasing the lock removes it
            path.unlink()
        lock.release()


def refuse_if_held(path: Path, refusal: str) -> None:
    """Raise InputError with `refusal` if the lock is held now. Without a lock file, nothing is created."""
    if path.is_file():
        with held(path, refusal, lambda reason: None):
            return
