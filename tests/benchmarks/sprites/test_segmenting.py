"""The small SAM 2 of the package: it finds drawn figures, follows them, and `bench quality --masks made` uses it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scail2_rt.benchmarks.report.record import load
from scail2_rt.benchmarks.sprites import segmenting
from scail2_rt.benchmarks.sprites.quality.trials import held_out_case
from scail2_rt.benchmarks.sprites.segmenting import box_of, figure_masks, mask_scores, replace_masks, shipped_segmenter
from scail2_rt.benchmarks.sprites.world.case_files import write_case
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.figures import iou
from scail2_rt.runtime.masks.make.folders import open_folder
from scail2_rt.runtime.masks.make.segmenters import Segmenter, open_segmenter
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE
from tests.support.command import Run

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.fixture(scope="module")
def segmenter() -> Iterator[Segmenter]:
    opened = open_segmenter(open_folder(shipped_segmenter()), "cpu")
    yield opened
    opened.close()


def test_it_is_small() -> None:
    files = list(shipped_segmenter().iterdir())
    assert {file.name for file in files} == {"config.json", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) < 8e6


@pytest.mark.parametrize(("task", "seed"), [("animate", 0), ("pose", 1), ("replace", 1), ("two", 1), ("three", 0)])
def test_the_detector_finds_the_drawn_figures(segmenter: Segmenter, task: str, seed: int) -> None:
    """Of held-out characters; the surest are the true ones."""
    case = held_out_case(task, seed, frames=2)
    truth = [(case.driving_mask[0] == PALETTE[name]).all(-1) for name in CHARACTERS]
    truth = [mask for mask in truth if mask.any()]
    found = figure_masks(case.driving[0], segmenter)[: len(truth)]
    assert all(max(iou(mask, true) for mask in found) > 0.7 for true in truth)


def test_an_empty_picture_holds_nobody(segmenter: Segmenter) -> None:
    assert figure_masks(np.full((128, 128, 3), 90, np.uint8), segmenter) == []


def test_boxes() -> None:
    mask = np.zeros((20, 30), bool)
    mask[3:9, 5:17] = True
    assert box_of(mask) == (5, 3, 17, 9)


def test_scores_tell_an_exchange() -> None:
    """Two figures whose colours are exchanged in half of the frames."""
    true = np.zeros((4, 20, 40, 3), np.uint8)
    true[:, 2:18, 2:18], true[:, 2:18, 22:38] = PALETTE["red"], PALETTE["blue"]
    made = true.copy()
    assert mask_scores(made, true) == {"mask_iou": 1.0, "exchanged": 0.0}
    made[2:, 2:18, 2:18], made[2:, 2:18, 22:38] = PALETTE["blue"], PALETTE["red"]
    assert mask_scores(made, true) == {"mask_iou": 0.5, "exchanged": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("animate", 0.93), ("two", 0.82), ("animal", 0.85)])
def test_made_masks_are_near_the_true_ones(tmp_path: Path, task: str, least: float) -> None:
    """And two characters are never exchanged."""
    case = held_out_case(task, 0, frames=17)
    write_case(case, tmp_path, masks=False)
    masks, scores = replace_masks(case, tmp_path)
    assert len(masks.characters) == (2 if task == "two" else 1)
    assert scores["mask_iou"] > least
    assert scores["exchanged"] == 0


@pytest.mark.slow
def test_the_benchmark_runs_on_made_masks(scail2: Run, engines: Path, tmp_path: Path) -> None:
    words = ("bench", "quality", "--engines", engines, "--work", tmp_path / "w", "--steps", 1, "--cases", 1)
    result = scail2(*words, "--tasks", "animate", "--masks", "made", "--json", tmp_path / "q.json")
    assert result.returncode == 0, result.stderr
    assert "mask IoU" in result.stdout
    values = load(tmp_path / "q.json").rows["default/animate/made-masks/0"].values
    assert values["mask_iou"] > 0.9
    assert values["psnr"] > 0


def test_a_missing_segmenter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenting, "SEGMENTER", tmp_path / "nowhere")
    with pytest.raises(InputError, match="sprite segmenter is missing"):
        shipped_segmenter()
