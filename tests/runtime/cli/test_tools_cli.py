"""`verify`, `export-onnx` and `doctor` through the installed command."""

import hashlib
import json
import platform
import shutil
from pathlib import Path

import onnx
import pytest

from tests.support.command import Run, sabotage

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_doctor_says_what_is_there_and_what_auto_would_take(scail2: Run, engines: Path) -> None:
    result = scail2("doctor", engines, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["python"].startswith(platform.python_version())
    text = scail2("doctor", engines).stdout
    assert "backend" in text
    assert str(engines) in text


def test_verify_passes_and_finds_one_changed_value(
    scail2: Run, engines: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    good = scail2("verify", engines, "--checkpoint", tiny_checkpoint, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["passed"] is True
    changed = tmp_path / "changed"
    shutil.copytree(engines, changed)
    store, manifest = changed / "stages" / "weights.safetensors", changed / "manifest.json"
    data = bytearray(store.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[-5] ^= 0x40
    store.write_bytes(data)
    manifest.write_text(manifest.read_text().replace(before, hashlib.sha256(data).hexdigest()))
    bad = scail2("verify", changed, "--checkpoint", tiny_checkpoint)
    assert bad.returncode == 1
    assert "FAIL weights" in bad.stdout
    assert "PASS files" in bad.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("verify", "--rows", "1"), ["check 1/", "dit.blocks.1.ffn", "stages/weights.safetensors"]),
        (("inspect",), ["of 0.0 GiB"]),
        (("doctor",), ["checking the libraries", "of 0.0 GiB"]),
    ],
)
def test_what_takes_long_says_how_far_it_is(
    installed: Run, engines: Path, tiny_checkpoint: Path, tmp_path: Path, words: tuple[str, ...], says: list[str]
) -> None:
    """The delays are set to zero. Usually the first line is printed after two seconds."""
    code = "from scail2_rt.runtime.cli import progress\nprogress.FIRST_LINE_S = progress.LINE_INTERVAL_S = 0\n"
    command, *options = words
    options += ["--checkpoint", str(tiny_checkpoint)] if command == "verify" else []
    result = installed(command, engines, *options, **sabotage(tmp_path, code))
    assert result.returncode == 0, result.stderr
    assert [text for text in says if text not in result.stderr] == []


def test_verify_against_the_other_executor(scail2: Run, engines: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(engines, both)
    told = scail2("verify", both, "--checkpoint", tiny_checkpoint, "--backend", "torch", "--against", "onnxruntime")
    assert told.returncode == 2
    assert "onnxruntime" in told.stderr
    built = scail2("build-engines", tiny_checkpoint, "-o", both, "--backend", "onnxruntime", "--precision", "fp32")
    assert built.returncode == 0, built.stderr
    words = ("--checkpoint", tiny_checkpoint, "--backend", "torch", "--against", "onnxruntime")
    good = scail2("verify", both, *words, "--json")
    assert good.returncode == 0, good.stderr
    report = json.loads(good.stdout)
    assert report["passed"] is True
    assert all(stage["against"] <= stage["tolerance"] for stage in report["stages"])
    assert {stage["backend"] for stage in report["stages"]} == {"torch"}


def test_export_of_the_whole_transformer(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    result = scail2("export-onnx", tiny_checkpoint, "-o", folder, "--layout", "monolithic")
    assert result.returncode == 0, result.stderr
    (path,) = folder.rglob("*.onnx")
    onnx.checker.check_model(path)
    kinds = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"Softmax", "RotaryEmbedding"} <= kinds  # Attention in 16 bits
    again = scail2("export-onnx", tiny_checkpoint, "-o", folder, "--layout", "monolithic")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
