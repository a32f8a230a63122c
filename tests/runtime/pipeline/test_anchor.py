"""Matching colours to an earlier segment: CIELAB against published values, the statistics, and the correction."""

import pytest
import torch
from torch import Tensor

from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.media.colour import lab_to_rgb, rgb_to_lab
from scail2_rt.runtime.pipeline.anchor import ColourAnchor, background, open_anchor, statistics
from scail2_rt.runtime.pipeline.driving import DrivingClip
from scail2_rt.runtime.pipeline.preprocess import normalise_video

HEIGHT, WIDTH, FRAMES = 64, 96, 9
CPU = torch.device("cpu")
# sRGB → CIELAB (D65, 2°), as Bruce Lindbloom's CIE calculator gives it
KNOWN = {
    (255, 255, 255): (100.0, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (255, 255, 0): (97.14, -21.55, 94.48),
    (0, 255, 255): (91.11, -48.09, -14.13),
    (128, 128, 128): (53.585, 0.0, 0.0),
    (5, 5, 5): (1.371, 0.0, 0.0),
}


@pytest.mark.parametrize(("rgb", "lab"), KNOWN.items())
def test_known_colours(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    assert rgb_to_lab(torch.tensor(rgb) / 255).tolist() == pytest.approx(lab, abs=0.02)


def test_there_and_back() -> None:
    rgb = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0))
    assert (lab_to_rgb(rgb_to_lab(rgb)) - rgb).abs().max() < 2e-5


def test_background_keeps_away_from_characters() -> None:
    mask = torch.zeros(2, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    mask[0, 0, 20:30, 40:50] = 255
    mask[0, :, 40:, :20] = 255  # white: background of a replace mask
    found = background(mask)
    assert found[1].all()
    assert found[0, 50, 10]
    assert not found[0, 18:32, 38:52].any()  # two pixels around: 64 / 32
    assert found[0, 17, 45]


def scene(seed: int = 0) -> Tensor:
    """A picture in -1..1 that is smooth, textured and far from the edges of the gamut: [3, H, W]."""
    coarse = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed)) - 0.5
    smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
    return (smooth + 0.1 * torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed + 1))).clamp(-1, 1)


def clip(walk: int = 0, frames: Tensor | None = None, white: bool = False) -> DrivingClip:
    """A character that walks from `walk` on; frames [T, 3, H, W] are the driving clip's."""
    mask = torch.full((FRAMES, 3, HEIGHT, WIDTH), 255 if white else 0, dtype=torch.uint8)
    for t in range(FRAMES):
        x = walk + 2 * t
        mask[t, :, 10:60, x : x + 20] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    frames = torch.zeros(FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8) if frames is None else frames
    return DrivingClip(Segment(0, FRAMES, FRAMES, 0), frames, mask)


def still(driving: DrivingClip, picture: Tensor, character: float = 0.9) -> Tensor:
    """The picture in every frame with a flat character where the mask has one: [3, T, H, W]."""
    here = (driving.mask[:, 0] > 225) & (driving.mask[:, 1] < 225)
    return torch.where(here, torch.tensor(character), picture[:, None])


def shade(anchor: ColourAnchor, video: Tensor) -> Tensor:
    """In the groups in which the VAE decodes."""
    return torch.cat([anchor.shade(a, video[:, a:b]) for a, b in ((0, 1), (1, 5), (5, 9))], 1)


def drift(video: Tensor, light: float = 0.92, warm: float = 0.05) -> Tensor:
    """Darker and warmer."""
    return (video * light + torch.tensor([warm, 0.0, -warm]).view(3, 1, 1, 1)).clamp(-1, 1)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean CIE76 colour difference of two videos in -1..1."""
    return (rgb_to_lab(a.add(1).div(2)) - rgb_to_lab(b.add(1).div(2))).norm(dim=0).mean().item()


def test_off_is_no_anchor() -> None:
    assert open_anchor("off", "animate", clip(), {}, CPU) is None


@pytest.mark.parametrize("choice", ["first", "previous"])
@pytest.mark.parametrize("replace", [False, True])
def test_the_first_segment_stays_and_equal_statistics_change_nothing(choice: str, replace: bool) -> None:
    driving = clip(0, (scene(5).expand(FRAMES, -1, -1, -1) * 127.5 + 127.5).byte(), white=replace)
    video = still(driving, normalise_video(driving.frames[0]))
    first = ColourAnchor(choice, replace, driving, {}, CPU)
    assert torch.equal(shade(first, video), video)
    again = shade(ColourAnchor(choice, replace, driving, first.state(), CPU), video)
    assert (again - video).abs().max() < 2e-5  # a twohundredth of a level


@pytest.mark.parametrize("choice", ["first", "previous"])
def test_drift_is_taken_back_while_the_character_walks_on(choice: str) -> None:
    """A character that covers another part of the background than in the anchor segment is not a colour change."""
    anchor = ColourAnchor(choice, False, clip(0), {}, CPU)
    shade(anchor, still(clip(0), scene()))
    true = still(clip(40), scene())
    drifted = drift(true)
    corrected = shade(ColourAnchor(choice, False, clip(40), anchor.state(), CPU), drifted)
    assert distance(drifted, true) > 3
    assert distance(corrected, true) < 0.15 * distance(drifted, true)
    walked_on = ColourAnchor(choice, False, clip(40), anchor.state(), CPU)
    assert distance(shade(walked_on, true), true) < 0.02


def test_in_replace_mode_the_scene_may_change() -> None:
    """Colour changes of the driving scene are followed; only a changed difference from it counts as drift."""
    one, other = ((scene(s).expand(FRAMES, -1, -1, -1) * 127.5 + 127.5).byte() for s in (5, 9))
    anchor = ColourAnchor("first", True, clip(0, one, True), {}, CPU)
    shade(anchor, still(clip(0, one, True), drift(scene(5)[:, None], 0.97, 0.01)[:, 0]))
    true = still(clip(0, other, True), drift(scene(9)[:, None], 0.97, 0.01)[:, 0])
    follows = shade(ColourAnchor("first", True, clip(0, other, True), anchor.state(), CPU), true)
    assert distance(follows, true) < 0.4
    drifted = drift(true)
    corrected = shade(ColourAnchor("first", True, clip(0, other, True), anchor.state(), CPU), drifted)
    assert distance(corrected, true) < 0.2 * distance(drifted, true)


def test_previous_follows_the_segment_before_and_first_does_not() -> None:
    states = {}
    for choice in ("first", "previous"):
        state = {}
        for picture in (scene(), drift(scene()[:, None], 0.97, 0.02)[:, 0]):
            anchor = ColourAnchor(choice, False, clip(), state, CPU)
            shade(anchor, still(clip(), picture))
            state = anchor.state()
        states[choice] = state
    assert states["first"]["count"].max() == FRAMES
    assert states["previous"]["count"].max() == FRAMES
    difference = states["first"]["total"] - states["previous"]["total"]
    assert 0 < difference.abs().max() / FRAMES < 1  # the next segment is matched to corrected frames


def test_without_background_nothing_is_corrected() -> None:
    driving = clip()
    anchor = ColourAnchor("first", False, driving, {}, CPU)
    shade(anchor, still(driving, scene()))
    full = DrivingClip(driving.segment, driving.frames, torch.zeros_like(driving.mask))
    full.mask[:, 0] = 255
    video = drift(still(driving, scene()))
    assert torch.equal(shade(ColourAnchor("first", False, full, anchor.state(), CPU), video), video)


def test_the_drift_within_a_segment_is_followed_without_steps() -> None:
    anchor = ColourAnchor("first", False, clip(), {}, CPU)
    shade(anchor, still(clip(), scene()))
    video = still(clip(), scene())
    light = torch.linspace(1, 0.9, FRAMES).view(1, -1, 1, 1)
    corrected = shade(ColourAnchor("first", False, clip(), anchor.state(), CPU), video * light)
    levels = statistics(rgb_to_lab(corrected.add(1).div(2)), torch.ones(FRAMES, HEIGHT, WIDTH))[0][0]
    assert levels == pytest.approx(
        statistics(rgb_to_lab(video.add(1).div(2)), torch.ones(FRAMES, HEIGHT, WIDTH))[0][0].item(), abs=1
    )
    steps = [distance(corrected[:, t : t + 1], video[:, t : t + 1]) for t in range(FRAMES)]
    drifted = [distance(video[:, t : t + 1] * light[:, t : t + 1], video[:, t : t + 1]) for t in range(FRAMES)]
    assert max(steps) < 0.5 * max(drifted)
