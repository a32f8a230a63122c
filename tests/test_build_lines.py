"""The lines that long work shows on stderr."""

import pytest

from scail2_rt.engines.observe import BuildStep
from scail2_rt.runtime import progress
from scail2_rt.runtime.progress import BuildLines

GIB = 2**30


def test_a_long_step_says_how_far_it_is_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 s between lines; the rate is that of this call: what an earlier one had fetched (20 GiB) does not count."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = BuildLines()
    step = BuildStep("download", 2, 3, "large.pt", 60 * GIB)
    lines.started(step)
    for second in range(25):
        clock[0] = float(second)
        lines.advanced(step, 20 * GIB + second * GIB)
    assert capsys.readouterr().err.splitlines() == [
        "download large.pt: 30.0 of 60.0 GiB, about 30 s left",
        "download large.pt: 40.0 of 60.0 GiB, about 20 s left",
    ]
    lines.started(step)
    clock[0] += 20
    lines.advanced(step, GIB)
    assert capsys.readouterr().err == "download large.pt: 1.0 of 60.0 GiB\n"
