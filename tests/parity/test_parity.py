"""The golden fixtures, through the code that `scail2-rt generate` runs (`python -m tests.parity`)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import run
from tests.parity.fixtures import Golden, Row


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_every_fixture_passes(golden: Path, backend: str) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[cpu]'")
    with torch.inference_mode(), Golden(golden, backend) as fixtures:
        rows = list(run(fixtures))
    assert len(rows) > 400
    assert [str(row) for row in rows if not row.passed] == []


def command(folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "tests.parity", str(folder)], cwd=root, capture_output=True, text=True, check=False
    )


def test_a_wrong_number_or_an_unknown_fixture_fails_the_command(golden: Path, tmp_path: Path) -> None:
    """A renamed copy passes, because names are arbitrary; a changed value and an unsupported file fail."""
    (tmp_path / "solvers").mkdir()
    copy = tmp_path / "solvers" / "anything.safetensors"
    shutil.copy(golden / "solvers" / "euler.safetensors", copy)
    assert command(tmp_path).returncode == 0
    from safetensors import safe_open

    with safe_open(copy, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(copy)
    tensors["shift3.0_steps8.traj"][2, 0, 0, 0, 0] += 1e-3
    save_file(tensors, copy, metadata)
    changed = command(tmp_path)
    assert changed.returncode == 1
    assert "FAIL solvers/anything.safetensors:shift3.0_steps8:euler " in changed.stdout
    copy.unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "solvers" / "stranger.safetensors")
    unknown = command(tmp_path)
    assert unknown.returncode == 1
    assert "stranger.safetensors" in unknown.stdout


def test_an_empty_folder_proves_nothing(tmp_path: Path) -> None:
    assert command(tmp_path).returncode == 1


@pytest.mark.parametrize(("error", "passed"), [(0.5, True), (1.0, True), (1.1, False), (float("nan"), False)])
def test_rows_pass_within_their_tolerance_only(error: float, passed: bool) -> None:
    assert Row("x", error, 1.0).passed is passed
