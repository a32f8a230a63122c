"""Mask options that contradict each other or the clip, and damaged files, are refused with one sentence."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from scail2_rt.benchmarks.sprites.segmenting import shipped_segmenter
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.folders import open_folder
from scail2_rt.runtime.masks.make.make import check_places
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.masks.make.pairs import Pairing
from scail2_rt.runtime.masks.make.segmenters import open_segmenter
from scail2_rt.runtime.media.video_reader import VideoInfo

BOX = "5,5,30,55"
VIDEO = VideoInfo("clip", 96, 64, 9, Fraction(16), False, None, 9, ())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": -1}, "--start must be 0 or more, not -1"),
        ({"frames": 0}, "--frames must be 1 or more, not 0"),
        ({"boxes": (f"{BOX}:red", "40,5,70,55:red")}, "Two --box of one image are red"),
        (
            {"boxes": (BOX, "40,5,70,55"), "points": ("80,30",)},
            "mark 3 characters in one image, but --max-characters is 2",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        MaskOptions(**options)  # type: ignore[arg-type]


def test_points_and_boxes_of_one_colour_are_one_character_per_image() -> None:
    boxes = (f"{BOX}:red", f"9:{BOX}:red", f"image:{BOX}:red")
    assert len(MaskOptions(boxes=boxes, points=("8,8:red", "9,9:red", "70,9"), max_characters=2).places) == 6


def test_frame_0_is_not_the_first_used_frame() -> None:
    check_places(MaskOptions(boxes=(BOX,), start=5), (64, 96), VIDEO)
    with pytest.raises(InputError, match="in frame 0: use one of the frames 5 to 8"):
        check_places(MaskOptions(boxes=(f"0:{BOX}",), start=5), (64, 96), VIDEO)


@pytest.mark.parametrize(("places", "refused"), [((), True), ((f"image:{BOX}", BOX), True), ((f"3:{BOX}",), False)])
def test_pairs_of_a_missing_character(places: tuple[str, ...], refused: bool) -> None:
    mask = np.ones((4, 4), bool)
    pairing = Pairing(MaskOptions(pairs="2=1", boxes=places), [mask], [""])
    if refused:
        with pytest.raises(InputError, match=r"names driving character 2, but the first frame .* shows 1"):
            pairing.begin([mask], [""])
    else:  # a place in a later frame may mark character 2
        pairing.begin([mask], [""])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", "big"),
        ("image_size", -5),
        ("image_size", []),
        ("model_type", ["sam2_video"]),
        ("num_maskmem", "x"),
    ],
)
def test_a_segmenter_with_a_damaged_config(tmp_path: Path, field: str, value: object) -> None:
    config = json.loads((shipped_segmenter() / "config.json").read_text())
    shutil.copy(shipped_segmenter() / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(InputError, match=r"download|get one with"):
        open_segmenter(open_folder(tmp_path), "cpu")
