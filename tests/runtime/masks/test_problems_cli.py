"""`generate` with unusable masks: refused with the command that repairs them, or allowed and recorded."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.media.lossless import write_video
from tests.support.command import SMALL, Run, error_of, one_json, read_video

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.fixture
def copy(case: Path, tmp_path: Path) -> Path:
    """A copy of the animate case of 21 frames, which a test damages."""
    return Path(shutil.copytree(case, tmp_path / "case"))


def recolour(path: Path, old: tuple[int, int, int], new: tuple[int, int, int]) -> None:
    pixels = np.array(Image.open(path))
    pixels[(pixels == old).all(-1)] = new
    Image.fromarray(pixels).save(path)


def test_a_wrong_colour_names_the_remedy(scail2: Run, engines: Path, copy: Path, tmp_path: Path) -> None:
    recolour(copy / "ref_mask.png", (255, 0, 0), (255, 140, 0))
    words = ("generate", engines, "--case", copy, "-o", tmp_path / "a.mp4", *SMALL)
    message = error_of(scail2(*words, "--dry-run"))
    assert "--allow-mask-problems" in message
    command = message.split("`")[1].replace("COLOUR", "red").split()
    assert command[:3] == ["scail2-rt", "masks", "clean"]
    assert scail2(*command[1:]).returncode == 0
    (copy / "ref_mask_clean.png").replace(copy / "ref_mask.png")
    assert scail2(*words, "--dry-run").returncode == 0


def test_several_errors_are_counted(scail2: Run, engines: Path, copy: Path, tmp_path: Path) -> None:
    recolour(copy / "ref_mask.png", (255, 0, 0), (0, 255, 0))
    recolour(copy / "ref_mask.png", (255, 255, 255), (255, 140, 0))
    message = error_of(scail2("generate", engines, "--case", copy, "-o", tmp_path / "a.mp4", *SMALL))
    assert "Run `scail2-rt masks check` to see 1 more." in message


def test_one_other_colour_can_be_recoloured(scail2: Run, engines: Path, copy: Path, tmp_path: Path) -> None:
    recolour(copy / "ref_mask.png", (255, 0, 0), (0, 255, 0))
    words = ("generate", engines, "--case", copy, "-o", tmp_path / "a.mp4", *SMALL, "--dry-run")
    message = error_of(scail2(*words))
    assert "--map 255,0,0=green" in message
    command = message.split("`")[1].split()
    assert scail2(*command[1:]).returncode == 0
    (copy / "rendered_mask_v2_clean.mp4").replace(copy / "rendered_mask_v2.mp4")
    assert scail2(*words).returncode == 0


def test_allowed_problems_are_warnings_in_the_report(scail2: Run, engines: Path, copy: Path, tmp_path: Path) -> None:
    recolour(copy / "ref_mask.png", (255, 0, 0), (0, 255, 0))
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[10:50, 20:40] = (255, 0, 0)
    write_video(copy / "rendered_mask_v2.mp4", iter([mask] * 18), Fraction(16))  # three frames too few
    words = ("generate", engines, "--case", copy, "-o", tmp_path / "a.mp4", *SMALL, "--json")
    assert "has 21 frames but its mask" in scail2(*words).stderr
    result = scail2(*words, "--allow-mask-problems")
    assert result.returncode == 0, result.stderr
    reply = one_json(result)
    errors = {finding["rule"]: finding for finding in reply["mask_findings"] if finding["severity"] == "error"}
    assert set(errors) == {"frame count", "no reference"}
    assert errors["frame count"]["frames"] == [[18, 20]]
    for finding in errors.values():
        assert any(finding["says"] in warning for warning in reply["warnings"])
        assert finding["says"] in result.stderr
    assert reply["frames"] == read_video(tmp_path / "a.mp4").frames == 18  # the frames that both videos have
    assert reply["options"]["allow_mask_problems"] is True


def test_a_good_case_has_no_findings(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    reply = one_json(scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--json"))
    assert (reply["warnings"], reply["mask_findings"], reply["reference_fit"]) == ([], [], None)
    assert reply["framing"]["ratio"] == pytest.approx(1, abs=0.1)
