"""One writer a place: a second one is refused, and a killed one blocks nobody.

The lock is the operating system's, on a small file in or beside what is written, and ends with the process that holds
it. What such a process leaves behind is a file of no meaning. The holder removes the file before it lets go of it:
whoever has opened it by then finds that it has no name any more, and does not take it for the lock. A file system
without locks (some network mounts) is written to all the same, with one sentence about it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from scail2_rt.kernels.errors import InputError

LOCK = ".scail2-rt.lock"
PATIENCE_S = 0.2  # for who has just ended, or only looks


@contextlib.contextmanager
def alone(folder: Path, refusal: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an existing folder. InputError with `refusal` when another holds it; `note` hears it when the
    folder cannot be locked."""

    def unlocked(reason: str) -> None:
        note(f"{folder} cannot be locked ({reason}): let nothing else write to it meanwhile")

    with held(folder / LOCK, refusal, unlocked):
        yield


@contextlib.contextmanager
def held(path: Path, refusal: str, unlocked: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock that this file is, in a folder that exists. InputError with `refusal` when another process, or
    another thread of this one, holds it; `unlocked` hears why it cannot be locked at all."""
    # without flock the package would make a mark of its own, which stays when its process is killed
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
    """InputError with `refusal` when somebody holds the lock now. Nothing is made where there is no lock file."""
    if path.is_file():
        with held(path, refusal, lambda reason: None):
            return
