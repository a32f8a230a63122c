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
from typing import Any

import pytest
import torch

from scail2_rt.engines.folder.manifest import KERNELS, MANIFEST
from scail2_rt.kernels import ahead
from scail2_rt.kernels.cache_folder import cache_directory

ADA = (8, 9)
PTXAS = find_spec("triton") is not None and platform.machine() == "x86_64"
needs_compiler = pytest.mark.skipif(not PTXAS, reason="needs Triton with its assembler for x86-64")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not ahead.list_of(torch.cuda.get_device_capability()).exists(),
    reason="needs a GPU with a list of kernels",
)
LINES = [(file.stem, line) for file in sorted(ahead.LISTS.iterdir()) for line in file.read_text().splitlines()]
CUDA = [line for lines in ahead.cuda_lines() for line in lines]
CHEAP = next(line for _, line in LINES if ":_residual_kernel" in line)


@pytest.mark.parametrize("name", sorted({name for name, _ in LINES}))
def test_each_line_fits_its_kernel(name: str) -> None:
    lines = [line for listed, line in LINES if listed == name]
    assert len(lines) == len(set(lines))
    assert [line for line in lines if "defines" in line] == (CUDA if name == "sm90" else [])
    for line in lines:
        entry = json.loads(line)
        if "defines" in entry:
            continue
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


def compiled(tmp_path: Path, *lines: str, code: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the compiling process with a list of these lines for sm89, and into a cache folder `cache`."""
    (tmp_path / "lists").mkdir(exist_ok=True)
    (tmp_path / "lists" / "sm89.jsonl").write_text("".join(f"{line}\n" for line in lines))
    code = f"ahead.LISTS = Path(sys.argv.pop())\n{code}\nahead.main()"
    return run(code, tmp_path / "cache", *map(str, ADA), str(tmp_path / "lists"))


def markers(cache: Path) -> list[Path]:
    return [file for file in cache.glob("ahead-*") if not file.suffix]


@needs_compiler
def test_a_list_is_compiled_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = compiled(tmp_path, CHEAP)
    assert first.returncode == 0, first.stderr
    (cubin,) = cubins(cache)
    (marker,) = markers(cache)
    assert marker.read_text() == ""
    written = cubin.stat().st_mtime_ns
    (cache / "ahead.log").write_text("of the first process")
    assert compiled(tmp_path, CHEAP).returncode == 0
    assert cubin.stat().st_mtime_ns == written
    assert (cache / "ahead.log").read_text() == "of the first process"


@needs_compiler
def test_a_kernel_that_does_not_compile_is_tried_once(tmp_path: Path) -> None:
    broken = CHEAP.replace('"*fp32"', '"*fp99"', 1)
    assert broken != CHEAP
    assert compiled(tmp_path, broken, CHEAP).returncode == 0
    assert len(cubins(tmp_path / "cache")) == 1
    (marker,) = markers(tmp_path / "cache")
    assert "_residual_kernel: " in marker.read_text()
    assert "_residual_kernel: " in (tmp_path / "cache" / "ahead.log").read_text()


@pytest.mark.parametrize(
    "fault", ["os.kill(os.getpid(), signal.SIGKILL)", "(_ for _ in ()).throw(OSError(28, 'full'))"]
)
def test_a_passing_fault_leaves_no_marker(tmp_path: Path, fault: str) -> None:
    result = compiled(tmp_path, CHEAP, code=f"import os, signal\nahead.compile_line = lambda *_: {fault}")
    assert result.returncode == 1
    assert "Traceback" in (tmp_path / "cache" / "ahead.log").read_text()
    assert not markers(tmp_path / "cache")


@needs_compiler
def test_pytorch_is_not_imported(tmp_path: Path) -> None:
    code = """
ahead.capabilities()
for line in sys.argv[1:]:
    ahead.importlib.import_module(ahead.json.loads(line)["kernel"].partition(":")[0])
ahead.compile_line(line, (9, 0))
assert "triton" in sys.modules
print("torch" in sys.modules)
"""
    result = run(code, tmp_path, *(line for _, line in LINES if "defines" not in line), CHEAP)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr
    assert cubins(tmp_path)


def test_generate_starts_it_before_pytorch_is_imported(tmp_path: Path) -> None:
    code = """
def started(*given):
    print(*given, "torch" in sys.modules)
    sys.exit()

ahead.start_early = started
from scail2_rt.runtime.cli.main import cli
cli(["generate", "engines", "--backend", "torch", "--output", "out.mp4"])
"""
    assert run(code, tmp_path).stdout.strip() == "engines torch False"


@needs_compiler
def test_a_launch_finds_what_was_compiled(tmp_path: Path) -> None:
    """The launchers ask Triton for kernels under the keys with which they were compiled, with and without a tensor
    descriptor. Triton's driver is replaced by one that has an sm90 GPU and launches nothing."""
    code = """
for line in sys.argv[1:]:
    ahead.compile_line(line, (9, 0))
import torch, triton
from triton.backends.compiler import GPUTarget

class Launched(BaseException):
    pass

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def __getattr__(self, name): raise Launched

triton.runtime.driver.set_active(Driver())
found = []
triton.knobs.compilation.listener = lambda **about: found.append(about["cache_hit"])
from scail2_rt.kernels.attention.launch import cross_attention
from scail2_rt.kernels.rows.launch import residual_rows
x, gate = torch.zeros(64, 5120), torch.zeros(5120)
y, text, image = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((64, 5120), (512, 10240), (257, 10240)))
for launch, operands in ((residual_rows, (x, y, gate, x)), (cross_attention, (y, text, image, 128, y))):
    try:
        launch(*operands)
    except Launched:
        print(found)
"""
    result = run(code, tmp_path, CHEAP, next(line for _, line in LINES if ":_cross_attention" in line))
    assert result.stdout.split("\n")[-2:] == ["[True, True]", ""], result.stdout + result.stderr


def test_compute_capabilities_come_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [(9, 0), (8, 9), (9, 0)]

    class Driver:
        """Its functions are those of libcuda; handles are ordinals plus 40."""

        def __init__(self, status: int = 0) -> None:
            self.cuInit = lambda flags: status

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = len(devices)
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:
            device._obj.value = index + 40
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            value._obj.value = devices[device.value - 40][attribute - 75]
            return 0

    monkeypatch.setattr(ahead.ctypes, "CDLL", lambda name: Driver())
    assert ahead.capabilities() == [(8, 9), (9, 0)]
    monkeypatch.setattr(ahead.ctypes, "CDLL", lambda name: Driver(100))  # CUDA_ERROR_NO_DEVICE
    assert ahead.capabilities() == []


def test_nothing_starts_without_a_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    monkeypatch.setattr(ahead, "LISTS", tmp_path / "none")
    assert ahead.start(ADA) is ahead.start() is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_starts_when_all_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    monkeypatch.setattr(ahead, "LISTS", tmp_path)
    file = tmp_path / "sm89.jsonl"
    file.write_text(CHEAP)
    marker = ahead._marker(file)
    if marker is None:
        pytest.skip("needs Triton")
    marker.touch()
    assert ahead.start(ADA) is ahead.start() is None
    file.write_text("another list")
    assert ahead._marker(file) != marker


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Path]]:
    """An engine folder on a machine with NVIDIA's driver, and the kernel folders for which a process was started."""
    for variable in ("TRITON_CACHE_DIR", "SCAIL2_RT_KERNELS"):
        monkeypatch.setenv(variable, "")  # so that the change by `use_kernel_cache` is undone
        monkeypatch.delenv(variable)
    (tmp_path / MANIFEST).touch()
    started: list[Path] = []
    monkeypatch.setattr(ahead.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(ahead, "start", lambda: started.append(ahead.kernel_directory()))
    return tmp_path, started


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_engine_folder_starts_it_early(early: tuple[Path, list[Path]], backend: str) -> None:
    folder, started = early
    ahead.start_early(folder, backend)
    assert started == [folder / KERNELS] == [Path(os.environ["TRITON_CACHE_DIR"])]


def test_kernels_are_cached_elsewhere_if_their_folder_is_read_only(
    early: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, started = early
    (folder / KERNELS).mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / KERNELS)
    ahead.start_early(folder, "torch")
    assert started == [cache_directory() / "kernels"]
    assert "TRITON_CACHE_DIR" not in os.environ


@needs_compiler
def test_functions_that_do_not_compile_leave_a_marker(tmp_path: Path) -> None:
    code = """
from triton.backends.nvidia import driver
def utilities():
    raise ImportError("undefined symbol")
driver.CudaUtils = utilities
"""
    result = compiled(tmp_path, CHEAP, code=code)
    assert result.returncode == 0, (tmp_path / "cache" / "ahead.log").read_text()
    assert markers(tmp_path / "cache")


def test_other_backends_and_folders_start_nothing(early: tuple[Path, list[Path]]) -> None:
    folder, started = early
    ahead.start_early(folder, "tensorrt")
    ahead.start_early(folder / "other", "torch")
    ahead.start_early(folder / ("x" * 300), "torch")  # a name that is too long; the command says so
    assert not started
    assert not (folder / KERNELS).exists()


def test_without_a_driver_nothing_starts(early: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    folder, started = early
    monkeypatch.setattr(ahead.ctypes, "CDLL", missing)
    ahead.start_early(folder, "torch")
    assert not started
    assert not (folder / KERNELS).exists()


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
