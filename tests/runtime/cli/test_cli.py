"""The command line: help, start-up time, errors, JSON; and making checkpoints and engines."""

import importlib.metadata
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

from scail2_rt.engines.registry import BACKENDS
from scail2_rt.export.checkpoint.random_checkpoint import CLIP_FILE, SAT_FILE, VAE_FILE
from scail2_rt.export.models.precision import PRECISIONS
from scail2_rt.kernels.attention.variants import VARIANTS
from scail2_rt.runtime.cli import options
from scail2_rt.runtime.cli.main import SECTIONS, cli, explain
from scail2_rt.runtime.core.request import ANCHORS, SCHEDULERS
from scail2_rt.runtime.core.window import FITS
from scail2_rt.runtime.jobs.options import PRESETS
from scail2_rt.runtime.media.video_format import CODECS
from tests.support.command import SCAIL2_RT, SMALL, Run, error_of, one_json, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]
COMMANDS = ("build-engines", "generate", "make-checkpoint", "demo", "convert", "download")


HEAVY = (
    "torch",
    "av",
    "numpy",
    "onnx",
    "onnxruntime",
    "triton",
    "tensorrt",
    "rich",
    "PIL",
    "tokenizers",
    "safetensors",
)


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["build-engines", "--help"], ["generate", "--sizes"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """`--help` imports little, so it takes about 0.1 s (`make soak` prints the time)."""
    code = (
        "import sys; from scail2_rt.runtime.cli.main import main\n"
        f"try: main({words!r})\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.soak
def test_how_long_help_takes(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        subprocess.run([SCAIL2_RT, "--help"], check=True, capture_output=True, env=unmeasured())
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"--help: {min(seconds):.3f} s at best, median {statistics.median(seconds):.3f} s")


def test_the_installed_script_says_what_a_forked_one_says(installed: Run, scail2: Run, tmp_path: Path) -> None:
    """Most tests run the command without its imports (`tests/support/forked.py`)."""
    for words in (("--help",), ("inspect", tmp_path), ("make-checkpoint", tmp_path / "c", "--preset", "x", "--json")):
        one, other = installed(*words), scail2(*words)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_the_installed_script_makes_a_video(installed: Run, case: Path, tmp_path: Path) -> None:
    """From a checkpoint to a video, each command from its start."""
    assert installed("make-checkpoint", tmp_path / "c").returncode == 0
    built = installed(
        "build-engines", tmp_path / "c", "-o", tmp_path / "e", "--backend", "torch", "--precision", "fp32"
    )
    assert built.returncode == 0, built.stderr
    made = installed("generate", tmp_path / "e", "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--json")
    assert one_json(made)["frames"] == 21


@pytest.mark.parametrize("words", [("-h",), ("--help",), ()])
def test_help_names_every_command(scail2: Run, words: tuple[str, ...]) -> None:
    result = scail2(*words)
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


def every_command(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Return a command and all its subcommands, with their names."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            inner = command.get_command(context, word)
            assert inner is not None
            yield from every_command(inner, f"{name} {word}")


def test_every_command_is_in_a_section_of_the_help() -> None:
    listed = [name for commands in SECTIONS.values() for name in commands]
    assert sorted(listed) == cli.list_commands(click.Context(cli))


def test_every_command_and_option_is_described_in_sentences() -> None:
    bad = []
    for name, command in every_command(cli, "scail2-rt"):
        texts = {name: (command.help or "").partition("\n\n")[0]}
        options = (option for option in command.params if isinstance(option, click.Option))
        texts |= {f"{name} {option.opts[-1]}": (option.help or "").partition("  [")[0] for option in options}
        bad += [what for what, text in texts.items() if not text or not text.rstrip().endswith(".")]
    assert bad == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_lists_every_option_in_a_section(scail2: Run, command: str) -> None:
    result = scail2(command, "-h")
    assert result.returncode == 0
    known = cli.get_command(click.Context(cli), command)
    assert known is not None
    options = [name for parameter in known.params for name in parameter.opts if name.startswith("--")]
    assert len(options) > 2
    assert [name for name in options if name not in result.stdout] == []
    assert "--json" in options


def test_generate_help_has_the_sections(scail2: Run) -> None:
    text = scail2("generate", "--help").stdout
    sections = ["\nInputs", "\nPrompt:", "\nOutput:", "\nSampling:", "\nLong clips:", "\nEngines:", "\nOther:"]
    positions = [text.index(section) for section in sections]
    assert positions == sorted(positions)


def test_version(scail2: Run) -> None:
    assert scail2("--version").stdout.split()[-1] == importlib.metadata.version("scail2-rt")


def test_option_values_are_those_of_the_modules() -> None:
    assert options.PRECISIONS == PRECISIONS
    assert set(options.BACKENDS) == {"auto", *BACKENDS}
    assert ("auto", *VARIANTS) == options.ATTENTION
    assert options.SCHEDULERS == SCHEDULERS
    assert (tuple(PRESETS), ANCHORS, FITS) == (options.PRESETS, options.ANCHORS, options.FITS)
    assert tuple(CODECS) == options.CODECS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("animate",), "No such command 'animate'"),
        (("generate",), "Missing argument 'ENGINES'"),
        (("generate", "engines"), "Missing option '-o'"),
        (("generate", "engines", "-o", "x.mp4", "--sizes", "3"), "No such option"),
        (("generate", "engines", "-o", "x.mp4", "--size", "512"), "'512' is not a size"),
        (("generate", "engines", "-o", "x.mp4", "--steps", "many"), "'many' is not a valid integer"),
        (("generate", "engines", "-o", "x.mp4", "--scheduler", "heun"), "'heun' is not one of"),
        (("build-engines", "SCAIL-2"), "Missing option '-o'"),
    ],
)
def test_usage_errors_are_one_line(scail2: Run, words: tuple[str, ...], expected: str) -> None:
    result = scail2(*words)
    message = error_of(result)
    assert expected in message
    assert len(result.stderr.splitlines()) == 1
    assert "--help" in message


def test_an_error_with_json_is_one_object(scail2: Run, tmp_path: Path) -> None:
    result = scail2("build-engines", tmp_path / "none", "-o", tmp_path / "e", "--json")
    assert result.returncode == 2
    reply = one_json(result)
    assert reply["exit_code"] == 2
    assert "no checkpoint" in reply["error"]


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(scail2: Run, tmp_path: Path, before: bool) -> None:
    words = ["build-engines", tmp_path / "none", "-o", tmp_path / "e"]
    result = scail2("--debug", *words) if before else scail2(*words, "--debug")
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_fault_of_the_program_is_one_line_with_exit_code_1() -> None:
    message, code = explain(ZeroDivisionError("division\nby zero"))
    assert code == 1
    assert message.startswith("ZeroDivisionError: division by zero")
    assert "--debug" in message


# make-checkpoint


def test_make_checkpoint_writes_the_official_layout(scail2: Run, tmp_path: Path) -> None:
    reply = one_json(scail2("make-checkpoint", tmp_path / "c", "--preset", "tiny", "--seed", "3", "--json"))
    assert {SAT_FILE, VAE_FILE, CLIP_FILE, "model/latest"} <= set(reply["files"])
    assert reply["seed"] == 3
    state = torch.load(tmp_path / "c" / SAT_FILE, weights_only=True)
    assert "module" in state


def test_make_checkpoint_refuses_a_full_folder(scail2: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an empty folder" in error_of(scail2("make-checkpoint", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_make_checkpoint_refuses_an_unknown_preset(scail2: Run, tmp_path: Path) -> None:
    assert "tiny" in error_of(scail2("make-checkpoint", tmp_path / "c", "--preset", "huge"))
    assert not (tmp_path / "c").exists()


# build-engines


def test_build_reports_and_a_second_call_does_nothing(
    scail2: Run, engines: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in engines.rglob("*") if path.suffix != ".json"}
    words = ("build-engines", tiny_checkpoint, "-o", engines, "--backend", "torch", "--precision", "fp32")
    reply = one_json(scail2(*words, "--json"))
    assert reply["up_to_date"] is True
    assert reply["stages"] > 10
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "nothing to do" in scail2(*words).stdout


def test_build_shows_each_stage_with_size_and_time(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = scail2("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "torch", "--precision", "bf16")
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stderr.splitlines() if "dit.blocks.1.ffn" in line)
    assert line.startswith("weights ")
    assert "MiB" in line
    assert " s" in line
    assert "bf16" in result.stdout


def test_build_with_other_options_names_the_field(scail2: Run, engines: Path, tiny_checkpoint: Path) -> None:
    result = scail2("build-engines", tiny_checkpoint, "-o", engines, "--backend", "torch", "--precision", "bf16")
    message = error_of(result)
    assert "precision" in message
    assert "fp32" in message
    assert "bf16" in message


def test_build_of_a_changed_checkpoint_names_the_field(scail2: Run, engines: Path, tmp_path: Path) -> None:
    assert scail2("make-checkpoint", tmp_path / "other", "--seed", "9").returncode == 0
    message = error_of(scail2("build-engines", tmp_path / "other", "-o", engines, "--backend", "torch"))
    assert "sources.dit" in message
    assert "--rebuild" in message


def test_tensorrt_is_refused_with_a_reason(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    message = error_of(scail2("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "tensorrt"))
    assert "tensorrt" in message
    assert not (tmp_path / "e").exists()


def _copy(checkpoint: Path, to: Path) -> Path:
    shutil.copytree(checkpoint, to)
    return to


def _truncated(checkpoint: Path) -> str:
    with (checkpoint / SAT_FILE).open("r+b") as file:
        file.truncate(4096)
    return "fsdp2_rank_0000_checkpoint.pt"


def _missing_tensor(checkpoint: Path) -> str:
    state = torch.load(checkpoint / VAE_FILE, weights_only=True)
    del state["decoder.conv1.weight"]
    torch.save(state, checkpoint / VAE_FILE)
    return "decoder.conv1.weight"


def _wrong_shape(checkpoint: Path) -> str:
    state = torch.load(checkpoint / CLIP_FILE, weights_only=True)
    name = next(name for name in state if name.endswith("attn.proj.weight"))
    state[name] = state[name][:-1]
    torch.save(state, checkpoint / CLIP_FILE)
    return "attn.proj.weight"


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def _code(checkpoint: Path) -> str:
    torch.save({"module": _Payload()}, checkpoint / VAE_FILE)
    return VAE_FILE


def _raw_pickle(checkpoint: Path) -> str:
    (checkpoint / VAE_FILE).write_bytes(pickle.dumps(_Payload()))
    return VAE_FILE


def _unknown_config(checkpoint: Path) -> str:
    state = torch.load(checkpoint / SAT_FILE, weights_only=True)
    prefix = "model.diffusion_model."
    state["module"] = {name: value for name, value in state["module"].items() if not name.startswith(f"{prefix}mixins")}
    torch.save(state, checkpoint / SAT_FILE)
    return ""


def _no_vae(checkpoint: Path) -> str:
    (checkpoint / VAE_FILE).unlink()
    return "VAE"


@pytest.mark.parametrize(
    "damage", [_truncated, _missing_tensor, _wrong_shape, _code, _raw_pickle, _unknown_config, _no_vae]
)
def test_a_checkpoint_that_cannot_work_is_refused(
    scail2: Run, tiny_checkpoint: Path, tmp_path: Path, damage: "type[_truncated]"
) -> None:
    checkpoint = _copy(tiny_checkpoint, tmp_path / "c")
    named = damage(checkpoint)
    result = scail2("build-engines", checkpoint, "-o", tmp_path / "e", "--backend", "torch", cwd=tmp_path)
    assert named in error_of(result)
    assert not (tmp_path / "e" / "manifest.json").exists()
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_checkpoint_is_refused(scail2: Run, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("this is not a checkpoint")
    assert "model.safetensors" in error_of(
        scail2("build-engines", tmp_path / "model.safetensors", "-o", tmp_path / "e", "--backend", "torch")
    )


def test_an_interrupted_json_error_is_parseable() -> None:
    message, code = explain(KeyboardInterrupt())
    assert (json.loads(json.dumps(message)), code) == ("interrupted", 130)


def test_a_long_step_says_how_far_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line is printed after 2 s, then one every 10 s. The rate counts only bytes of this call, not the 20 GiB
    of an earlier one."""
    from scail2_rt.engines.observer import BuildStep
    from scail2_rt.runtime.cli import progress

    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = progress.BuildLines()
    step = BuildStep("download", 2, 3, "large.pt", 60 * 2**30)
    lines.started(step)
    for second in range(25):
        clock[0] = float(second)
        lines.advanced(step, (20 + second) * 2**30)
    assert capsys.readouterr().err.splitlines() == [
        "download large.pt: 22.0 of 60.0 GiB, about 38 s left",
        "download large.pt: 32.0 of 60.0 GiB, about 28 s left",
        "download large.pt: 42.0 of 60.0 GiB, about 18 s left",
    ]
    lines.started(step)
    clock[0] += 20
    lines.advanced(step, 2**30)
    assert capsys.readouterr().err == "download large.pt: 1.0 of 60.0 GiB\n"
