"""One run per output: a second one would write to the same partial video, state and report, and is refused at once.

The lock is a hidden file beside the output, `.NAME.lock`. Its name has no ending, like those of the partial video and
the report, so that `out.mp4` and `out.mov` exclude each other. For a symbolic link, both the link and its target are
locked, and paths are resolved first: another name of the same file has the same lock.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scail2_rt.engines.folder.lock import held, refuse_if_held
from scail2_rt.kernels.errors import InputError

LOCK_WAIT_S = 60.0


def lock_files(output: Path) -> tuple[Path, ...]:
    """The lock files of an output, in an order that is the same for all its names."""
    places = {output.parent.resolve() / output.name, output.resolve()}
    return tuple(sorted({place.with_name(f".{place.stem}.lock") for place in places}))


def refuse_second(output: Path) -> None:
    """Raises InputError if a run is writing this output now. Nothing is created or changed."""
    for path in lock_files(output):
        refuse_if_held(path, _refusal(output))


def wait_for_lock(output: Path) -> None:
    """Waits until no run writes this output. Raises InputError if one still does after `LOCK_WAIT_S`."""
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
    """Hold the locks of an output; its folder is created if needed. Raises InputError if another run holds one. `note`
    is called with one sentence if the output cannot be locked."""
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
