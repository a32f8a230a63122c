"""The user's request for one generation, and its output.

A `Request` holds the inputs and the settings of the model; an `Output` holds the file to write. Both check their
numbers but open no file; `session.check` does. An input is a path or data in memory: an image as an array or a PIL
image, a clip as a `Clip`.
"""

import math
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import refuse_url, url_of
from scail2_rt.runtime.core.containers import resolve_encoding
from scail2_rt.runtime.core.geometry import check_size, plan_segments
from scail2_rt.runtime.core.window import FITS, Fit

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

DEFAULT_SIZE = (512, 896)
MAX_STEPS = 1000  # the model was trained on 1000 noise levels
MAX_SEED = 2**63 - 1
_LONGEST_STEM = 255 - len("..resume-10000.safetensors.tmp")  # bytes; the longest name that is written beside it
Mode = Literal["auto", "animate", "replace"]
SCHEDULERS = ("unipc", "dpm++", "euler")
ANCHORS = ("off", "first", "previous")
NOISE_DEVICES = ("cpu", "cuda")

ImageSource: TypeAlias = "Path | str | np.ndarray | Image"
ClipSource: TypeAlias = "Path | str | Clip"
_INTEGERS = ("start", "frames", "steps", "seed", "segment_length", "segment_overlap", "overlap_blend")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A video in memory.

    frames   uint8 RGB: an array [T, H, W, 3], an object with such a `shape` whose slices are such arrays (frames that
             are computed when they are read), or an iterable of frames [H, W, 3] (arrays or PIL images). An iterable
             that can be read only once (a generator) is written losslessly to a temporary file when it is checked
    rate     frames per second: a Fraction, a whole number, a float, or text like "30000/1001"
    name     its name in messages

    Raises InputError unless the rate is above 0 and at most 1000."""

    frames: "np.ndarray | Iterable[Any]"
    rate: Fraction
    name: str = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", _rate(f"The rate of the {self.name}", self.rate))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One generation.

    image, mask_image     the reference image and its mask: a path, an array uint8 [H, W, 3], or a PIL image
    driving, mask_video   the driving clip and its mask video: a path (of a video or a folder of images) or a `Clip`
    extra_refs            (image, mask) pairs in the order in which the model sees them
    mode                  `auto` derives it from the background of the mask video
    size                  output (H, W) in pixels; None: 512×896, turned to the orientation of the scene that is shown:
                          the reference's in animate mode, the driving clip's in replace mode
    fit                   placement of inputs of another aspect ratio in the frame. official: the centre crop of the
                          official code; crop: one window per clip, moved onto the characters; pad: the complete input
                          with margins; auto: the first of the three that keeps the characters. With official, the
                          default size follows the reference in both modes
    fps                   frames per second (whole number, float, Fraction or text like "30000/1001") at which the
                          driving clip is sampled, by the frame nearest in time. None: the clip's own rate. For a folder
                          of images, the rate of its frames, 16 by default
    start, frames         first driving frame, and the number of frames (None: to the end), both at the rate `fps`
    scheduler, steps, shift, guidance
                          settings of the denoising loop; guidance ≤ 1 runs one pass per step instead of two
    segment_length, segment_overlap
                          frames denoised together, and frames that a segment shares with the previous one; both 4n+1
    overlap_blend         number of frames, at the end of the overlap, that fade from one segment into the next
    anchor_color          segment that sets the colours of later segments (`pipeline.anchor`)
    noise_device          cpu: equal seeds give equal noise on any machine; cuda: the noise of the official pipeline
    fit_reference         replace mode: make the reference character as tall as the driving one
    allow_mask_problems   continue with masks that the check calls unusable

    Raises InputError for inputs of other types and for numbers out of range."""

    image: ImageSource
    mask_image: ImageSource
    driving: ClipSource
    mask_video: ClipSource
    extra_refs: tuple[tuple[ImageSource, ImageSource], ...] = ()
    mode: Mode = "auto"
    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    fit: Fit = "auto"
    fps: Fraction | None = None
    start: int = 0
    frames: int | None = None
    scheduler: str = "unipc"
    steps: int = 40
    shift: float = 3.0
    guidance: float = 5.0
    seed: int = 0
    segment_length: int = 81
    segment_overlap: int = 5
    overlap_blend: int = 0
    anchor_color: str = "off"
    noise_device: str = "cpu"
    fit_reference: bool = False
    allow_mask_problems: bool = False

    def __post_init__(self) -> None:
        for name in ("image", "mask_image", "driving", "mask_video"):
            object.__setattr__(self, name, as_path(getattr(self, name)))
        pairs = [tuple(map(as_path, pair)) if isinstance(pair, tuple | list) else () for pair in self.extra_refs]
        if any(len(pair) != 2 for pair in pairs):
            raise InputError("Extra references must be pairs: extra_refs=((image, mask), …).")
        object.__setattr__(self, "extra_refs", tuple(pairs))
        self._check_kinds()
        self._check_numbers()

    @property
    def passes(self) -> int:
        """Transformer passes per step: two with guidance, else one."""
        return 2 if self.guidance > 1 else 1

    @property
    def references(self) -> tuple[tuple[ImageSource, ImageSource], ...]:
        """(image, mask) of the reference and of the additional references."""
        return ((self.image, self.mask_image), *self.extra_refs)

    @property
    def inputs(self) -> dict[str, "ImageSource | ClipSource"]:
        """Label → path, array, image or clip of every input."""
        found = {
            "reference image": self.image,
            "reference mask": self.mask_image,
            "driving clip": self.driving,
            "driving mask video": self.mask_video,
        }
        for number, (image, mask) in enumerate(self.extra_refs, 1):
            found |= {f"extra reference {number}": image, f"mask of extra reference {number}": mask}
        return found

    @property
    def names(self) -> dict[str, str]:
        """Label → name of the input in messages: its path, or the label if it is in memory."""
        return {label: str(source) if isinstance(source, Path) else label for label, source in self.inputs.items()}

    def _check_kinds(self) -> None:
        """Check that inputs are paths, images or clips, and convert numbers of other libraries to Python's."""
        for label, source in self.inputs.items():
            if isinstance(source, Path):
                refuse_url(label, source)
            if label.startswith("driving"):
                fits, offered = isinstance(source, Path | Clip), "a path or a Clip(frames, rate)"
            else:
                fits = isinstance(source, Path) or hasattr(source, "convert") or hasattr(source, "__array_interface__")
                offered = "a path, a PIL image or an array"
            if source is None and "mask" in label:
                raise InputError(f"The {label} is None: give {offered}, or make both masks with `masks make`.")
            if not fits:
                raise InputError(f"The {label} must be {offered}, not a {type(source).__name__}.")
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise InputError(
                    f"The {name.replace('_', ' ')} must be text, not a {type(getattr(self, name)).__name__}."
                )
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name != "frames":
                object.__setattr__(self, name, _whole(name, value))
        if self.fps is not None:
            object.__setattr__(self, "fps", _rate("--fps", self.fps))
        for name in ("shift", "guidance"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.size is not None:
            if not isinstance(self.size, tuple | list) or len(self.size) != 2:
                raise InputError(f"The size must be (height, width), not {self.size!r}.")
            object.__setattr__(self, "size", tuple(_whole("size", value) for value in self.size))

    def _check_numbers(self) -> None:
        """Check all numbers, so that one error reports everything that is out of range."""
        limits = {
            f"--steps must be 1 to {MAX_STEPS}, not {self.steps}": 1 <= self.steps <= MAX_STEPS,
            f"--shift must be a number above 0, not {self.shift}": math.isfinite(self.shift) and self.shift > 0,
            f"--guidance must be 0 or more, not {self.guidance}": math.isfinite(self.guidance) and self.guidance >= 0,
            f"--seed must be 0 to {MAX_SEED}, not {self.seed}": 0 <= self.seed <= MAX_SEED,
            f"--start must be 0 or more, not {self.start}": self.start >= 0,
            f"--frames must be 1 or more, not {self.frames}": self.frames is None or self.frames >= 1,
            _one_of("--mode", self.mode, ("auto", "animate", "replace")): self.mode in ("auto", "animate", "replace"),
            _one_of("--fit", self.fit, FITS): self.fit in FITS,
            _one_of("--scheduler", self.scheduler, SCHEDULERS): self.scheduler in SCHEDULERS,
            _one_of("--anchor-color", self.anchor_color, ANCHORS): self.anchor_color in ANCHORS,
            _one_of("--noise-device", self.noise_device, NOISE_DEVICES): self.noise_device in NOISE_DEVICES,
            f"--overlap-blend must be 0 to --segment-overlap {self.segment_overlap}, not {self.overlap_blend}": 0
            <= self.overlap_blend
            <= self.segment_overlap,
        }
        wrong = [sentence for sentence, holds in limits.items() if not holds]
        if wrong:
            raise InputError("; ".join(wrong) + ".")
        if self.size is not None:
            check_size(*self.size)
        plan_segments(1, self.segment_length, self.segment_overlap)


def _one_of(option: str, value: str, offered: tuple[str, ...]) -> str:
    return f"{option} must be one of {', '.join(offered)}, not {value}"


def as_path(source: Any) -> Any:
    """Convert text to a path; return other sources unchanged."""
    return Path(source) if isinstance(source, str | os.PathLike) else source


def _rate(name: str, given: Any) -> Fraction:
    """Frames per second as a fraction. Raises InputError unless it is a number above 0 and at most 1000."""
    try:
        plain = given.item() if hasattr(given, "item") else given  # NumPy's numbers
        rate = Fraction(plain).limit_denominator(100_000)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise InputError(f"{name} must be above 0 and at most 1000 frames per second, not {given}.")
    return rate


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{_option(name)} must be a whole number, not {value!r}.") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise InputError(f"{_option(name)} must be a number, not {value!r}.")
    return float(value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a generation.

    path        .mp4, .m4v, .mov, .mkv, .webm or .gif; a name without an ending is a folder of PNG files
    codec       h264, hevc, av1 or vp9; by default vp9 in .webm, else h264; None for .gif and PNG files
    crf         constant rate factor, 0 is lossless, by default 18; None for .gif and PNG files
    overwrite   replace an existing output or interrupted run
    resume      continue an interrupted run of the same request if there is one
    metadata    store the settings of the run in the output
    config      file given with `--config`; used in the report only

    Raises InputError for other endings, for a name that is too long, and for a codec that the format cannot hold."""

    path: Path
    codec: str | None = None
    crf: int | None = None
    overwrite: bool = False
    resume: bool = False
    metadata: bool = True
    config: Path | None = None

    if TYPE_CHECKING:  # the signature of the generated constructor, except that the path may be text

        def __init__(
            self,
            path: Path | str,
            codec: str | None = None,
            crf: int | None = None,
            overwrite: bool = False,
            resume: bool = False,
            metadata: bool = True,
            config: Path | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if url := url_of(self.path):
            raise InputError(f"The output {url} is a URL: give a path on this machine.")
        path = Path(self.path)
        if (over := len(os.fsencode(path.stem)) - _LONGEST_STEM) > 0:
            raise InputError(f"The name of the output {path} is too long: make it {counted(over, 'byte')} shorter.")
        crf = None if self.crf is None else _whole("crf", self.crf)
        codec, crf = resolve_encoding(path, self.codec, crf)
        for name, value in {"path": path, "codec": codec, "crf": crf}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, output: "Output | Path | str") -> "Output":
        """Convert a path to an output with the defaults; return an output unchanged."""
        return output if isinstance(output, Output) else cls(output)
