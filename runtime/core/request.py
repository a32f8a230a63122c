"""What the user asked for, and the plan that follows from it: every check that needs no weights happens here.

`Request` is one generation as given. `check_request` reads the media (not the engines), refuses what cannot work with
one sentence, and returns the `JobPlan` that the pipeline carries out: the size, the segments, the resolved mode. Checks
run from cheap to dear; the driving video and its mask are decoded once each. Nothing is written.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout, Segment, check_size, oriented, plan_segments
from scail2_rt.runtime.pipeline.schedulers import SOLVERS
from scail2_rt.runtime.pipeline.text import MAX_TOKENS, Tokenizer, clean_prompt

if TYPE_CHECKING:
    import numpy as np

    from scail2_rt.runtime.masks.framing import Framing, ReferenceFit
    from scail2_rt.runtime.masks.lint import Finding, MaskReport
    from scail2_rt.runtime.media.video_reader import VideoInfo


DEFAULT_SIZE = (512, 896)
MAX_STEPS = 1000  # the model was trained on 1000 noise levels
MAX_SEED = 2**63 - 1
OUTPUT_MARGIN = 16 << 20  # bytes, for short clips and the report
Mode = Literal["auto", "animate", "replace"]
HISTORIES = ("official", "latents")
ANCHORS = ("off", "first", "previous")


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    extra_refs   (image, mask) pairs in the order in which the model sees them
    mode         `auto` reads it from the driving mask's background
    size         (H, W) in pixels, taken as given; None: 512×896 turned to the reference image's orientation
    start        first driving frame; frames: how many, None to the end
    history      what a segment starts from; overlap_blend: frames of the overlap that fade into the next segment;
                 anchor_color: what later segments' colours are held to (`pipeline.history`, `pipeline.anchor`)
    overwrite    an existing output may be replaced
    resume       continue an interrupted run of this request where there is one
    fit_reference, allow_mask_problems
                 make the reference character as tall as the driving one; go on with masks that are judged unusable"""

    image: Path
    mask_image: Path
    driving: Path
    mask_video: Path
    output: Path
    extra_refs: tuple[tuple[Path, Path], ...] = ()
    mode: Mode = "auto"
    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    start: int = 0
    frames: int | None = None
    solver: str = "unipc"
    steps: int = 40
    shift: float = 3.0
    guidance: float = 5.0
    seed: int = 0
    segment_length: int = 81
    segment_overlap: int = 5
    history: str = "official"
    overlap_blend: int = 0
    anchor_color: str = "off"
    crf: int = 18
    codec: str = "h264"
    noise_device: str = "cpu"
    overwrite: bool = False
    resume: bool = False
    fit_reference: bool = False
    allow_mask_problems: bool = False

    @property
    def passes(self) -> int:
        """Transformer passes a step: two with guidance, else one."""
        return 2 if self.guidance > 1 else 1


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A request that can be carried out.

    request      as given, with cleaned prompts
    frames       T, the length of the output; segments count from its first frame
    mode, layout the resolved mode, and the token layout of the largest segment
    warnings     sentences for the user
    timestamps   presentation times of the output's frames in the driving video, in seconds, where its rate varies
    audio        whether the driving video has any
    masks        what the lint found, errors among it if they are allowed
    framing, fit the characters' heights, and how the reference is scaled to match if that was asked for"""

    request: Request
    height: int
    width: int
    frame_rate: Fraction
    frames: int
    segments: tuple[Segment, ...]
    mode: Literal["animate", "replace"]
    layout: Layout
    warnings: tuple[str, ...]
    timestamps: tuple[Fraction, ...] | None = None
    audio: bool = False
    masks: "tuple[Finding, ...]" = ()
    framing: "Framing | None" = None
    fit: "ReferenceFit | None" = None

    @property
    def start_s(self) -> Fraction:
        """Seconds of the driving video before the output's first frame."""
        return self.request.start / self.frame_rate if self.timestamps is None else self.timestamps[0]


def check_request(request: Request) -> JobPlan:
    """Check everything that needs no weights. Raises InputError with one sentence for the first thing that is wrong."""
    from scail2_rt.runtime.masks.lint import check_masks, refuse, video_pair, warnings_of

    _check_options(request)
    _check_files(request)
    images, masks, findings = _load_references(request)
    driving, mask_video = _probe_videos(request)
    findings += video_pair(driving, mask_video)
    refuse(findings, request.allow_mask_problems)
    frames = _trimmed(request, min(driving.frames, mask_video.frames))
    image_height, image_width = images[0].shape[:2]
    height, width = request.size or oriented(DEFAULT_SIZE, image_height, image_width)
    check_size(height, width)
    segments = plan_segments(frames, request.segment_length, request.segment_overlap)
    _check_output(request, frames, height * width)
    report = check_masks(
        masks,
        request.mask_video,
        request.mode,
        names=[str(mask) for _, mask in reference_pairs(request)],
        start=request.start,
        frames=frames,
        size=(height, width),
    )
    findings += report.findings
    refuse(report.findings, request.allow_mask_problems)
    fit = _fit(request, images[0], masks[0], report, height, width) if request.fit_reference else None
    if fit:  # the difference that the lint warns of is mended
        findings = [finding for finding in findings if finding.rule != "framing"]
    largest = max(segment.padded_frames for segment in segments)
    layout = Layout.of(largest, height, width, len(request.extra_refs), report.mode == "replace")
    cleaned = replace(
        request, prompt=clean_prompt(request.prompt), negative_prompt=clean_prompt(request.negative_prompt)
    )
    warnings = (*driving.warnings, *mask_video.warnings, *warnings_of(findings))
    times = driving.timestamps and driving.timestamps[request.start : request.start + frames]
    return JobPlan(
        cleaned,
        height,
        width,
        driving.frame_rate,
        frames,
        segments,
        report.mode,
        layout,
        warnings,
        times,
        driving.audio,
        tuple(findings),
        report.framing,
        fit,
    )


def reference_pairs(request: Request) -> tuple[tuple[Path, Path], ...]:
    """(image, mask) of the reference and of the additional ones."""
    return ((request.image, request.mask_image), *request.extra_refs)


def prompt_warnings(plan: JobPlan, tokenizer_path: Path) -> tuple[str, ...]:
    """A sentence for each prompt that fills what the model reads (it may well be longer)."""
    tokenizer = Tokenizer(tokenizer_path)
    prompts = {"prompt": plan.request.prompt, "negative prompt": plan.request.negative_prompt}
    return tuple(
        f"The {name} fills the {MAX_TOKENS} tokens that the model reads: what comes after them is cut off."
        for name, text in prompts.items()
        if len(tokenizer.encode(text)) == MAX_TOKENS
    )


def _check_options(request: Request) -> None:
    """Ranges of the numbers, all at once so that a long command is mended in one go."""
    limits = {
        f"--steps must be 1 to {MAX_STEPS}, not {request.steps}": 1 <= request.steps <= MAX_STEPS,
        f"--shift must be a number above 0, not {request.shift}": math.isfinite(request.shift) and request.shift > 0,
        f"--guidance must be 0 or more, not {request.guidance}": math.isfinite(request.guidance)
        and request.guidance >= 0,
        f"--seed must be 0 to {MAX_SEED}, not {request.seed}": 0 <= request.seed <= MAX_SEED,
        f"--start must be 0 or more, not {request.start}": request.start >= 0,
        f"--frames must be 1 or more, not {request.frames}": request.frames is None or request.frames >= 1,
        f"--solver must be one of {', '.join(SOLVERS)}, not {request.solver}": request.solver in SOLVERS,
        f"--history must be one of {', '.join(HISTORIES)}, not {request.history}": request.history in HISTORIES,
        f"--anchor-color must be one of {', '.join(ANCHORS)}, not {request.anchor_color}": request.anchor_color
        in ANCHORS,
        f"--overlap-blend must be 0 to --segment-overlap {request.segment_overlap}, not {request.overlap_blend}": 0
        <= request.overlap_blend
        <= request.segment_overlap,
    }
    wrong = [sentence for sentence, holds in limits.items() if not holds]
    if wrong:
        raise InputError("; ".join(wrong) + ".")
    if request.size is not None:
        check_size(*request.size)
    plan_segments(1, request.segment_length, request.segment_overlap)


def _check_files(request: Request) -> None:
    files = {
        "reference image": request.image,
        "reference mask": request.mask_image,
        "driving video": request.driving,
        "driving mask video": request.mask_video,
    }
    for number, (image, mask) in enumerate(request.extra_refs, 1):
        files |= {f"extra reference {number}": image, f"mask of extra reference {number}": mask}
    for label, path in files.items():
        if not path.exists():
            raise InputError(f"The {label} {path} does not exist.")
        if not path.is_file():
            raise InputError(f"The {label} {path} is not a file.")
        if path.stat().st_size == 0:
            raise InputError(f"The {label} {path} is empty (0 bytes): copy it again.")
        if path.resolve() == request.output.resolve():
            raise InputError(f"The output {request.output} is the {label}: choose another name with -o.")


def _load_references(request: Request) -> tuple[list["np.ndarray"], list["np.ndarray"], list["Finding"]]:
    """Images and masks uint8 [H, W, 3], and what is wrong with their shapes."""
    from scail2_rt.runtime.masks.lint import image_pair
    from scail2_rt.runtime.media.images import load_image, load_mask_image

    images, masks, findings = [], [], []
    for image_path, mask_path in reference_pairs(request):
        image, mask = load_image(image_path), load_mask_image(mask_path)
        findings += image_pair(str(image_path), image.shape[:2], str(mask_path), mask.shape[:2])
        images.append(image)
        masks.append(mask)
    return images, masks, findings


def _probe_videos(request: Request) -> tuple["VideoInfo", "VideoInfo"]:
    from scail2_rt.runtime.media.video_reader import probe_video

    return probe_video(request.driving), probe_video(request.mask_video)


def _fit(
    request: Request, image: "np.ndarray", mask: "np.ndarray", report: "MaskReport", height: int, width: int
) -> "ReferenceFit":
    """How `--fit-reference` scales the reference."""
    from scail2_rt.runtime.masks.framing import fit_reference

    if report.mode != "replace":
        raise InputError(
            "--fit-reference is for replace mode: in animate mode the character keeps its place in the reference image."
        )
    return fit_reference(image, mask, report.framing.driving, height, width)


def _trimmed(request: Request, total: int) -> int:
    """Frames of the output."""
    if request.start >= total:
        raise InputError(
            f"--start {request.start} is beyond the end of the driving video, whose frames are 0 to {total - 1}."
        )
    left = total - request.start
    if request.frames is not None and request.frames > left:
        raise InputError(
            f"--frames {request.frames} is more than the {left} frames that the driving video has from frame "
            f"{request.start} on: leave --frames out to go to the end."
        )
    return request.frames or left


def _check_output(request: Request, frames: int, pixels: int) -> None:
    """An existing output is kept unless `overwrite`; its place must be writable and have room.

    pixels: H·W. H.264 at crf 18 takes about a tenth of a byte each, without loss about one and a half; both files are
    there for a moment when the audio is added. Two saved states hold the overlap in fp32, decoded and as seen."""
    from scail2_rt.runtime.media.video_writer import check_codec, check_writable

    check_codec(request.codec, request.crf)
    if request.codec in ("av1", "vp9") and request.output.suffix.lower() == ".mov":
        raise InputError(f"A .mov file cannot hold {request.codec} video: name the output .mp4, or use --codec hevc.")
    states = 2 * 2 * 12 * request.segment_overlap * pixels
    check_writable(request.output, int(frames * pixels * (3 if request.crf == 0 else 0.3)) + states + OUTPUT_MARGIN)
    if request.output.exists() and not (request.overwrite or request.resume):
        raise InputError(
            f"The output {request.output} exists: choose another name with -o, or replace it with --overwrite."
        )
