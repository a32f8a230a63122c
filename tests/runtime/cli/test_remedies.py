"""The commands that errors and reports name: each is one that the command line takes, in every folder, and none is
refused."""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from scail2_rt.runtime.cli.main import cli
from tests.support.command import SMALL, Run, error_of
from tests.support.damage import flip_tensor

pytest_plugins = ["tests.support.runtime_fixtures"]
ROOT = Path(__file__).parents[3]
BEFORE = r"(?:`|: |with )"  # a command


def commands_in(text: str) -> list[list[str]]:
    """The words of every command in a text; one ends with the line, a backtick or a semicolon."""
    return [shlex.split(found.strip()) for found in re.findall(rf"{BEFORE}scail2-rt ([a-z-]+ [^`;\n]+)", text)]


def command_of(words: list[str]) -> tuple[click.Command, list[str], click.Context]:
    """A command of the command line, and the words that are left for it."""
    context, command, left = click.Context(cli, info_name="scail2-rt", obj={}), cli, list(words)
    while isinstance(command, click.Group) and left and left[0].islower():
        found = command.get_command(context, left[0])
        assert found is not None, f"{left[0]} is no command of {command.name}"
        command = found
        del left[0]
    return command, left, context


def check(words: list[str]) -> None:
    """The command line takes these words; paths among them are absolute."""
    command, left, context = command_of(words)
    parsed = command.make_context(words[0], left, parent=context)
    for value in parsed.params.values():
        if isinstance(value, Path) and str(value) not in ("CHECKPOINT", "ENGINES"):
            assert value.is_absolute(), words


@pytest.fixture
def place(tmp_path: Path, engines: Path, tiny_checkpoint: Path, scail2: Run) -> Path:
    """A folder with an engine folder of an awkward name and its checkpoint; paths are relative to it."""
    place = tmp_path / "a place"
    place.mkdir()
    (place / "ckpt").symlink_to(tiny_checkpoint)
    shutil.copytree(engines, place / "my engines")
    built = scail2("build-engines", "ckpt", "-o", "my engines", "--backend", "torch", "--precision", "fp32", cwd=place)
    assert built.returncode == 0, built.stderr  # it writes the checkpoint's new name
    return place


def edited(place: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = place / "my engines" / "manifest.json"
    document = json.loads(manifest.read_text())
    edit(document)
    manifest.write_text(json.dumps(document))


def _lost_file(place: Path) -> None:
    (place / "my engines" / "stages" / "weights.safetensors").unlink()


def _flipped_bit(place: Path) -> None:
    flip_tensor(place / "my engines", "dit.blocks.1.ffn.up.weight")


def _no_sums(place: Path) -> None:
    edited(place, lambda document: document.pop("sums"))


def _no_json(place: Path) -> None:
    (place / "my engines" / "manifest.json").write_text("{")


def _other_version(place: Path) -> None:
    edited(place, lambda document: document.update(format_version=999))


def _only_plans(place: Path) -> None:
    record = {"backend": "tensorrt-rtx", "versions": {"tensorrt-rtx": "1.0"}, "gpu": None, "targets": ["sm89"]}
    edited(place, lambda document: document.update(executors=[record]))


def _plans_of_elsewhere(place: Path) -> None:
    """TensorRT for data centres is not installed here: a command that builds it would be refused."""
    record = {"backend": "tensorrt", "versions": {"tensorrt": "11.4"}, "gpu": "NVIDIA H200 (sm90)"}
    edited(place, lambda document: document["executors"].append(record))
    _lost_file(place)


def _nothing(place: Path) -> None:
    shutil.rmtree(place / "my engines")


def _not_engines(place: Path) -> None:
    (place / "my engines" / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _lost_file, _flipped_bit, _no_sums, _no_json, _other_version, _only_plans, _plans_of_elsewhere, _nothing,
        _not_engines,
    ],
)  # fmt: skip
def test_remedies_of_an_engine_folder(
    scail2: Run, place: Path, case: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(place)
    said, generate = "", ("generate", "my engines", "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--dry-run")
    for words in (
        (*generate, "--backend", "onnxruntime" if damage is _no_sums else "auto"),
        ("inspect", "my engines"),
        ("doctor", "my engines"),
        *([("serve", "my engines", "--data", tmp_path / "data", "--port", "0")] if damage is _nothing else []),
    ):
        result = scail2(*words, cwd=place)
        said += result.stdout + result.stderr
    found = commands_in(said)
    assert [words for words in found if words[0] == "build-engines"], said
    for words in found:
        check(words)
        assert "tensorrt" not in words
        if "-o" in words and "ENGINES" not in words:
            assert words[words.index("-o") + 1] == str(place / "my engines")
    if damage is _only_plans:
        rebuilding = [words for words in found if "--rebuild" in words]
        assert all(words[words.index("--target") + 1] == "sm89" for words in rebuilding)
    if damage is _plans_of_elsewhere:
        words = next(words for words in found if "--rebuild" in words)
        rebuilt = scail2(*words, cwd=tmp_path)
        assert rebuilt.returncode == 0, rebuilt.stderr


def test_remedies_of_a_build(scail2: Run, place: Path, tmp_path: Path) -> None:
    words = ("build-engines", "ckpt", "-o", "my engines", "--backend", "torch", "--precision", "bf16")
    (remedy,) = commands_in(error_of(scail2(*words, cwd=place)))
    check(remedy)
    assert scail2(*remedy, cwd=tmp_path).returncode == 0


def test_verify_prints_a_line_once_and_what_to_do(scail2: Run, place: Path, tmp_path: Path) -> None:
    words = ("verify", "my engines", "--checkpoint", "ckpt", "--rows", "1")
    good = scail2(*words, cwd=place)
    lines = [*good.stdout.splitlines(), *good.stderr.splitlines()]
    assert len(lines) == len(set(lines)) > 20
    assert "To repair" not in good.stdout
    _flipped_bit(place)
    bad = scail2(*words, cwd=place)
    assert bad.returncode == 1
    repair, verdict = bad.stdout.splitlines()[-2:]
    assert verdict.startswith("FAIL my engines: checksums, files, weights")
    (remedy,) = commands_in(repair)
    assert scail2(*remedy, cwd=tmp_path).returncode == 0
    assert scail2(*words, cwd=place).returncode == 0


def test_doctor_of_nothing_is_one_sentence(scail2: Run, tmp_path: Path) -> None:
    result = scail2("doctor", tmp_path / "nope")
    assert error_of(result).startswith(f"There is nothing at {tmp_path / 'nope'}; ")
    assert len(result.stderr.splitlines()) == 1
    assert "no engine folder" in error_of(scail2("doctor", tmp_path))


def _texts(file: Path) -> Iterator[str]:
    """The strings of a source file; what an f-string fills in is X."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_command_in_the_source_exists() -> None:
    """With the options that stand beside it."""
    seen = 0
    for room in ("benchmarks", "engines", "export", "kernels", "runtime"):
        for file in (ROOT / room).rglob("*.py"):
            for text in _texts(file):
                for found in re.findall(rf"{BEFORE}scail2-rt ([a-z][^`\n;]*)", text):
                    words = re.findall(r"[\w-]+", found)
                    command, left, _ = command_of(words)
                    known = {"--help", *(name for parameter in command.params for name in parameter.opts)}
                    assert [word for word in left if word.startswith("--") and word not in known] == [], found
                    seen += 1
    assert seen > 20
