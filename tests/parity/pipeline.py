"""Pipeline fixtures: from prepared inputs to frames through the same generator that `scail2-rt generate` consumes."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout, Segment, plan_segments
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.pipeline.conditioning import Conditions, encode_references
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.driving import DrivingClip
from scail2_rt.runtime.pipeline.history import Carry
from scail2_rt.runtime.pipeline.observe import observing
from scail2_rt.runtime.pipeline.pipeline import Machine, Sampling, animate
from scail2_rt.runtime.pipeline.schedulers import make_scheduler
from tests.parity.fixtures import Fixture, Golden, Row, compare, exact
from tests.parity.networks import dit_fixture

TOLERANCE, LATER_SEGMENT = 1e-3, 2e-2  # later segments: tiny differences flip roundings of the bf16 history
MASK, SIGMAS = 1e-6, 1e-7


def check_pipeline(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """The complete video, then every later segment separately from the recorded history."""
    case = fixture.metadata["case"]
    engines = golden.engines(
        dit=dit_fixture(golden, fixture.metadata["dit_weights"]), vae=golden.load(fixture.metadata["vae_weights"])
    )
    conditions = _conditions(golden, fixture, engines)
    yield compare(f"{fixture.name} ref_latent", conditions.references.reference, fixture["ref_latent"], TOLERANCE)
    yield compare(f"{fixture.name} ref_mask28", conditions.references.reference_mask, fixture["ref_mask28"], MASK)
    segments = plan_segments(case["T"], case["segment_len"], case["overlap"])
    planned = [{key: row[key] for key in asdict(segments[0])} for row in fixture.metadata["segments"]]
    yield exact(f"{fixture.name} segments", [asdict(segment) for segment in segments] == planned)
    scheduler = make_scheduler(case["solver"], case["steps"], case["shift"])
    yield compare(f"{fixture.name} sigmas", torch.tensor(scheduler.sigmas), fixture["seg0.sigmas"], SIGMAS)
    yield compare(f"{fixture.name} timesteps", torch.tensor(scheduler.timesteps), fixture["seg0.timesteps"], 0)

    video, frames = [], []
    constants = golden.constants(engines)
    for index, seen in enumerate(_run(engines, constants, conditions, fixture, segments)):
        tolerance = TOLERANCE if index == 0 else LATER_SEGMENT
        yield from _segment_rows(fixture, index, seen, tolerance)
        video.append(torch.cat(seen["pixels"], 1)[:, segments[index].overlap : segments[index].valid_frames])
        frames += seen["frames"]
    tolerance = TOLERANCE if len(segments) == 1 else LATER_SEGMENT
    yield compare(f"{fixture.name} video", torch.cat(video, 1), fixture["video"], tolerance)
    levels = 1 + int(127.5 * tolerance)
    yield compare(f"{fixture.name} frames_u8 (levels)", torch.cat(frames).int(), fixture["frames_u8"], levels)
    for index in range(1, len(segments)):
        (seen,) = _run(engines, constants, conditions, fixture, segments[index : index + 1], index)
        for row in _segment_rows(fixture, index, seen, TOLERANCE):
            yield Row(f"{row.name} from recorded history", row.error, row.tolerance)


def _conditions(golden: Golden, fixture: Fixture, engines: EngineSet) -> Conditions:
    references = [(fixture["in.ref_image"], fixture["in.ref_mask"])]
    names = sorted(name for name in fixture.tensors if name.startswith("in.additional_ref"))
    images, masks = (
        [picture for name in names if ("mask" in name) == is_mask for picture in _pictures(fixture[name])]
        for is_mask in (False, True)
    )
    references += list(zip(images, masks, strict=True))
    contexts = (fixture["in.context"], fixture["in.context_null"])
    clip = golden.load(fixture.metadata["clip_fea"])["clip_fea"][0].float()
    return Conditions(contexts, clip, encode_references(engines, references))


def _pictures(tensor: Tensor) -> list[Tensor]:
    """[3, H, W], [N, 3, H, W] or [3, N, H, W] → N pictures [3, H, W]."""
    if tensor.ndim == 3:
        return [tensor]
    return list(tensor.unbind(0 if tensor.shape[1] == 3 else 1))


def _run(
    engines: EngineSet,
    constants: Constants,
    conditions: Conditions,
    fixture: Fixture,
    segments: tuple[Segment, ...],
    first: int = 0,
) -> Iterator[dict[str, list[Any]]]:
    """The recorded values of each segment. first: the number of the first one in the fixture."""
    case = fixture.metadata["case"]
    mode: Literal["animate", "replace"] = "replace" if case["replace"] else "animate"
    sampling = Sampling(case["solver"], case["steps"], case["shift"], case["guide"], mode, case["overlap"])
    noises = iter([fixture[f"seg{first + i}.noise"] for i in range(len(segments))])
    seen: dict[str, list[Any]] = {}

    def clips() -> Iterator[DrivingClip]:
        for segment in segments:
            index = torch.arange(segment.start, segment.start + segment.padded_frames).clamp_max(segment.valid_end - 1)
            yield DrivingClip(segment, fixture["in.driving_u8"][index], fixture["in.driving_mask_u8"][index])

    def draw_noise(layout: Layout) -> Tensor:
        return next(noises).to(engines.device)

    def observe(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.cpu())

    recorded = fixture[f"seg{first}.history_pixels"].to(engines.device) if first else None
    carry = Carry(first, recorded)
    machine = Machine(engines, constants, RunProgress())
    with observing(observe):
        for frames in animate(machine, conditions, clips(), sampling, draw_noise, carry):
            seen.setdefault("frames", []).append(frames.pixels.cpu())
            if frames.ends_segment:
                yield seen
                seen = {}


def _segment_rows(fixture: Fixture, index: int, seen: dict[str, list[Any]], tolerance: float) -> Iterator[Row]:
    recorded = {
        "pose_latent": seen["driving"][0],
        "driving_mask28": seen["driving_mask"][0],
        "step0.v_cond": seen["velocity"][0],
        "step0.v_uncond": seen["velocity_unguided"][0] if "velocity_unguided" in seen else None,
        "latents_per_step": torch.stack(seen["latent"]),
        "final_latent": seen["final_latent"][0],
        "history_pixels": seen["history"][0] if "history" in seen else None,
        "history_latent": seen["history_latent"][0] if "history_latent" in seen else None,
    }
    for name, value in recorded.items():
        if (key := f"seg{index}.{name}") in fixture:
            limit = MASK if name == "driving_mask28" else tolerance
            yield compare(f"{fixture.name} {key}", torch.zeros(0) if value is None else value, fixture[key], limit)
