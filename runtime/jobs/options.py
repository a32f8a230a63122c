"""The options of `scail2-rt generate` as a typed record.

The fields have the names of the command's parameters, so that a text search follows an option from the command line to
the request, the output and the engines.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import (
    BatchLine,
    CaseFiles,
    CaseInputs,
    UnmaskedCase,
    read_case,
    read_text,
    read_unmasked_case,
)
from scail2_rt.runtime.core.request import Mode, Output, Request
from scail2_rt.runtime.core.window import Fit


@dataclass(frozen=True, slots=True)
class Preset:
    """Default sampling settings. They apply to options that are None."""

    scheduler: str
    steps: int
    shift: float
    guidance: float


PRESETS = {"quality": Preset("unipc", 40, 3.0, 5.0), "fast": Preset("euler", 6, 5.0, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of `generate`, under the names of its parameters.

    lines   the lines of the file `batch`, with their options under the same names
    notes   sentences about inputs that were chosen by the program

    Raises InputError for `max_rows` below 1, and for both `seed` and `seeds`."""

    engines: Path
    output: Path
    from_video: Path | None = None
    # inputs
    case: Path | None = None
    batch: Path | None = None
    lines: tuple[BatchLine, ...] = ()
    notes: tuple[str, ...] = ()
    image: Path | None = None
    mask_image: Path | None = None
    driving: Path | None = None
    mask_video: Path | None = None
    extra_refs: tuple[tuple[Path, Path], ...] = ()
    mode: Mode = "auto"
    fit: Fit = "auto"
    fit_reference: bool = False
    allow_mask_problems: bool = False
    fps: Fraction | str | None = None
    start: int = 0
    frames: int | None = None
    prompt: str | None = None
    prompt_file: Path | None = None
    negative_prompt: str = ""
    # making masks
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
    seeds: tuple[int, ...] = ()
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
    config: Path | None = None  # configuration file that some options come from

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"--max-rows is {self.max_rows}. Give a number of 1 or more.")
        if self.seeds and self.seed not in (0, *self.seeds):
            raise InputError("--seed and --seeds were both given. Use one of them.")

    @property
    def inputs(self) -> CaseInputs:
        """The case folder, or the files that were named separately."""
        return CaseInputs(self.case, self.image, self.mask_image, self.driving, self.mask_video)

    @property
    def makes_masks(self) -> bool:
        """Whether an image and a clip are given without masks."""
        others = (self.case, self.batch, self.mask_image, self.mask_video)
        return self.image is not None and self.driving is not None and not any(others)

    @property
    def video(self) -> Path:
        """The video to write: `output`, or `NAME-seedN.mp4` for one of `seeds`."""
        output = self.output
        return output.with_name(f"{output.stem}-seed{self.seed}{output.suffix}") if self.seeds else output

    @property
    def per_seed(self) -> "list[GenerateOptions]":
        """One set of options per seed of `seeds`; these options if there are no seeds."""
        return [replace(self, seed=seed, seeds=(seed,)) for seed in self.seeds] or [self]

    def unfolded(self) -> "GenerateOptions":
        """Return the options with the case folder replaced by its files, and with its prompt if none was given. Notes
        name the files that were chosen.

        Raises InputError if files of the folder are missing. Masks may be missing if both are."""
        if self.case is None:
            return self
        self.inputs.files("")
        notes, found = list[str](), dict[str, Any]()
        case: UnmaskedCase | CaseFiles | None = read_unmasked_case(self.case)
        if case is None:
            case = read_case(self.case, None if self.mode == "auto" else self.mode)
            found = {"mask_image": case.mask_image, "mask_video": case.mask_video, "mode": case.mode}
        else:
            notes.append(f"{self.case} holds no masks: they are made first.")
        if case.choices:
            notes.append(f"{self.case} holds several files for one input; chosen: {case.choices}.")
        prompt = self.prompt
        if prompt is None and self.prompt_file is None and case.prompt_file is not None:
            prompt = read_text("prompt file", case.prompt_file)
            notes.append(f"The prompt comes from {case.prompt_file}: {' '.join(prompt.split())[:60]!r}.")
        return replace(
            self, case=None, image=case.image, driving=case.driving, prompt=prompt, notes=tuple(notes), **found
        )

    def request(self, image: Path, mask_image: Path, driving: Path, mask_video: Path, **changes: Any) -> Request:
        """Return the request for these files. changes: fields of `Request` that replace those of the options.

        Raises InputError for numbers out of range."""
        preset = PRESETS[self.preset]
        fields: dict[str, Any] = {
            "extra_refs": self.extra_refs,
            "mode": self.mode,
            "prompt": self.prompt or "",
            "negative_prompt": self.negative_prompt,
            "size": self.size,
            "fit": self.fit,
            "fps": self.fps,
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

    def to_video(self) -> Output:
        """Return the output: the video's path and the options of its file."""
        return Output(self.video, self.codec, self.crf, self.overwrite, self.resume, self.metadata, self.config)

    def read_prompt(self) -> str:
        """Return the prompt of `--prompt` or `--prompt-file`, or "". Raises InputError if both are given, or if the
        file cannot be read."""
        if self.prompt_file is None:
            return self.prompt or ""
        if self.prompt is not None:
            raise InputError("--prompt and --prompt-file were both given. Use one of them.")
        return read_text("prompt file", self.prompt_file)
