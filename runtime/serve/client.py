"""`scail2-rt generate --server URL`: generates with a running service, with the same options and the same output files.

A file whose hash the service knows is not sent again. The command prints the service's warnings, progress and errors;
field names in them are replaced by the user's paths. Ctrl-C deletes the job. If the service is restarted, it resumes
the job and this command waits for it (`BACK_S`)."""

import contextlib
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.containers import MP4_ENDINGS
from scail2_rt.runtime.core.progress import Listener, Progress
from scail2_rt.runtime.jobs.batch import batch_jobs, gathered
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.run import Job, Outcome, say_notes, single_job, summary
from scail2_rt.runtime.jobs.stopping import stop_tidily
from scail2_rt.runtime.serve import made_masks
from scail2_rt.runtime.serve.fields import MASKING, REFERENCES
from scail2_rt.runtime.serve.wire import Wire
from scail2_rt.runtime.session.check import check_files, check_output
from scail2_rt.runtime.session.output_lock import refuse_second, sole_writer
from scail2_rt.runtime.session.report import file_hash, report_path, write_report

OPERATORS = (
    *("backend", "max_rows", "attention", "vram_limit", "no_graphs", "gpus"),
    *("segmenter", "segmenter_weights", "segmenter_device", "image_from", "driving_from"),
)
LOCAL = ("dry_run", "resume")
SAME = (
    *(
        "mode",
        "fit",
        "fit_reference",
        "allow_mask_problems",
        "start",
        "frames",
        "negative_prompt",
        "codec",
        "crf",
        "metadata",
    ),
    *("preset", "scheduler", "steps", "shift", "guidance", "seed", "noise_device", "segment_length", "segment_overlap"),
    *("overlap_blend", "anchor_color"),
)
BACK_S = 120.0  # how long to wait for a service that does not answer
KEY = "SCAIL2_RT_API_KEY"
MASK_VIDEOS = {"animate": "rendered_mask_v2.mp4", "replace": "replace_mask.mp4"}  # runtime.masks.make.work.VIDEO_NAMES


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of a remote job, with the attributes that `jobs.run.summary` reads from a local `Result`."""

    path: Path
    frames: int
    timings: Mapping[str, float]
    report: Mapping[str, Any]
    report_path: Path | None
    resumed: int | None


def run_remote(options: GenerateOptions, server: str, listener: Listener) -> Outcome:
    """Generate one case, or the cases of a batch file, with the service at this URL. Raises InputError for options
    that cannot be sent and for refused inputs, Scail2Error for faults of the service."""
    _refuse_local(options)
    wire = Wire(server, os.environ.get(KEY))
    stop_tidily()
    if options.batch is None and not options.seeds:
        job = single_job(options)
        say_notes(job)
        return _generate(wire, job, listener)
    return _run_batch(wire, options, listener)


def _run_batch(wire: Wire, options: GenerateOptions, listener: Listener) -> Outcome:
    jobs, results = batch_jobs(options), dict[str, Outcome | dict[str, Any]]()
    for job in jobs:
        try:
            results[job.name] = _generate(wire, job, listener)
        except Scail2Error as error:
            print(f"error: {job.name}: {error}", file=sys.stderr)
            results[job.name] = {"case": job.name, "status": "failed", "error": str(error)}
    return gathered(jobs, results)


def _refuse_local(options: GenerateOptions) -> None:
    """Raises InputError for options that only the operator of a service can set, or that only make sense locally."""
    known = GenerateOptions.__dataclass_fields__
    plain = {name: known[name].default for name in (*OPERATORS, *LOCAL) if name in known}
    given = [name for name, default in plain.items() if getattr(options, name) != default]
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        if name == "resume":
            raise InputError("--resume cannot be used with --server: the service resumes its jobs. Leave --resume out.")
        why = "describes local engines" if name == "dry_run" else "is set by the operator of the service"
        raise InputError(f"{flag} {why}. Leave out {flag} or --server.")


def _generate(wire: Wire, job: Job, listener: Listener) -> Outcome:
    """The outcome of one job. Masks that the service makes are written where a local run writes them."""
    options = job.options
    if job.request is None or job.output is None or options is None:
        raise job.error or InputError(f"{job.name} has no request.")
    if job.output.path.suffix.lower() not in MP4_ENDINGS:
        raise InputError(
            f"The service makes mp4 videos. End the output {job.output.path} in .mp4, or leave --server out."
        )
    _refuse_local(options)
    refuse_second(job.output.path)
    check_output(job.output, job.request)
    files = _files_of(job, options.makes_masks)
    try:
        with sole_writer(job.output.path, lambda note: print(f"warning: {note}", file=sys.stderr)):
            fetched = _through(wire, job, options, files, listener)
    except Scail2Error as error:
        raise type(error)(_own_names(str(error), files)) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise InputError(f"{error.filename} cannot be read ({error.strerror}). Check path and rights.") from error
        raise Scail2Error(
            f"The service at {wire.url} cannot be reached ({error}). Check the URL and that the service runs."
        ) from error
    document = {**fetched.report, "report": fetched.report_path and str(fetched.report_path)}
    return Outcome(document, summary(cast(Any, fetched)))


def _files_of(job: Job, made: bool) -> dict[str, Path]:
    """Field of the interface → the user's file. made: the service makes the masks, so they are left out. Raises
    InputError for a file that does not exist or cannot be sent."""
    request = job.request
    assert request is not None
    named: dict[str, Any] = {name: getattr(request, field) for name, field in REFERENCES.items()}
    for number, (image, mask) in enumerate(request.extra_refs, 1):
        named |= {f"extra_ref_{number}": image, f"extra_ref_{number}_mask": mask}
    if made:
        named = {name: path for name, path in named.items() if name not in made_masks.INPUTS}
    masks = ("reference mask", "driving mask video")
    check_files({label: path for label, path in request.inputs.items() if not (made and label in masks)})
    for name, path in named.items():
        if path.is_dir():
            raise InputError(f"{name} {path} is a folder, but the service takes files. Give a video.")
    return {name: Path(path) for name, path in named.items()}


def _own_names(sentence: str, files: Mapping[str, Path]) -> str:
    """Replace the field names in a sentence of the service by the user's paths."""
    for name in sorted(files, key=len, reverse=True):
        sentence = re.sub(rf"\b{name}\b", lambda _, name=name: str(files[name]), sentence)  # type: ignore[misc]
    return sentence


def _through(wire: Wire, job: Job, options: GenerateOptions, files: Mapping[str, Path], listener: Listener) -> Fetched:
    video = None
    try:
        video = _post(wire, job, options, files)
        for warning in video["warnings"]:
            print(f"warning: {_own_names(warning, files)}", file=sys.stderr)
        if video["framing"]:
            print(_own_names(video["framing"], files), file=sys.stderr)
        _follow(wire, video["id"], listener)
        return _fetch(wire, video["id"], job, files)
    except KeyboardInterrupt:
        if video is not None:
            with contextlib.suppress(OSError, Scail2Error):
                wire.ask("DELETE", f"/v1/videos/{video['id']}")
                print("cancelled: the job was deleted at the service", file=sys.stderr)
        raise


def _post(wire: Wire, job: Job, options: GenerateOptions, files: Mapping[str, Path]) -> dict[str, Any]:
    """Create the job and return its video object. If the answer is lost the request is sent again; the idempotency key
    prevents a second job."""
    request = job.request
    assert request is not None
    known: dict[str, str] = {}
    body: dict[str, Any] = {name: value for name in SAME if (value := getattr(options, name)) is not None}
    if options.makes_masks:
        body |= {name: value for name in MASKING if (value := getattr(options, name))}
    body |= {"prompt": request.prompt, "mode": request.mode}
    if request.fps is not None:
        body["fps"] = str(request.fps)
    if request.size is not None:
        body["size"] = f"{request.size[1]}x{request.size[0]}"
    for name, path in files.items():
        digest = file_hash(path)
        known[name] = known.get(digest) or wire.keep(path, digest)
        known[digest] = known[name]
    body |= {name: {"file_id": known[name]} for name in files if not name.startswith("extra_ref")}
    body["extra_refs"] = [
        [{"file_id": known[f"extra_ref_{number}"]}, {"file_id": known[f"extra_ref_{number}_mask"]}]
        for number in range(1, len(request.extra_refs) + 1)
    ]
    key = uuid.uuid4().hex
    patience = _Patience()
    while True:
        try:
            return wire.ask("POST", "/v1/videos", body, Idempotency_Key=key)
        except ConnectionError as error:
            patience.wait(error)


class _Patience:
    """Waits before another attempt to reach a service, at growing intervals, for `BACK_S` seconds in total."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._pause_s = 0.2

    def heard(self) -> None:
        self._since, self._pause_s = None, 0.2

    def wait(self, error: OSError) -> None:
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > BACK_S:
            raise error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, 5.0)


def _follow(wire: Wire, video_id: str, listener: Listener) -> None:
    """Pass the job's progress to the listener until the job has ended. Raises InputError or Scail2Error if it failed
    or was deleted, ConnectionError if the service stays unreachable."""
    patience = _Patience()
    while True:
        broken = ConnectionError("the connection was lost")
        try:
            for kind, video in wire.events(f"/v1/videos/{video_id}/events"):
                patience.heard()
                if kind == "completed":
                    return
                if kind == "failed":
                    wrong = video["error"]["code"] == "invalid_input"
                    raise (InputError if wrong else Scail2Error)(video["error"]["message"])
                if kind == "deleted":
                    raise Scail2Error(f"The job {video_id} was deleted at the service. Run the command again.")
                if kind == "progress" and video.get("phase"):
                    listener(_progress(video))
        except OSError as error:
            broken = error if isinstance(error, ConnectionError) else ConnectionError(str(error))
        patience.wait(broken)


def _progress(video: Mapping[str, Any]) -> Progress:
    steps = video["steps"] or 0
    left = video["seconds_left"]
    return Progress(
        video["phase"],
        video["segment"] or 0,
        video["segments"],
        video["step"] or 0,
        steps,
        video["progress"] / 100,
        left,
    )


def _fetch(wire: Wire, video_id: str, job: Job, files: Mapping[str, Path]) -> Fetched:
    """Download the video and its run report. The video is renamed into place when it is complete."""
    assert job.output is not None
    output = job.output.path
    content = f"/v1/videos/{video_id}/content?variant="
    temporary = output.with_name(f".{uuid.uuid4().hex}{output.suffix}")
    try:
        with temporary.open("xb") as file:
            wire.download(f"{content}video", file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    with wire.open("GET", f"{content}report") as response:
        report = json.loads(response.read())
    if made_masks.INPUTS[0] not in files:
        files = {**files, **_fetch_masks(wire, content, output, report["mode"])}
    _localise(report, output, files)
    report["notes"] = list(job.options.notes) if job.options is not None else []
    report |= {"server": wire.url, "video_id": video_id}
    write_report(report_path(output), report)
    return Fetched(
        output, report["frames"], report["timings_s"], report, report_path(output), report["resumed_after_segments"]
    )


def _fetch_masks(wire: Wire, content: str, output: Path, mode: str) -> dict[str, Path]:
    """Download the masks that the service made, with contact sheet and record, into `NAME.masks` beside the output."""
    folder = output.with_name(f"{output.stem}.masks")
    folder.mkdir(exist_ok=True)
    names = {"mask_reference": "ref_mask.png", "video_mask_reference": MASK_VIDEOS[mode]}
    for variant, name in {**names, "mask_sheet": "masks.png", "mask_record": "masks.json"}.items():
        temporary = folder / f".{name}.{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                wire.download(f"{content}{variant}", file)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return {variant: folder / name for variant, name in names.items()}


def _localise(report: dict[str, Any], output: Path, files: Mapping[str, Path]) -> None:
    """Replace the paths of the service's job folder in a run report by the user's paths."""
    report["output"] = report["options"]["output"] = str(output)
    fields = {
        "input_reference": ("image", "image"),
        "mask_reference": ("mask_image", "image_mask"),
        "video_reference": ("driving", "driving"),
        "video_mask_reference": ("mask_video", "mask_video"),
    }
    for name, (option, label) in fields.items():
        report["options"][option] = report["inputs"][label]["path"] = str(files[name])
    pairs = len(report["options"]["extra_refs"])
    report["options"]["extra_refs"] = [
        [str(files[f"extra_ref_{i}"]), str(files[f"extra_ref_{i}_mask"])] for i in range(1, pairs + 1)
    ]
    for i in range(1, pairs + 1):
        report["inputs"][f"extra_ref_{i}"]["path"] = str(files[f"extra_ref_{i}"])
        report["inputs"][f"extra_ref_{i}_mask"]["path"] = str(files[f"extra_ref_{i}_mask"])
