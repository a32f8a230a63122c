"""One run an output: a second one would cut into the same partial video, state and report, and is refused at once.

The lock is a hidden file beside the output, `.NAME.lock`, under the name that partial video and report have too, so
that `out.mp4` and `out.mov` exclude each other. An output that is a symbolic link is locked at both its ends, and paths
are compared as the file system resolves them: no other name of the same place leads past the lock.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scail2_rt.engines.folder.lock import held, refuse_if_held
from scail2_rt.kernels.errors import InputError

LOCK_WAIT_S = 60.0


def lock_files(output: Path) -> tuple[Path, ...]:
    """Where the locks of an output are, in an order that is the same for all its names."""
    places = {output.parent.resolve() / output.name, output.resolve()}
    return tuple(sorted({place.with_name(f".{place.stem}.lock") for place in places}))


def refuse_second(output: Path) -> None:
    """InputError when a run is writing this output now. Nothing is made or changed."""
    for path in lock_files(output):
        refuse_if_held(path, _refusal(output))


def wait_for_lock(output: Path) -> None:
    """Until a run that was killed, or cut off, is gone too. InputError when it still writes after `LOCK_WAIT_S`."""
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
    """Hold the locks of an output, whose folder is made if need be. InputError when another run holds one; `note` hears
    one sentence when the output cannot be locked."""
    reasons: list[str] = []
    with contextlib.ExitStack() as locks:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in lock_files(output):
            if path.parent.is_dir():  # a link may point to nowhere
                locks.enter_context(held(path, _refusal(output), reasons.append))
        if reasons:
            note(f"The output {output} cannot be locked ({reasons[0]}): let no other run write to it meanwhile.")
        yield


def _refusal(output: Path) -> str:
    return f"Another run is writing the output {output}: wait until it ends, or choose another name with -o."
