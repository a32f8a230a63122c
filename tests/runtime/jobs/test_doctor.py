"""The output of `doctor`: on this machine, on simulated machines, and with broken libraries."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from scail2_rt.engines.registry import FP8_CAPABILITY, choose_backend
from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.jobs import doctor
from scail2_rt.runtime.jobs.doctor import GPU, Library, diagnose
from tests.support.small import build_small

H200 = GPU("NVIDIA H200", (9, 0), 138.2, 139.8, "580.65")
A100 = GPU("NVIDIA A100", (8, 0), 70.0, 79.2, "550.54")


def libraries(**usable: bool) -> dict[str, Library]:
    names = {
        "torch": "PyTorch",
        "triton": "Triton",
        "tensorrt": "TensorRT",
        "rtx": "TensorRT for RTX",
        "onnxruntime": "ONNX Runtime",
    }
    return {name: Library(name, "1.0", "", usable.get(key, True)) for key, name in names.items()}


def test_this_machine() -> None:
    found = diagnose()
    assert found.backend == choose_backend()[0]
    assert found.engines is None
    by_name = {library.name: library for library in found.libraries}
    assert by_name["PyTorch"].usable
    assert by_name["PyAV"].usable
    assert "libx264" in found.encoders["h264"]
    assert len(found.text.splitlines()) <= 25  # one screen
    assert all(len(line) <= 160 for line in found.text.splitlines())
    assert f"auto chooses {found.backend}" in found.text
    json.dumps(plain(found), allow_nan=False)


def test_it_imports_no_more_than_it_reports_on() -> None:
    """Timed in a new process, because imports take most of the time, mainly compilers and exporters."""
    slow = ("onnx", "onnxscript", "torch._inductor", "torch._dynamo", "torch.onnx", "huggingface_hub")
    code = (
        "import sys; from scail2_rt.runtime.jobs.doctor import diagnose; print(diagnose().text);"
        f"print([name for name in {slow!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Python")
    assert done.stdout.splitlines()[-1] == "[]"


class TestEngines:
    def test_a_folder_that_opens(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        found = diagnose(tmp_path / "e")
        assert found.engines_open is True
        assert "opens: torch on" in found.text
        assert found.disk == str(tmp_path / "e")

    def test_a_damaged_folder(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        (tmp_path / "e" / "tables.safetensors").unlink()
        found = diagnose(tmp_path / "e")
        assert found.engines_open is False
        assert "cannot be opened" in str(found.engines)
        assert "tables.safetensors" in str(found.engines)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none does not exist\. Give the path of an engine folder"):
            diagnose(tmp_path / "none")
        with pytest.raises(InputError, match=r"not an engine folder.*build-engines"):
            diagnose(tmp_path)


class Broken(ModuleType):
    """A module whose attributes all raise different exceptions."""

    def __getattr__(self, name: str) -> object:
        raise OSError("libnvinfer.so.11: cannot open shared object file")


@pytest.mark.parametrize("module", ["triton", "tensorrt", "onnxruntime", "av"])
@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_no_library_is_needed(monkeypatch: pytest.MonkeyPatch, module: str, kind: str) -> None:
    monkeypatch.setitem(sys.modules, module, None if kind == "missing" else Broken(module))  # type: ignore[arg-type]
    found = diagnose()
    name = {"triton": "Triton", "tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "av": "PyAV"}[module]
    (library,) = [library for library in found.libraries if library.name == name]
    if (module, kind) != ("triton", "broken"):  # Triton is only imported
        assert not library.usable
        assert library.detail == doctor.MISSING or library.detail.startswith("broken: ")
    assert found.text


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = Library("PyTorch", "2.0", "broken: OSError: libcudart.so.13: cannot open", False)
    monkeypatch.setattr(doctor, "_torch", lambda: failed)
    (tmp_path / "manifest.json").write_text("{}")
    found = diagnose(tmp_path)
    assert (found.backend, found.engines_open) == (None, False)
    assert "broken: OSError" in found.text
    assert found.advice[0].startswith("PyTorch is needed")


def test_a_choice_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose() -> tuple[str, str]:
        raise RuntimeError("driver too\nold")

    monkeypatch.setattr("scail2_rt.engines.registry.choose_backend", choose)
    found = diagnose()
    assert found.backend is None
    assert found.reason == "RuntimeError: driver too old"


class TestProbe:
    def test_an_installed_library_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> ModuleType:
            raise ImportError("undefined symbol\n _ZN3c10")

        monkeypatch.setattr(doctor.importlib, "import_module", fail)
        library = doctor._probe("PyAV", "av", ("av",), lambda av: "")
        assert library.version
        assert library.detail == "broken: ImportError: undefined symbol _ZN3c10"

    def test_a_dependency_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> ModuleType:
            raise ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers")

        monkeypatch.setattr(doctor.importlib, "import_module", fail)
        assert doctor._probe("X", "x", ("no-such-package",), lambda x: "").detail.startswith("broken: ")


class TestGPUs:
    def test_the_drivers_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = "NVIDIA H200, 9.0, 141000, 143771, 580.65.06\nNVIDIA L4, 8.9, 22000, 23034, 580.65.06\n"
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=answer))
        first, second = doctor.gpus_of_driver()
        assert (first.name, first.capability, first.driver) == ("NVIDIA H200", (9, 0), "580.65.06")
        assert first.free_gib == pytest.approx(141000 / 1024)
        assert second.capability == (8, 9)
        lines = [" ".join(line.split()) for line in diagnose().text.splitlines()]
        assert "GPU NVIDIA L4, sm89, 21.5 GiB free of 22.5 GiB, driver 580.65.06" in lines

    @pytest.mark.parametrize(
        "error",
        [
            FileNotFoundError("nvidia-smi"),
            subprocess.TimeoutExpired("nvidia-smi", 3),
            subprocess.CalledProcessError(9, "nvidia-smi"),
        ],
    )
    def test_no_answer(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(doctor.subprocess, "run", fail)
        assert doctor.gpus_of_driver() == ()

    def test_an_answer_of_another_form(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="No devices were found\n"))
        assert doctor.gpus_of_driver() == ()


class TestAdvice:
    def test_nothing_is_missing(self) -> None:
        assert doctor._advice((H200,), libraries(), True) == ("nothing is missing",)

    def test_a_cpu_machine(self) -> None:
        first, second = doctor._advice((), libraries(onnxruntime=False), False)
        assert '"scail2-rt[cpu]"' in first
        assert "need an NVIDIA GPU" in second

    def test_a_gpu_that_pytorch_does_not_see(self) -> None:
        assert "install a CUDA build" in doctor._advice((H200,), libraries(), False)[0]

    def test_what_makes_a_gpu_faster(self) -> None:
        lines = doctor._advice((H200,), libraries(tensorrt=False, triton=False), True)
        assert ['"scail2-rt[tensorrt]"' in lines[0], '"scail2-rt[gpu]"' in lines[1], len(lines)] == [True, True, 2]

    def test_a_card_of_peoples_own(self) -> None:
        card = GPU("NVIDIA GeForce RTX 4090", (8, 9), 23.1, 24.0, "580.65")
        (line,) = doctor._advice((card,), libraries(tensorrt=False, rtx=False), True)
        assert '"scail2-rt[tensorrt-rtx]"' in line
        assert "then scail2-rt verify ENGINES" in line
        assert doctor._advice((card,), libraries(tensorrt=False), True) == ("nothing is missing",)
        assert TENSORRT_RTX.targets == doctor.RTX_TARGETS

    def test_no_fp8(self) -> None:
        (line,) = doctor._advice((A100,), libraries(), True)
        assert "--precision bf16" in line
        assert doctor._advice((A100, H200), libraries(), True) == ("nothing is missing",)

    def test_the_capability_is_that_of_the_backends(self) -> None:
        assert doctor.FP8_CAPABILITY == FP8_CAPABILITY
