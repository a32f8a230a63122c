"""Progress of the `masks` commands, shown after two seconds."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from scail2_rt.runtime.cli.main import cli
from scail2_rt.runtime.core.progress import Progress, Work, within
from tests.support.mask_cases import blocks, make_case, video


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize(
    ("words", "phase"),
    [
        (("check", "--case", "case"), "mask check"),
        (("check", "case/rendered_mask_v2.mp4"), "mask check"),
        (("preview", "--case", "case", "-o", "out"), "mask preview"),
        (("clean", "case/rendered_mask_v2.mp4", "-o", "m.mp4"), "masks"),
        (("from-grey", "grey.mp4", "-o", "m.mp4", "--mode", "animate"), "masks"),
        (("from-labels", "grey.mp4", "-o", "m.mp4", "--mode", "animate", "--order", "255=red"), "masks"),
    ],
)
def test_long_work_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], phase: str, silent: bool
) -> None:
    make_case(tmp_path / "case")
    video(tmp_path / "grey.mp4", *[blocks("black", "white")] * 12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Work, "SILENT_S", 1e9 if silent else 0.0)
    result = CliRunner().invoke(cli, ["masks", *words])
    assert result.exit_code == 0, result.output
    assert (f" %  {phase}, about " in result.stderr) is not silent
    assert " %  " not in result.stdout


def test_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Progress] = []
    now = iter([100.0, 101.0, 103.0, 104.0])
    monkeypatch.setattr("scail2_rt.runtime.core.progress.time.perf_counter", lambda: next(now))
    work = Work("masks", told.append)
    second_half = within(work, 0.5, 1.0)
    work(0.2)  # one second: no progress
    second_half(0.5)
    work(1.0)  # no progress at the end
    assert [(event.phase, event.fraction, event.seconds_left) for event in told] == [("masks", 0.75, 1.0)]
