"""All checks that need no weights. They turn a request into a plan, or raise InputError with one sentence.

`check_request` reads the media but not the engines, and does the cheapest checks first. The driving clip and its mask
video are decoded once each. `check_output` checks the place of the result. Nothing is written, except a temporary copy
of a clip whose frames can be read only once.
"""

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.core.findings import Finding, ReferenceFit
from scail2_rt.runtime.core.geometry import Layout, plan_segments
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Cancelled, Listener, Work, within
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.media.unfinished import is_there, part_ends, partial_path, resumable, sidecar_path

if TYPE_CHECKING:
    import numpy as np

    from scail2_rt.runtime.masks.lint import MaskReport
    from scail2_rt.runtime.media.video_reader import VideoInfo

OUTPUT_MARGIN = 16 << 20  # bytes, for short clips and the report


def check_request(request: Request, on_progress: Listener | None = None) -> Plan:
    """Return the plan of a request. `on_progress` is called if the check takes more than two seconds.

    Raises InputError for the first problem found: a missing or unreadable file, media that do not match, masks that
    cannot be used."""
    from scail2_rt.runtime.masks.lint import check_masks, refuse, video_pair, warnings_of
    from scail2_rt.runtime.masks.stats import image_stats, video_stats
    from scail2_rt.runtime.masks.windows import Pictures
    from scail2_rt.runtime.media.clips import is_folder, nearest_frames

    check_files(request.inputs)
    images, masks, findings = _load_references(request)
    request = _prepared(request)
    work = Work("mask check", on_progress)
    driving, mask_video = _probed(request, work)
    if is_folder(request.driving) or is_folder(request.mask_video):  # images have no rate that could differ
        mask_video = replace(mask_video, frame_rate=driving.frame_rate)
    findings += video_pair(driving, mask_video)
    refuse(findings, request.allow_mask_problems)
    total, chosen = min(driving.frames, mask_video.frames), None
    if request.fps is not None and not is_folder(request.driving):
        chosen = tuple(number for number in nearest_frames(driving, request.fps) if number < total)
        driving, total = replace(driving, frame_rate=request.fps, timestamps=None), len(chosen)
    frames = _trimmed(request, total)
    checked = range(request.start, request.start + frames)  # of the mask video's frames
    if chosen is not None:
        chosen = chosen[request.start : request.start + frames]
        checked = range(chosen[0], chosen[-1] + 1)
    segments = plan_segments(frames, request.segment_length, request.segment_overlap)
    references = [image_stats(mask, name) for mask, (_, name) in zip(masks, _names(request), strict=True)]
    driving_mask = video_stats(request.mask_video, checked.start, len(checked), within(work, 0.65, 1))
    sizes = [image.shape[:2] for image in images]
    pictures = Pictures(sizes, (driving.height, driving.width), request.fit, request.size)
    report = check_masks(references, driving_mask, request.mode, pictures, request.driving)
    fit = None
    if request.fit_reference:
        report, fit = _fitted(images[0], masks[0], report, request)
    findings += report.findings
    refuse(report.findings, request.allow_mask_problems)
    height, width = report.size
    largest = max(segment.padded_frames for segment in segments)
    times = driving.timestamps and driving.timestamps[request.start : request.start + frames]
    return Plan(
        request=request,
        height=height,
        width=width,
        frame_rate=driving.frame_rate,
        frames=frames,
        segments=segments,
        mode=report.mode,
        layout=Layout.of(largest, height, width, len(request.extra_refs), report.mode == "replace"),
        driving_window=report.framing.inputs[0].window,
        reference_windows=tuple(framed.window for framed in report.framing.inputs[1:]),
        warnings=(*driving.warnings, *mask_video.warnings, *warnings_of(findings)),
        timestamps=times,
        audio=driving.audio,
        masks=tuple(findings),
        framing=report.framing,
        fit=fit,
        chosen=chosen,
    )


def _probed(request: Request, work: Work) -> tuple["VideoInfo", "VideoInfo"]:
    """Probe the driving clip and the mask video, a mask file in a thread. The thread stops at once if the driving clip
    cannot be used or the check is interrupted."""
    from scail2_rt.runtime.media.clips import probe

    stop = threading.Event()

    def unless_stopped(_share: float) -> None:
        if stop.is_set():
            raise Cancelled("The check was stopped.")

    with ThreadPoolExecutor(1, thread_name_prefix="probe") as thread:
        mask = request.mask_video  # frames of the caller are read in the caller's thread, and so are images of a folder
        alone = isinstance(mask, Path) and mask.is_file()
        try:
            coming = thread.submit(copy_context().run, partial(probe, mask, tell=unless_stopped)) if alone else None
            driving = probe(request.driving, request.fps, within(work, 0, 0.4))
            return driving, coming.result() if coming else probe(mask, tell=within(work, 0.4, 0.65))
        except BaseException:
            stop.set()
            raise


def check_files(inputs: Mapping[str, object]) -> None:
    """Raise InputError for a path that does not exist, is not a file (a driving clip or mask may be a folder) or is
    empty. inputs: label → path, or an input in memory, which is skipped."""
    for label, path in inputs.items():
        if not isinstance(path, Path):
            continue
        if not path.exists():
            hint = ", or make both masks with `scail2-rt masks make`" if "mask" in label else ""
            raise InputError(f"The {label} {path} does not exist. Give a file that exists{hint}.")
        if not path.is_file() and not (label.startswith("driving") and path.is_dir()):
            raise InputError(f"The {label} {path} is not a file. Give a file.")
        if path.stat().st_size == 0:
            raise InputError(f"The {label} {path} is empty (0 bytes). Copy it again.")


def _load_references(request: Request) -> tuple[list["np.ndarray"], list["np.ndarray"], list[Finding]]:
    """Return images and masks, uint8 [H, W, 3], and findings about their shapes."""
    from scail2_rt.runtime.masks.lint import image_pair
    from scail2_rt.runtime.media.images import load_image, load_mask_image

    images, masks, findings = [], [], []
    for (image_source, mask_source), (image_name, mask_name) in zip(request.references, _names(request), strict=True):
        image, mask = load_image(image_source), load_mask_image(mask_source)
        findings += image_pair(image_name, image.shape[:2], mask_name, mask.shape[:2])
        images.append(image)
        masks.append(mask)
    return images, masks, findings


def _names(request: Request) -> list[tuple[str, str]]:
    """Return the (image, mask) names of each reference for use in messages."""
    named = request.names
    extra = range(1, len(request.extra_refs) + 1)
    labels = [("reference image", "reference mask")]
    labels += [(f"extra reference {number}", f"mask of extra reference {number}") for number in extra]
    return [(named[image], named[mask]) for image, mask in labels]


def _prepared(request: Request) -> Request:
    """Return the request with cleaned prompts, and with clips that can be read repeatedly."""
    from scail2_rt.runtime.media.clips import rereadable
    from scail2_rt.runtime.pipeline.text import clean_prompt

    return replace(
        request,
        driving=rereadable(request.driving, "driving clip"),
        mask_video=rereadable(request.mask_video, "driving mask video"),
        prompt=clean_prompt(request.prompt),
        negative_prompt=clean_prompt(request.negative_prompt),
    )


def _fitted(
    image: "np.ndarray", mask: "np.ndarray", report: "MaskReport", request: Request
) -> tuple["MaskReport", ReferenceFit]:
    """Return the report and the scaling of the reference by `--fit-reference`. The report loses the findings that the
    scaling repairs: the difference of heights, and cropping by the reference's window."""
    from scail2_rt.runtime.masks.framing import fit_reference, framed_by_fit
    from scail2_rt.runtime.masks.lint import refuse
    from scail2_rt.runtime.masks.windows import CROPPED, cropped_findings

    if report.mode != "replace":
        raise InputError(
            "--fit-reference works only in replace mode, because in animate mode the character keeps its place in the "
            "reference image. Leave it out."
        )
    name = _names(request)[0][1]
    kept = [f for f in report.findings if f.rule != "framing" and (f.rule, f.file) != (CROPPED, name)]
    refuse(kept, request.allow_mask_problems)
    driving, reference, *extra = report.framing.inputs
    fit = fit_reference(image, mask, report.framing.driving, reference.window)
    reference = framed_by_fit(reference, mask, fit)
    kept += cropped_findings(reference, name, "At this scale it is wider than the frame. Leave out --fit-reference.")
    framing = replace(report.framing, inputs=(driving, reference, *extra))
    return replace(report, findings=tuple(kept), framing=framing), fit


def _trimmed(request: Request, total: int) -> int:
    """Return the number of output frames. `total`: frames of the driving clip at the output's rate."""
    from scail2_rt.runtime.media.clips import check_start

    check_start(request.start, total, request.fps)
    left = total - request.start
    if request.frames is not None and request.frames > left:
        raise InputError(
            f"--frames {request.frames} is too many: from frame {request.start} on, the driving clip has "
            f"{counted(left, 'frame')}{'' if request.fps is None else ' at --fps'}. Leave --frames out to go to the "
            "end."
        )
    return request.frames or left


def check_output(output: Output, request: Request) -> None:
    """Check the output before the request's media are read.

    Raises InputError for a path that cannot be written, and if files would be lost: an input, another result, the
    segments of an interrupted run, a JSON file that is not a run report."""
    from scail2_rt.runtime.media.output_path import check_writable
    from scail2_rt.runtime.media.video_format import check_codec
    from scail2_rt.runtime.session.report import is_report, report_path

    report_file = report_path(output.path)
    if report_file.exists() and not is_report(report_file):
        raise InputError(
            f"The run report would replace {report_file}, which scail2-rt did not write. Choose another name with -o."
        )
    _check_unfinished(output)
    for label, path in request.inputs.items():
        if isinstance(path, Path) and output.path.resolve() in (path.resolve(), path.resolve().parent):
            verb = "is" if path.resolve() == output.path.resolve() else "holds"
            raise InputError(f"The output {output.path} {verb} the {label}. Choose another name with -o.")
    if output.codec is not None and output.crf is not None:
        check_codec(output.codec, output.crf)
    check_writable(output.path)
    if is_there(output.path) and not (output.overwrite or output.resume):
        raise InputError(
            f"The output {output.path} exists. Choose another name with -o, or use --overwrite to replace it."
        )


def fit_output(plan: Plan, output: Output) -> Plan:
    """Return the plan, with warnings about what the output cannot hold and about another output whose report it
    replaces."""
    kind, warnings = container_of(output.path), list(plan.warnings)
    if plan.audio and not kind.audio:
        warnings.append(
            f"{kind.what} holds no audio: {output.path} will have no sound. Use .mp4 to keep the driving clip's audio."
        )
    warnings += _replaced_report(output.path)
    return replace(plan, warnings=tuple(dict.fromkeys(warnings)))


def _replaced_report(output: Path) -> list[str]:
    """Return a warning if another output beside this one has the same report: their names differ only in the ending."""
    from scail2_rt.runtime.session.report import report_path

    beside = report_path(output)
    try:
        name = Path(json.loads(beside.read_text(encoding="utf-8"))["output"]).name
    except (OSError, ValueError, TypeError, KeyError):
        return []
    if name in ("", output.name, partial_path(output).name) or not output.with_name(name).exists():
        return []
    return [f"The report {beside} is that of {name}, and is replaced. Choose another name with -o to keep it."]


def check_room(output: Output, plan: Plan) -> None:
    """Raise InputError if the disk has too little free space for the video.

    H.264 takes about 0.1 bytes per pixel at crf 18. Lossless H.264, PNG and GIF take about 1.5. Both are doubled or
    more, because the partial video and the result exist at the same time. Two saved states hold the overlap in fp32,
    once as decoded and once as the model sees it."""
    from scail2_rt.runtime.media.output_path import check_writable

    pixels = plan.height * plan.width
    states = 2 * 2 * 12 * plan.request.segment_overlap * pixels
    video = int(plan.frames * pixels * (0.3 if output.crf else 3))
    check_writable(output.path, video + states + OUTPUT_MARGIN)


def _check_unfinished(output: Output) -> None:
    """Raise InputError if files of an interrupted run would be deleted without --overwrite."""
    partial_video = partial_path(output.path)
    if output.overwrite or not partial_video.is_file():
        return
    parts = resumable(output.path)
    if parts and not output.resume:
        raise InputError(
            f"{partial_video} holds {counted(parts, 'finished segment')} of an interrupted run. Use --resume to "
            "continue it, or --overwrite to start again."
        )
    if output.resume and not parts and (lost := len(part_ends(partial_video))) and not is_there(output.path):
        raise InputError(
            f"{partial_video} holds {counted(lost, 'finished segment')}, but the state to resume from, "
            f"{sidecar_path(output.path, lost).name}, is not beside it. Move the video away, or use --overwrite to "
            "start again."
        )
