"""`scail2-rt generate` behind the command line: one case or many through one set of engines.

Everything is checked before anything is loaded: each case first (without PyTorch, so that mistakes are told at once),
then the engine folder's manifest. A single case that cannot work ends the command; in a batch it is reported and the
others run. However a run ends, its report is written beside the video, and what was finished is named. With `--resume`,
a complete result stays, an interrupted one is continued and what was not begun begins.
"""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.case_folder import FILES, flags, named_files, read_batch, read_case
from scail2_rt.runtime.core.request import JobPlan, Request, check_request, prompt_warnings
from scail2_rt.runtime.media.unfinished import clear_sidecars, part_ends, partial_path, resumable, sidecar_path
from scail2_rt.runtime.session import report

if TYPE_CHECKING:
    from scail2_rt.engines.engine_set import EngineSet
    from scail2_rt.engines.folder.manifest import Manifest

SHARED = (  # options that are fields of `Request` as they are
    *("mode", "negative_prompt", "size", "start", "frames", "seed", "segment_length", "segment_overlap"),
    *("history", "overlap_blend", "anchor_color", "resume"),
    *("crf", "codec", "noise_device", "overwrite", "extra_refs"),
    *("fit_reference", "allow_mask_problems"),
)
T = TypeVar("T")
MANY_STEPS = 10  # from here on steps and guidance are those of a model that was not distilled


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine folder and how to run it."""

    directory: Path
    backend: str = "auto"
    max_rows: int = 16_384
    attention: str = "auto"
    graphs: bool = True
    vram_limit: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"--max-rows must be 1 or more, not {self.max_rows}.")


@dataclass(frozen=True, slots=True)
class Case:
    """One line of work: a request, or why there is none."""

    name: str
    request: Request | None
    error: Scail2Error | None = None


def single_case(options: Mapping[str, Any], common: Mapping[str, Any]) -> Case:
    """The case of `--case DIR`, or of the four files. `common`: the fields of `Request` that are not files."""
    instead = f"give --case DIR, --batch FILE, or all of {flags(FILES)}"
    files: dict[str, Any] = named_files(options, instead)
    if options["case"] is not None:
        return Case(str(options["case"]), _from_folder(options["case"], options["output"], common))
    if not files:
        raise InputError(f"There is nothing to animate: {instead}.")
    return Case(str(options["driving"]), Request(**files, output=options["output"], **common))


def batch_cases(options: Mapping[str, Any], common: Mapping[str, Any]) -> list[Case]:
    """The cases of `--batch FILE`, each writing `<case folder>.mp4` into the output folder; names are made unique."""
    others = [name for name in ("case", *FILES, "extra_refs", "prompt", "prompt_file") if options[name]]
    if others:
        raise InputError(f"--batch and {flags(others)} were both given: a batch file names its cases and prompts.")
    folder: Path = options["output"]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output {folder} is a file, but --batch writes a video a case: give a folder with -o.")
    cases: list[Case] = []
    taken: set[str] = set()
    for line in read_batch(options["batch"]):
        name = line.directory.resolve().name
        unique = next(n for i in range(len(taken) + 1) if (n := f"{name}-{i + 1}" if i else name) not in taken)
        taken.add(unique)
        label = f"line {line.number}, {line.directory}"
        try:
            fields = {**common, "prompt": line.prompt}
            cases.append(Case(label, _from_folder(line.directory, folder / f"{unique}.mp4", fields)))
        except Scail2Error as error:
            cases.append(Case(label, None, error))
    return cases


def _from_folder(directory: Path, output: Path, common: Mapping[str, Any]) -> Request:
    mode = common["mode"]
    files = read_case(directory, None if mode == "auto" else mode)
    found = {name: getattr(files, name) for name in FILES}
    return Request(**found, output=output, **{**common, "mode": files.mode})


def read_prompt(options: Mapping[str, Any]) -> str:
    """The prompt of `--prompt` or `--prompt-file`, else empty."""
    if options["prompt_file"] is None:
        return options["prompt"] or ""
    if options["prompt"] is not None:
        raise InputError("--prompt and --prompt-file were both given: use one of them.")
    try:
        return options["prompt_file"].read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The prompt file {options['prompt_file']} cannot be read ({error}).") from error


def check_case(case: Case) -> JobPlan:
    """The plan of a case; InputError when it cannot work."""
    if case.request is None:
        raise case.error or InputError(f"{case.name} holds no request.")
    beside = report.report_path(case.request.output)
    if beside.exists() and not report.is_report(beside):
        raise InputError(
            f"The report would replace {beside}, which is no report of scail2-rt: choose another name with -o."
        )
    _check_unfinished(case.request)
    return check_request(case.request)


def _check_unfinished(request: Request) -> None:
    """Hours of work in an interrupted run's files are not thrown away unasked."""
    partial_video = partial_path(request.output)
    if request.overwrite or not partial_video.is_file():
        return
    parts = resumable(request.output)
    if parts and not request.resume:
        raise InputError(
            f"{partial_video} holds {parts} finished segment(s) of an interrupted run: go on with --resume, or start "
            "anew with --overwrite."
        )
    if request.resume and not parts and (lost := len(part_ends(partial_video))) and not request.output.exists():
        raise InputError(
            f"{partial_video} holds {lost} finished segment(s), but the state to go on from, "
            f"{sidecar_path(request.output, lost).name}, is not beside it: move the video away, or start anew with "
            "--overwrite."
        )


def engine_manifest(choice: EngineChoice) -> "Manifest":
    """The manifest of the engine folder, checked against this version; no weights are touched."""
    from scail2_rt.engines.folder.manifest import check_folder, read_manifest
    from scail2_rt.engines.registry import choose_backend
    from scail2_rt.export.stages.definitions import stage_definitions

    manifest = read_manifest(choice.directory)
    check_folder(choice.directory, manifest, stage_definitions(manifest.config))
    choose_backend(choice.backend, manifest.backends)
    return manifest


def fit_engines(plan: JobPlan, choice: EngineChoice, manifest: "Manifest", preset: str) -> JobPlan:
    """The plan with the warnings that depend on the engines; InputError for noise from a GPU that is not there."""
    request = plan.request
    if request.noise_device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--noise-device cuda was given, but PyTorch finds no CUDA GPU here: use cpu.")
    warnings = list(plan.warnings)
    tokenizer = choice.directory / "tokenizer" / "tokenizer.json"
    if tokenizer.is_file():
        warnings += prompt_warnings(plan, tokenizer)
    if preset == "fast" and not manifest.loras and request.steps < MANY_STEPS:
        warnings.append(
            "--preset fast needs engines with a step-distilled LoRA, and these have none: expect a blurred video; "
            "build with --lora FILE, or use --preset quality."
        )
    return replace(plan, warnings=tuple(warnings))


def dry_run(plan: JobPlan, manifest: "Manifest", choice: EngineChoice) -> tuple[dict[str, Any], str]:
    """(JSON object, text) of the estimate."""
    from scail2_rt.runtime.session import estimate

    result = estimate.estimate(plan, manifest, choice.directory, choice.backend, choice.max_rows)
    return estimate.describe(plan, result), estimate.as_text(plan, result)


@contextmanager
def opened(choice: EngineChoice) -> "Iterator[EngineSet]":
    """The engines of a folder, with their choice printed on stderr; SIGTERM ends a run as Ctrl-C does."""
    from scail2_rt.engines.engine_set import Execution, open_engines

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    execution = Execution(choice.max_rows, choice.attention, choice.graphs, choice.vram_limit)
    with open_engines(choice.directory, choice.backend, execution) as engines:
        print(f"engines: {engines.choice}", file=sys.stderr)
        yield engines


class _Warnings(logging.Handler):
    """Collects what modules log as warnings, so that it reaches the report as well."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())
        print(f"warning: {record.getMessage()}", file=sys.stderr)


def run_plan(plan: JobPlan, engines: "EngineSet") -> dict[str, Any]:
    """Generate one video and write its report, which is returned. Whatever is raised, the report is there."""
    from scail2_rt.runtime.core.progress import open_progress
    from scail2_rt.runtime.pipeline.pipeline import generate
    from scail2_rt.runtime.pipeline.text import PromptCache
    from scail2_rt.runtime.session.estimate import remember_run
    from scail2_rt.runtime.session.memory import apply, plan_memory
    from scail2_rt.runtime.session.resume import Sidecar, identity

    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.fit is not None:
        print(plan.fit.text, file=sys.stderr)
    output, unfinished = plan.request.output, partial_path(plan.request.output)
    cache = PromptCache(None, engines.encoder_hash)
    about = {**report.describe_plan(plan), "prompt_cache": _cache_hits(plan, cache)}
    about |= {"engines": report.describe_engines(engines), "device": report.describe_device(engines)}
    about["versions"] = report.versions()
    sidecar, resume = Sidecar(output, identity(about)), plan.request.resume
    saved = sidecar.load() if resume else None
    if resume and output.exists() and not plan.request.overwrite:
        return _complete_already(output, about, unfinished=saved is not None)
    about["resumed_after_segments"] = saved.carry.finished if saved else 0
    if resume:
        done = saved and f"resuming after {saved.carry.finished} of {len(plan.segments)} segments"
        print(done or "no interrupted run is there to resume: this one begins", file=sys.stderr)
    output.parent.mkdir(parents=True, exist_ok=True)
    if saved is None:  # what is there afterwards is this run's
        unfinished.unlink(missing_ok=True)
        clear_sidecars(output)
    logged = _Warnings()
    logging.getLogger("scail2_rt").addHandler(logged)
    memory = plan_memory(plan, engines)
    if memory is not None:
        apply(memory, engines)
        print(f"memory: {memory.line}", file=sys.stderr)
    about["memory_plan"] = None if memory is None else memory.line
    timings: dict[str, float] = {}

    def finished(status: str, video: Path, error: str | None = None) -> dict[str, Any]:
        end = report.describe_end(status, video, timings, (*plan.warnings, *logged.sentences), error)
        beside: Path | None = report.report_path(output)
        try:
            report.write_report(report.report_path(output), {**about, **end})
        except OSError as fault:  # the disk is full, say: what became of the video matters more
            beside = None
            print(f"warning: the report {report.report_path(output)} could not be written ({fault})", file=sys.stderr)
        return {**about, **end, "report": beside and str(beside)}

    try:
        with open_progress() as progress:
            timings = progress.timings
            generate(plan, engines, progress, cache, memory, sidecar, saved)
    except BaseException as error:
        kept = unfinished.is_file()
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        finished("partial" if kept else "failed", unfinished, name)
        what = f"the finished segments are in {unfinished}" if kept else "no segment was finished, so no video is kept"
        more = "; the same command with --resume goes on after them" if resumable(output) else ""
        print(f"stopped: {what}{more}", file=sys.stderr)
        raise
    finally:
        logging.getLogger("scail2_rt").removeHandler(logged)
    if saved is None:
        remember_run(engines.directory, plan, engines.manifest, engines.backend, timings)
    result = finished("complete", output)
    sidecar.clear()
    return result


def _complete_already(output: Path, about: Mapping[str, Any], unfinished: bool) -> dict[str, Any]:
    """The report of a result that `--resume` finds complete; InputError when it is another request's, or one that the
    interrupted run was to replace."""
    from scail2_rt.runtime.session.resume import first_difference, identity

    if unfinished:
        raise InputError(
            f"The output {output} exists, and the interrupted run was to replace it: give --overwrite with --resume."
        )
    beside = report.report_path(output)
    before = json.loads(beside.read_text(encoding="utf-8")) if report.is_report(beside) else {}
    if before.get("status") != "complete" or before.get("output_sha256") != report.file_hash(output):
        raise InputError(
            f"The output {output} exists and is not a complete result of this command: choose another name with -o, or "
            "replace it with --overwrite."
        )
    if difference := first_difference(identity(before), identity(about)):
        raise InputError(
            f"The output {output} is complete, but of another request: {difference}. Choose another name with -o, or "
            "replace it with --overwrite."
        )
    print(f"{output} is complete: nothing to resume", file=sys.stderr)
    return {**before, "report": str(beside)}


def run_single(case: Case, choice: EngineChoice, preset: str, estimate_only: bool) -> tuple[dict[str, Any], str]:
    """(result, text) of one case, or of its estimate."""
    plan = check_case(case)
    manifest = engine_manifest(choice)
    plan = fit_engines(plan, choice, manifest, preset)
    if estimate_only:
        return dry_run(plan, manifest, choice)
    with opened(choice) as engines:
        result = run_plan(plan, engines)
    return result, summary(result)


def run_batch(
    cases: Sequence[Case], choice: EngineChoice, preset: str, estimate_only: bool
) -> tuple[dict[str, Any], str, int]:
    """(result, text, number of failed cases). Every case is checked before the engines load once for all of them."""
    results: dict[str, dict[str, Any]] = {}
    texts: list[str] = []

    def attempt(case: Case, work: Callable[[], T]) -> T | None:
        """What `work` returns; whatever is wrong with one case is reported, and the others run."""
        try:
            return work()
        except Exception as error:
            reason = str(error) if isinstance(error, Scail2Error) else f"{type(error).__name__}: {error}"
            print(f"error: {case.name}: {reason}", file=sys.stderr)
            results[case.name] = {"case": case.name, "status": "failed", "error": reason}
            return None

    checked = [(case, attempt(case, partial(check_case, case))) for case in cases]
    plans = [(case, plan) for case, plan in checked if plan is not None]
    manifest = engine_manifest(choice)
    with opened(choice) if plans and not estimate_only else nullcontext() as engines:
        for number, (case, plan) in enumerate(plans, 1):
            print(f"case {number}/{len(plans)}: {case.name}", file=sys.stderr)

            def work(plan: JobPlan = plan) -> tuple[dict[str, Any], str]:
                fitting = fit_engines(plan, choice, manifest, preset)
                if engines is None:
                    return dry_run(fitting, manifest, choice)
                result = run_plan(fitting, engines)
                return result, summary(result)

            if done := attempt(case, work):
                results[case.name] = {"case": case.name, **done[0]}
                texts.append(done[1])
    in_order = [results[case.name] for case in cases]
    lost = sum(result["status"] == "failed" for result in in_order)
    texts.append(f"{len(in_order) - lost} of {len(in_order)} cases done" + (f", {lost} failed" if lost else ""))
    return {"cases": in_order, "failed": lost}, "\n".join(texts), lost


def _cache_hits(plan: JobPlan, cache: Any) -> dict[str, int]:
    request = plan.request
    prompts = (request.prompt, request.negative_prompt)[: request.passes]
    hits = sum(cache.path(prompt).is_file() for prompt in prompts)
    return {"hits": hits, "misses": len(prompts) - hits}


def summary(result: Mapping[str, Any]) -> str:
    """One complete run for people: the file, what it is, how long it took and what for."""
    timings: Mapping[str, float] = result["timings_s"]
    segments = len(result["segments"])
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in timings.items() if seconds >= 0.05)
    rate = f"{float(Fraction(result['frame_rate'])):.6g}"
    return (
        f"{result['output']}: {result['frames']} frames of {result['height']}x{result['width']} at {rate} fps, "
        f"{segments} segment{'' if segments == 1 else 's'} in {sum(timings.values()):.1f} s ({phases})"
        + (f"\nreport: {result['report']}" if result["report"] else "")
    )
