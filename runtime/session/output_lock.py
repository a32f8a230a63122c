"""One run per output. A second run would write to the same partial video, state and report, so it is refused.

The lock is a hidden file beside the output, `.NAME.lock`, where NAME has no extension, as for the partial video and the
report: `out.mp4` and `out.mov` exclude each other. Paths are resolved first, so that all names of a file share its
lock. For a symbolic link, the link and its target are both locked.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scail2_rt.engines.folder.lock import held, refuse_if_held
from scail2_rt.kernels.errors import InputError

LOCK_WAIT_S = 60.0


def lock_files(output: Path) -> tuple[Path, ...]:
    """Return the lock files of an output, sorted, so that all runs take them in the same order."""
    places = {output.parent.resolve() / output.name, output.resolve()}
    return tuple(sorted({place.with_name(f".{place.stem}.lock") for place in places}))


def refuse_second(output: Path) -> None:
    """Raise InputError if a run is writing this output. Nothing is created or changed."""
    for path in lock_files(output):
        refuse_if_held(path, _refusal(output))


def wait_for_lock(output: Path) -> None:
    """Wait until no run writes this output. Raises InputError after `LOCK_WAIT_S` seconds."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return refuse_second(output)
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def sole_writer(output: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the locks of an output and create its folder. `note` is called with one sentence if the file system has no
    locks. Raises InputError if another run holds a lock."""
    reasons: list[str] = []
    with contextlib.ExitStack() as locks:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in lock_files(output):
            if path.parent.is_dir():  # a link may point to nowhere
                locks.enter_context(held(path, _refusal(output), reasons.append))
        if reasons:
            note(f"The output {output} cannot be locked ({reasons[0]}). Do not start another run that writes to it.")
        yield


def _refusal(output: Path) -> str:
    return f"Another run is writing the output {output}. Wait until it ends, or choose another name with -o."
