"""The joins of segments: histories, the fade of the overlap, and no lost frames for any segmentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.runtime.core.geometry import Layout, plan_segments
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.pipeline.conditioning import Conditions
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.driving import DrivingClip
from scail2_rt.runtime.pipeline.history import Carry, cross_fade, encode_history
from scail2_rt.runtime.pipeline.observe import observing
from scail2_rt.runtime.pipeline.pipeline import Frames, Machine, Sampling, animate
from scail2_rt.runtime.pipeline.transformer import References
from scail2_rt.runtime.pipeline.vae import encode_clip

pytest_plugins = ["tests.support.runtime_fixtures"]
HEIGHT, WIDTH, LENGTH, OVERLAP = 32, 32, 9, 5
FRAMES = 15  # segments 0..9, 4..13, 8..15


@pytest.fixture(scope="module")
def opened(engines: Path) -> Iterator[EngineSet]:
    with torch.no_grad(), open_engines(engines, "torch") as opened:
        yield opened


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestFade:
    OLD, NEW = torch.zeros(3, 5, 2, 2), torch.ones(3, 9, 2, 2)

    @pytest.mark.parametrize(("blend", "expected"), [(0, []), (1, [1 / 2]), (3, [1 / 4, 2 / 4, 3 / 4])])
    def test_weights_rise_to_the_end_of_the_overlap(self, blend: int, expected: list[float]) -> None:
        faded = cross_fade(self.NEW, 0, self.OLD, 5, blend)
        assert faded[0, :, 0, 0].tolist() == [1] * (5 - blend) + expected + [1] * 4

    def test_groups_of_frames_give_what_the_whole_gives(self) -> None:
        old, new = noise(3, 5, 4, 4), noise(3, 9, 4, 4, seed=1)
        whole = cross_fade(new, 0, old, 5, 5)
        parts = [cross_fade(new[:, a:b], a, old, 5, 5) for a, b in ((0, 1), (1, 5), (5, 9))]
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.allclose(whole[:, 2], (old[:, 2] + new[:, 2]) / 2, atol=1e-6)

    def test_nothing_to_fade_changes_nothing(self) -> None:
        new = noise(3, 9, 4, 4)
        assert cross_fade(new, 0, None, 5, 5) is new
        assert cross_fade(new, 5, self.OLD, 5, 5) is new


def test_a_history_is_the_rounded_frames_encoded_as_a_clip(opened: EngineSet) -> None:
    frames = noise(3, 5, HEIGHT, WIDTH).clamp(-1, 1)
    pixels, clean = encode_history(opened, frames)
    assert torch.equal(pixels, frames.bfloat16().float())
    assert torch.equal(clean, encode_clip(opened, pixels))


class Joins(NamedTuple):
    blend: int = 0
    anchor_color: str = "off"


class Run:
    """The result of `animate` with random conditions."""

    def __init__(self, opened: EngineSet, joins: Joins, frames: int = FRAMES, carry: Carry | None = None) -> None:
        dit, clip = opened.config.dit, opened.config.clip
        assert dit is not None
        assert clip is not None
        h, w = HEIGHT // 8, WIDTH // 8
        shown = References(noise(16, 1, h, w), noise(28, 1, h, w), noise(16, 0, h, w), noise(28, 0, h, w))
        conditions = Conditions((noise(4, dit.text_dim),), noise(clip.tokens, dit.clip_dim), shown)
        driving = (noise(frames + 3, 3, HEIGHT, WIDTH, seed=2) * 60 + 128).clamp(0, 255).byte()
        mask = torch.zeros_like(driving)
        mask[:, 0, :8, :8] = 255
        segments = plan_segments(frames, LENGTH, OVERLAP)
        first = carry.finished if carry else 0
        clips = [
            DrivingClip(s, driving[s.start : s.start + s.padded_frames], mask[s.start : s.start + s.padded_frames])
            for s in segments[first:]
        ]
        noises = iter([noise(16, s.latent_frames, h, w, seed=10 + i) for i, s in enumerate(segments)][first:])
        self.seen: dict[str, list[Tensor]] = {}

        def draw_noise(layout: Layout) -> Tensor:
            return next(noises)

        def observe(name: str, value: Tensor) -> None:
            self.seen.setdefault(name, []).append(value)

        sampling = Sampling("euler", 1, 5.0, 1.0, overlap=OVERLAP, blend=joins.blend, anchor_color=joins.anchor_color)
        machine = Machine(opened, Constants(opened), RunProgress())
        with observing(observe):
            self.parts: list[Frames] = list(animate(machine, conditions, clips, sampling, draw_noise, carry))
        self.frames = torch.cat([part.pixels for part in self.parts])


@pytest.mark.parametrize("frames", [3, 9, 10, 15, 17])
@pytest.mark.parametrize("joins", [Joins(), Joins(1), Joins(5, "first"), Joins(3, "previous")])
def test_every_frame_comes_once(opened: EngineSet, joins: Joins, frames: int) -> None:
    run = Run(opened, joins, frames)
    assert len(run.frames) == frames
    segments = len(plan_segments(frames, LENGTH, OVERLAP))
    assert sum(part.ends_segment for part in run.parts) == segments + (joins.blend > 0)


def test_a_fade_changes_the_overlap_alone(opened: EngineSet) -> None:
    plain, faded = Run(opened, Joins(), 13), Run(opened, Joins(blend=3), 13)
    changed = [bool((a != b).any()) for a, b in zip(plain.frames, faded.frames, strict=True)]
    assert changed == [6 <= i < 9 for i in range(13)]
    own = torch.cat(faded.seen["pixels"][3:6], 1)[:, 2:5]  # the second segment's version of frames 6 to 8
    before = torch.cat(faded.seen["pixels"][:3], 1)[:, 6:9]
    middle = ((own + before)[:, 1] / 2 + 1) / 2 * 255
    assert (faded.frames[7].permute(2, 0, 1) - middle).abs().max() <= 1


@pytest.mark.parametrize("joins", [Joins(), Joins(5, "first"), Joins(2, "previous")])
def test_what_a_segment_leaves_is_all_that_the_next_needs(opened: EngineSet, joins: Joins) -> None:
    whole = Run(opened, joins)
    carries = [part.carry for part in whole.parts if part.carry is not None]
    for carry in carries[:2]:
        rest = Run(opened, joins, carry=carry)
        assert torch.equal(rest.frames, whole.frames[-len(rest.frames) :])
        assert len(rest.frames) < FRAMES
