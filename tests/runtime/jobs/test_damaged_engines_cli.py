"""One flipped bit in an engine folder, through the installed command: the error names stage and repair command, and the
command repairs only that stage, in any working folder."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from scail2_rt.engines.folder.manifest import MANIFEST
from scail2_rt.engines.folder.store import StoreLayout
from scail2_rt.engines.folder.sums import sum_of
from tests.support.command import SMALL, Run, error_of, one_json
from tests.support.damage import STORE, flip_tensor

pytest_plugins = ["tests.support.runtime_fixtures"]
TENSOR, STAGE = "dit.blocks.1.ffn.up.weight", "dit.blocks.1.ffn"


@pytest.fixture
def folder(engines: Path, tmp_path: Path, tiny_checkpoint: Path, scail2: Run) -> Path:
    """An engine folder that was built with relative paths in another working folder."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "ckpt").symlink_to(tiny_checkpoint)
    words = ("ckpt", "-o", "engines", "--backend", "torch", "--precision", "fp32")
    result = scail2("build-engines", *words, cwd=tmp_path / "made")
    assert result.returncode == 0, result.stderr
    return tmp_path / "made" / "engines"


def command_of(text: str) -> list[str]:
    """Return the words of the command at the end of a sentence."""
    words = shlex.split(text.rpartition("with: ")[2])
    assert words[:2] == ["scail2-rt", "build-engines"]
    assert "--rebuild" not in words
    return words[1:]


def generated(scail2: Run, folder: Path, case: Path, output: Path) -> bytes:
    result = scail2("generate", folder, "--case", case, "-o", output, *SMALL, "--frames", "5")
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    return output.read_bytes()


def test_a_flipped_bit_from_refusal_to_repair(folder: Path, case: Path, tmp_path: Path, scail2: Run) -> None:
    first = generated(scail2, folder, case, tmp_path / "first.mp4")
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flip_tensor(folder, TENSOR, bit=1)
    words = ("generate", "engines", "--case", case, "-o", tmp_path / "v.mp4", *SMALL, "--frames", "5")
    refused = error_of(scail2(*words, cwd=folder.parent))
    assert refused.startswith(f"stage {STAGE} of engines is damaged: tensor {TENSOR} does not match its checksum")
    assert not (tmp_path / "v.mp4").exists()

    inspected = one_json(scail2("inspect", folder, "--json"))
    assert inspected["engines"]["damages"] == [{"stage": STAGE, "kind": "tensor", "name": TENSOR, "readable": True}]
    assert f"problem: stage {STAGE} of" in scail2("inspect", folder).stdout
    doctor = one_json(scail2("doctor", folder, "--json"))
    assert doctor["engines_open"] is False
    assert command_of(doctor["engines"]) == command_of(inspected["problems"][0]) == command_of(refused)
    verified = scail2("verify", folder, "--checkpoint", folder.parent / "ckpt")
    assert verified.returncode == 1
    line = next(line for line in verified.stdout.splitlines() if "checksums" in line)
    assert line.startswith(f"FAIL checksums: stage {STAGE} of")
    assert command_of(line) == command_of(refused)

    (tmp_path / "elsewhere").mkdir()
    repaired = scail2(*command_of(refused), "--json", cwd=tmp_path / "elsewhere")
    assert repaired.returncode == 0, repaired.stderr
    assert one_json(repaired)["repaired"] == [STAGE]
    assert "weights " not in repaired.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    assert generated(scail2, folder, case, tmp_path / "second.mp4") == first
    assert "have the checksums recorded by the build" in scail2("inspect", folder).stdout
    again = scail2(*command_of(refused))
    assert "nothing to do" in again.stdout


def test_only_the_damaged_stage_is_written(folder: Path, scail2: Run) -> None:
    """Another stage that differs from the checkpoint but matches its checksum is not changed."""
    document = json.loads((folder / MANIFEST).read_text())
    flip_tensor(folder, "dit.blocks.0.mid.o.weight")
    store = StoreLayout.read(folder / STORE)
    data = (folder / STORE).read_bytes()
    place = store.location("dit.blocks.0.mid.o.weight")
    document["sums"]["tensors"]["dit.blocks.0.mid.o.weight"] = sum_of(data[place.offset : place.offset + place.length])
    (folder / MANIFEST).write_text(json.dumps(document))
    flip_tensor(folder, TENSOR)
    words = ("build-engines", folder.parent / "ckpt", "-o", folder, "--backend", "torch", "--precision", "fp32")
    result = scail2(*words)
    assert f"repaired {STAGE} in" in result.stdout
    assert (folder / STORE).read_bytes() == data


def test_a_folder_without_sums(folder: Path, case: Path, tmp_path: Path, scail2: Run) -> None:
    """There is one warning, also in a batch. Its command adds the checksums and writes no weights."""
    document = json.loads((folder / MANIFEST).read_text())
    del document["sums"]
    (folder / MANIFEST).write_text(json.dumps(document))
    store = (folder / STORE).stat()
    (tmp_path / "batch.txt").write_text(f"None@@{case}\nNone@@{case}\n")
    result = scail2(
        "generate", folder, "--batch", tmp_path / "batch.txt", "-o", tmp_path / "v", *SMALL, "--frames", "5"
    )
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert "has no checksums" in warning
    assert "has no checksums" in scail2("inspect", folder).stdout
    added = scail2(*command_of(warning), cwd=tmp_path)
    assert "checksums added in" in added.stdout
    assert (folder / STORE).stat().st_mtime_ns == store.st_mtime_ns
    shutil.rmtree(tmp_path / "v")
    generated(scail2, folder, case, tmp_path / "v.mp4")


def test_help_says_what_a_second_call_does(scail2: Run) -> None:
    assert "repair damaged files" in " ".join(scail2("build-engines", "--help").stdout.split())
