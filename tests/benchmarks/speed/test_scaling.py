"""`bench scaling` through the installed command with the tiny model, and the times that it computes."""

import json
from pathlib import Path

import pytest

from scail2_rt.benchmarks.speed.scaling import scaled, summary
from tests.support.command import Run

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.mark.slow
def test_parts_are_measured_and_saved(scail2: Run, tmp_path: Path) -> None:
    words = ["--config", "tiny", "--work", tmp_path / "work", "--json", tmp_path / "r.json"]
    words += ["--summary", tmp_path / "s.json", "--part", "forward-fp8", "--part", "golden"]
    result = scail2("bench", "scaling", *words, SCAIL2_GOLDEN="")
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    collectives = parts["forward-fp8"]["fp8/144"]["collectives"]
    assert {kind: row["count"] for kind, row in collectives.items()} == {"broadcast": 1, "exchange": 4, "gather": 1}
    assert parts["golden"]["skipped"]
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["forward_fp8_144_difference"] <= 1e-5
    assert found["guidance_pair_difference"] <= 1e-5
    assert found["forward_fp8_144_speedup"] > 0
    assert json.loads(result.stdout)["guidance_pair_speedup"] == found["guidance_pair_speedup"]


@pytest.mark.soak
def test_the_parts_that_take_long(scail2: Run, tmp_path: Path) -> None:
    words = ["--config", "tiny", "--work", tmp_path / "work", "--json", tmp_path / "r.json"]
    result = scail2("bench", "scaling", *words, "--part", "generate", "--part", "failures")
    assert result.returncode == 0, result.stderr
    parts = json.loads((tmp_path / "r.json").read_text())["parts"]
    assert parts["generate"]["decode"]["difference"] <= 1e-3
    assert parts["generate"]["13f_2steps"]["wall_s"] > 0
    assert parts["failures"]["killed_told"].startswith("Rank 1 of 2 was ended")
    assert parts["failures"]["left"] == []


def test_other_numbers_of_gpus_are_worked_out_from_the_parts() -> None:
    alone = {"attention": 2.0, "products": 1.2}
    shared = {"attention": 1.0, "products": 0.6, "copies": 0.04, "collectives": 0.08}
    four = scaled(alone, shared, 2, 4)
    assert four["computed_s"] == pytest.approx(3.2 / 4 + 0.08 * (3 / 16) / (1 / 4) + 0.04 * 2 / 4)
    assert four["computed_speedup"] == pytest.approx(3.2 / four["computed_s"])
    assert scaled(alone, shared, 2, 2)["computed_s"] == pytest.approx(1.72)


def test_a_summary_leaves_out_what_was_not_measured() -> None:
    parts = {"forward-fp8": {"fp8/5": {"failure": "hung"}, "wall_s": 3.0}, "golden": {"failure": "not run"}}
    assert summary({"parts": parts}, 2) == {"gpus": 2}
