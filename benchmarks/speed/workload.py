"""The generation that `load` and `generate` measure: a drawn case, a random or a named engine folder, and one run."""

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
    """What to generate, in how many segments, and the folder that keeps its case, its video and the prompt cache."""

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
        """Euler, guidance 1; the case is drawn when it is not there yet."""
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
    """81 frames of 512×896 and 6 steps; less for the tiny model, which is not measured but tried."""
    steps = 6 if bench.options.config != "tiny" else 2
    return Workload(bench.options.sizes[0], steps, bench.options.work, bench.options.segments)


def engine_folder(bench: Bench) -> Path:
    """The folder that was named, or one of random weights: made once, kept in the work folder for the next call."""
    if bench.options.folder is not None:
        return bench.options.folder
    precision: Precision = bench.precisions[0] if bench.on_gpu else "fp32"
    directory = bench.options.work / f"engines-{bench.options.config}-{precision}"
    write_random_folder(directory, bench.options.config, precision)
    bench.free()
    return directory
