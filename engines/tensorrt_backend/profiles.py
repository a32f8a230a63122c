"""Optimisation profiles: the ranges of a plan's free dimensions.

Every range follows from the model and from two limits that a build may raise: the rows per call of a token-wise stage,
and the largest frame of the VAE. Text and image contexts always have the model's fixed length; in umT5 a prompt has its
real length, so that no padding is needed. A VAE stage has two profiles, one for landscape and one for portrait frames
up to the same size, each tuned at the usual size: a single range would have to include a square of the longer side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from scail2_rt.engines.row_chunks import MAX_ROWS
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.models.vae import PIXELS_PER_CELL
from scail2_rt.export.onnx.stages import split_dim
from scail2_rt.export.stages.spec import ROWS, StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error

PICTURE_MULTIPLE = 16  # frame sides in the VAE: half of a side divisible by 32
USUAL_PICTURE = (512, 896)
LARGEST_PICTURE = (704, 1280)
PROMPT_TOKENS = 512
CLIP_TOKENS = 257
GIB = 1 << 30
WORKSPACE_BYTES = 8 * GIB
TYPE_NAMES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int64: "INT64"}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options for building plans. max_picture: shorter and longer side in pixels, for both orientations;
    workspace_bytes: TensorRT's limit of one layer's scratch memory; targets: architectures to build for ("sm89"), ()
    for the default of the machine. Raises InputError for impossible values."""

    max_rows: int = MAX_ROWS
    max_picture: tuple[int, int] = LARGEST_PICTURE
    workspace_bytes: int = WORKSPACE_BYTES
    optimization_level: int = 3
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        short, long = sorted(self.max_picture)
        if short < PICTURE_MULTIPLE or short % PICTURE_MULTIPLE or long % PICTURE_MULTIPLE:
            raise InputError(
                f"the largest frame {self.max_picture[0]}x{self.max_picture[1]} is not possible. Use sides that are "
                f"multiples of {PICTURE_MULTIPLE} pixels."
            )
        if self.max_rows < 1 or not 1 <= self.optimization_level <= 5 or self.workspace_bytes < 1 << 20:
            raise InputError(
                f"TensorRT cannot build for {self.max_rows} rows at level {self.optimization_level} in "
                f"{self.workspace_bytes} bytes. Use at least 1 row, a level from 1 to 5 (0 would ignore the timing "
                "cache) and at least 1 MiB."
            )

    @property
    def words(self) -> list[str]:
        """The equivalent command-line options."""
        words = ["--target", ",".join(self.targets)] if self.targets else []
        if self.max_picture != LARGEST_PICTURE:
            words += ["--max-picture", f"{self.max_picture[0]}x{self.max_picture[1]}"]
        if self.workspace_bytes != WORKSPACE_BYTES:
            words += ["--workspace-gib", f"{self.workspace_bytes / GIB:g}"]
        return words


def plan_options(
    max_picture: tuple[int, int] | None, workspace_gib: float | None, targets: str | None = None
) -> PlanOptions | None:
    """Return the options given on the command line; None if there were none. targets: joined by commas."""
    if max_picture is None and workspace_gib is None and targets is None:
        return None
    workspace = WORKSPACE_BYTES if workspace_gib is None else int(workspace_gib * GIB)
    named = tuple(dict.fromkeys(target.strip() for target in (targets or "").split(",") if target.strip()))
    if targets is not None and not named:
        raise InputError("--target names no card. Write it as in sm89,sm120, or leave it out.")
    return PlanOptions(max_picture=max_picture or LARGEST_PICTURE, workspace_bytes=workspace, targets=named)


class Range(NamedTuple):
    """Smallest, usual and largest value of a free dimension."""

    smallest: int
    usual: int
    largest: int


class InputRange(NamedTuple):
    """Smallest, usual and largest shape of an input."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )


Profile = Mapping[str, InputRange]  # for every input with a free dimension


def stage_profiles(
    definition: StageDefinition, numerics: Numerics, config: ModelConfig, options: PlanOptions
) -> tuple[Profile, ...]:
    """Return the profiles of a stage, in the order of their indices; none if all of its sizes are fixed."""
    specs = [spec for spec in definition.io(numerics)[0] if any(not isinstance(dim, int) for dim in spec.dims)]
    if not specs:
        return ()
    choices = _picture_ranges(options) if definition.component == "vae" else (_token_ranges(config, options),)
    return tuple({spec.name: _input_range(definition.name, spec, ranges) for spec in specs} for ranges in choices)


def _token_ranges(config: ModelConfig, options: PlanOptions) -> dict[str, Range]:
    text = config.dit.text_len if config.dit is not None else PROMPT_TOKENS
    image = config.clip.tokens if config.clip is not None else CLIP_TOKENS
    return {
        ROWS: Range(1, min(MAX_ROWS // 2, options.max_rows), options.max_rows),
        "t": Range(text, text, text),
        "i": Range(image, image, image),
        "n": Range(1, PROMPT_TOKENS, PROMPT_TOKENS),
    }


def _picture_ranges(options: PlanOptions) -> tuple[dict[str, Range], ...]:
    """Return the ranges for landscape, then portrait, in latent cells."""
    smallest = PICTURE_MULTIPLE // PIXELS_PER_CELL
    short, long = (
        Range(smallest, min(usual, largest) // PIXELS_PER_CELL, largest // PIXELS_PER_CELL)
        for usual, largest in zip(USUAL_PICTURE, sorted(options.max_picture), strict=True)
    )
    return {"h": short, "w": long}, {"h": long, "w": short}


def _input_range(stage: str, spec: TensorSpec, ranges: Mapping[str, Range]) -> InputRange:
    shapes: list[tuple[int, ...]] = []
    for value in range(3):
        shape = []
        for factor, symbol in map(split_dim, spec.dims):
            if symbol and symbol not in ranges:
                raise Scail2Error(f"stage {stage}: the size {symbol} of its input {spec.name} is unknown.")
            shape.append(factor * ranges[symbol][value] if symbol else factor)
        shapes.append(tuple(shape))
    return InputRange(*shapes)
