"""The progress display of the commands."""

import io

import pytest

from scail2_rt.runtime.cli.progress import ProgressLines, open_progress, progress_bar
from scail2_rt.runtime.core.progress import RunProgress


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress(ProgressLines())
    progress.begin(2, 50)
    for segment in range(2):
        progress.segment(segment)
        for step in range(50):
            progress.step(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "segment 1/2, step 0/50"
    assert lines[-1].startswith("segment 2/2, step 50/50")
    assert len(lines) == 3


def test_the_bar_shows_segment_step_phase_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    stream, shown = io.StringIO(), []
    monkeypatch.setattr("sys.stderr", stream)
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda self, task, **more: shown.append(more) or update(self, task, **more))
    with progress_bar() as listener:
        progress = RunProgress(listener)
        with progress.phase("text"):
            pass
        progress.begin(2, 4)
        progress.segment(1)
        with progress.phase("denoise"):
            progress.step(1)
    assert shown[0]["description"] == "text"
    assert shown[0]["total"] is None  # no estimate yet
    assert shown[-1]["description"] == "segment 2/2, step 2/4, denoise"
    assert shown[-1]["completed"] == 7 / 10
    assert shown[-1]["left"].startswith("0:00:")


@pytest.mark.parametrize(("term", "lines"), [("xterm", False), ("dumb", True)])
def test_a_terminal_that_draws_no_bar_gets_lines(monkeypatch: pytest.MonkeyPatch, term: str, lines: bool) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", term)
    with open_progress() as listener:
        assert isinstance(listener, ProgressLines) == lines
