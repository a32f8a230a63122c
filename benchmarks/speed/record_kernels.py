"""Record which kernels a generation uses on this GPU: the lists of `kernels.ahead`.

`python -m scail2_rt.benchmarks.speed.record_kernels [--work DIR] [--config 14b]` runs one step of a usual and of a
small segment with every precision, with and without guidance, on random weights. It writes the list of this GPU's
compute capability into the package. No kernel is compiled for one size, so two sizes are enough, and the blocks of the
transformer are alike, so two blocks are. Needs a GPU.
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from scail2_rt.benchmarks.speed.models import Work
from scail2_rt.benchmarks.speed.random_folder import write_random_folder
from scail2_rt.benchmarks.speed.workload import Workload
from scail2_rt.export.models.precision import Precision
from scail2_rt.kernels.ahead import Recorder, cuda_lines, list_of
from scail2_rt.kernels.cuda.nvrtc import HOPPER

SIZES = (Work(512, 896, 81), Work(256, 448, 13))
PRECISIONS = ("fp8", "bf16")
LAYERS = 2


def record(config: str, work: Path, precisions: tuple[str, ...] = PRECISIONS) -> list[str]:
    """Run the generations. Returns the lines of the list, in the order of first use."""
    with Recorder() as recorder:
        for precision in precisions:
            directory = work / f"engines-{config}-{LAYERS}-blocks-{precision}"
            folder = write_random_folder(directory, config, cast(Precision, precision), LAYERS)
            with Workload(SIZES[0], 1, work).open(folder) as session:
                for size, guidance in itertools.product(SIZES, (1.0, 2.0)):
                    workload = Workload(size, 1, work)
                    request = replace(workload.request(), guidance=guidance)
                    session.generate(session.check(request), workload.output)
    return recorder.lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/scail2-rt-bench"))
    parser.add_argument("--config", default="14b")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    given = parser.parse_args()
    capability = torch.cuda.get_device_capability()
    file = list_of(capability)
    lines = record(given.config, given.work, tuple(given.precision or PRECISIONS))
    if capability == HOPPER:
        first, last = cuda_lines()
        lines = [*first, *lines, *last]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    print(f"{file}: {len(lines)} kernels")


if __name__ == "__main__":
    main()
