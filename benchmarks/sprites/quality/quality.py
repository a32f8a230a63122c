"""`scail2-rt bench quality`: how close the videos come to the known answers.

Held-out cases go through the pipeline that `generate` calls, as files, except that frames are kept instead of encoded.
Noise comes from the CPU generator with the case's number as seed, so a result can be had again. A row is saved as soon
as it is there; a run that was interrupted goes on with the rows that its file lacks.
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
    """checkpoint: what engines are built from where `engines` is None; cases: how many of each task; sampling: fields
    of `Request` that replace the usual ones; table: "tasks", "variants" or "long"; tasks: () for those that the table
    usually has; work: folder for engines and cases; output: where rows are saved; sheets: folder for contact sheets;
    masks: "true", or "made" for videos with masks that are made beside those with the true ones."""

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
            raise InputError(f"--tasks: there is no task {', '.join(unknown)}; choose from {', '.join(TASKS)}.")
        if self.tasks and self.table == "long":
            raise InputError("--long has a task of its own: leave out --tasks.")

    @property
    def usual(self) -> Variant:
        return Variant(USUAL, self.precision, self.attention, {**SAMPLING, **self.sampling})

    @property
    def runs(self) -> list[tuple[Variant, tuple[str, ...]]]:
        """What is run, in order."""
        if self.table == "long":
            return [(variant, ("longer",)) for variant in long_variants(self.usual)]
        if self.table == "variants":
            tasks = self.tasks or VARIANT_TASKS
            return [(variant, tasks) for variant in (self.usual, *variants(self.usual))]
        return [(self.usual, self.tasks or TASKS)]


def run_quality(options: QualityOptions, debug: bool = False) -> Results:
    """All rows of the options' table, those of an earlier run of the same options included.

    InputError: the first variant cannot run at all, or the output holds rows of something else."""
    if options.engines is not None:
        options = replace(options, precision=read_manifest(options.engines).precision)
    runner = _Runner(options, debug)
    for number, (variant, tasks) in enumerate(options.runs):
        runner.run_variant(variant, tasks, required=number == 0)
    return runner.results


def make_video(session: Session, request: Request) -> _Made:
    """The request's frames uint8 [T, H, W, 3], as `generate` would encode them, and its segments."""
    plan = session.check(request)
    return np.concatenate(list(session.animate(plan))), plan.segments


def drawing_hash() -> str:
    """Of the code that draws the cases: changed code draws others under the same numbers."""
    sources = "".join(inspect.getsource(module) for module in (cases, figures, motions, raster, shapes))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def round_trip(engines: EngineSet, video: np.ndarray) -> np.ndarray:
    """What the VAE makes of a video: no model can do better."""
    pixels = normalise_video(torch.from_numpy(video).permute(3, 0, 1, 2))
    return torch.cat([quantise_frames(part) for part in decode(engines, encode_clip(engines, pixels))]).cpu().numpy()


@dataclass
class _Trial:
    """One case on its way: drawn, and written to its folder, when it is first needed."""

    task: str
    seed: int
    folder: Path

    @cached_property
    def answer(self) -> Answer:
        case = held_out_case(self.task, self.seed)
        write_case(case, self.folder)
        return Answer.of(case)

    def draw(self) -> None:
        """Make sure that the folder is there."""
        _ = self.answer


class _Runner:
    """Rows of one call: what is there already, what is measured, and where it is kept."""

    def __init__(self, options: QualityOptions, debug: bool) -> None:
        self.options, self.debug = options, debug
        self.results = Results(CONFIG, (), {})
        self.trials: dict[tuple[str, int], _Trial] = {}
        self.mask_scores: dict[tuple[str, int], dict[str, float]] = {}  # of masks that were made in this call
        self.described = False

    def run_variant(self, variant: Variant, tasks: Sequence[str], required: bool = False) -> None:
        """Its rows. One that cannot run on this machine or with this folder is a row that says so, or an InputError
        where it is `required`."""
        try:
            if variant.unknown:
                raise InputError(f"this version has no option {', '.join(variant.unknown)}")
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
            raise InputError(f"{options.engines} holds {options.precision}")
        folder = options.engines or options.work / f"engines-{variant.precision}"
        if options.engines is None:
            assert options.checkpoint is not None
            make_engines(options.checkpoint, folder, precision=variant.precision)
        execution = Execution(attention=variant.attention)
        with Session.open(folder, backend=options.backend, execution=execution, prompt_cache=options.work) as session:
            print(f"{variant.name}: {session.choice}", file=sys.stderr, flush=True)
            yield session

    def _describe(self, engines: EngineSet) -> None:
        """The run's description, once the first engines are open; rows of an earlier run are taken over."""
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
                        f"{output} holds results of other settings ({', '.join(others)}): give --json another name, or "
                        "remove it."
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
        """→ the model's videos that were made in this call, by who made them."""
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
        """Who makes which video of a trial, and how: (frames, segments)."""

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
