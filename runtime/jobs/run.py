"""`scail2-rt generate` behind the command line: one case on a session (several cases: `jobs.batch`).

Everything is checked before weights are loaded: the case first, then the engine folder. An invalid case ends the
command. If a run is interrupted or fails, its report is still written, and a message names the finished segments.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import FILES, flags
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.jobs.masks import masks_folder, masks_of, with_masks
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.stopping import stop_tidily
from scail2_rt.runtime.session.check import check_output, check_request, check_room, fit_output
from scail2_rt.runtime.session.output_lock import refuse_second
from scail2_rt.runtime.session.settings import made_with, read_settings

if TYPE_CHECKING:
    from scail2_rt.engines.folder.manifest import LoRARecord
    from scail2_rt.runtime.session.session import Session
    from scail2_rt.runtime.session.write import Result

MANY_STEPS = 10  # at least this many steps with guidance indicate settings for a model that is not distilled


@dataclass(frozen=True, slots=True)
class Job:
    """One video to make: a request, its output and their options; or the error of an invalid batch line."""

    name: str
    request: Request | None
    output: Output | None
    options: GenerateOptions | None = None
    error: Scail2Error | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command: the JSON object, the text for people, and the number of failed cases."""

    document: Mapping[str, Any]
    text: str
    failed: int = 0


def single_job(options: GenerateOptions) -> Job:
    """Return the job of `--case DIR`, of the four files, or of an image and a clip. In the last case the request names
    the masks, which do not exist yet. Raises InputError for missing or invalid options."""
    name, options = options.case or options.driving, options.unfolded()
    if options.makes_masks:
        folder = masks_folder(options.output)
        options_files = replace(options, mask_image=folder / "ref_mask.png", mask_video=folder / "mask.mp4")
    else:
        options_files = options
    instead = f"give --case DIR, --batch FILE, or all of {flags(FILES)}"
    files = options_files.inputs.files(instead)
    if files is None:
        raise InputError(f"No inputs were given. {instead[0].upper()}{instead[1:]}.")
    request = options.request(*files, prompt=options.read_prompt())
    return Job(str(name), request, options.to_video(), options)


def with_made_masks(job: Job, listener: Listener) -> "Job | Outcome":
    """Return the job with masks, which are made if none are given. With `--dry-run`, return the estimate for making
    them. Raises the errors of `masks_of` and `make_masks`."""
    assert job.options is not None
    planned = masks_of(job.options)
    if planned is None:
        return job
    say_notes(job)
    if job.options.dry_run and planned.there is None:
        later = "The rest of the estimate needs the masks. Run without --dry-run, or use `scail2-rt masks make` first."
        return Outcome({"masks": {"text": planned.text, "frames": planned.frames}}, f"{planned.text}\n{later}")
    return replace(single_job(with_masks(job.options, listener)), name=job.name)


def check_job(job: Job, listener: Listener | None = None) -> Plan:
    """Return the plan of a job; engines are not needed. Raises InputError if the inputs or the output fail a check."""
    if job.request is None or job.output is None:
        raise job.error or InputError(f"{job.name} holds no request.")
    refuse_second(job.output.path)
    check_output(job.output, job.request)
    plan = check_request(job.request, listener)
    check_room(job.output, plan)
    return replace(plan, notes=job.options.notes) if job.options is not None else plan


@contextmanager
def open_session(options: GenerateOptions) -> "Iterator[Session]":
    """Open a session with the engines of the options. SIGTERM ends a run as Ctrl-C does. Raises as `Session.open`."""
    from scail2_rt.runtime.session.session import Session  # noqa: F401, which takes seconds

    stop_tidily()
    with open_engines(options) as session:
        yield session


def open_engines(options: GenerateOptions) -> "Session":
    """Return a session with the engines of the options. Raises as `Session.open`."""
    from scail2_rt.engines.engine_set import Execution
    from scail2_rt.runtime.session.session import Session

    execution = Execution(options.max_rows, options.attention, not options.no_graphs, options.vram_limit)
    return Session.open(options.engines, backend=options.backend, execution=execution, gpus=options.gpus)


def fit_plan(plan: Plan, session: "Session", options: GenerateOptions) -> Plan:
    """Return the plan of `Session.fit`, with warnings about the preset and about a repeated video."""
    fitting = session.fit(plan)
    hints = [preset_hint(plan.request, session.engines.manifest.loras, options.preset)]
    if options.from_video is not None:
        hints.append(other_machine(options.from_video, session))
    return replace(fitting, warnings=(*fitting.warnings, *filter(None, hints)))


def other_machine(video: Path, session: "Session") -> str | None:
    """Return a warning if a repeated video was made with other engines, packages or another device, else None."""
    from scail2_rt.runtime.session.report import describe_device, engine_digest, versions

    settings, digest = read_settings(video), engine_digest(session.engines.manifest.identity)
    if settings.engines.get("digest") != digest:
        return (
            f"{video} was made with another engine folder ({settings.engines.get('precision')}, digest "
            f"{str(settings.engines.get('digest'))[:12]}; this one has {digest[:12]}): the result will differ."
        )
    then = settings.made_with
    now = made_with(describe_device(session.engines, session.gpus), versions())
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    listed = ", ".join(f"{name} {then.get(name, 'none')} (here {now.get(name, 'none')})" for name in names)
    return f"{video} was made with {listed}: the result may not be bit-identical." if listed else None


def preset_hint(request: Request, loras: "Sequence[LoRARecord]", preset: str) -> str | None:
    """Return a warning if steps and guidance do not suit the fused LoRAs, else None."""
    distilled = [lora for lora in loras if lora.distilled]
    many = request.steps >= MANY_STEPS
    if distilled and many and request.guidance > 1:
        name = Path(distilled[0].file.path).name
        return (
            f"these engines hold a step-distilled LoRA ({name}, according to its {distilled[0].distilled}), which is "
            f"for few steps without guidance. {request.steps} steps with guidance {request.guidance:g} take longer and "
            "give oversaturated videos. Use --preset fast."
        )
    if preset == "fast" and not many and not distilled:
        listed = ", ".join(Path(lora.file.path).name for lora in loras)
        have = f"only {listed}, not known to be step-distilled" if loras else "none"
        return (
            f"--preset fast needs engines with a step-distilled LoRA, and these have {have}. The video will be "
            "blurred. Build with --lora FILE, or use --preset quality."
        )
    return None


def run_single(options: GenerateOptions, listener: Listener) -> Outcome:
    """Make the video of one case, or with `--dry-run` its estimate. Raises as the functions that it calls."""
    job = single_job(options)
    ready = with_made_masks(job, listener)
    if isinstance(ready, Outcome):
        return ready
    plan, masks_given = check_job(ready, listener), ready is job
    with open_session(options) as session:
        fitting = fit_plan(plan, session, options)
        if masks_given:
            say_notes(job)
        say_engines(session, options)
        return run_plan(fitting, ready, session, options, listener)


def say_notes(job: Job) -> None:
    """Print on stderr which inputs the program chose."""
    for note in job.options.notes if job.options is not None else ():
        print(f"note: {note}", file=sys.stderr)


def say_engines(session: "Session", options: GenerateOptions) -> None:
    """Print the executor, its device and the reason on stderr, except in a dry run."""
    if not options.dry_run:
        print(f"engines: {session.choice}", file=sys.stderr)


def run_plan(plan: Plan, job: Job, session: "Session", options: GenerateOptions, listener: Listener) -> Outcome:
    """Run a checked job on open engines: return its estimate with `--dry-run`, else make its video."""
    assert job.output is not None
    plan = fit_output(plan, job.output)
    if options.dry_run:
        from scail2_rt.runtime.session.estimate import as_text, described

        assert plan.estimate is not None
        return Outcome(described(plan, plan.estimate), as_text(plan, plan.estimate))
    result = generate(plan, job.output, session, listener)
    return Outcome({**result.report, "report": result.report_path and str(result.report_path)}, summary(result))


def generate(plan: Plan, output: Output, session: "Session", listener: Listener) -> "Result":
    """Write the video. Print warnings, framing, placement and the state of `--resume` on stderr. Raises as
    `Session.generate`."""
    from scail2_rt.runtime.media.unfinished import is_there, resumable
    from scail2_rt.runtime.session.write import describe_unfinished

    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.framing is not None and plan.framing.line:
        print(plan.framing.line, file=sys.stderr)
    if plan.fit is not None:
        print(plan.fit.text, file=sys.stderr)
    if plan.estimate is not None and plan.estimate.placement:
        print(f"memory: {plan.estimate.placement}", file=sys.stderr)
    if output.resume and not is_there(output.path):
        parts = min(resumable(output.path), len(plan.segments))  # held-back frames of --overlap-blend are a part, too
        done = f"resuming after {parts} of {counted(len(plan.segments), 'segment')}"
        print(done if parts else "there is no interrupted run to resume: starting a new one", file=sys.stderr)
    began = False

    def on_progress(event: Any) -> None:
        nonlocal began
        began = True
        listener(event)

    try:
        result = session.generate(plan, output, on_progress)
    except BaseException:
        if began:
            print(f"stopped: {describe_unfinished(output.path)}", file=sys.stderr)
        raise
    finally:
        for warning in session.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if result.resumed is None:
        print(f"{output.path} is complete: nothing to resume", file=sys.stderr)
    return result


def summary(result: "Result") -> str:
    """Return text about a complete run: the file, its shape, the time per phase and the report."""
    document, segments = result.report, len(result.report["segments"])
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.timings.items() if seconds >= 0.05)
    rate = f"{float(Fraction(document['frame_rate'])):.6g}"
    resumed = f" ({counted(result.resumed, 'segment')} from an interrupted run)" if result.resumed else ""
    return (
        f"{result.path}: {counted(result.frames, 'frame')} of {document['height']}x{document['width']} at {rate} fps, "
        f"{counted(segments, 'segment')}{resumed} in {sum(result.timings.values()):.1f} s ({phases})"
        + (f"\nreport: {result.report_path}" if result.report_path else "")
    )
