"""`build-engines` on a finished folder: rewrites only damaged stages and files, and adds missing checksums."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scail2_rt.engines.build import repair
from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.folder.damage import check_health
from scail2_rt.engines.folder.journal import JOURNAL, Journal
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.engines.folder.store import StoreLayout
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.kernels.errors import InputError
from tests.engines.build.test_build import contents, lora_file
from tests.engines.build.test_build_interrupted import run_python
from tests.engines.folder.test_sums import without_sums
from tests.support.damage import STORE, flip, flip_tensor
from tests.support.small import Steps, build_small, request, small_checkpoint

UP, QKV = "dit.blocks.1.ffn.up.weight", "dit.blocks.0.qkv.linear.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair") / "e"
    build_small(folder, "fp8")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "e")


def test_the_damaged_stages_alone_are_written(whole: Path, copy: Path) -> None:
    for name in (UP, QKV, "umt5.token_embedding.weight"):
        flip_tensor(copy, name)
    steps, inode = Steps(), (copy / STORE).stat().st_ino
    report = build(request(copy, "fp8"), small_checkpoint(), steps)
    assert report.repaired == ("umt5.token_embedding", "dit.blocks.0.qkv", "dit.blocks.1.ffn")
    assert steps.names("repair") == list(report.repaired)
    assert not steps.names("weights")
    assert not report.up_to_date
    assert steps.notes[0].startswith("damaged: stage umt5.token_embedding (tensor umt5.token_embedding.weight), stage")
    assert contents(copy) == contents(whole)
    assert (copy / STORE).stat().st_ino == inode
    assert build(request(copy, "fp8"), small_checkpoint()).up_to_date


@pytest.mark.parametrize("place", [3, 60, -1])
def test_a_damaged_header_and_what_lies_behind_it(whole: Path, copy: Path, place: int) -> None:
    header = len(StoreLayout.read(copy / STORE).header)
    flip_tensor(copy, UP)
    flip(copy / STORE, place % header)
    assert build(request(copy, "fp8"), small_checkpoint()).repaired == (
        "the header of the weight store",
        "dit.blocks.1.ffn",
    )
    assert contents(copy) == contents(whole)


def test_tables_are_made_again(whole: Path, copy: Path) -> None:
    flip(copy / "tables.safetensors", -3)
    assert build(request(copy, "fp8"), small_checkpoint()).repaired == ("file tables.safetensors",)
    assert contents(copy) == contents(whole)


def test_a_kill_half_way_is_found_again(whole: Path, copy: Path) -> None:
    flip_tensor(copy, UP)
    flip_tensor(copy, "dit.head.linear.weight")
    script = """
        import os, signal, sys
        from pathlib import Path
        from scail2_rt.engines.build.build import BuildRequest, build
        from scail2_rt.engines.folder.store import StoreRepairer
        from tests.support.small import small_checkpoint

        def killed(self, name, data, start=0):
            os.pwrite(self._file, bytes(7), self.layout.location(name).offset)
            os.kill(os.getpid(), signal.SIGKILL)

        StoreRepairer.write = killed
        build(BuildRequest(Path("small"), Path(sys.argv[1]), ("torch",), "fp8"), small_checkpoint())
    """
    assert run_python(script, copy).returncode == -signal.SIGKILL
    assert "stage dit.blocks.1.ffn" in check_health(copy, read_manifest(copy)).text
    assert build(request(copy, "fp8"), small_checkpoint()).repaired == ("dit.blocks.1.ffn", "dit.head")
    assert contents(copy) == contents(whole)


def test_damage_is_repaired_before_an_executor_is_added(copy: Path) -> None:
    pytest.importorskip("onnxruntime")
    flip_tensor(copy, UP)
    report = build(replace(request(copy, "fp8"), backends=("onnxruntime",)), small_checkpoint())
    assert (report.repaired, report.added) == (("dit.blocks.1.ffn",), ("onnxruntime",))
    manifest = read_manifest(copy)
    assert manifest.sums is not None
    assert "stages/dit.blocks.1.ffn.onnx" in manifest.sums.files
    assert not check_health(copy, manifest).damages


def test_weights_that_do_not_repeat_get_new_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a LoRA depend on the machine: another one may round a value otherwise."""
    loras = (LoRASpec(lora_file(tmp_path / "l.safetensors")),)
    build_small(tmp_path / "e", loras=loras)
    flip_tensor(tmp_path / "e", QKV)
    before = read_manifest(tmp_path / "e")
    write = repair.SummingWriter.write

    def elsewhere(self: repair.SummingWriter, name: str, data: torch.Tensor, start: int = 0) -> None:
        write(self, name, data.nextafter(torch.tensor(9.0)) if name == QKV else data, start)

    monkeypatch.setattr(repair.SummingWriter, "write", elsewhere)
    assert build(request(tmp_path / "e", loras=loras), small_checkpoint()).repaired == ("dit.blocks.0.qkv",)
    monkeypatch.undo()
    after = read_manifest(tmp_path / "e")
    assert before.sums is not None
    assert after.sums is not None
    assert {n for n, value in after.sums.tensors.items() if value != before.sums.tensors[n]} == {QKV}
    assert [a.path for a, b in zip(after.artefacts, before.artefacts, strict=True) if a != b] == [STORE]
    assert build(request(tmp_path / "e", loras=loras), small_checkpoint()).up_to_date


class TestWithoutSums:
    def test_they_are_added_without_a_build(self, whole: Path, copy: Path) -> None:
        without_sums(copy)
        steps = Steps()
        report = build(request(copy, "fp8"), small_checkpoint(), steps)
        assert report.sums_added
        assert not report.up_to_date
        assert not steps.names("weights")
        assert read_manifest(copy) == read_manifest(whole)
        assert (copy / STORE).read_bytes() == (whole / STORE).read_bytes()

    def test_not_to_a_damaged_folder(self, copy: Path) -> None:
        flip_tensor(without_sums(copy), UP)
        with pytest.raises(InputError, match=rf"the manifest has another hash for {STORE}.*--rebuild"):
            build(request(copy, "fp8"), small_checkpoint())

    def test_an_interrupted_build_of_a_version_without_sums(self, whole: Path, tmp_path: Path) -> None:
        class Interrupt(Steps):
            def started(self, step: object) -> None:
                if getattr(step, "name", "") == "dit.head":
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(request(tmp_path / "e", "fp8"), small_checkpoint(), Interrupt())
        journal = Journal.load(tmp_path / "e")
        assert UP in journal.sums
        journal.sums = {}
        journal.save()
        build(request(tmp_path / "e", "fp8"), small_checkpoint())
        assert read_manifest(tmp_path / "e").sums == read_manifest(whole).sums
        assert not (tmp_path / "e" / JOURNAL).exists()


def test_the_command_is_good_in_every_folder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    asked = BuildRequest(Path(tiny_checkpoint.name), tmp_path / "e", ("torch",), "fp32")
    build(asked, open_checkpoint(asked.checkpoint, components=("clip",)))
    monkeypatch.chdir(tmp_path)
    health = check_health(Path("e"), read_manifest(Path("e")))
    assert health.remedy == (
        f"scail2-rt build-engines {tiny_checkpoint} -o {tmp_path / 'e'} --precision fp32 --backend torch"
    )
    assert (tmp_path / "e" / MANIFEST).is_file()
