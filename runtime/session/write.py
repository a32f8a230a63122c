"""Writing a generation to its output: the frames as they are made, the state to resume from, and the run report.

If a run is interrupted or fails, its finished segments are kept and the report says why. With `resume`, a complete
result is kept, an interrupted run is resumed, and otherwise the run starts.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.core.request import Output
from scail2_rt.runtime.core.warnings import collecting
from scail2_rt.runtime.media.unfinished import clear_sidecars, is_there, partial_path, resumable
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_writer import VideoWriter
from scail2_rt.runtime.pipeline.history import Carry
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.session import report
from scail2_rt.runtime.session.check import check_output, check_room, fit_output
from scail2_rt.runtime.session.output_lock import refuse_second, sole_writer
from scail2_rt.runtime.session.resume import Saved, Sidecar, first_difference, identity, noise_generator
from scail2_rt.runtime.session.settings import settings_text

if TYPE_CHECKING:
    from scail2_rt.runtime.session.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A video that was written.

    path          the video
    frames        number of its frames
    timings       seconds per phase
    warnings      warnings of the plan and of the run
    report        the JSON document
    report_path   file of the report; None if it could not be written
    resumed       number of segments taken from an interrupted run; None if the result was already complete"""

    path: Path
    frames: int
    timings: Mapping[str, float]
    warnings: tuple[str, ...]
    report: Mapping[str, Any]
    report_path: Path | None
    resumed: int | None = 0


def write_video(session: "Session", plan: Plan, output: Output, progress: RunProgress) -> Result:
    """Write the video of a plan: the implementation of `Session.generate`, which documents the errors."""
    refuse_second(output.path)
    check_output(output, plan.request)
    check_room(output, plan)
    plan = fit_output(plan, output)
    notes: list[str] = []
    with session.claimed(), sole_writer(output.path, notes.append):
        check_output(output, plan.request)  # again, because files may have changed before the lock was taken
        return _write_alone(session, plan, output, progress, notes)


def _write_alone(session: "Session", plan: Plan, output: Output, progress: RunProgress, notes: Sequence[str]) -> Result:
    """Write the video while the output is locked. notes: warnings so far."""
    about = {
        **report.describe_plan(plan, output),
        "prompt_cache": _cache_hits(session, plan),
        "engines": report.describe_engines(session.engines),
        "device": report.describe_device(session.engines, session.gpus),
        "versions": report.versions(),
    }
    sidecar = Sidecar(output.path, identity(about))
    saved = sidecar.load() if output.resume else None
    if output.resume and is_there(output.path) and not output.overwrite:
        return _complete_already(output.path, about, unfinished=saved is not None)
    placement = session.place(plan)
    about |= {"resumed_after_segments": saved.carry.finished if saved else 0}
    about |= {"placement": None if placement is None else placement.line}
    run = _Run(session, plan, output, about, progress)
    run.begin(fresh=saved is None)
    try:
        with collecting(session.warnings):
            _write(session, run, sidecar, saved, placement, notes)
    except BaseException as error:
        run.failed(error)
        raise
    if saved is None:
        session.rates.remember(plan, progress.timings)
    result = run.complete(saved.carry.finished if saved else 0)
    _clear(output.path)  # not before the report says that the output is complete
    progress.end()
    return result


def _write(
    session: "Session",
    run: "_Run",
    sidecar: Sidecar,
    saved: Saved | None,
    placement: Placement | None,
    notes: Sequence[str],
) -> None:
    plan = run.plan
    noise = noise_generator(plan.request.noise_device, plan.request.seed, saved)
    carry, written = (saved.carry, saved.frames) if saved else (Carry(), 0)
    frames_of_run = session.frames(plan, run.progress, noise, carry, placement, notes)
    with contextlib.closing(frames_of_run) as made, run.writer(after=written) as writer:
        for frames in made:
            writer.write(frames.pixels.numpy())
            written += len(frames.pixels)
            if frames.carry is not None:
                now = Saved(written, _needed_later(frames.carry, plan).to("cpu"), noise.get_state())
                writer.segment_done(save=partial(sidecar.write, saved=now))
        with run.progress.phase("finish"):
            writer.finish(keep_partial=True)


def _needed_later(carry: Carry, plan: Plan) -> Carry:
    """Return the carry without the history if nothing follows that starts from it or fades into it."""
    last = carry.finished == len(plan.segments) and not plan.request.overlap_blend
    return replace(carry, history=None) if last else carry


class _Run:
    """One run: its video writer and its report."""

    def __init__(
        self, session: "Session", plan: Plan, output: Output, about: dict[str, Any], progress: RunProgress
    ) -> None:
        self.plan, self.output, self.about, self.progress = plan, output, about, progress
        self._warnings = session.warnings

    def begin(self, fresh: bool) -> None:
        """Create the folder of the output. A fresh run deletes the unfinished files of an earlier run."""
        self.output.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            _clear(self.output.path)

    def writer(self, after: int) -> VideoWriter:
        """Return the writer of the video. after: frames that the partial video already holds."""
        plan, output = self.plan, self.output
        sound = plan.audio and container_of(output.path).audio
        audio = plan.request.driving if sound and isinstance(plan.request.driving, Path) else None
        picture = VideoFormat(plan.width, plan.height, plan.frame_rate, output.codec, output.crf)
        comment = settings_text(self.about) if output.metadata else None
        return VideoWriter(output.path, picture, audio, plan.start_s, plan.timestamps, after, comment)

    def complete(self, resumed: int) -> Result:
        """Write the report of a complete run. resumed: segments taken from an interrupted run."""
        document, report_file = self._write_report("complete", self.output.path)
        return Result(
            path=self.output.path,
            frames=self.plan.frames,
            timings=dict(self.progress.timings),
            warnings=tuple(document["warnings"]),
            report=document,
            report_path=report_file,
            resumed=resumed,
        )

    def failed(self, error: BaseException) -> None:
        """Write the report of a run that was interrupted or failed."""
        unfinished = partial_path(self.output.path)
        name = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        self._write_report("partial" if unfinished.is_file() else "failed", unfinished, name)

    def _write_report(self, status: str, video: Path, error: str | None = None) -> tuple[dict[str, Any], Path | None]:
        report_file: Path | None = report.report_path(self.output.path)
        warnings = (*self.plan.warnings, *self._warnings)
        end = report.describe_end(status, video, self.progress.timings, warnings, error)
        try:
            report.write_report(report.report_path(self.output.path), {**self.about, **end})
        except OSError as fault:  # for example a full disk; the run's result is still reported
            self._warnings.append(f"The report {report_file} could not be written ({fault}).")
            end["warnings"], report_file = [*self.plan.warnings, *self._warnings], None
        return {**self.about, **end}, report_file


def describe_unfinished(output: Path) -> str:
    """Return one sentence about the files of an interrupted run and how to continue."""
    kept = partial_path(output)
    what = f"the finished segments are in {kept}" if kept.is_file() else "no segment was finished, so no video is kept"
    return what + ("; repeat the command with --resume to continue after them" if resumable(output) else "")


def _clear(output: Path) -> None:
    """Remove what an unfinished run has left."""
    partial_path(output).unlink(missing_ok=True)
    clear_sidecars(output)


def _complete_already(output: Path, about: Mapping[str, Any], unfinished: bool) -> Result:
    """Return the complete result that `resume` found, and delete what an unfinished run of the same request left.

    Raises InputError if the output is the result of another request, or if an interrupted run (`unfinished`) was
    replacing it."""
    report_file = report.report_path(output)
    before = json.loads(report_file.read_text(encoding="utf-8")) if report.is_report(report_file) else {}
    complete = before.get("status") == "complete" and before.get("output_sha256") == report.file_hash(output)
    if unfinished and not (complete and first_difference(identity(before), identity(about)) is None):
        raise InputError(
            f"The output {output} exists, and an interrupted run writes to it. Use --overwrite with --resume."
        )
    if not complete:
        raise InputError(
            f"The output {output} exists and is not a complete result of this command. Choose another name with -o, or "
            "use --overwrite to replace it."
        )
    if difference := first_difference(identity(before), identity(about)):
        raise InputError(
            f"The output {output} is the complete result of another request: {difference}. Choose another name with "
            "-o, or use --overwrite to replace it."
        )
    if unfinished:
        _clear(output)
    return Result(
        path=output,
        frames=before["frames"],
        timings=before["timings_s"],
        warnings=tuple(before["warnings"]),
        report=before,
        report_path=report_file,
        resumed=None,
    )


def _cache_hits(session: "Session", plan: Plan) -> dict[str, int]:
    request = plan.request
    prompts = (request.prompt, request.negative_prompt)[: request.passes]
    hits = sum(session.prompts.path(prompt).is_file() for prompt in prompts)
    return {"hits": hits, "misses": len(prompts) - hits}
