"""The NaN check during a run: read one step late, without waiting for queued work."""

import pytest
import torch
from torch import Tensor

from scail2_rt.runtime.pipeline.async_copy import StepMarks
from scail2_rt.runtime.pipeline.finite import value_range

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NAN = float("nan")


def test_on_a_cpu_a_step_is_reported_at_once() -> None:
    reported: list[tuple[int, bool]] = []
    marks = StepMarks(lambda step, seen: reported.append((step, bool(seen.isfinite().all()))))
    for step, value in enumerate((1.0, 2.0, NAN)):
        marks.passed(step, value_range(torch.full((4,), value)))
        assert len(reported) == step + 1
    marks.finish()
    assert reported == [(0, True), (1, True), (2, False)]


def test_what_the_report_raises_ends_the_loop() -> None:
    def refuse(step: int, seen: Tensor) -> None:
        if not seen.isfinite().all():
            raise LookupError(step)

    marks = StepMarks(refuse)
    marks.passed(0, value_range(torch.zeros(3)))
    with pytest.raises(LookupError, match="1"):
        marks.passed(1, value_range(torch.tensor([0.0, NAN])))


@needs_gpu
def test_on_a_gpu_a_step_is_reported_while_the_next_one_runs() -> None:
    """Each step sleeps for about 0.1 s: its mark is read when the next one is queued, and nothing waits for the last
    queued step."""
    reported: list[tuple[int, list[float]]] = []
    marks = StepMarks(lambda step, seen: reported.append((step, seen.tolist())))

    def step_of(step: int) -> Tensor:
        torch.cuda._sleep(200_000_000)
        x = torch.full((1 << 20,), float(step), device="cuda")
        x[12_345].fill_(NAN if step == 3 else step)  # an assignment would wait for the device
        return value_range(x)

    marks.passed(0, step_of(0))  # loads every kernel, which would wait for the device
    assert [step for step, _ in reported] == [0]  # the first one is waited for
    busy = []
    for step in range(1, 5):
        marks.passed(step, step_of(step))
        end = torch.cuda.Event()
        end.record()
        busy.append(not end.query())
        assert [number for number, _ in reported] == list(range(step))
    assert all(busy)
    marks.finish()
    assert [(step, seen[0] == seen[0]) for step, seen in reported] == [(n, n != 3) for n in range(5)]


@needs_gpu
def test_the_watch_never_asks_the_device_to_wait() -> None:
    """PyTorch raises where an operation would synchronise."""
    x = torch.randn(16, 21, 64, 112, device="cuda")
    marks = StepMarks(lambda step, seen: None)
    marks.passed(0, value_range(x))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            marks.passed(step, value_range(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    marks.finish()
