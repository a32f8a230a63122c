"""The errors of `--ray`: one sentence, without delay."""

from pathlib import Path

import pytest

from tests.support.command import Run, error_of

pytest.importorskip("ray", reason="Ray is not installed: pip install 'scail2-rt[ray]'")

pytest_plugins = ["tests.support.runtime_fixtures"]
NOBODY = "127.0.0.1:1"


def test_a_batch(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"a@@{case}\n")
    words = ["generate", engines, "-o", tmp_path / "out"]
    assert "Use it with --batch FILE" in error_of(scail2(*words, "--case", case, "--ray", NOBODY))
    batch = [*words, "--batch", tmp_path / "b.txt"]
    assert "No Ray cluster answers at 127.0.0.1:1" in error_of(scail2(*batch, "--ray", NOBODY))
    assert "must be HOST:PORT or auto, not here" in error_of(scail2(*batch, "--ray", "here"))
    assert "--dry-run and --ray" in error_of(scail2(*batch, "--ray", NOBODY, "--dry-run"))
    assert "Give the number of GPUs per case" in error_of(scail2(*batch, "--ray", NOBODY, "--gpus", "all"))
    assert not (tmp_path / "out").exists()


def test_a_service(scail2: Run, engines: Path, tmp_path: Path) -> None:
    words = ["serve", engines, "--ray", NOBODY]
    assert "--ray needs --data" in error_of(scail2(*words))
    data = ["--data", tmp_path / "data"]
    assert "No Ray cluster answers" in error_of(scail2(*words, *data))
    assert "--disk-limit does not work with --ray" in error_of(scail2(*words, *data, "--disk-limit", "1GiB"))
    assert "is not an engine folder" in error_of(scail2("serve", tmp_path, "--ray", NOBODY, *data))
    assert "not a URL that fsspec knows" in error_of(scail2("serve", "nowhere://x", "--ray", NOBODY, *data))
    assert "Give --api-key-file" in error_of(scail2(*words, *data, "--host", "0.0.0.0"))
    assert not (tmp_path / "data").exists()
