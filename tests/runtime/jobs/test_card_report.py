"""The report block about plans on a GPU, made from a verification on a CPU, because its form does not depend on the
device."""

from dataclasses import replace
from pathlib import Path

import pytest

from scail2_rt.engines.verify.verify import VerifyRequest, verify
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.runtime.jobs import card_report
from scail2_rt.runtime.jobs.card_report import StepTime, block_for_report, card_block, step_time
from scail2_rt.runtime.jobs.doctor import GPU

pytest_plugins = ["tests.support.runtime_fixtures"]
SMALL = (13, 64, 96)


def test_the_block(engines: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = GPU("NVIDIA GeForce RTX 4090", (8, 9), 23.1, 24.0, "580.65")
    monkeypatch.setattr(card_report, "gpus_of_driver", lambda: (card,))
    report = verify(VerifyRequest(engines), open_checkpoint(tiny_checkpoint))
    assert block_for_report(report) is None, "a CPU has nothing to report"
    slow = StepTime("tensorrt-rtx", "512x896x81", None, fault="out of memory")
    block = card_block(report, [StepTime("torch", "512x896x81", 0.5, 9.0, 11.5), slow], {"torch": "2.13"})
    lines = block.splitlines()
    assert lines[0] == lines[-1] == "```"
    assert lines[1] == "scail2-rt verify: PASS (fp32)"
    assert "GPU: NVIDIA GeForce RTX 4090, sm89, 24.0 GiB, driver 580.65" in lines
    assert any(line.startswith("PASS dit.blocks.ffn: torch 2/2 error ") for line in lines), "a family is one line"
    assert "step: torch 500 ms at 512x896x81, peak 9.0 GiB, GPU in use 11.5 GiB" in lines
    assert "step: tensorrt-rtx failed at 512x896x81: out of memory" in lines
    assert len(lines) < 40

    broken = replace(report.stages[-1], passed=False, fault="the CUDA graph's result differs")
    failed = card_block(replace(report, passed=False, stages=(*report.stages[:-1], broken)), [], {})
    assert "verify: FAIL" in failed
    assert f"FAIL {broken.stage}: torch: the CUDA graph's result differs" in failed


def test_a_step_is_timed(engines: Path) -> None:
    found = step_time(engines, "torch", [SMALL], repeats=2)
    assert (found.backend, found.size, found.fault) == ("torch", "64x96x13", "")
    assert found.seconds is not None
    assert found.seconds > 0


def test_the_next_size_when_one_fails(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = card_report._timed

    def small_only(directory: Path, name: str, layout: object, size: str, repeats: int) -> StepTime:
        if size != "64x96x13":
            raise RuntimeError("CUDA out of\nmemory")
        return timed(directory, name, layout, size, repeats)  # type: ignore[arg-type]

    monkeypatch.setattr(card_report, "_timed", small_only)
    assert step_time(engines, "torch", [(81, 512, 896), SMALL], repeats=1).size == "64x96x13"
    assert str(step_time(engines, "torch", [(81, 512, 896)])) == "torch failed at 512x896x81: CUDA out of memory"


def test_an_executor_that_the_folder_lacks(engines: Path) -> None:
    found = step_time(engines, "tensorrt-rtx", [SMALL])
    assert found.seconds is None
    assert "tensorrt-rtx" in found.fault
