"""Fixtures that several test files share: the golden folder (skipped if absent) and one tiny checkpoint per session."""

import os
import signal
from pathlib import Path

import pytest

# Set before PyTorch is imported: with more threads than free cores, threads mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: Triton's interpreter runs them on the CPU


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Restore SIGINT, which a shell disables for background jobs and their children, for the tests of Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden reference data: `SCAIL2_GOLDEN`, or `../shared/golden` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("SCAIL2_GOLDEN", beside))
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"golden data not found at {folder}; set SCAIL2_GOLDEN to its folder")
    return folder


@pytest.fixture(scope="session")
def reports() -> Path:
    """Folder of the files described by users' reports: `SCAIL2_REPORTS`, or `../shared/reports`."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "reports"
    folder = Path(os.environ.get("SCAIL2_REPORTS", beside))
    if not (folder / "README.md").is_file():
        pytest.skip(f"files of reports not found at {folder}; set SCAIL2_REPORTS to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the `tiny` preset in the official folder layout. Copy it before changing it."""
    from scail2_rt.export.checkpoint.random_checkpoint import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(directory, preset="tiny", seed=0)
    return directory


@pytest.fixture
def exact_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry into the exponent (−1.9575 → −1.0); PyTorch's cast to e4m3 is right."""
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):  # type: ignore[no-untyped-def]
        if source == tl.float32 and target == tl.float8e4nv:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).clamp(-448, 448).to(torch.float8_e4m3fn)
            return rounded.view(torch.uint8).numpy()
        return original(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
