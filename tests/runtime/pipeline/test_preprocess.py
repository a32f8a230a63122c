"""Resizing, normalising and quantising against the golden data, and properties that need no golden data."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from scail2_rt.runtime.core.geometry import covering_size
from scail2_rt.runtime.pipeline.preprocess import (
    clip_pixels,
    half_resolution,
    normalise_image,
    normalise_video,
    quantise_frames,
    resize_cover,
)


def cases(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted({name.partition(".")[0] for name in tensors})


class TestGolden:
    def test_resize(self, golden: Path) -> None:
        data = load_file(golden / "preprocess" / "resize_center_crop.safetensors")
        for name in cases(data):
            expected, expected_float = data[f"{name}.u8_out"], data[f"{name}.f32_out"]
            result = resize_cover(data[f"{name}.u8_in"], *expected.shape[-2:])
            assert result.dtype == torch.uint8
            difference = (result.int() - expected.int()).abs()
            assert difference.max() <= 1, name
            assert (difference > 0).float().mean() < 0.001, name
            result = resize_cover(data[f"{name}.f32_in"], *expected_float.shape[-2:])
            torch.testing.assert_close(result, expected_float, atol=1e-5, rtol=0)

    def test_normalise(self, golden: Path) -> None:
        table = load_file(golden / "preprocess" / "normalise_tables.safetensors")
        assert torch.equal(normalise_video(table["u8"]), table["video_path"])
        assert torch.equal(normalise_image(table["u8"]), table["image_path"])

    def test_half_resolution(self, golden: Path) -> None:
        data = load_file(golden / "preprocess" / "half_resolution.safetensors")
        for name in cases(data):
            video = normalise_video(data[f"{name}.u8_in"])
            assert torch.equal(video, data[f"{name}.norm"])
            torch.testing.assert_close(half_resolution(video), data[f"{name}.half"], atol=1e-5, rtol=0)

    def test_quantise(self, golden: Path) -> None:
        data = load_file(golden / "preprocess" / "frame_quantise.safetensors")
        result = quantise_frames(data["in"].expand(3, 2, 1, -1))
        assert torch.equal(result, data["out_u8"][None, None, :, None].expand_as(result))

    def test_clip(self, golden: Path) -> None:
        path = golden / "clip" / "preprocess.safetensors"
        data = load_file(path)
        for name in cases(data):
            result = clip_pixels(data[f"{name}.image"])
            torch.testing.assert_close(result, data[f"{name}.pixels224"], atol=1e-4, rtol=0)
        with safe_open(path, "pt") as file:
            assert len(json.loads(file.metadata()["mean"])) == 3


class TestRules:
    @pytest.mark.parametrize(
        ("source", "target", "expected"),
        [
            ((1080, 2048), (512, 896), (512, 970)),  # 970.9: truncated
            ((1920, 1080), (512, 896), (1592, 896)),  # 1592.9: truncated
            ((1080, 1920), (512, 896), (512, 910)),
            ((512, 896), (512, 896), (512, 896)),
            ((100, 175), (512, 896), (512, 896)),
            ((31, 25), (32, 64), (79, 64)),
        ],
    )
    def test_covering_size(self, source: tuple[int, int], target: tuple[int, int], expected: tuple[int, int]) -> None:
        assert covering_size(*source, *target) == expected

    def test_every_size_is_covered(self) -> None:
        for height in range(1, 120, 7):
            for width in range(1, 120, 3):
                scaled = covering_size(height, width, 64, 96)
                assert scaled[0] >= 64
                assert scaled[1] >= 96
                assert 64 in scaled or 96 in scaled

    def test_crop_offset_is_floored(self) -> None:
        frames = torch.arange(5, dtype=torch.uint8).view(1, 1, 1, 5).expand(1, 3, 2, 5)
        assert resize_cover(frames, 2, 2)[0, 0, 0].tolist() == [1, 2]

    def test_same_size_is_the_input(self) -> None:
        frames = torch.randint(0, 256, (3, 3, 32, 64), dtype=torch.uint8)
        assert torch.equal(resize_cover(frames, 32, 64), frames)

    def test_overshoot_stays_in_float_and_is_clamped_in_8_bit(self) -> None:
        edge = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)  # more frames than are resized at once
        edge[..., 8:] = 255
        result = resize_cover(edge, 40, 40)
        assert result.shape == (9, 3, 40, 40)
        assert (result.min(), result.max()) == (0, 255)
        assert all(torch.equal(frame, result[0]) for frame in result)
        signed = resize_cover(normalise_image(edge[:1]), 40, 40)
        assert signed.max() > 1.01
        assert signed.min() < -1.01

    def test_inputs_are_left_alone(self) -> None:
        video = torch.rand(3, 2, 4, 4) * 3 - 1.5
        kept = video.clone()
        quantise_frames(video)
        normalise_video(video)
        normalise_image(video)
        clip_pixels(video[:, 0])
        assert torch.equal(video, kept)

    def test_quantise_truncates(self) -> None:
        values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 7.0])
        assert quantise_frames(values.view(1, 1, 1, -1).expand(3, 1, 1, -1))[0, 0, :, 0].tolist() == [
            0, 0, 127, 254, 255, 255,
        ]  # fmt: skip

    def test_quantise_layout(self) -> None:
        video = torch.rand(3, 5, 4, 6) * 2 - 1
        assert quantise_frames(video.bfloat16()).shape == (5, 4, 6, 3)
        assert quantise_frames(video)[4, 3, 2].tolist() == ((video[:, 4, 3, 2] + 1) / 2 * 255).int().tolist()

    def test_half_resolution_is_the_mean_of_four(self) -> None:
        video = torch.rand(2, 3, 8, 12)
        torch.testing.assert_close(half_resolution(video), F.avg_pool2d(video, 2))

    def test_clip_size(self) -> None:
        assert clip_pixels(torch.zeros(3, 20, 30), 28).shape == (1, 3, 28, 28)
