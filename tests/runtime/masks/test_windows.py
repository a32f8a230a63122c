"""The window of an image, the visible part of its characters, and the frames that the pipeline reads."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import covering_size
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.request import Clip, Request
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.palette import COLOURS, PALETTE
from scail2_rt.runtime.masks.stats import MaskStats
from scail2_rt.runtime.masks.windows import Pictures, choose_window, kept_inside
from scail2_rt.runtime.pipeline.conditioning import load_reference
from scail2_rt.runtime.pipeline.driving import read_clips
from scail2_rt.runtime.pipeline.preprocess import normalise_image, resize_cover, through_window
from scail2_rt.runtime.session.check import check_request

Box = tuple[float, float, float, float]  # top, bottom, left, right as shares of the sides
STANDING: Box = (0.1, 0.9, 0.35, 0.65)
LEFT: Box = (0.1, 0.95, 0.02, 0.2)
SHIRT, SKY = (40, 90, 200), (150, 200, 235)


def drawn(size: tuple[int, int], background: tuple[int, int, int], **figures: Box) -> np.ndarray:
    """A mask with one block per colour; the sides of a block are shares of those of the frame."""
    frame = np.full((*size, 3), background, np.uint8)
    for colour, (top, bottom, left, right) in figures.items():
        rows, columns = (
            slice(round(top * size[0]), round(bottom * size[0])),
            slice(round(left * size[1]), round(right * size[1])),
        )
        frame[rows, columns] = COLOURS[colour]
    return frame


def stats_of(*frames: np.ndarray) -> MaskStats:
    stats = MaskStats()
    stats.add(np.stack(frames))
    return stats


def way(stats: MaskStats, frame: tuple[int, int], fit: str = "auto") -> str:
    return choose_window(stats, stats.shape, frame, fit).way  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [(64, 96), (120, 66), (48, 130), (75, 101), (64, 64)])
@pytest.mark.parametrize("frame", [(64, 96), (96, 64), (64, 64)])
def test_the_official_window_is_the_official_resize(source: tuple[int, int], frame: tuple[int, int]) -> None:
    """Bit-identical in 8 bits and in float; a crop at the same position gives the same result."""
    levels = torch.randint(0, 256, (3, 3, *source), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    official = Window.official(source, frame)
    same = replace(official, way="crop")
    for frames in (levels, normalise_image(levels)):
        for window in (official, same):
            assert torch.equal(through_window(frames, window), resize_cover(frames, *frame))
    assert (official.height, official.width) == covering_size(*source, *frame)


@pytest.mark.parametrize("source", [(64, 96), (120, 66), (48, 130), (64, 64)])
@pytest.mark.parametrize("frame", [(64, 96), (96, 64), (64, 64)])
def test_a_padded_window_shows_all_and_black(source: tuple[int, int], frame: tuple[int, int]) -> None:
    window = Window.padded(source, frame)
    assert window.part == (0, 1, 0, 1)
    picture = torch.full((2, 3, *source), 200, dtype=torch.uint8)
    shown = through_window(picture, window)
    assert shown.shape == (2, 3, *frame)
    inside = torch.zeros(frame, dtype=torch.bool)
    inside[window.top : window.top + window.height, window.left : window.left + window.width] = True
    assert (shown[..., inside] == 200).all()
    assert (shown[..., ~inside] == 0).all()
    floating = through_window(normalise_image(picture), window)
    assert (floating[..., ~inside] == -1).all()
    assert max(window.height / frame[0], window.width / frame[1]) == 1
    assert abs(window.height / window.width - source[0] / source[1]) < 0.03 * source[0] / source[1]


@pytest.mark.parametrize("size", [(224, 126), (560, 315), (720, 405)])
@pytest.mark.parametrize("frame", [(64, 96), (96, 64), (64, 64)])
def test_shares_equal_counted_pixels(size: tuple[int, int], frame: tuple[int, int]) -> None:
    """Compared with the pixel counts of the resized mask, at all scales."""
    masks = [
        drawn(size, (0, 0, 0), red=(0.1 + t, 0.7 + t, 0.2, 0.5), cyan=(0.05, 0.3, 0.6, 0.95)) for t in (0, 0.1, 0.25)
    ]
    window = Window.official(size, frame)
    found = kept_inside(stats_of(*masks), window.part)
    wide = torch.from_numpy(np.stack(masks)).permute(0, 3, 1, 2).float()
    whole = torch.nn.functional.interpolate(wide, (window.height, window.width), mode="nearest")
    shown = whole[..., -window.top :, -window.left :][..., : frame[0], : frame[1]]
    for name in ("red", "cyan"):
        inside, total = ((x == torch.tensor(COLOURS[name]).view(1, 3, 1, 1)).all(1).sum((1, 2)) for x in (shown, whole))
        assert found[name].share == pytest.approx(float(inside.sum() / total.sum()), abs=0.02)
        assert found[name].least == pytest.approx(float((inside / total).min()), abs=0.02)


@pytest.mark.parametrize(
    ("size", "frame", "figures", "expected"),
    [
        ((128, 224), (64, 96), {"red": STANDING}, "official"),
        ((128, 224), (96, 64), {"red": STANDING}, "official"),  # wide enough
        ((128, 224), (96, 64), {"red": LEFT}, "crop"),
        ((224, 126), (64, 96), {"red": STANDING}, "pad"),
        ((224, 126), (64, 96), {"red": (0.05, 0.3, 0.3, 0.6)}, "crop"),
        ((128, 224), (64, 64), {"red": LEFT}, "crop"),
        ((128, 224), (64, 64), {"red": LEFT, "blue": (0.1, 0.9, 0.35, 0.5)}, "crop"),  # one window contains both
        ((128, 224), (64, 64), {"red": LEFT, "blue": (0.1, 0.9, 0.8, 0.95)}, "pad"),
        ((128, 128), (64, 96), {"red": STANDING}, "pad"),
        ((128, 128), (64, 96), {"red": (0.5, 0.95, 0.3, 0.6)}, "crop"),
        ((128, 224), (64, 96), {}, "official"),
    ],
)
def test_auto_takes_the_first_that_keeps_the_characters(
    size: tuple[int, int], frame: tuple[int, int], figures: dict[str, Box], expected: str
) -> None:
    stats = stats_of(drawn(size, (0, 0, 0), **figures))
    window = choose_window(stats, size, frame, "auto")
    assert window.way == expected
    kept = kept_inside(stats, window.part)
    assert set(kept) == set(figures)
    assert all(found.share >= 0.98 and not found.cut for found in kept.values())


def test_one_window_for_the_complete_clip() -> None:
    """A walking character is cropped if one window contains its path, otherwise padded."""
    near = [drawn((128, 224), (0, 0, 0), red=(0.1, 0.9, 0.02 + t, 0.15 + t)) for t in (0, 0.05, 0.1)]
    far = [*near, drawn((128, 224), (0, 0, 0), red=(0.1, 0.9, 0.8, 0.93))]
    window = choose_window(stats_of(*near), (128, 224), (96, 64), "auto")
    assert window.way == "crop"
    assert kept_inside(stats_of(*near), window.part)["red"].least == 1
    assert way(stats_of(*far), (96, 64)) == "pad"
    cut = kept_inside(stats_of(*far), choose_window(stats_of(*far), (128, 224), (96, 64), "crop").part)["red"]
    assert cut.cut == (3,)
    assert (cut.least, cut.share) == (0, pytest.approx(0.75, abs=0.01))


def test_a_character_that_enters_needs_no_other_window() -> None:
    """16:9 in a frame of 7:4: a narrow part that is briefly outside is accepted, a cut body is not."""
    sliver = drawn((360, 640), (0, 0, 0), red=(0.1, 0.9, 0, 0.006))
    whole = [drawn((360, 640), (0, 0, 0), red=(0.1, 0.9, 0.1 * t, 0.1 * t + 0.2)) for t in range(1, 6)]
    assert way(stats_of(sliver, *whole), (512, 896)) == "official"
    assert way(stats_of(drawn((360, 640), (0, 0, 0), red=(0.1, 0.9, 0, 0.2)), *whole), (512, 896)) == "official"
    narrow = drawn((360, 640), (0, 0, 0), red=(0.1, 0.9, 0, 0.04))
    assert way(stats_of(*[narrow] * 6), (512, 896)) == "crop"  # a fifth of it is outside


def test_a_small_character_is_measured_like_a_large_one() -> None:
    """A character that is small and outside the window in two frames, and then large. No border of the clip cuts it."""
    far = drawn((128, 224), (0, 0, 0), red=(0.4, 0.5, 0.05, 0.1))
    near = drawn((128, 224), (0, 0, 0), red=STANDING)
    stats = stats_of(far, far, *[near] * 8)
    cut = kept_inside(stats, choose_window(stats, (128, 224), (64, 64), "official").part)["red"]
    assert (cut.cut, cut.least) == ((0, 1), 0)
    assert cut.share > 0.98
    assert way(stats, (64, 64)) == "pad"


@pytest.mark.parametrize(
    ("mode", "fit", "expected"),
    [("animate", "auto", (896, 512)), ("animate", "official", (896, 512)), ("replace", "auto", (512, 896)),
     ("replace", "pad", (512, 896)), ("replace", "crop", (512, 896)), ("replace", "official", (896, 512))],
)  # fmt: skip
def test_the_default_size_follows_the_shown_scene(mode: str, fit: str, expected: tuple[int, int]) -> None:
    pictures = Pictures([(192, 128)], (128, 224), fit)  # type: ignore[arg-type]
    assert pictures.frame(mode) == expected  # type: ignore[arg-type]
    assert replace(pictures, size=(64, 64)).frame(mode) == (64, 64)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="divisible by 32"):
        replace(pictures, size=(60, 64)).frame(mode)  # type: ignore[arg-type]


# Requests in memory, and the frames that the pipeline reads.


def request_of(
    mode: str, reference: tuple[tuple[int, int], Box], driving: tuple[tuple[int, int], Box], **changes: object
) -> Request:
    """An image and a clip of 5 frames with one red character each; `mask_scale` divides the size of the driving
    mask."""
    here, there = (PALETTE[name] for name in (("white", "black") if mode == "animate" else ("black", "white")))
    scale, frames = int(changes.pop("mask_scale", 1)), int(changes.pop("count", 5))  # type: ignore[call-overload]
    image, image_mask = (drawn(reference[0], colour, red=reference[1]) for colour in (SKY, here))
    image[(image == COLOURS["red"]).all(-1)] = SHIRT
    clip = np.stack([drawn(driving[0], SKY, red=driving[1])] * frames)
    mask_size = (driving[0][0] // scale, driving[0][1] // scale)
    masks = np.stack([drawn(mask_size, there, red=driving[1])] * frames)
    rate = Fraction(16)
    given = {"mode": mode, "size": (64, 96), **changes}
    return Request(image, image_mask, Clip(clip, rate), Clip(masks, rate), **given)  # type: ignore[arg-type]


def red_pixels(mask: torch.Tensor) -> torch.Tensor:
    """bool [..., H, W] of mask frames uint8 [..., 3, H, W]."""
    return (mask[..., 0, :, :] > 225) & (mask[..., 1, :, :] < 64) & (mask[..., 2, :, :] < 64)


@pytest.mark.parametrize("mode", ["animate", "replace"])
@pytest.mark.parametrize("scale", [1, 2])
def test_clip_and_mask_use_one_window(mode: str, scale: int) -> None:
    """Also for a mask of half the size of the clip. Margins are black in both, which is hidden in both modes."""
    plan = check_request(request_of(mode, ((64, 96), STANDING), ((192, 108), STANDING), mask_scale=scale))
    window = plan.driving_window
    assert window.way == "pad"
    (clip,) = read_clips(plan)
    assert clip.frames.shape == clip.mask.shape == (5, 3, 64, 96)
    margins = torch.ones(64, 96, dtype=torch.bool)
    margins[:, window.left : window.left + window.width] = False
    assert margins.float().mean() > 0.5
    assert not clip.frames[..., margins].any()
    assert not clip.mask[..., margins].any()
    figure = red_pixels(clip.mask)
    assert figure.any(-1).sum() / 5 == pytest.approx(0.8 * 64, abs=2)
    pixels = clip.frames.permute(1, 0, 2, 3)[:, figure]
    assert (pixels[0] > 200).float().mean() > 0.9  # the drawn clip is red there


def test_every_input_has_a_window() -> None:
    request = request_of("animate", ((128, 256), LEFT), ((192, 108), STANDING), size=(64, 64))
    tall = drawn((160, 80), PALETTE["white"], red=STANDING)
    aside = drawn((80, 160), PALETTE["white"], red=(0.1, 0.9, 0.8, 0.95))
    plan = check_request(replace(request, extra_refs=((tall, tall), (aside, aside))))
    assert plan.driving_window.way == "pad"
    assert [window.way for window in plan.reference_windows] == ["crop", "pad", "crop"]
    assert plan.framing is not None
    assert [framed.name for framed in plan.framing.inputs] == [
        "driving clip", "reference", "extra reference 1", "extra reference 2",
    ]  # fmt: skip
    for (image, mask), window in zip(plan.request.references, plan.reference_windows, strict=True):
        shown, shown_mask = load_reference(image, mask, window)
        assert shown.shape == shown_mask.shape == (3, 64, 64)
        on = (shown_mask[0] > 0.5) & (shown_mask[1] < 0)
        rows = on.any(1).sum() / 64
        assert rows == pytest.approx(0.8 if window.way == "pad" else 0.85, abs=0.1)
    assert plan.warnings == ()


def test_only_used_frames_count() -> None:
    """The character leaves the centre after the second frame."""
    request = request_of("animate", ((64, 96), STANDING), ((128, 224), STANDING), size=(64, 64))
    masks = [drawn((128, 224), (0, 0, 0), red=STANDING)] * 2 + [drawn((128, 224), (0, 0, 0), red=LEFT)] * 3
    request = replace(request, mask_video=Clip(np.stack(masks), Fraction(16)), fit="official", allow_mask_problems=True)
    ways = {}
    for start, frames in ((0, 2), (0, None), (2, 1), (1, None)):
        found = check_request(replace(request, start=start, frames=frames))
        ways[start, frames] = [f.frames for f in found.masks if f.rule == "cropped"]
    assert ways == {(0, 2): [], (0, None): [((2, 4),)], (2, 1): [((2, 2),)], (1, None): [((2, 4),)]}
    assert check_request(replace(request, frames=2, fit="auto")).driving_window.way == "official"
    one = check_request(replace(request, start=4, fit="auto"))
    assert (one.frames, one.driving_window.way) == (1, "crop")


@pytest.mark.parametrize("fit", ["auto", "crop", "pad"])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_the_reference_is_scaled_inside_its_window(fit: str, size: tuple[int, int]) -> None:
    """`--fit-reference` with every `--fit`: as tall as the driving character in the frame, and fully visible."""
    request = request_of("replace", ((200, 100), STANDING), ((128, 224), LEFT), size=size, fit=fit)
    plan = check_request(replace(request, fit_reference=True))
    assert plan.fit is not None
    (clip,) = read_clips(plan)
    tall = float(red_pixels(clip.mask).any(-1).sum()) / 5
    _, mask = load_reference(request.image, request.mask_image, plan.reference_windows[0], plan.fit)
    on = (mask[0] > 0) & (mask[1] < 0)
    assert float(on.any(1).sum()) == pytest.approx(tall, abs=3)
    assert plan.framing is not None
    assert plan.framing.inputs[1].kept["red"].share > 0.98
    assert not [finding for finding in plan.masks if finding.rule in ("cropped", "framing")]


def test_a_cropped_reference_with_fit_reference_is_accepted() -> None:
    request = request_of("replace", ((100, 400), LEFT), ((128, 192), STANDING), fit="official")
    with pytest.raises(InputError, match=r"shows \d+ % of the red character of reference mask"):
        check_request(request)
    assert check_request(replace(request, fit_reference=True)).warnings == ()


def test_a_lost_driving_character_is_refused_before_scaling() -> None:
    request = request_of("replace", ((64, 96), STANDING), ((128, 224), LEFT), size=(96, 64), fit="official")
    with pytest.raises(InputError, match=r"0 % of the red character of driving mask video; .*--fit auto"):
        check_request(replace(request, fit_reference=True))


def test_files_and_clips_in_memory_give_one_plan(tmp_path: Path) -> None:
    from scail2_rt.runtime.media.lossless import write_video

    memory = request_of("animate", ((128, 256), LEFT), ((192, 108), STANDING))
    assert isinstance(memory.driving, Clip)
    assert isinstance(memory.mask_video, Clip)
    for name, pixels in (("ref", memory.image), ("mask", memory.mask_image)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")  # type: ignore[arg-type]
    write_video(tmp_path / "d.mp4", memory.driving.frames, Fraction(16))
    write_video(tmp_path / "m.mp4", memory.mask_video.frames, Fraction(16))
    paths = [tmp_path / name for name in ("ref.png", "mask.png", "d.mp4", "m.mp4")]
    plans: list[Plan] = [check_request(request) for request in (memory, Request(*paths, mode="animate", size=(64, 96)))]
    assert plans[0].driving_window == plans[1].driving_window
    assert plans[0].reference_windows == plans[1].reference_windows
    assert plans[0].framing is not None
    assert plans[1].framing is not None
    assert plans[0].framing.line == plans[1].framing.line
