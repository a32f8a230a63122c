"""Mask latents against the golden data, and the findings for good and bad masks, also after lossy coding."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.lint import MaskReport, check_masks, refuse, warnings_of
from scail2_rt.runtime.masks.palette import CHARACTERS, COLOURS, class_shares, mask_latents
from scail2_rt.runtime.masks.stats import MaskStats, flat_strangers, guess_mode, image_stats, video_stats
from scail2_rt.runtime.masks.windows import Pictures
from scail2_rt.runtime.pipeline.preprocess import half_resolution, normalise_image, normalise_video
from tests.support.clips import write_clip

BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (128, 128, 128)
RGB = tuple[int, int, int]


def mask(background: RGB, *characters: RGB | str, height: int = 96, width: int = 160) -> np.ndarray:
    """A mask image: a background with one block per character, from left to right."""
    image = np.full((height, width, 3), background, np.uint8)
    for i, colour in enumerate(characters):
        left = 8 + i * 22
        image[24:80, left : left + 18] = COLOURS[colour] if isinstance(colour, str) else colour
    return image


def video(path: Path, frames: Sequence[np.ndarray], crf: int = 23) -> Path:
    return write_clip(path, np.stack(frames), 25, options={"crf": str(crf)})


class TestLatents:
    def test_golden(self, golden: Path) -> None:
        data = load_file(golden / "preprocess" / "mask28.safetensors")
        seen = 0
        for name, expected in data.items():
            case, _, kind = name.partition(".")
            if kind == "u8_in":
                continue
            frames = normalise_video(data[f"{case}.u8_in"])
            result = mask_latents(frames if kind == "full28" else half_resolution(frames))
            torch.testing.assert_close(result, expected, atol=1e-6, rtol=0, msg=name)
            seen += 1
        assert seen > 10

    def test_threshold(self, golden: Path) -> None:
        rule = json.loads((golden / "preprocess" / "threshold.json").read_text())
        levels = torch.arange(256, dtype=torch.uint8)
        grey = levels.view(1, 1, 1, 256).expand(1, 3, 1, 256).repeat_interleave(8, 2).repeat_interleave(8, 3)
        for route, name in ((normalise_video, "video_path_on"), (normalise_image, "image_path_on")):
            white = mask_latents(route(grey))[0, 0, 0]
            assert torch.nonzero(white)[:, 0].tolist() == rule[name]

    def test_channels(self) -> None:
        """Each colour has a channel; the first frame fills a group; later frames form groups of four."""
        names = [*COLOURS, "white", "red"]  # 9 frames
        frames = torch.tensor([COLOURS[name] for name in names], dtype=torch.uint8)[..., None, None].expand(
            -1, -1, 16, 24
        )
        latents = mask_latents(normalise_video(frames))
        assert latents.shape == (28, 3, 2, 3)
        for group, members in enumerate(([0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8])):
            on = torch.nonzero(latents[:, group].amax((1, 2)))[:, 0].tolist()
            assert on == [slot * 7 + list(COLOURS).index(names[frame]) for slot, frame in enumerate(members)]
        assert set(latents.unique().tolist()) == {0.0, 1.0}

    def test_coverage_is_a_share(self) -> None:
        frame = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        frame[:, 0, :, :2] = 255
        assert mask_latents(normalise_video(frame))[1, 0, 0, 0] == 0.25

    def test_wrong_frame_count(self) -> None:
        with pytest.raises(ValueError, match="4n\\+1"):
            mask_latents(torch.zeros(4, 3, 8, 8))


class TestShares:
    def test_every_colour(self) -> None:
        frame = np.zeros((10, 16, 3), np.uint8)
        for i, colour in enumerate(COLOURS.values()):
            frame[: i + 1, i] = colour
        assert class_shares(frame) == pytest.approx((np.arange(7) + 1) / 160)

    def test_agrees_with_the_latents(self) -> None:
        frame = np.random.default_rng(0).choice(np.array([0, 225, 226, 255], np.uint8), (16, 24, 3))
        means = mask_latents(normalise_video(torch.from_numpy(frame).permute(2, 0, 1)[None]))[:7].mean((1, 2, 3))
        assert class_shares(frame).tolist() == pytest.approx(means.tolist())

    def test_stats_grow_frame_by_frame(self) -> None:
        stats = MaskStats()
        stats.add(np.stack([mask(BLACK)]))
        stats.add(np.stack([mask(BLACK, "blue"), mask(BLACK, "red", "blue")]))
        assert (stats.frames, stats.shares.shape) == (3, (3, 7))
        assert stats.first_frames == {"red": 2, "blue": 1}
        assert stats.characters == ("red", "blue")


class TestStrangers:
    def test_flat_colours_are_found(self) -> None:
        found = flat_strangers(mask(BLACK, (255, 128, 0), "red", (120, 0, 160)))
        assert {colour for colour, _ in found} == {(255, 128, 0), (120, 0, 160)}

    def test_soft_edges_are_not(self) -> None:
        soft = mask(WHITE, *CHARACTERS, height=480, width=800).astype(np.float32)
        kernel = np.hanning(9)[1:-1] / np.hanning(9).sum()
        for axis in (0, 1):
            soft = np.apply_along_axis(lambda line: np.convolve(line, kernel, "same"), axis, soft)
        assert flat_strangers(soft[4:-4, 4:-4].round().astype(np.uint8)) == []

    def test_tiny_frames(self) -> None:
        assert flat_strangers(np.full((2, 2, 3), 128, np.uint8)) == []


class TestGuess:
    @pytest.mark.parametrize(("background", "mode"), [(WHITE, "replace"), (BLACK, "animate"), (GREY, "animate")])
    def test_background(self, background: RGB, mode: str) -> None:
        assert guess_mode(np.stack([mask(background, "red")] * 2)) == mode

    def test_close_up(self) -> None:
        frame = np.full((64, 64, 3), COLOURS["red"], np.uint8)
        frame[:4] = WHITE
        assert guess_mode(frame[None]) == "replace"


def accepted(masks: list[np.ndarray], path: Path, mode: Any = "auto", names: Any = None, **part: int) -> MaskReport:
    """The report of the mask check; raises InputError if it has an error."""
    names = names or [f"reference mask {number}" for number in range(1, len(masks) + 1)]
    references, driving = list(map(image_stats, masks, names)), video_stats(path, **part)
    report = check_masks(references, driving, mode, Pictures([stats.shape for stats in references], driving.shape))
    refuse(report.findings)
    return report


class TestCheck:
    @pytest.mark.parametrize("crf", [0, 23, 35])
    @pytest.mark.parametrize("mode", ["animate", "replace"])
    def test_good_masks_pass_after_coding(self, tmp_path: Path, mode: str, crf: int) -> None:
        here, there = (BLACK, WHITE) if mode == "replace" else (WHITE, BLACK)
        frames = [mask(there, "red"), *[mask(there, *CHARACTERS)] * 9]
        report = accepted([mask(here, *CHARACTERS)], video(tmp_path / "m.mp4", frames, crf))
        assert report.mode == mode
        reference, driving = report.facts
        assert (driving.frames, driving.height, driving.width) == (10, 96, 160)
        assert set(reference.shares) == {*CHARACTERS, "white" if mode == "animate" else "black"}
        assert driving.presence == {"red": ((0, 9),), **dict.fromkeys(CHARACTERS[1:], ((1, 9),))}
        assert driving.shares["cyan"] == pytest.approx(0.9 * 56 * 18 / 96 / 160, rel=0.2)
        assert warnings_of(report.findings) == ()

    def test_only_used_frames_are_read(self, tmp_path: Path) -> None:
        frames = [*[mask(BLACK, "blue")] * 4, *[mask(BLACK, "red")] * 12, *[mask(BLACK, "blue")] * 4]
        report = accepted([mask(WHITE, "red")], video(tmp_path / "m.mp4", frames), start=4, frames=12)
        assert (report.facts[1].frames, report.facts[1].presence) == (12, {"red": ((4, 15),)})
        with pytest.raises(InputError, match="blue character in frames 16-19, but"):
            accepted([mask(WHITE, "red")], tmp_path / "m.mp4", start=4)
        with pytest.raises(InputError, match="cannot start at frame 21"):
            accepted([mask(WHITE, "red")], tmp_path / "m.mp4", start=21)
        with pytest.raises(InputError, match="no frame from number 20 on"):
            accepted([mask(WHITE, "red")], tmp_path / "m.mp4", start=20)

    @pytest.mark.parametrize("image", [mask(GREY), mask(BLACK), mask(BLACK, (100, 100, 100))])
    def test_reference_without_palette(self, tmp_path: Path, image: np.ndarray) -> None:
        with pytest.raises(InputError, match=r"ref_mask\.png has none of the mask colours"):
            accepted([image], video(tmp_path / "m.mp4", [mask(BLACK, "red")]), names=["ref_mask.png"])

    @pytest.mark.parametrize("frame", [mask(GREY), mask(BLACK), mask(WHITE)])
    def test_driving_without_character(self, tmp_path: Path, frame: np.ndarray) -> None:
        with pytest.raises(InputError, match=r"m\.mp4 shows no character in any of its 3 frames"):
            accepted([mask(WHITE, "red")], video(tmp_path / "m.mp4", [frame] * 3))

    def test_colour_that_no_reference_has(self, tmp_path: Path) -> None:
        path = video(tmp_path / "m.mp4", [*[mask(BLACK, "red")] * 3, *[mask(BLACK, "red", "green")] * 3])
        with pytest.raises(
            InputError, match=r"green character in frames 3-5, .*mask has green \(a\.png, b\.png: red, blue\)"
        ):
            accepted([mask(WHITE, "red"), mask(WHITE, "blue")], path, names=["a.png", "b.png"])
        report = accepted([mask(WHITE, "red"), mask(WHITE, "green")], path)
        assert report.facts[-1].presence == {"red": ((0, 5),), "green": ((3, 5),)}

    def test_an_extra_reference_may_show_background_only(self, tmp_path: Path) -> None:
        report = accepted([mask(WHITE, "red"), mask(WHITE)], video(tmp_path / "m.mp4", [mask(BLACK, "red")]))
        assert report.facts[1].shares == {"white": 1}
        assert warnings_of(report.findings) == ()

    def test_more_than_six_characters(self, tmp_path: Path) -> None:
        frames = [mask(BLACK, "red"), mask(BLACK, *CHARACTERS, (255, 128, 0))]
        with pytest.raises(
            InputError, match=r"more than six characters \(7 colours\): \(25\d,12\d,\d\) covers .*in frame 1"
        ):
            accepted([mask(WHITE, *CHARACTERS)], video(tmp_path / "m.mp4", frames, 10))

    def test_colour_outside_the_palette(self, tmp_path: Path) -> None:
        red = video(tmp_path / "red.mp4", [mask(BLACK, "red")])
        with pytest.raises(
            InputError, match=r"\(255,128,0\) covers .* of ref\.png, and is not one of the mask colours"
        ):
            accepted([mask(WHITE, "red", (255, 128, 0))], red, names=["ref.png"])
        path = video(tmp_path / "m.mp4", [mask(BLACK, "red"), mask(BLACK, "red", (180, 0, 0))], 10)
        with pytest.raises(InputError, match=r"m\.mp4 in frame 1, and is not one of the mask colours"):
            accepted([mask(WHITE, "red")], path)

    def test_specks_are_ignored(self, tmp_path: Path) -> None:
        frame = mask(BLACK, "red", height=480, width=800)
        frame[300:312, 600:612] = COLOURS["cyan"]  # 0.04 % of the frame
        frame[400:412, 600:612] = (255, 128, 0)
        report = accepted([mask(WHITE, "red")], video(tmp_path / "m.mp4", [frame] * 2, 10))
        assert report.facts[-1].presence == {"red": ((0, 1),)}

    @pytest.mark.parametrize(
        ("reference", "driving", "mode", "says"),
        [
            (mask(WHITE, "red"), mask(WHITE, "red"), "animate", "as in masks for replace mode"),
            (mask(BLACK, "red"), mask(BLACK, "red"), "replace", "shows only where it is white"),
            (mask(BLACK, "red"), mask(BLACK, "red"), "animate", "reference's background will not be kept"),
            (mask(WHITE, "red"), mask(WHITE, "red"), "replace", "would be kept from the reference"),
            (mask(WHITE, "red", "blue"), mask(BLACK, "red"), "animate", "blue character that never appears"),
            (mask(WHITE, "red", GREY), mask(BLACK, "red"), "animate", r"is grey \(128,128,128\)"),
            (mask(WHITE, "red"), mask(GREY, "red"), "animate", "grey counts as hidden"),
        ],
    )
    def test_warnings(self, tmp_path: Path, reference: np.ndarray, driving: np.ndarray, mode: str, says: str) -> None:
        import re

        report = accepted([reference], video(tmp_path / "m.mp4", [driving] * 2, 10), mode)
        assert report.mode == mode
        assert any(re.search(says, warning) for warning in warnings_of(report.findings)), report.findings

    def test_absence_is_a_warning(self, tmp_path: Path) -> None:
        frames = [*[mask(BLACK, "red")] * 2, *[mask(BLACK)] * 3, mask(BLACK, "red")]
        report = accepted([mask(WHITE, "red")], video(tmp_path / "m.mp4", frames))
        assert [(f.severity, f.rule, f.frames) for f in report.findings if f.severity != "note"] == [
            ("warning", "flicker", ((2, 4),)),
            ("warning", "absence", ((2, 4),)),
        ]
        assert "m.mp4 shows no character in 3 of 6 frames (frames 2-4)." in warnings_of(report.findings)[1]
