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

from scail2_rt.export.errors import InputError
from scail2_rt.runtime.geometry import Layout, Segment, check_size, oriented, plan_segments
from scail2_rt.runtime.solvers import SOLVERS
from scail2_rt.runtime.text import MAX_TOKENS, Tokenizer, clean_prompt

if TYPE_CHECKING:
    import numpy as np

    from scail2_rt.runtime.media import VideoInfo


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
                 anchor_color: what later segments' colours are held to (`runtime.history`, `runtime.anchor`)
    overwrite    an existing output may be replaced
    resume       continue an interrupted run of this request where there is one"""

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
    audio        whether the driving video has any"""

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

    @property
    def start_s(self) -> Fraction:
        """Seconds of the driving video before the output's first frame."""
        return self.request.start / self.frame_rate if self.timestamps is None else self.timestamps[0]


def check_request(request: Request) -> JobPlan:
    """Check everything that needs no weights. Raises InputError with one sentence for the first thing that is wrong."""
    from scail2_rt.runtime.masks import check_masks

    _check_options(request)
    _check_files(request)
    images, masks = _load_references(request)
    driving, warnings = _check_videos(request)
    frames = _trimmed(request, driving.frames)
    image_height, image_width = images[0].shape[:2]
    height, width = request.size or oriented(DEFAULT_SIZE, image_height, image_width)
    check_size(height, width)
    segments = plan_segments(frames, request.segment_length, request.segment_overlap)
    _check_output(request, frames, height * width)
    report = check_masks(
        masks,
        request.mask_video,
        request.mode,
        names=[str(mask.name) for _, mask in reference_pairs(request)],
        start=request.start,
        frames=frames,
    )
    largest = max(segment.padded_frames for segment in segments)
    layout = Layout.of(largest, height, width, len(request.extra_refs), report.mode == "replace")
    cleaned = replace(
        request, prompt=clean_prompt(request.prompt), negative_prompt=clean_prompt(request.negative_prompt)
    )
    warnings += report.warnings
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


def _load_references(request: Request) -> tuple[list["np.ndarray"], list["np.ndarray"]]:
    """Images and masks uint8 [H, W, 3]; a pair must have one aspect ratio: else the mask lies beside the character."""
    from scail2_rt.runtime.media import load_image, load_mask_image

    images, masks = [], []
    for image_path, mask_path in reference_pairs(request):
        image, mask = load_image(image_path), load_mask_image(mask_path)
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[:2]
        if abs(height * mask_width - width * mask_height) > max(height * mask_width, width * mask_height) * 0.02:
            raise InputError(
                f"The mask {mask_path} is {mask_height}x{mask_width}, but its image {image_path} is {height}x{width} "
                "(height x width): make the mask from this very image."
            )
        images.append(image)
        masks.append(mask)
    return images, masks


def _check_videos(request: Request) -> tuple["VideoInfo", tuple[str, ...]]:
    """→ what the driving video is, and warnings."""
    from scail2_rt.runtime.media import probe_video

    driving, mask = probe_video(request.driving), probe_video(request.mask_video)
    if driving.frames != mask.frames:
        raise InputError(_lengths_differ(driving, mask))
    warnings = [*driving.warnings, *mask.warnings]
    if driving.frame_rate != mask.frame_rate and driving.frames > 1 and not driving.variable_frame_rate:
        warnings.append(
            f"The driving video runs at {_fps(driving)} but its mask at {_fps(mask)}: the n-th mask is used for the "
            "n-th frame."
        )
    if abs(driving.width * mask.height - driving.height * mask.width) > 0.02 * driving.width * mask.height:
        warnings.append(
            f"The driving video is {driving.height}x{driving.width} but its mask is {mask.height}x{mask.width} "
            "(height x width): both are cropped to the output's shape, so the mask may lie beside the character."
        )
    return driving, tuple(warnings)


def _lengths_differ(driving: "VideoInfo", mask: "VideoInfo") -> str:
    """The counts, and what explains them: other frame rates, or a damaged file."""
    rates = [f" at {_fps(info)}" if driving.frame_rate != mask.frame_rate else "" for info in (driving, mask)]
    return " ".join(
        [
            f"The driving video {driving.path} has {driving.frames} frames{rates[0]} but its mask {mask.path} has "
            f"{mask.frames}{rates[1]}: make the mask video from this very clip, one mask a frame.",
            *driving.warnings,
            *mask.warnings,
        ]
    )


def _fps(info: "VideoInfo") -> str:
    return f"{float(info.frame_rate):.6g} fps"


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
    from scail2_rt.runtime.video_writer import check_codec, check_writable

    check_codec(request.codec, request.crf)
    if request.codec in ("av1", "vp9") and request.output.suffix.lower() == ".mov":
        raise InputError(f"A .mov file cannot hold {request.codec} video: name the output .mp4, or use --codec hevc.")
    states = 2 * 2 * 12 * request.segment_overlap * pixels
    check_writable(request.output, int(frames * pixels * (3 if request.crf == 0 else 0.3)) + states + OUTPUT_MARGIN)
    if request.output.exists() and not (request.overwrite or request.resume):
        raise InputError(
            f"The output {request.output} exists: choose another name with -o, or replace it with --overwrite."
        )
