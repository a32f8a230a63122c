"""Kernels compiled ahead of their first use: the lists, and the process that compiles them. Needs no GPU; the compiler
itself runs for GPUs that are not there. One test on a GPU checks that nothing is left to compile."""

import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from scail2_rt.kernels import ahead

ADA = (8, 9)
PTXAS = find_spec("triton") is not None and platform.machine() == "x86_64"
needs_compiler = pytest.mark.skipif(not PTXAS, reason="needs Triton with its assembler for x86-64")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not ahead.list_of(torch.cuda.get_device_capability()).exists(),
    reason="needs a GPU with a list of kernels",
)
LINES = [(file.stem, line) for file in sorted(ahead.LISTS.iterdir()) for line in file.read_text().splitlines()]
CHEAP = next(line for _, line in LINES if ":_residual_kernel" in line)


@pytest.mark.parametrize("name", sorted({name for name, _ in LINES}))
def test_each_line_fits_its_kernel(name: str) -> None:
    lines = [line for listed, line in LINES if listed == name]
    assert len(lines) == len(set(lines))
    for line in lines:
        entry = json.loads(line)
        module, _, kernel = entry["kernel"].partition(":")
        parameters = list(inspect.signature(getattr(importlib.import_module(module), kernel).fn).parameters)
        assert list(entry["signature"]) == parameters, kernel
        places = [path[0] for path, _ in entry["constants"]]
        assert [i for i, kind in enumerate(entry["signature"].values()) if kind == "constexpr"] == places, kernel
        assert set(entry["options"]) == {"num_warps", "num_stages"}


def run(code: str, cache: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a process with Triton's compiler instead of its interpreter."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "SCAIL2_RT_KERNELS": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    words = (
        sys.executable,
        "-c",
        f"import sys\nfrom pathlib import Path\nfrom scail2_rt.kernels import ahead\n{code}",
        *words,
    )
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def cubins(cache: Path) -> set[Path]:
    return {file for file in cache.rglob("*.cubin") if not file.name.startswith("tmp")}


@needs_compiler
def test_a_list_is_compiled_once(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "sm89.jsonl").write_text(CHEAP + "\n")
    code = "ahead.LISTS = Path(sys.argv.pop())\nsys.exit(ahead.main())"
    words = (*map(str, ADA), str(tmp_path / "lists"))
    first = run(code, tmp_path / "cache", *words)
    assert (first.returncode, first.stdout.strip()) == (0, ""), first.stderr
    (compiled,) = cubins(tmp_path / "cache")
    assert len([file for file in (tmp_path / "cache").glob("ahead-*") if not file.suffix]) == 1
    written = compiled.stat().st_mtime_ns
    assert run(code, tmp_path / "cache", *words).returncode == 0
    assert compiled.stat().st_mtime_ns == written


@needs_compiler
def test_a_kernel_that_does_not_compile_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    broken = CHEAP.replace('"*fp32"', '"*fp99"', 1)
    assert broken != CHEAP
    (tmp_path / "lists" / "sm89.jsonl").write_text(f"{broken}\n{CHEAP}\n")
    code = "ahead.LISTS = Path(sys.argv.pop())\nsys.exit(ahead.main())"
    result = run(code, tmp_path / "cache", *map(str, ADA), str(tmp_path / "lists"))
    assert result.returncode == 1
    assert "_residual_kernel: " in result.stdout
    assert len(cubins(tmp_path / "cache")) == 1
    assert not [file for file in (tmp_path / "cache").glob("ahead-*") if not file.suffix]


def test_a_killed_process_ends_the_attempt(tmp_path: Path) -> None:
    code = """
import os, signal
ahead.compile_line = lambda line, capability: os.kill(os.getpid(), signal.SIGKILL)
"""
    result = run(f"{code}print(ahead.compile_all((8, 9), sys.argv[-1:], 1))", tmp_path, CHEAP)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("['A process was killed")


def test_without_cuda_python_the_list_can_be_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "find_spec", lambda name: None)
    assert ahead.cuda_kernels((9, 0)) == []


def test_nothing_starts_without_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    monkeypatch.setattr(ahead, "LISTS", tmp_path / "none")
    assert ahead.start(ADA) is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_starts_when_all_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    monkeypatch.setattr(ahead, "LISTS", tmp_path)
    (tmp_path / "sm89.jsonl").write_text(CHEAP)
    marker = ahead._marker(ADA)
    assert marker is not None
    marker.touch()
    assert ahead.start(ADA) is None
    (tmp_path / "sm89.jsonl").write_text("another list")
    assert ahead._marker(ADA) != marker


@needs_gpu
def test_a_compiled_kernel_is_found(tmp_path: Path) -> None:
    """The keys of kernels compiled here are those of a launch: a launch compiles nothing."""
    code = """
import torch, triton
capability = torch.cuda.get_device_capability()
line = next(line for line in ahead.list_of(capability).read_text().splitlines() if ":_residual_kernel" in line)
ahead.compile_line(line, capability)
found = []
triton.knobs.compilation.listener = lambda **about: found.append(about["cache_hit"])
from scail2_rt.kernels.rows.ops import gate_residual
x, y = torch.randn(64, 5120, device="cuda"), torch.randn(64, 5120, device="cuda", dtype=torch.bfloat16)
gate = torch.randn(5120, device="cuda")
torch.testing.assert_close(gate_residual(x, y, gate), x + gate * y.float())
assert found == [True], found
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
