"""Conversion between a graph's tensors and frames."""

import numpy as np
import pytest
import torch

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui.frames import ImageBatch, TensorFrames, float_levels
from scail2_rt.runtime.core.request import Clip
from scail2_rt.runtime.media.clips import open_video, probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_levels_survive_both_ways_of_rounding(dtype: torch.dtype) -> None:
    levels = float_levels(dtype)
    assert torch.equal((levels * 255).to(torch.uint8), torch.arange(256).to(torch.uint8))  # as ComfyUI saves
    frames = TensorFrames(levels.view(1, 16, 16, 1).expand(-1, -1, -1, 3), "levels")
    assert np.array_equal(frames[0][..., 0].ravel(), np.arange(256))


def test_only_what_is_read_is_converted() -> None:
    class Watched(TensorFrames):
        read: list[object] = []  # noqa: RUF012

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            self.read.append(index)
            return super().__getitem__(index)

    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8)
    frames = Watched(torch.from_numpy(pixels) / 255, "clip")
    clip = Clip(frames, 16)  # type: ignore[arg-type]
    assert (probe(clip).frames, probe(clip).width) == (30, 6)
    assert set(Watched.read) == {0}
    with open_video(clip, 20) as reader:
        assert np.array_equal(reader.read(8), pixels[20:28])
        assert np.array_equal(reader.read(8), pixels[28:])
        assert reader.read(8).shape[0] == 0
    assert Watched.read[-3:] == [slice(20, 28), slice(28, 36), slice(30, 38)]
    with pytest.raises(InputError, match="cannot start at frame 31"):
        open_video(clip, 31)


def test_a_fourth_channel_is_left_out() -> None:
    assert TensorFrames(torch.zeros(2, 4, 6, 4), "clip")[:].shape == (2, 4, 6, 3)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"the shape \[4, 6, 3\]"):
        TensorFrames(torch.zeros(4, 6, 3), "clip")


def test_values_that_are_no_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="Connect images, which are floats"):
        TensorFrames(torch.zeros(1, 4, 6, 3, dtype=torch.uint8), "reference image")
    with pytest.raises(InputError, match=r"is a NoneType\. Connect images"):
        TensorFrames(None, "reference image")  # type: ignore[arg-type]
    holed = torch.zeros(2, 4, 6, 3)
    holed[1, 2, 3, 0] = float("nan")
    with pytest.raises(InputError, match="contains NaN"):
        TensorFrames(holed, "reference image")[1]


def test_the_batch_is_filled_from_the_front() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    batch = ImageBatch(5, 4, 6)
    batch.add(pixels[:2])
    batch.add(pixels[2:])
    assert batch.filled == 5
    assert torch.equal(batch.images, torch.from_numpy(pixels) / 255)
