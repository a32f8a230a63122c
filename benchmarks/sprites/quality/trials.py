"""The trials of `scail2-rt bench quality`: tasks, variants, and the metrics of an output.

A trial is a case of the test split (held-out characters, places and motions) with a variant. Besides the tasks of
`cases`: `swapped` assigns each of two characters to the other's driving figure; `closeup` is replacement with a
reference image that the character fills; `long` has three segments and `longer` five; `portrait`, `landscape` and
`edge` have inputs of other shapes than the frame (`world.shapes`). Baselines that need no model are repeating the
reference image and copying the driving clip. The ceiling is the truth, encoded and decoded by the VAE.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.benchmarks.sprites.quality import metrics
from scail2_rt.benchmarks.sprites.world import cases
from scail2_rt.benchmarks.sprites.world.case_files import case_request
from scail2_rt.benchmarks.sprites.world.cases import SIZE, SpriteCase, closeup, make_scene, render_case
from scail2_rt.benchmarks.sprites.world.raster import Picture, draw_picture
from scail2_rt.benchmarks.sprites.world.shapes import SHAPES, render_shapes
from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.core.request import Request

TASKS = (*cases.TASKS, "swapped", "closeup", "long", *SHAPES)
SEGMENT, OVERLAP = cases.FRAMES, 5
STEP = SEGMENT - OVERLAP
LENGTHS = {"long": SEGMENT + 2 * STEP, "longer": SEGMENT + 4 * STEP}  # three and five segments; other tasks: one
DRAWN_AS = {
    "swapped": "two", "closeup": "replace", "long": "animate", "longer": "animate", "portrait": "animate",
    "landscape": "animate", "edge": "replace",
}  # fmt: skip
SAMPLING: Mapping[str, Any] = {"scheduler": "unipc", "steps": 2, "shift": 3.0, "guidance": 1.0}
OURS, ONE_REFERENCE, FITTED, CEILING = "ours", "one-reference", "fit-reference", "vae"
OFFICIAL, EQUAL, MADE_MASKS = "fit-official", "equal-shapes", "made-masks"


@dataclass(frozen=True, slots=True)
class Variant:
    """A configuration for running the cases. options: fields of `Request` that differ from the defaults."""

    name: str
    precision: str = "fp32"
    attention: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The options that are not fields of `Request`."""
        return tuple(sorted(set(self.options) - {f.name for f in fields(Request)}))


def variants(usual: Variant) -> tuple[Variant, ...]:
    """Variants that each differ from the default in one setting; variants equal to the default are omitted. Schedulers
    give different results from three steps on, so they are compared at six."""
    precisions = [Variant(name, name, "auto", usual.options) for name in ("fp32", "bf16", "fp8")]
    attentions = ("sdpa", "bf16", "8bit-bf16pv", "8bit")
    changed = [Variant(f"fp8-{attention}", "fp8", attention, usual.options) for attention in attentions]
    for key, values in (
        ("guidance", (1.0, 3.0, 5.0)),
        ("steps", (1, 2, 4, 6, 20, 40)),
    ):
        for value in values:
            options = {**usual.options, key: value}
            changed.append(Variant(f"{key}-{value:g}", usual.precision, usual.attention, options))
    for scheduler in ("dpm++", "euler"):
        options = {**usual.options, "scheduler": scheduler, "steps": 6}
        changed.append(Variant(f"steps-6-{scheduler}", usual.precision, usual.attention, options))
    same = (usual.precision, usual.attention, usual.options)
    return tuple(v for v in (*precisions, *changed) if (v.precision, v.attention, v.options) != same)


def long_variants(usual: Variant) -> tuple[Variant, ...]:
    """Variants of the options for long clips."""
    ways: dict[str, dict[str, Any]] = {
        "official": {},
        "overlap-9": {"segment_overlap": 9},
        "overlap-13": {"segment_overlap": 13},
        "blend-4": {"overlap_blend": 4},
        "anchor-first": {"anchor_color": "first"},
        "anchor-previous": {"anchor_color": "previous"},
    }
    return tuple(
        Variant(f"long-{name}", usual.precision, usual.attention, {**usual.options, **options})
        for name, options in ways.items()
    )


def held_out_case(task: str, seed: int, equal: bool = False, frames: int | None = None) -> SpriteCase:
    """The held-out case number `seed` of a task of this module. equal: both inputs in the frame's shape."""
    frames = frames or LENGTHS.get(task, cases.FRAMES)
    scene = make_scene(DRAWN_AS.get(task, task), seed, "test", frames, swapped=task == "swapped")
    if task in SHAPES:
        return render_shapes(task, scene, SHAPES[task].equal if equal else SHAPES[task])
    return render_case(closeup(scene) if task == "closeup" else scene)


def frame_of(task: str) -> tuple[int, int]:
    """(H, W) of the output of a task."""
    return SHAPES[task].frame if task in SHAPES else SIZE


def make_request(folder: Path, seed: int, variant: Variant, **options: Any) -> Request:
    """The request for a case folder with a variant."""
    usual: dict[str, Any] = {"size": SIZE, "segment_length": SEGMENT, "segment_overlap": OVERLAP, "seed": seed}
    return case_request(folder, **{**usual, **SAMPLING, **variant.options, **options})


@dataclass(frozen=True, slots=True)
class Answer:
    """A case and the references for its metrics.

    bare         the truth without characters, uint8 [T, H, W, 3]
    shape        silhouettes of the characters in the truth, bool [T, H, W]
    characters   pixels of the truth that show a character, bool [T, H, W]"""

    case: SpriteCase
    bare: np.ndarray
    shape: np.ndarray
    characters: np.ndarray

    @classmethod
    def of(cls, case: SpriteCase) -> "Answer":
        """The case with the references for its metrics."""
        empty = Picture(case.scene.truth.parts[:, :0], case.scene.truth.background)
        bare, _ = draw_picture(empty, *case.truth.shape[1:3])
        return cls(case, bare, metrics.silhouette(case.truth, bare), case.labels > 0)

    def score(self, output: np.ndarray) -> dict[str, float]:
        """The metrics of a video uint8 [T, H, W, 3]. `hidden_psnr` is added if the task hides something, `area` (area
        of the silhouettes relative to the truth) if the reference image does not show the size."""
        truth, joints = self.case.truth, self.case.scene.joints
        found = {
            "psnr": metrics.psnr(output, truth),
            "ssim": metrics.ssim(output, truth),
            "character_psnr": metrics.psnr(output, truth, self.characters),
            "colour_error": metrics.colour_error(output, truth, self.characters),
            "shape_error": metrics.shape_error(metrics.silhouette(output, self.bare), self.shape),
            "motion_px": metrics.motion_error(output, truth, joints),
        }
        if self.case.scene.task == "closeup":
            found["area"] = float(metrics.silhouette(output, self.bare).sum() / self.shape.sum())
        if self.case.hidden.any():
            found["hidden_psnr"] = metrics.psnr(output, truth, self.case.hidden)
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def follow(self, output: np.ndarray, segments: Iterable[Segment]) -> dict[str, float]:
        """The metrics of a long clip: PSNR and colour error on characters per frame, PSNR per segment, the drift of
        both from the first to the last segment, and the error of the change at the joins."""
        truth, characters = self.case.truth, self.characters
        own = [slice(segment.start + segment.overlap, segment.valid_end) for segment in segments]
        found = {
            f"segment_{number}": metrics.psnr(output[part], truth[part], characters[part])
            for number, part in enumerate(own, 1)
        }
        by_frame = metrics.frame_psnr(output, truth, characters)
        colours = metrics.frame_colour(output, truth, characters)
        seam, steady = metrics.seam_error(output, truth, tuple(part.start for part in own[1:]))
        found |= {"drift_db": found[f"segment_{len(own)}"] - found["segment_1"], "seam": seam, "steady": steady}
        found["colour_drift"] = np.nanmean(colours[own[-1]]) - np.nanmean(colours[own[0]])
        found |= {f"frame_{t:03d}": value for t, value in enumerate(by_frame)}
        found |= {f"colour_{t:03d}": value for t, value in enumerate(colours)}
        return {name: float(value) for name, value in found.items() if not np.isnan(value)}


# Baselines without a model.
BASELINES: Mapping[str, Callable[[Answer], np.ndarray]] = {
    "repeat-reference": lambda answer: np.broadcast_to(answer.case.reference, answer.case.truth.shape),
    "copy-driving": lambda answer: answer.case.driving,
}
