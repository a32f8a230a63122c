"""The run report of a video."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.geometry import plan_segments
from scail2_rt.runtime.session import report


def test_a_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = report.report_path(tmp_path / "a.b.mp4")
    assert path.name == "a.b.json"
    report.write_report(path, {"status": "failed"})
    report.write_report(path, {"status": "complete", "where": str(tmp_path)})
    assert json.loads(path.read_text())["status"] == "complete"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        report.write_report(path, {"status": object()})
    assert json.loads(path.read_text())["status"] == "complete"
    assert list(tmp_path.iterdir()) == [path]


def test_records_become_json() -> None:
    described = plain({"segments": plan_segments(9, 9), "rate": Fraction(30000, 1001), "path": Path("a")})
    assert json.loads(json.dumps(described))["rate"] == "30000/1001"
    assert described["segments"][0]["start"] == 0
