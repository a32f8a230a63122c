"""One writer a folder: a second build or conversion is refused, and a killed one blocks nobody.

The lock is the operating system's, on a small file in the folder, and ends with the process that holds it. What such a
process leaves behind is a file of no meaning. A file system without locks (some network mounts) is written to all the
same, with one sentence about it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from scail2_rt.kernels.errors import InputError

LOCK = ".scail2-rt.lock"


@contextlib.contextmanager
def alone(folder: Path, refusal: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an existing folder. InputError with `refusal` when another holds it; `note` hears it when the
    folder cannot be locked."""
    path = folder / LOCK
    # without flock the package would make a mark of its own, which stays when its process is killed
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(refusal) from None
    except OSError as error:
        note(f"{folder} cannot be locked ({error.strerror or error}): let nothing else write to it meanwhile")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where open files cannot be removed, releasing the lock removes it
            path.unlink()
        lock.release()
