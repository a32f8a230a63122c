"""`scail2-rt convert`: one file from any layout, which gives the same engines; interrupted, refused, resumed."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scail2_rt.engines.build.build import BuildStep
from scail2_rt.engines.build.convert import convert
from scail2_rt.engines.build.convert_target import DTYPES, ConvertRequest
from scail2_rt.engines.folder.lock import LOCK
from scail2_rt.engines.folder.sources import hash_file
from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import SAT_FILE
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.cli import files_commands
from tests.engines.build.test_build_interrupted import run_python
from tests.support.command import Run, error_of, one_json, sabotage
from tests.support.repackaged import Tensors, tensors_of
from tests.support.small import DIT, Steps, random_tensors

pytest_plugins = ["tests.support.runtime_fixtures"]

STORE = "stages/weights.safetensors"


@pytest.fixture(scope="module")
def dit(tiny_checkpoint: Path) -> Tensors:
    return tensors_of(open_checkpoint(tiny_checkpoint, components=("dit",)).sources["dit"])


def layouts(folder: Path, tiny_checkpoint: Path, dit: Tensors) -> Iterator[Path]:
    """The same transformer in every layout."""
    yield tiny_checkpoint
    yield tiny_checkpoint / SAT_FILE
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in dit.items()}, folder / "one.safetensors")
    yield folder / "one.safetensors"
    torch.save({"state_dict": dict(reversed(dit.items()))}, folder / "dit.pth")
    yield folder / "dit.pth"
    for i in range(3):
        part = {name: dit[name] for name in sorted(dit)[i::3]}
        save_file(part, folder / f"shards-{i + 1:05}-of-00003.safetensors")
    yield folder / "shards-00001-of-00003.safetensors"


def small(path: Path, seed: int = 0) -> Checkpoint:
    """A transformer file whose shapes do not determine the number of heads."""
    path.mkdir(exist_ok=True)
    save_file(random_tensors(dit_shapes(DIT), seed), path / "dit.safetensors")
    (path / "config.json").write_text('{"num_heads": 2, "eps": 1e-5}')
    return open_checkpoint(path / "dit.safetensors", components=("dit",))


class Stop(Steps):
    """An observer that interrupts when a step begins."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def started(self, step: BuildStep) -> None:
        if step.name == self.step:
            raise KeyboardInterrupt


def test_the_types_are_those_that_help_names() -> None:
    assert tuple(DTYPES) == files_commands.DTYPES


class TestResult:
    def test_every_layout_gives_the_same_file(self, tiny_checkpoint: Path, dit: Tensors, tmp_path: Path) -> None:
        hashes = set()
        for i, path in enumerate(layouts(tmp_path, tiny_checkpoint, dit)):
            opened = open_checkpoint(path, components=("dit",))
            (file,) = convert(ConvertRequest(tmp_path / f"out/{i}.safetensors"), opened).files
            assert file.sha256 == hash_file(Path(file.path))
            hashes.add(file.sha256)
        assert i == 4
        assert len(hashes) == 1

    def test_matrices_are_cast_and_what_engines_hold_in_fp32_is_not(
        self, tiny_checkpoint: Path, dit: Tensors, tmp_path: Path
    ) -> None:
        opened = open_checkpoint(tiny_checkpoint, components=("dit",))
        for dtype, type_ in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            convert(ConvertRequest(tmp_path / f"{dtype}.safetensors", dtype), opened)
            found = load_file(tmp_path / f"{dtype}.safetensors")
            assert set(found) == set(dit)
            for name, tensor in found.items():
                assert torch.equal(tensor, dit[name].to(tensor.dtype)), name
            assert found["blocks.1.self_attn.q.weight"].dtype == type_
            for exact in ("blocks.1.modulation", "blocks.0.norm3.bias", "head.head.weight", "time_projection.1.weight"):
                assert found[exact].dtype == torch.float32
            if dtype != "fp32":
                assert {tensor.dtype for tensor in found.values()} == {torch.float32, type_}

    def test_16_bit_files_keep_their_type_unless_another_is_named(self, dit: Tensors, tmp_path: Path) -> None:
        save_file({name: tensor.half() for name, tensor in dit.items()}, tmp_path / "half.safetensors")
        opened = open_checkpoint(tmp_path / "half.safetensors", components=("dit",))
        convert(ConvertRequest(tmp_path / "a.safetensors"), opened)
        assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
        convert(ConvertRequest(tmp_path / "b.safetensors", "bf16"), opened)
        assert load_file(tmp_path / "b.safetensors")["blocks.0.ffn.0.weight"].dtype == torch.bfloat16

    def test_heads_survive_without_a_config_beside_the_file(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        convert(ConvertRequest(tmp_path / "out/x.safetensors"), opened)
        again = open_checkpoint(tmp_path / "out/x.safetensors", components=("dit",))
        assert again.config == opened.config
        assert (again.config.dit.heads, again.config.dit.eps) == (2, 1e-5)  # type: ignore[union-attr]
        with safe_open(tmp_path / "out/x.safetensors", "pt") as file:  # by the format's own reader
            assert set(file.metadata()) == {"format", "config"}

    def test_a_plain_number_of_the_record(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        (file,) = convert(ConvertRequest(tmp_path / "x.safetensors"), opened).files
        record = json.loads((tmp_path / "x.safetensors.json").read_text())
        assert record["sha256"] == file.sha256 == hash_file(tmp_path / "x.safetensors")
        (source,) = record["sources"]
        assert source["path"] == str(tmp_path / "c/dit.safetensors")
        assert source["sha256"] == hash_file(tmp_path / "c/dit.safetensors")


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "bf16"), ("fp32", "fp8")])
def test_engines_from_the_file_are_those_of_the_checkpoint(
    scail2: Run, tiny_checkpoint: Path, tmp_path: Path, dtype: str, precision: str
) -> None:
    """The command, `--all`, and the engines of the folder that it makes."""
    output = tmp_path / "new folder/scail2.safetensors"
    result = scail2("convert", tiny_checkpoint, "-o", output, "--all", "--dtype", dtype, "--json")
    assert result.returncode == 0, result.stderr
    reply = one_json(result)
    assert [file["component"] for file in reply["files"]] == ["transformer", "VAE", "umT5 encoder", "CLIP tower"]
    for file in reply["files"]:
        assert file["sha256"] == hash_file(Path(file["path"]))
    assert "convert 1/10" in result.stderr
    build = ("--backend", "torch", "--precision", precision)
    for checkpoint, engines in ((tiny_checkpoint, "a"), (output.parent, "b")):
        result = scail2("build-engines", checkpoint, "-o", tmp_path / engines, *build)
        assert result.returncode == 0, result.stderr
    for file in (STORE, "tables.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_text_for_people_and_a_second_call(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    first = scail2("convert", tiny_checkpoint, "-o", output)
    assert first.returncode == 0, first.stderr
    assert f"{hash_file(output)}  {output}" in first.stdout
    assert "VAE, umT5, CLIP and tokenizer are not included" in first.stdout
    before = output.stat()
    second = scail2("convert", tiny_checkpoint, "-o", output, "--json")
    assert one_json(second)["files"][0]["up_to_date"] is True
    assert output.stat() == before
    assert second.stderr == ""  # not even a hash was made
    message = error_of(scail2("convert", tiny_checkpoint, "-o", output, "--dtype", "fp16"))
    assert "--overwrite" in message
    assert scail2("convert", tiny_checkpoint, "-o", output, "--dtype", "fp16", "--overwrite").returncode == 0
    assert load_file(output)["blocks.0.ffn.0.weight"].dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors", "x.safetensors.json"]
    message = error_of(scail2("convert", tiny_checkpoint, "-o", tmp_path / "y.safetensors", "--vae", "v.pth"))
    assert "were given without --all" in message


class TestInterruption:
    def test_sigkill_then_resume(self, tmp_path: Path) -> None:
        """Only missing parts are written; the result is the same file."""
        script = """
            import os, signal, sys
            from pathlib import Path
            from scail2_rt.engines.build.convert import convert
            from scail2_rt.engines.build.convert_target import ConvertRequest
            from scail2_rt.export.checkpoint.open import open_checkpoint
            from tests.support.small import Steps

            class Killer(Steps):
                def started(self, step):
                    if step.name == "blocks.1":
                        os.kill(os.getpid(), signal.SIGKILL)

            opened = open_checkpoint(sys.argv[1], components=("dit",))
            convert(ConvertRequest(Path(sys.argv[2])), opened, Killer())
        """
        opened = small(tmp_path / "c")
        output = tmp_path / "x.safetensors"
        killed = run_python(script, tmp_path / "c/dit.safetensors", output)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not output.exists()
        steps = Steps()
        (file,) = convert(ConvertRequest(output), opened, steps).files
        assert steps.names("convert") == ["blocks.1"]
        assert steps.names("hash") == []
        assert file.resumed_groups == 9
        (whole,) = convert(ConvertRequest(tmp_path / "whole.safetensors"), opened).files
        assert file.sha256 == whole.sha256 == hash_file(output)
        assert not list(tmp_path.glob("x.safetensors.partial*"))

    @pytest.mark.parametrize("step", ["head", "blocks.0", "x.safetensors"])
    def test_interrupt_then_resume(self, tmp_path: Path, step: str) -> None:
        opened, stop = small(tmp_path / "c"), Stop(step)
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertRequest(tmp_path / "x.safetensors"), opened, stop)
        assert not (tmp_path / "x.safetensors").exists()
        assert "the same command continues" in stop.notes[-1]
        (file,) = convert(ConvertRequest(tmp_path / "x.safetensors"), opened).files
        (whole,) = convert(ConvertRequest(tmp_path / "whole.safetensors"), opened).files
        assert file.sha256 == whole.sha256

    def test_a_stop_between_the_name_and_the_record(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = small(tmp_path / "c")
        output = tmp_path / "x.safetensors"

        def fail(path: Path, document: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("scail2_rt.engines.build.convert.write_json", fail)
            with pytest.raises(KeyboardInterrupt):
                convert(ConvertRequest(output), opened)
        assert output.exists()
        assert not (tmp_path / "x.safetensors.json").exists()
        steps = Steps()
        (file,) = convert(ConvertRequest(output), opened, steps).files
        assert file.sha256 == hash_file(output)
        assert steps.names("convert") == []
        assert convert(ConvertRequest(output), opened).files[0].up_to_date

    def test_a_source_that_changed_in_between_is_refused(self, tmp_path: Path) -> None:
        output = tmp_path / "x.safetensors"
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertRequest(output), small(tmp_path / "c"), Stop("blocks.1"))
        other = small(tmp_path / "c", seed=3)
        with pytest.raises(InputError, match="was begun from other files or with another --dtype"):
            convert(ConvertRequest(output), other)
        (file,) = convert(ConvertRequest(output, overwrite=True), other).files
        assert file.resumed_groups == 0
        assert torch.equal(
            load_file(output)["blocks.0.norm3.weight"], other.sources["dit"].get("blocks.0.norm3.weight")
        )

    def test_a_source_that_was_only_touched_is_continued(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertRequest(tmp_path / "x.safetensors"), opened, Stop("blocks.1"))
        os.utime(tmp_path / "c/dit.safetensors")
        steps = Steps()
        convert(ConvertRequest(tmp_path / "x.safetensors"), opened, steps)
        assert (steps.names("convert"), len(steps.names("hash"))) == (["blocks.1"], 1)

    def test_a_source_that_changes_meanwhile_is_noticed(self, tmp_path: Path) -> None:
        class Touch(Steps):
            def started(self, step: BuildStep) -> None:
                if step.name == "blocks.1":
                    os.utime(tmp_path / "c/dit.safetensors", (0, 0))

        with pytest.raises(InputError, match="changed during the conversion"):
            convert(ConvertRequest(tmp_path / "x.safetensors"), small(tmp_path / "c"), Touch())
        assert not (tmp_path / "x.safetensors").exists()

    def test_ctrl_c_of_the_command(self, scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
        """The command interrupts itself, so that the test does not depend on the machine's speed."""
        output = tmp_path / "x.safetensors"
        words = ("convert", tiny_checkpoint, "-o", output, "--dtype", "fp32")
        code = (
            "import os, signal\n"
            "from scail2_rt.runtime.cli.progress import BuildLines\n"
            "def started(self, step):\n"
            "    if (step.phase, step.name) == ('convert', 'blocks.1'):\n"
            "        os.kill(os.getpid(), signal.SIGINT)\n"
            "BuildLines.started = started\n"
        )
        result = scail2(*words, **sabotage(tmp_path, code))
        told = result.stderr
        assert result.returncode == 130, told
        assert "finished work is kept; the same command continues" in told
        assert told.endswith("error: interrupted\n")
        assert not output.exists()
        reply = one_json(scail2(*words, "--json"))
        assert reply["files"][0]["resumed_groups"] >= 1
        assert reply["files"][0]["sha256"] == hash_file(output)

    def test_a_disk_that_fills_up(self, tmp_path: Path) -> None:
        script = """
            import resource, signal, sys
            from pathlib import Path
            from scail2_rt.engines.build.convert import convert
            from scail2_rt.engines.build.convert_target import ConvertRequest
            from scail2_rt.export.checkpoint.open import open_checkpoint
            opened = open_checkpoint(sys.argv[1], components=("dit",))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            try:
                convert(ConvertRequest(Path(sys.argv[2])), opened)
            except Exception as error:
                print(type(error).__name__, error)
        """
        opened = small(tmp_path / "c")
        found = run_python(script, tmp_path / "c/dit.safetensors", tmp_path / "x.safetensors")
        assert found.stdout.startswith("Scail2Error the disk of"), found.stdout + found.stderr
        assert "run the same command again" in found.stdout
        assert not (tmp_path / "x.safetensors").exists()
        assert convert(ConvertRequest(tmp_path / "x.safetensors"), opened).files[0].tensors == len(dit_shapes(DIT))


class TestRefusals:
    def test_places(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        (tmp_path / "mine.safetensors").write_text("mine")
        (tmp_path / "folder.safetensors").mkdir()
        cases = [
            (tmp_path / "c/dit.safetensors", "is a file of the checkpoint"),
            (tmp_path / "mine.safetensors", "exists. Use --overwrite to replace it"),
            (tmp_path / "folder.safetensors", "is a folder"),
            (tmp_path / "x.bin", r"Name it \*\.safetensors"),
            (tmp_path / "mine.safetensors/x.safetensors", "cannot be"),
        ]
        for output, said in cases:
            with pytest.raises(InputError, match=said):
                convert(ConvertRequest(output), opened)
        assert (tmp_path / "mine.safetensors").read_text() == "mine"
        with pytest.raises(InputError, match="is a file of the checkpoint"):
            convert(ConvertRequest(tmp_path / "c/dit.safetensors", overwrite=True), opened)

    def test_all_in_a_folder_that_has_the_parts(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        opened = open_checkpoint(tiny_checkpoint)
        with pytest.raises(InputError, match="a folder can hold each only once"):
            convert(ConvertRequest(tiny_checkpoint / "x.safetensors", everything=True), opened)
        (tmp_path / "tokenizer.json").write_text("{}")
        request = ConvertRequest(tmp_path / "x.safetensors", everything=True)
        with pytest.raises(InputError, match="is another tokenizer"):
            convert(request, opened)
        assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
        convert(dataclasses.replace(request, overwrite=True), opened)
        assert convert(request, opened).files[3].up_to_date
        assert open_checkpoint(tmp_path).config == opened.config

    def test_a_disk_without_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="are needed on the disk of"):
            convert(ConvertRequest(tmp_path / "x.safetensors"), small(tmp_path / "c"))

    def test_a_second_conversion_in_the_folder(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        with (
            FileLock(tmp_path / LOCK),
            pytest.raises(InputError, match="another conversion is writing to"),
        ):
            convert(ConvertRequest(tmp_path / "x.safetensors"), opened)
        convert(ConvertRequest(tmp_path / "x.safetensors"), opened)

    @pytest.mark.parametrize(
        ("value", "dtype", "error", "said"),
        [
            (float("nan"), "bf16", InputError, "NaN or infinite"),
            (1e6, "fp16", Scail2Error, "more than float16 can hold; convert with --dtype bf16"),
        ],
    )
    def test_values_that_cannot_be_stored(
        self, tmp_path: Path, value: float, dtype: str, error: type[Scail2Error], said: str
    ) -> None:
        tensors = random_tensors(dit_shapes(DIT))
        tensors["blocks.1.ffn.2.weight"][3, 4] = value
        opened = Checkpoint(Path("small"), ModelConfig(dit=DIT), {"dit": MappingSource(tensors)}, None)
        with pytest.raises(error, match=said) as caught:
            convert(ConvertRequest(tmp_path / "x.safetensors", dtype), opened)
        assert "blocks.1.ffn.2.weight" in str(caught.value)
        assert not (tmp_path / "x.safetensors").exists()

    def test_a_damaged_journal_or_record_is_none(self, tmp_path: Path) -> None:
        opened = small(tmp_path / "c")
        (tmp_path / "x.safetensors.partial.json").write_text("[]")
        (tmp_path / "x.safetensors.json").write_text('{"format_version": 1, "sources": 3}')
        assert not convert(ConvertRequest(tmp_path / "x.safetensors"), opened).files[0].up_to_date
        assert convert(ConvertRequest(tmp_path / "x.safetensors"), opened).files[0].up_to_date
