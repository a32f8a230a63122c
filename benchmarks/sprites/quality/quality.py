"""`scail2-rt bench quality`: compares generated videos with the known correct output.

Held-out cases run as files through the pipeline of `generate`, but their frames are not encoded to a video. Noise comes
from the CPU generator with the case's number as seed, so results are reproducible. Each row is saved as soon as it is
measured. An interrupted run resumes with the missing rows.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scail2_rt.benchmarks.report.record import Kind, Results, Row, load
from scail2_rt.benchmarks.speed.harness import describe_run
from scail2_rt.benchmarks.sprites.quality.quality_table import USUAL, brief
from scail2_rt.benchmarks.sprites.quality.sheets import Block, case_block, write_sheet
from scail2_rt.benchmarks.sprites.quality.trials import (
    BASELINES,
    CEILING,
    EQUAL,
    FITTED,
    MADE_MASKS,
    OFFICIAL,
    ONE_REFERENCE,
    OURS,
    SAMPLING,
    TASKS,
    Answer,
    Variant,
    frame_of,
    held_out_case,
    long_variants,
    make_request,
    variants,
)
from scail2_rt.benchmarks.sprites.segmenting import replace_masks
from scail2_rt.benchmarks.sprites.shipped import make_engines
from scail2_rt.benchmarks.sprites.world import cases, figures, motions, raster, shapes
from scail2_rt.benchmarks.sprites.world.case_files import write_case
from scail2_rt.benchmarks.sprites.world.shapes import SHAPES
from scail2_rt.engines.engine_set import EngineSet, Execution
from scail2_rt.engines.folder.manifest import read_manifest
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.pipeline.preprocess import normalise_video, quantise_frames
from scail2_rt.runtime.pipeline.vae import decode, encode_clip
from scail2_rt.runtime.session.session import Session

CONFIG = "sprites"
VARIANT_TASKS = ("animate", "replace", "two")
SHEET_CASES = 4
_Made = tuple[np.ndarray, tuple[Segment, ...]]
_Make = Callable[[], _Made]


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """The options of `bench quality`. Raises InputError for an unknown task and for tasks with the table "long".

    checkpoint   checkpoint to build engines from, if `engines` is None
    engines      engine folder
    work         folder for engines and cases
    cases        number of cases per task
    tasks        tasks to run; (): the default of the table
    table        "tasks", "variants" or "long"
    precision, attention, backend   as for `build-engines` and `generate`
    sampling     fields of `Request` that replace the defaults
    output       result file; None: not saved
    sheets       folder for contact sheets; None: not written
    masks        "true": the true masks; "made": additionally videos with masks made by the segmenter"""

    checkpoint: Path | None
    engines: Path | None
    work: Path
    cases: int = 4
    tasks: tuple[str, ...] = ()
    table: str = "tasks"
    precision: str = "fp32"
    attention: str = "auto"
    backend: str = "auto"
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    output: Path | None = None
    sheets: Path | None = None
    masks: str = "true"

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise InputError(f"--tasks: there is no task {', '.join(unknown)}. Choose from {', '.join(TASKS)}.")
        if self.tasks and self.table == "long":
            raise InputError("--long has a fixed task. Leave out --tasks.")

    @property
    def usual(self) -> Variant:
        return Variant(USUAL, self.precision, self.attention, {**SAMPLING, **self.sampling})

    @property
    def runs(self) -> list[tuple[Variant, tuple[str, ...]]]:
        """(variant, tasks) to run, in order."""
        if self.table == "long":
            return [(variant, ("longer",)) for variant in long_variants(self.usual)]
        if self.table == "variants":
            tasks = self.tasks or VARIANT_TASKS
            return [(variant, tasks) for variant in (self.usual, *variants(self.usual))]
        return [(self.usual, self.tasks or TASKS)]


def run_quality(options: QualityOptions, debug: bool = False) -> Results:
    """Measure all rows of the options' table and return them, including rows of an earlier run in the same file.

    Raises InputError if the first variant cannot run, or if the file has rows of other settings."""
    if options.engines is not None:
        options = replace(options, precision=read_manifest(options.engines).precision)
    runner = _Runner(options, debug)
    for number, (variant, tasks) in enumerate(options.runs):
        runner.run_variant(variant, tasks, required=number == 0)
    return runner.results


def make_video(session: Session, request: Request) -> _Made:
    """(frames uint8 [T, H, W, 3] as `generate` would encode them, segments) of a request."""
    plan = session.check(request)
    return np.concatenate(list(session.animate(plan))), plan.segments


def drawing_hash() -> str:
    """A hash of the source code that draws the cases, since a change of the code may change the cases."""
    sources = "".join(inspect.getsource(module) for module in (cases, figures, motions, raster, shapes))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def round_trip(engines: EngineSet, video: np.ndarray) -> np.ndarray:
    """Encode and decode a video, uint8 [T, H, W, 3]: an upper bound for the quality of the model's output."""
    pixels = normalise_video(torch.from_numpy(video).permute(3, 0, 1, 2))
    return torch.cat([quantise_frames(part) for part in decode(engines, encode_clip(engines, pixels))]).cpu().numpy()


@dataclass
class _Trial:
    """One case, which is drawn and written to its folder on first use."""

    task: str
    seed: int
    folder: Path

    @cached_property
    def answer(self) -> Answer:
        case = held_out_case(self.task, self.seed)
        write_case(case, self.folder)
        return Answer.of(case)

    def draw(self) -> None:
        """Write the folder, unless it was written already."""
        _ = self.answer


class _Runner:
    """Measures and saves the rows of one call. mask_scores: (task, seed) → scores of masks made in this call."""

    def __init__(self, options: QualityOptions, debug: bool) -> None:
        self.options, self.debug = options, debug
        self.results = Results(CONFIG, (), {})
        self.trials: dict[tuple[str, int], _Trial] = {}
        self.mask_scores: dict[tuple[str, int], dict[str, float]] = {}
        self.described = False

    def run_variant(self, variant: Variant, tasks: Sequence[str], required: bool = False) -> None:
        """Measure the rows of a variant. For a variant that this machine or engine folder does not support, add a row
        with the reason; raises InputError if it is `required`."""
        try:
            if variant.unknown:
                raise InputError(f"This version has no option {', '.join(variant.unknown)}.")
            with self._session(variant) as session:
                self._describe(session.engines)
                for task in tasks:
                    self._run_task(session, variant, task)
        except InputError as error:
            if required:
                raise
            self._add(Row(f"{variant.name}/{tasks[0]}/{OURS}/0", note=f"not measured: {error}"))

    @contextmanager
    def _session(self, variant: Variant) -> Iterator[Session]:
        options = self.options
        if options.engines is not None and variant.precision != options.precision:
            raise InputError(f"{options.engines} has the precision {options.precision}.")
        folder = options.engines or options.work / f"engines-{variant.precision}"
        if options.engines is None:
            assert options.checkpoint is not None
            make_engines(options.checkpoint, folder, precision=variant.precision)
        execution = Execution(attention=variant.attention)
        with Session.open(folder, backend=options.backend, execution=execution, prompt_cache=options.work) as session:
            print(f"{variant.name}: {session.choice}", file=sys.stderr, flush=True)
            yield session

    def _describe(self, engines: EngineSet) -> None:
        """Add the description of this run, once the first engines are open, and load the rows of an earlier run."""
        if self.described:
            return
        usual = self.options.usual
        settings = {
            "precision": usual.precision,
            "attention": usual.attention,
            "sampling": dict(usual.options),
            "weights": [list(engines.manifest.identity.sources.get(part, ())) for part in ("dit", "vae")],
            "drawing": drawing_hash(),
        }
        run = describe_run(
            engines.device, section="quality", settings=settings, cases=self.options.cases, engines=engines.choice
        )
        output = self.options.output
        if output is not None and output.is_file():
            self.results = load(output)
            for earlier in self.results.runs:
                before = earlier.get("settings", {})
                if others := [name for name in settings | before if before.get(name) != settings.get(name)]:
                    raise InputError(
                        f"{output} has results of other settings ({', '.join(others)}). Give another file with --json, "
                        "or remove it."
                    )
        self.results = replace(self.results, runs=(*self.results.runs, run))
        self.described = True

    def _run_task(self, session: Session, variant: Variant, task: str) -> None:
        blocks: list[Block] = []
        for seed in range(self.options.cases):
            made = self._run_case(session, variant, task, seed)
            if made and len(blocks) < SHEET_CASES:
                case = self.trials[task, seed].answer.case
                blocks.append(case_block(f"{task}, case {seed}: {case.scene.prompt}", case, made))
        if blocks and self.options.sheets is not None:
            suffix = "" if variant.name == USUAL else f"-{variant.name}"
            write_sheet(self.options.sheets / f"{task}{suffix}.png", blocks)

    def _run_case(self, session: Session, variant: Variant, task: str, seed: int) -> dict[str, np.ndarray]:
        """Measure one case. Returns who → video, for the model's videos made in this call."""
        work = self.options.work
        trial = self.trials.setdefault((task, seed), _Trial(task, seed, work / "cases" / f"{task}-{seed}"))
        videos: dict[str, np.ndarray] = {}
        for who, (kind, make) in self._makers(session, variant, trial).items():
            name = f"{variant.name}/{task}/{who}/{seed}"
            known = self.results.rows.get(name)
            if known is not None and known.measured:
                continue
            try:
                video, segments = make()
                values = trial.answer.score(video)
                if len(segments) > 1:
                    values |= trial.answer.follow(video, segments)
                if who == MADE_MASKS:
                    values |= self.mask_scores[task, seed]
            except Exception as error:
                if self.debug:
                    traceback.print_exc()
                text = " ".join(f"{type(error).__name__}: {error}".split())
                self._add(Row(name, kind, failure=text[:500]))
                continue
            self._add(Row(name, kind, values=values))
            if kind == "ours":
                videos[who] = video
        return videos

    def _makers(self, session: Session, variant: Variant, trial: _Trial) -> dict[str, tuple[Kind, _Make]]:
        """who → (kind of row, function that returns frames and segments), for all videos of a trial."""

        def ours(**options: Any) -> _Made:
            trial.draw()
            options = {"size": frame_of(trial.task), **options}
            return make_video(session, make_request(trial.folder, trial.seed, variant, **options))

        def equal() -> _Made:
            folder = trial.folder.with_name(f"{trial.folder.name}-equal")
            write_case(held_out_case(trial.task, trial.seed, equal=True), folder)
            return make_video(session, make_request(folder, trial.seed, variant, size=frame_of(trial.task)))

        def made_masks() -> _Made:
            folder = trial.folder.with_name(f"{trial.folder.name}-made")
            write_case(trial.answer.case, folder)
            _, self.mask_scores[trial.task, trial.seed] = replace_masks(trial.answer.case, folder)
            request = make_request(folder, trial.seed, variant, size=frame_of(trial.task))
            return make_video(session, request)

        def alone(make: Callable[[Answer], np.ndarray]) -> _Make:
            return lambda: (make(trial.answer), ())

        makers: dict[str, tuple[Kind, _Make]] = {OURS: ("ours", ours)}
        if self.options.masks == "made":
            makers[MADE_MASKS] = ("ours", made_masks)
        if trial.task == "extra":
            makers[ONE_REFERENCE] = ("ours", partial(ours, extra_refs=()))
        if trial.task == "closeup":
            makers[FITTED] = ("ours", partial(ours, fit_reference=True))
        if trial.task in SHAPES:
            makers[OFFICIAL] = ("ours", partial(ours, fit="official", allow_mask_problems=True))
            makers[EQUAL] = ("ours", equal)
        elif variant.name == USUAL:
            makers |= {who: ("baseline", alone(make)) for who, make in BASELINES.items()}
        if variant.name == USUAL:
            makers[CEILING] = ("ceiling", alone(lambda answer: round_trip(session.engines, answer.case.truth)))
        return makers

    def _add(self, row: Row) -> None:
        self.results = self.results.with_row(replace(row, run=max(len(self.results.runs) - 1, 0)))
        print(brief(row), file=sys.stderr, flush=True)
        if self.options.output is not None:
            self.results.save(self.options.output)
