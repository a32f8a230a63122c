"""Everything that `scail2-rt generate` was given, as a typed record from the first line on.

The field names are those of the command's parameters, so that a search follows an option from the command line to the
request, the output and the engines.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import CaseInputs, read_case
from scail2_rt.runtime.core.request import Mode, Output, Request
from scail2_rt.runtime.core.window import Fit


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling settings by name; None in the options means the preset's."""

    scheduler: str
    steps: int
    shift: float
    guidance: float


PRESETS = {"quality": Preset("unipc", 40, 3.0, 5.0), "fast": Preset("euler", 6, 5.0, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of `generate`, by the names of its parameters."""

    engines: Path
    output: Path
    from_video: Path | None = None
    # inputs
    case: Path | None = None
    batch: Path | None = None
    image: Path | None = None
    mask_image: Path | None = None
    driving: Path | None = None
    mask_video: Path | None = None
    extra_refs: tuple[tuple[Path, Path], ...] = ()
    mode: Mode = "auto"
    fit: Fit = "auto"
    fit_reference: bool = False
    allow_mask_problems: bool = False
    start: int = 0
    frames: int | None = None
    prompt: str | None = None
    prompt_file: Path | None = None
    negative_prompt: str = ""
    # masks that are made
    segmenter: str = "auto"
    segmenter_weights: Path | None = None
    segmenter_device: str = "auto"
    mask_prompt: str | None = None
    max_characters: int = 2
    sort: str = "left-to-right"
    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    pairs: str = ""
    one_to_many: bool = False
    image_from: Path | None = None
    driving_from: Path | None = None
    # output
    overwrite: bool = False
    resume: bool = False
    size: tuple[int, int] | None = None
    codec: str | None = None
    crf: int | None = None
    metadata: bool = True
    dry_run: bool = False
    # sampling
    preset: str = "quality"
    scheduler: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    seed: int = 0
    noise_device: str = "cpu"
    segment_length: int = 81
    segment_overlap: int = 5
    overlap_blend: int = 0
    anchor_color: str = "off"
    # engines
    backend: str = "auto"
    max_rows: int = 16_384
    attention: str = "auto"
    vram_limit: int | None = None
    no_graphs: bool = False
    gpus: int | str = 1
    config: Path | None = None  # the file that some of these come from

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"--max-rows must be 1 or more, not {self.max_rows}.")

    @property
    def inputs(self) -> CaseInputs:
        """The case folder, or the files that were named one by one."""
        return CaseInputs(self.case, self.image, self.mask_image, self.driving, self.mask_video)

    @property
    def makes_masks(self) -> bool:
        """An image and a clip are given, and no masks."""
        others = (self.case, self.batch, self.mask_image, self.mask_video)
        return self.image is not None and self.driving is not None and not any(others)

    def request(self, image: Path, mask_image: Path, driving: Path, mask_video: Path, **changes: Any) -> Request:
        """The request for these files; `changes` are fields of `Request` that the batch file or the folder knows
        better. InputError for numbers out of range."""
        preset = PRESETS[self.preset]
        fields: dict[str, Any] = {
            "extra_refs": self.extra_refs,
            "mode": self.mode,
            "prompt": self.prompt or "",
            "negative_prompt": self.negative_prompt,
            "size": self.size,
            "fit": self.fit,
            "start": self.start,
            "frames": self.frames,
            "scheduler": preset.scheduler if self.scheduler is None else self.scheduler,
            "steps": preset.steps if self.steps is None else self.steps,
            "shift": preset.shift if self.shift is None else self.shift,
            "guidance": preset.guidance if self.guidance is None else self.guidance,
            "seed": self.seed,
            "segment_length": self.segment_length,
            "segment_overlap": self.segment_overlap,
            "overlap_blend": self.overlap_blend,
            "anchor_color": self.anchor_color,
            "noise_device": self.noise_device,
            "fit_reference": self.fit_reference,
            "allow_mask_problems": self.allow_mask_problems,
        }
        return Request(image, mask_image, driving, mask_video, **{**fields, **changes})

    def folder_request(self, directory: Path, **changes: Any) -> Request:
        """The request for a case folder. InputError when files of it are missing."""
        files = read_case(directory, None if self.mode == "auto" else self.mode)
        return self.request(files.image, files.mask_image, files.driving, files.mask_video, mode=files.mode, **changes)

    def output_to(self, path: Path) -> Output:
        return Output(path, self.codec, self.crf, self.overwrite, self.resume, self.metadata, self.config)

    def read_prompt(self) -> str:
        """The prompt of `--prompt` or `--prompt-file`, else empty."""
        if self.prompt_file is None:
            return self.prompt or ""
        if self.prompt is not None:
            raise InputError("--prompt and --prompt-file were both given: use one of them.")
        try:
            return self.prompt_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The prompt file {self.prompt_file} cannot be read ({error}).") from error
