"""The heights of reference and driving character, and `--fit-reference`; also through the installed command."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.framing import Framing, fit_reference, heights
from scail2_rt.runtime.masks.stats import image_stats
from scail2_rt.runtime.media.lossless import write_video
from scail2_rt.runtime.pipeline.conditioning import load_reference
from scail2_rt.runtime.session.check import check_request
from tests.support.command import SMALL, Run, error_of, one_json

pytest_plugins = ["tests.support.runtime_fixtures"]

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
SHIRT, SKY = (40, 90, 200), (150, 200, 235)
FRAMES = 13
Rows = tuple[float, float]  # top and bottom as shares of a height


def box(
    height: int,
    width: int,
    top: float,
    bottom: float,
    left: float,
    right: float,
    inside: tuple[int, int, int] = RED,
    outside: tuple[int, int, int] = BLACK,
) -> np.ndarray:
    """A block on a background; its sides are shares of those of the frame."""
    frame = np.full((height, width, 3), outside, np.uint8)
    frame[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = inside
    return frame


def write_case(
    folder: Path, reference: tuple[float, float], driving: list[tuple[float, float]], shape: tuple[int, int]
) -> Path:
    """A replace case: (top, bottom) of the block in the reference image of this shape, and in the driving frames."""
    folder.mkdir()
    Image.fromarray(box(*shape, *reference, 0.4, 0.6, SHIRT, SKY)).save(folder / "ref.png")
    Image.fromarray(box(*shape, *reference, 0.4, 0.6)).save(folder / "ref_mask.png")
    frames = [box(64, 96, *rows, 0.6, 0.8, SHIRT, SKY) for rows in driving]
    write_video(folder / "rendered_v2.mp4", iter(frames), Fraction(16))
    masks = [box(64, 96, *rows, 0.6, 0.8, RED, WHITE) for rows in driving]
    write_video(folder / "replace_mask.mp4", iter(masks), Fraction(16))
    return folder


def request_of(case: Path, **changes: object) -> Request:
    names = ("ref.png", "ref_mask.png", "rendered_v2.mp4", "replace_mask.mp4")
    request = Request(*(case / name for name in names), mode="replace", size=(64, 96))
    return replace(request, **changes)


@pytest.fixture
def giant(tmp_path: Path) -> Path:
    """A portrait that fills the image, and a driving character of half the frame's height in most frames."""
    rows = [(0.25, 0.75)] * (FRAMES - 4) + [(0.0, 1.0), (0.7, 0.75), (0.6, 0.75), (0.0, 1.0)]
    return write_case(tmp_path / "giant", (0.05, 0.95), rows, (160, 80))


def official_heights(mask: np.ndarray) -> dict[str, float]:
    """Heights of the characters in a frame of 64x96 with the official crop."""
    return heights(image_stats(mask), Window.official(mask.shape[:2], (64, 96)))


def test_heights_are_medians_of_what_the_cropped_frame_shows() -> None:
    tall = box(320, 160, 0.1, 0.9, 0.2, 0.8)
    assert image_stats(tall).heights() == {"red": pytest.approx(0.8, abs=0.01)}
    assert official_heights(tall) == {"red": 1}  # cropping leaves the middle 107 of 320 rows
    assert official_heights(box(64, 400, 0.25, 0.5, 0, 0.05)) == {}  # outside the visible part
    speck = box(64, 96, 0.25, 0.75, 0.4, 0.6)
    speck[2, 2] = RED
    assert official_heights(speck) == {"red": pytest.approx(0.5, abs=0.02)}


def test_the_ratio_is_of_shared_characters() -> None:
    assert Framing({"red": 0.8, "blue": 0.1}, {"red": 0.4, "green": 0.9}).ratio == pytest.approx(2)
    assert Framing({"blue": 0.1}, {"red": 0.4}).ratio is None
    assert not Framing({"blue": 0.1}, {"red": 0.4}).differs
    ratios = {ratio: Framing({"red": ratio * 0.5}, {"red": 0.5}).differs for ratio in (0.78, 0.82, 1.0, 1.24, 1.27)}
    assert list(ratios.values()) == [True, False, False, False, True]


@pytest.mark.parametrize(("rows", "warns"), [((0.3, 0.7), False), ((0.2, 0.5), True), ((0.1, 0.9), True)])
def test_the_lint_warns_beyond_a_quarter(tmp_path: Path, rows: tuple[float, float], warns: bool) -> None:
    case = write_case(tmp_path / "case", rows, [(0.3, 0.7)] * 5, (64, 96))
    plan = check_request(request_of(case))
    assert any("times as tall" in warning and "--fit-reference" in warning for warning in plan.warnings) == warns
    animate = check_request(request_of(case, mode="animate"))
    assert not any("times as tall" in warning for warning in animate.warnings)


@pytest.mark.parametrize("shape", [(160, 80), (64, 96), (100, 300)])
@pytest.mark.parametrize("rows", [(0.05, 0.95), (0.3, 0.6), (0.0, 0.3), (0.62, 1.0)])
def test_a_fitted_reference_has_the_height_and_is_complete(
    tmp_path: Path, shape: tuple[int, int], rows: tuple[float, float]
) -> None:
    case = write_case(tmp_path / "case", rows, [(0.2, 0.8)] * 5, shape)
    plan = check_request(request_of(case, fit_reference=True))
    assert plan.fit is not None
    image, mask = load_reference(case / "ref.png", case / "ref_mask.png", plan.reference_windows[0], plan.fit)
    assert image.shape == mask.shape == (3, 64, 96)
    on = (mask[0] > 0) & (mask[1] < 0)
    there = torch.nonzero(on.any(1))[:, 0]
    assert abs(len(there) / 64 - 0.6) <= 2 / 64
    true_width = 0.2 * shape[1] / ((rows[1] - rows[0]) * shape[0]) * 0.6 * 64  # it keeps its proportions
    assert len(torch.nonzero(on.any(0))) == pytest.approx(min(true_width, 96), abs=2)
    assert plan.warnings == ()


def test_the_margin_is_hidden_and_continues_the_border(giant: Path) -> None:
    plan = check_request(request_of(giant, fit_reference=True))
    assert plan.fit is not None
    assert plan.fit.margin == SKY
    image, mask = load_reference(giant / "ref.png", giant / "ref_mask.png", plan.reference_windows[0], plan.fit)
    assert (mask[:, :, :10] == -1).all()
    expected = torch.tensor(SKY).view(3, 1, 1) / 255 * 2 - 1
    assert (image[:, :, :10] - expected).abs().max() < 1e-6
    full = np.full((64, 96, 3), RED, np.uint8)  # without hidden border pixels, the margin is neutral grey
    assert fit_reference(full, full, {"red": 0.5}, Window.official((64, 96), (64, 96))).margin == (127, 127, 127)


def test_fit_without_a_shared_character_is_refused(giant: Path) -> None:
    with pytest.raises(InputError, match="only in replace mode"):
        check_request(request_of(giant, fit_reference=True, mode="animate"))
    Image.fromarray(box(160, 80, 0.1, 0.9, 0.2, 0.8, GREEN)).save(giant / "ref_mask.png")
    with pytest.raises(InputError, match="no reference mask has red"):
        check_request(request_of(giant, fit_reference=True))
    with pytest.raises(InputError, match="no character that both"):
        check_request(request_of(giant, fit_reference=True, allow_mask_problems=True))


def test_generate_warns_and_fits(scail2: Run, engines: Path, giant: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", giant, *SMALL, "--json")
    reply = one_json(scail2(*words, "-o", tmp_path / "a.mp4"))
    assert any("1.80 times as tall" in warning for warning in reply["warnings"])
    assert [finding["rule"] for finding in reply["mask_findings"]] == ["area jump", "framing"]
    assert reply["framing"]["ratio"] == pytest.approx(1.8, abs=0.05)
    assert reply["reference_fit"] is None
    result = scail2(*words, "-o", tmp_path / "b.mp4", "--fit-reference")
    fitted = one_json(result)
    says = "the reference is scaled to 56 %"
    assert says in result.stderr
    assert says in scail2(*words[:-1], "-o", tmp_path / "c.mp4", "--fit-reference", "--dry-run").stdout
    assert not any("times as tall" in warning for warning in fitted["warnings"])
    assert [finding["rule"] for finding in fitted["mask_findings"]] == ["area jump"]
    assert fitted["options"]["fit_reference"] is True
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["reference_fit"] == fitted["reference_fit"]
    assert report["reference_fit"]["margin"] == list(SKY)
    assert report["reference_fit"]["scale"] == pytest.approx(0.5 / 0.9, abs=0.01)
    assert fitted["output_sha256"] != reply["output_sha256"]


def test_generate_refuses_a_fit_in_animate_mode(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    result = scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--fit-reference")
    assert "only in replace mode" in error_of(result)
