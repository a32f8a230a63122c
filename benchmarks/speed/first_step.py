"""The fresh process of section `load`: opens an engine folder, runs four denoising steps, prints its times as JSON.

    python -m scail2_rt.benchmarks.speed.first_step FOLDER WORK HEIGHTxWIDTHxFRAMES START checked|unchecked

START is the time (seconds since the epoch) at which the parent started this process, so that starting Python and
importing PyTorch count. With "unchecked" the weights' checksums are not verified. The first step loads and compiles,
the second records the CUDA graph, the others only replay it. A step is reported while the next one runs, up to a second
late, so the time of a step is the median of their differences."""

import contextlib
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

STEPS = 4


def main(folder: Path, work: Path, size: str, start: float, checked: bool) -> dict[str, float]:
    """Run the steps. Returns the times in seconds since `start`, and the duration of each phase."""
    from scail2_rt.kernels.ahead import start_early

    start_early(folder, "auto")  # as the command does
    from scail2_rt.benchmarks.speed.models import parse_sizes
    from scail2_rt.benchmarks.speed.workload import Workload
    from scail2_rt.engines.folder.store import StoreReader
    from scail2_rt.runtime.core.progress import Progress, RunProgress
    from scail2_rt.runtime.session.check import check_request
    from scail2_rt.runtime.session.write import write_video

    class Reached(BaseException):
        """Raised after the last step. A BaseException, so that no handler of exceptions catches it."""

    done_s: list[float] = []

    def heard(event: Progress) -> None:
        if event.step > len(done_s):
            done_s.append(time.time() - start)
            if len(done_s) == STEPS:
                raise Reached

    found = {"import_s": time.time() - start}
    workload, progress = Workload(parse_sizes(size)[0], STEPS, work), RunProgress(heard)
    plan = check_request(workload.request())
    found["checked_s"] = time.time() - start
    with workload.open(folder) as session:
        found["opened_s"] = time.time() - start
        if not checked and isinstance(session.engines.store, StoreReader):
            session.engines.store.checker = None
        with contextlib.suppress(Reached):
            write_video(session, session.fit(plan), workload.output, progress)
    found["first_step_done_s"] = done_s[0]
    found["warm_step_s"] = median(later - earlier for earlier, later in pairwise(done_s))
    return found | {f"phase_{name}_s": seconds for name, seconds in progress.timings.items()}


if __name__ == "__main__":
    print(
        json.dumps(
            main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5] == "checked")
        )
    )
