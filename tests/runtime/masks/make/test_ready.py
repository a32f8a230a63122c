"""Masks of other tools: ComfyUI's track data in all file formats, mattes and alpha, and errors."""

import shutil
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime import Clip, MaskOptions, Masks, make_masks
from scail2_rt.runtime.jobs.masks import make_case
from scail2_rt.runtime.masks.palette import PALETTE
from scail2_rt.runtime.media.clips import open_video
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.lossless import write_image, write_video
from tests.support.clips import write_clip

SIZE, FRAMES = (60, 100), 5
PICTURE = np.full((*SIZE, 3), 90, np.uint8)


def track_data(
    boxes: list[list[tuple[int, int, int, int] | None]], scores: list[float], size: tuple[int, int] = (30, 56)
) -> Any:
    """Track data in the form of `SAM3_VideoTrack`; `boxes` by frame and character."""
    masks = torch.zeros(len(boxes), len(scores), *size, dtype=torch.bool)
    for frame, figures in enumerate(boxes):
        for figure, box in enumerate(figures):
            if box is not None:
                masks[frame, figure, box[1] : box[3], box[0] : box[2]] = True
    bits = masks.view(*masks.shape[:-1], -1, 8) * (1 << torch.arange(8))
    return {"packed_masks": bits.sum(-1).byte(), "orig_size": SIZE, "n_frames": len(boxes), "scores": scores}


def made(tmp_path: Path, **options: Any) -> tuple[Masks, np.ndarray, np.ndarray]:
    clip = Clip(np.stack([PICTURE] * FRAMES), Fraction(16))
    masks = make_masks(PICTURE, clip, tmp_path / "out", MaskOptions(**options))
    with open_video(masks.mask_video) as reader:
        return masks, load_image(masks.mask_image), reader.read(FRAMES + 1)


def saved(data: dict[str, Any], file: Path) -> Path:
    if file.suffix == ".pt":
        torch.save(data, file)
    elif file.suffix == ".npz":
        np.savez(file, packed_masks=data["packed_masks"].numpy(), scores=np.array(data["scores"]))
    else:
        save_file({"packed_masks": data["packed_masks"].numpy()}, file)
    return file


@pytest.mark.parametrize("ending", [".pt", ".npz", ".safetensors"])
def test_track_data_of_both(tmp_path: Path, ending: str) -> None:
    """Two characters; the right one is first in the file. Masks have the sizes of the images."""
    left, right, late = (2, 2, 20, 28), (36, 2, 54, 28), (36, 4, 54, 26)
    clip = saved(track_data([[None, left]] * 2 + [[late, left]] * 3, [0.9, 0.8]), tmp_path / f"clip{ending}")
    image = saved(track_data([[right, left]], [0.9, 0.8]), tmp_path / f"image{ending}")
    masks, reference, driving = made(tmp_path, image_from=image, driving_from=clip)
    assert masks.characters == ("blue", "red")
    assert reference.shape[:2] == driving.shape[1:3] == SIZE
    assert tuple(reference[30, 20]) == PALETTE["blue"]
    assert tuple(reference[30, 80]) == PALETTE["red"]
    assert tuple(driving[4, 30, 20]) == PALETTE["blue"]
    assert [tuple(frame[30, 80]) for frame in driving] == [PALETTE["black"]] * 2 + [PALETTE["red"]] * 3


def test_of_many_the_surest(tmp_path: Path) -> None:
    figures = [(2, 2, 12, 28), (20, 2, 30, 28), (40, 2, 50, 28)]
    clip = saved(track_data([figures] * FRAMES, [0.3, 0.9, 0.8]), tmp_path / "clip.pt")
    image = saved(track_data([figures], [0.3, 0.9, 0.8]), tmp_path / "image.pt")
    masks, reference, _ = made(tmp_path, image_from=image, driving_from=clip)
    assert masks.characters == ("blue", "red")
    assert tuple(reference[30, 10]) == PALETTE["white"]
    assert tuple(reference[30, 44]) == PALETTE["blue"]


def test_a_matte_video_and_an_image_with_alpha(tmp_path: Path) -> None:
    matte = np.zeros((FRAMES, *SIZE, 3), np.uint8)
    matte[:, 10:50, 20:60] = 255
    write_video(tmp_path / "matte.mp4", matte, Fraction(16))
    rgba = np.dstack([PICTURE, np.zeros(SIZE, np.uint8)])
    rgba[5:55, 30:70, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "cut.png")
    masks, reference, driving = made(
        tmp_path, image_from=tmp_path / "cut.png", driving_from=tmp_path / "matte.mp4", mode="replace"
    )
    assert masks.characters == ("blue",)
    assert masks.segmenter == "the files given"
    assert ((reference == PALETTE["blue"]).all(-1) == (rgba[..., 3] == 255)).all()
    assert ((driving == PALETTE["blue"]).all(-1) == (matte[..., 0] == 255)).all()
    assert tuple(driving[0, 0, 0]) == PALETTE["white"]


def test_a_video_with_alpha(tmp_path: Path) -> None:
    layers = np.full((FRAMES, *SIZE, 4), (200, 40, 90, 0), np.uint8)
    layers[:, 10:50, 20:60, 3] = 255
    clip = write_clip(tmp_path / "cut.mov", layers, 16, codec="qtrle", pixel_format="argb", options={})
    Image.fromarray(layers[0]).save(tmp_path / "cut.png")
    _, _, driving = made(tmp_path, image_from=tmp_path / "cut.png", driving_from=clip)
    assert ((driving == PALETTE["blue"]).all(-1) == (layers[..., 3] == 255)).all()


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda file: file.with_suffix(".pt").write_bytes(b"no"), "cannot be read as track data"),
        (lambda file: torch.save({"masks": torch.zeros(1)}, file.with_suffix(".pt")), "holds no packed_masks"),
        (
            lambda file: torch.save({"packed_masks": torch.zeros(2, 2)}, file.with_suffix(".pt")),
            "must be uint8 [T, N, H, W/8]",
        ),
        (
            lambda file: saved(track_data([[(2, 2, 20, 28)]] * 3, [1.0]), file.with_suffix(".pt")),
            "has 3 frames and the driving",
        ),
        (lambda file: write_image(file.with_suffix(".png"), np.zeros((*SIZE, 3), np.uint8)), "shows no character"),
        (
            lambda file: write_image(file.with_suffix(".png"), np.full((*SIZE, 3), (250, 20, 20), np.uint8)),
            "a matte is grey",
        ),
        (
            lambda file: torch.save(
                {**track_data([[(2, 2, 20, 28)]] * FRAMES, [1.0]), "scores": ["sure"]}, file.with_suffix(".pt")
            ),
            "cannot be read as track data",
        ),
        (
            lambda file: torch.save({"packed_masks": torch.zeros(FRAMES, 1, 0, 4).byte()}, file.with_suffix(".pt")),
            "must be uint8 [T, N, H, W/8]",
        ),
        (
            lambda file: saved(track_data([[(2, 2, 20, 28)]] * (FRAMES + 1), [1.0]), file.with_suffix(".pt")),
            "has 6 frames and the driving clip 5",
        ),
        (
            lambda file: write_video(file.with_suffix(".mp4"), np.zeros((FRAMES, *SIZE, 3), np.uint8), Fraction(16)),
            "shows no character",
        ),
    ],
)
def test_unusable_files(tmp_path: Path, write: Any, told: str) -> None:
    write(tmp_path / "clip")
    (file,) = tmp_path.glob("clip.*")
    image = saved(track_data([[(2, 2, 20, 28)]], [1.0]), tmp_path / "image.pt")
    with pytest.raises(InputError) as error:
        made(tmp_path, image_from=image, driving_from=file)
    assert told in str(error.value)
    assert str(file) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tracks_of_the_used_frames_only(tmp_path: Path) -> None:
    track = saved(track_data([[(2, 2, 20, 28)]] * 3, [1.0]), tmp_path / "clip.pt")
    masks, _, driving = made(tmp_path, image_from=track, driving_from=track, frames=3)
    assert masks.characters == ("blue",)
    assert [tuple(frame[30, 20]) for frame in driving] == [PALETTE["blue"]] * 3 + [PALETTE["black"]] * 2


def test_a_matte_of_the_reference_must_show_a_character(tmp_path: Path) -> None:
    clip = saved(track_data([[(2, 2, 20, 28)]] * FRAMES, [1.0]), tmp_path / "clip.pt")
    write_image(tmp_path / "black.png", np.zeros((*SIZE, 3), np.uint8))
    for name, told in (("black.png", "shows no character of at least 1 %"), ("missing.pt", "does not exist")):
        with pytest.raises(InputError, match=told):
            made(tmp_path, image_from=tmp_path / name, driving_from=clip)
    with pytest.raises(InputError, match="whose characters --image-from gives"):
        made(tmp_path, image_from=clip, driving_from=clip, points=("image:5,5",))


def test_a_case_whose_clip_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = saved(track_data([[(2, 2, 20, 28)]] * FRAMES, [1.0]), tmp_path / "clip.pt")
    write_image(tmp_path / "i.png", PICTURE)
    write_video(tmp_path / "v.mp4", [PICTURE] * FRAMES, Fraction(16))
    given = {field.name: field.default for field in fields(MaskOptions) if field.init}
    given |= {"image_from": track, "driving_from": track, "segmenter_weights": None, "mask_prompt": None}
    given |= {"image": tmp_path / "i.png", "driving": tmp_path / "v.mp4", "output": tmp_path / "case"}
    given |= {"segmenter_device": "cpu", "vram_limit": None, "overwrite": False}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(Scail2Error, match="same command with --overwrite"):
            make_case(given, lambda event: None)
    assert make_case({**given, "overwrite": True}, lambda event: None).document["masks"]["reused"]
