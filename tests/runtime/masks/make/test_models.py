"""The real architectures of `transformers` with random weights: all code paths, sizes and memory."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scail2_rt.benchmarks.sprites.world.crossings import make_crossing
from scail2_rt.benchmarks.sprites.world.raster import draw_picture
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime import Clip, MaskOptions, Masks, make_masks
from scail2_rt.runtime.masks.make.folders import find_segmenter, open_folder
from scail2_rt.runtime.masks.make.options import AUTHORS_PROMPT
from scail2_rt.runtime.masks.make.pixels import InputFormat, network_picture
from scail2_rt.runtime.masks.make.segmenters import dino_size, open_segmenter
from scail2_rt.runtime.masks.make.tracker import Given
from scail2_rt.runtime.masks.palette import PALETTE
from scail2_rt.runtime.media.clips import open_video
from tests.support.tiny_segmenters import write_grounding_dino, write_sam2, write_sam3

SIZE, FRAMES = (96, 160), 12
BOX = (20.0, 10.0, 90.0, 88.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenters")
    write_sam2(folder / "sam2")
    write_grounding_dino(folder / "sam2" / "detector")
    write_sam3(folder / "sam3")
    return folder


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return draw_picture(make_crossing(2, frames=FRAMES, count=2), *SIZE)[0]


@pytest.mark.parametrize("name", ["sam2", "sam3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "person. dog.", "mode": "replace"},
        {"boxes": ("image:20,10,90,88:green", "20,10,90,88:green", "7:100,5,150,90")},
    ],
    ids=["text", "prompt", "boxes"],
)
def test_all_kinds_of_inputs(
    folders: Path, frames: np.ndarray, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """With random weights, masks have the right size and palette colours, one per frame."""
    given = MaskOptions(weights=folders / name, segmenter=name, **options)
    masks = make_masks(frames[0], Clip(frames, Fraction(16)), tmp_path, given, device="cpu")
    assert isinstance(masks, Masks)
    assert masks.segmenter == name
    with open_video(masks.mask_video) as reader:
        driving = reader.read(FRAMES + 1)
    assert driving.shape == (FRAMES, *SIZE, 3)
    found = {tuple(colour) for colour in np.unique(driving.reshape(-1, 3), axis=0)}
    assert found <= {PALETTE[name] for name in (*masks.characters, "black", "white")}
    assert {path.name for path in tmp_path.iterdir()} == {
        "masks.json", "masks.png", "ref_mask.png", masks.mask_video.name,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sam2", "sam3"])
def test_the_tracker_removes_state_that_it_does_not_read(folders: Path, frames: np.ndarray, name: str) -> None:
    """The masks equal those of a session that keeps all frames, and the state does not grow."""
    segmenter = open_segmenter(open_folder(folders / name), "cpu")
    ours, whole = segmenter.tracker(SIZE), segmenter.tracker(SIZE)
    whole._forget = lambda: None  # type: ignore[method-assign]
    kept = []
    for _ in range(3):
        for frame in frames:
            made, all_kept = (tracker.follow(frame) or tracker.add({1: Given.box(BOX)}) for tracker in (ours, whole))
            torch.testing.assert_close(made[1].logits, all_kept[1].logits)
            kept.append(_held(ours._session))
    assert len(set(kept[-8:])) == 1
    assert _held(whole._session) > 1.5 * kept[-1]


def _held(session: Any) -> int:
    """The bytes of a session's tensors."""
    outputs = [
        each for figure in session.output_dict_per_obj.values() for kind in figure.values() for each in kind.values()
    ]
    tensors = [value for each in outputs for value in each.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*tensors, *session.processed_frames.values()])


def test_characters_can_be_added_later(folders: Path, frames: np.ndarray) -> None:
    """The result for a character does not depend on other characters."""
    segmenter = open_segmenter(open_folder(folders / "sam2"), "cpu")
    alone, both = segmenter.tracker(SIZE), segmenter.tracker(SIZE)
    for number, frame in enumerate(frames):
        first, second = alone.follow(frame), both.follow(frame)
        if number == 0:
            first, second = (tracker.add({1: Given.box(BOX)}) for tracker in (alone, both))
        if number == 4:
            second = both.add({2: Given.point(120, 40)})
        torch.testing.assert_close(first[1].logits, second[1].logits)
        assert set(second) == ({1} if number < 4 else {1, 2})


def test_the_pil_processor_of_grounding_dino_agrees(folders: Path, frames: np.ndarray) -> None:
    """It is the only processor that works without torchvision; `tests.parity.segmenters` compares the others."""
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    theirs = GroundingDinoImageProcessorPil()(frames[0], return_tensors="pt")["pixel_values"][0]
    ours = network_picture(frames[0], InputFormat(dino_size(*SIZE)))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 0.02  # one level of 255


def test_detections_are_sorted_and_above_the_threshold(folders: Path, frames: np.ndarray) -> None:
    for name in ("sam2", "sam3"):
        found = open_segmenter(open_folder(folders / name), "cpu").find(frames[0], AUTHORS_PROMPT)
        assert found
        scores = [each.score for each in found]
        assert scores == sorted(scores, reverse=True)
        assert min(scores) > 0.25


class TestFolders:
    def test_memory_estimate(self, folders: Path) -> None:
        opened = open_folder(folders / "sam2")
        assert opened.square == 128
        assert opened.detector == folders / "sam2" / "detector"
        assert opened.memory_bytes > opened.weight_bytes > 1_000_000

    def test_models_of_another_kind(self, folders: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        for folder, told in (
            (tmp_path, "holds llama, and a segmenter is a sam2_video or sam3_video model"),
            (tmp_path / "none", "does not exist"),
            (folders / "sam2" / "detector", "holds only Grounding DINO"),
        ):
            with pytest.raises(InputError, match=told):
                open_folder(folder)
        with pytest.raises(InputError, match="holds sam3, not sam2"):
            find_segmenter("sam2", folders / "sam3")

    def test_damaged_files(self, folders: Path, tmp_path: Path) -> None:
        config = (folders / "sam2" / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
            open_folder(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
        with pytest.raises(InputError, match=r"cannot be opened .* download it again"):
            open_segmenter(open_folder(tmp_path), "cpu")
        save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"it lacks \d+ of \d+ weights"):
            open_segmenter(open_folder(tmp_path), "cpu")

    def test_auto_prefers_sam3(self, folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path))
        with pytest.raises(InputError, match="scail2-rt download --segmenter sam2"):
            find_segmenter("auto", None)
        (tmp_path / "segmenters").mkdir()
        for name in ("sam2", "sam3"):
            (tmp_path / "segmenters" / name).symlink_to(folders / name)
            assert find_segmenter("auto", None).name == name
        assert find_segmenter("sam2", None).name == "sam2"
