"""A fresh process that opens an engine folder and generates up to its third denoising step; its times as JSON.

    python -m scail2_rt.benchmarks.speed.first_step FOLDER WORK HEIGHTxWIDTHxFRAMES START

START is the wall-clock time at which the parent started this process, so that the interpreter's and PyTorch's own start
count. The third step is the first that only replays (the first loads and compiles, the second records the graph)."""

import contextlib
import json
import sys
import time
from pathlib import Path

STEPS = 3


def main(folder: Path, work: Path, size: str, start: float) -> dict[str, float]:
    import torch

    from scail2_rt.benchmarks.speed.models import parse_sizes
    from scail2_rt.benchmarks.speed.workload import Workload, run_workload
    from scail2_rt.engines.engine_set import open_engines
    from scail2_rt.runtime.core.progress import SilentProgress

    class Reached(BaseException):
        """The last step that counts is done; a BaseException, so that nothing on the way takes it for a fault."""

    class Clock(SilentProgress):
        def __init__(self) -> None:
            super().__init__()
            self.done_s: list[float] = []

        def step(self, index: int) -> None:
            super().step(index)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.done_s.append(time.time() - start)
            if len(self.done_s) == STEPS:
                raise Reached

    found = {"import_s": time.time() - start}
    plan = Workload(parse_sizes(size)[0], STEPS, work).plan()
    found["checked_s"] = time.time() - start
    clock = Clock()
    with open_engines(folder, "torch") as engines:
        found["opened_s"] = time.time() - start
        with contextlib.suppress(Reached):
            run_workload(plan, engines, clock, work)
    found["first_step_done_s"] = clock.done_s[0]
    found["warm_step_s"] = clock.done_s[-1] - clock.done_s[-2]
    return found | {f"phase_{name}_s": seconds for name, seconds in clock.timings.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
