"""The generation that `load` and `generate` measure: a drawn case, a random or a named engine folder, and one run."""

from dataclasses import dataclass
from pathlib import Path

from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.models import Work
from scail2_rt.benchmarks.speed.random_folder import write_random_folder
from scail2_rt.benchmarks.sprites.world.case_files import draw_case
from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.precision import Precision
from scail2_rt.runtime.core.progress import Progress
from scail2_rt.runtime.core.request import JobPlan, Request, check_request
from scail2_rt.runtime.pipeline.pipeline import generate
from scail2_rt.runtime.pipeline.text import PromptCache

PROMPT = "A figure in a blue shirt waves while it walks across a meadow."
SHIFT = 5.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What to generate, and the folder that keeps its case, its video and the prompt cache."""

    work: Work
    steps: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.work.frames}f-{self.steps}steps"

    def plan(self, steps: int | None = None) -> JobPlan:
        """Euler, guidance 1; the case is drawn when it is not there yet."""
        case = self.folder / f"case-{self.work}"
        if not (case / "rendered_mask_v2.mp4").is_file():
            draw_case(case, self.work.frames, self.work.height, self.work.width)
        return check_request(
            Request(
                case / "ref.png",
                case / "ref_mask.png",
                case / "rendered_v2.mp4",
                case / "rendered_mask_v2.mp4",
                self.folder / "bench.mp4",
                prompt=PROMPT,
                size=(self.work.height, self.work.width),
                solver="euler",
                steps=steps or self.steps,
                shift=SHIFT,
                guidance=1.0,
                segment_length=self.work.frames,
                overwrite=True,
            )
        )


def run_workload(plan: JobPlan, engines: EngineSet, progress: Progress, folder: Path) -> str:
    """From inputs to the finished mp4, as `scail2-rt generate` does it; → the memory plan's line, if there is one."""
    from scail2_rt.runtime.session.memory import apply, plan_memory

    memory = plan_memory(plan, engines)
    if memory is not None:
        apply(memory, engines)
    generate(plan, engines, progress, PromptCache(folder / "cache", engines.encoder_hash), memory)
    return "" if memory is None else memory.line


def workload_of(bench: Bench) -> Workload:
    """81 frames of 512×896 and 6 steps; less for the tiny model, which is not measured but tried."""
    steps = 6 if bench.options.config != "tiny" else 2
    return Workload(bench.options.sizes[0], steps, bench.options.work)


def engine_folder(bench: Bench) -> Path:
    """The folder that was named, or one of random weights: made once, kept in the work folder for the next call."""
    if bench.options.folder is not None:
        return bench.options.folder
    precision: Precision = bench.precisions[0] if bench.on_gpu else "fp32"
    directory = bench.options.work / f"engines-{bench.options.config}-{precision}"
    write_random_folder(directory, bench.options.config, precision)
    bench.free()
    return directory
