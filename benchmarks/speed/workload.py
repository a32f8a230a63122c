"""The generation that sections `load`, `generate` and `serve` measure: a drawn case and an engine folder."""

from dataclasses import dataclass
from pathlib import Path

from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.models import Work
from scail2_rt.benchmarks.speed.random_folder import write_random_folder
from scail2_rt.benchmarks.sprites.world.case_files import draw_case
from scail2_rt.engines.engine_set import Execution
from scail2_rt.export.models.precision import Precision
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.session.session import Session

PROMPT = "A figure in a blue shirt waves while it walks across a meadow."
SHIFT, OVERLAP = 5.0, 5


@dataclass(frozen=True, slots=True)
class Workload:
    """One generation.

    work       size of a segment
    steps      denoising steps
    folder     folder for the case, the video and the prompt cache
    segments   number of segments"""

    work: Work
    steps: int
    folder: Path
    segments: int = 1

    @property
    def frames(self) -> int:
        return self.work.frames + (self.segments - 1) * (self.work.frames - OVERLAP)

    @property
    def name(self) -> str:
        return f"{self.frames}f-{self.steps}steps"

    @property
    def output(self) -> Output:
        return Output(self.folder / "bench.mp4", overwrite=True)

    def request(self, steps: int | None = None) -> Request:
        """The request: Euler scheduler, guidance 1. Draws the case unless it exists. steps: instead of `self.steps`."""
        case = self.folder / f"case-{self.work.height}x{self.work.width}x{self.frames}"
        if not (case / "rendered_mask_v2.mp4").is_file():
            draw_case(case, self.frames, self.work.height, self.work.width)
        return Request(
            case / "ref.png",
            case / "ref_mask.png",
            case / "rendered_v2.mp4",
            case / "rendered_mask_v2.mp4",
            prompt=PROMPT,
            size=(self.work.height, self.work.width),
            scheduler="euler",
            steps=steps or self.steps,
            shift=SHIFT,
            guidance=1.0,
            segment_length=self.work.frames,
            segment_overlap=OVERLAP,
        )

    def open(self, engines: Path, execution: Execution | None = None, gpus: int = 1) -> Session:
        cache = self.folder / "cache"
        return Session.open(engines, backend="torch", execution=execution, prompt_cache=cache, gpus=gpus)


def workload_of(bench: Bench) -> Workload:
    """The workload of a run: the first size and 6 steps; 2 steps for the tiny model, which only tests the code."""
    steps = 6 if bench.options.config != "tiny" else 2
    return Workload(bench.options.sizes[0], steps, bench.options.work, bench.options.segments)


def engine_folder(bench: Bench) -> Path:
    """The given engine folder, or one of random weights, which is made once and kept in the work folder."""
    if bench.options.folder is not None:
        return bench.options.folder
    precision: Precision = bench.precisions[0] if bench.on_gpu else "fp32"
    directory = bench.options.work / f"engines-{bench.options.config}-{precision}"
    write_random_folder(directory, bench.options.config, precision)
    bench.free()
    return directory
