"""`scail2-rt bench` through the installed command with the tiny model: every section, saving, merging, comparing.

Times on a CPU are not meaningful. The tests check that each section measures the rows and baselines that it names, and
that results survive a killed run, a merge and a comparison."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import SCAIL2_RT, Run, command_environment, error_of, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def everything(work: Path, scail2: Run) -> tuple[dict[str, Any], str]:
    """`bench all` with the tiny model: (results, stdout)."""
    words = (
        "--config",
        "tiny",
        "--runs",
        2,
        "--work",
        work,
        "--json",
        work / "all.json",
        "--clients",
        5,
        "--queued",
        5,
    )
    result = scail2("bench", "all", *words, "--report", work / "all.html", "--summary", work / "summary.json")
    assert result.returncode == 0, result.stderr
    return json.loads((work / "all.json").read_text()), result.stdout


def rows_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["rows"]}


@pytest.mark.slow
def test_all_sections_measure_and_merge(everything: tuple[dict[str, Any], str], work: Path) -> None:
    document, stdout = everything
    rows = rows_of(document)
    sections = {name.partition("/")[0] for name in rows}
    assert sections == {"ceiling", "attention", "kernels", "stages", "forward", "vae", "load", "generate", "serve"}
    assert not [name for name, row in rows.items() if row["failure"]]
    for name in ("forward/fp8/144", "forward/bf16/144", "forward/official/144", "forward/compile/144"):
        assert rows[name]["timing"]["median_s"] > 0
    assert rows["forward/official/144"]["kind"] == "baseline"
    assert "needs a GPU" in rows["generate/limit-12GiB/13f-2steps"]["note"]
    for name in ("load/first-step", "load/weights"):
        assert "check_percent" in rows[name]["values"]
        assert rows[f"{name}-unchecked"]["timing"]["median_s"] > 0
    assert rows["load/warm-request"]["timing"]["median_s"] > 0
    assert "needs a GPU" in rows["load/cold-kernels"]["note"]
    for name in ("fa3-bf16", "fa3-fp8", "comfy-int8"):
        assert rows[f"attention/{name}"]["kind"] == "baseline"
        assert "needs an NVIDIA GPU" in rows[f"attention/{name}"]["note"]
    assert len(document["runs"]) == 8
    assert {"command", "date", "versions", "device"} <= document["runs"][0].keys()
    last = json.loads(stdout.splitlines()[-1])
    assert last["summary"] == {
        k: v for k, v in json.loads((work / "summary.json").read_text()).items() if k in last["summary"]
    }
    assert {"speedup_vs_official", "attention_error_realistic", "vae_decode_s", "load_to_first_step_s"} <= last[
        "summary"
    ].keys()
    assert last["goals"] == {}  # goals are for the 14B model
    html = (work / "all.html").read_text()
    assert html.count("<svg") >= 2
    assert "FLOP per byte" in html


@pytest.mark.slow
def test_errors_are_those_of_the_arithmetic(everything: tuple[dict[str, Any], str]) -> None:
    """Errors are not zero, because fp8 differs from fp32, and small, because fast path and reference share weights and
    inputs."""
    rows = rows_of(everything[0])

    def error(name: str) -> float:
        return rows[name]["values"]["error"]

    assert 0.005 < error("forward/error/fp8-auto") < 0.1
    assert 0.0005 < error("forward/error/bf16-auto") < 0.01
    assert 0.01 < error("stages/qkv-fp8/144") < 0.06
    assert 0.0005 < error("stages/qkv-bf16/144") < 0.01
    assert error("vae/decode/fp16") < 0.01
    assert error("attention/8bit/error/realistic") < 0.03
    assert error("attention/8bit/error/shifted") < 0.005 < error("attention/8bit/error/normal") < 0.04


@pytest.mark.slow
def test_compare_tells_regressions_from_noise(
    everything: tuple[dict[str, Any], str], tmp_path: Path, scail2: Run
) -> None:
    document = everything[0]
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    for row in document["rows"]:
        if row["timing"]:
            row["timing"] |= {"low_s": row["timing"]["median_s"], "high_s": row["timing"]["median_s"]}
    before.write_text(json.dumps(document))
    assert scail2("bench", "compare", before, before).returncode == 0
    changed = json.loads(before.read_text())
    rows_of(changed)["forward/official/144"]["timing"]["median_s"] *= 2  # a slower baseline is a slower machine
    after.write_text(json.dumps(changed))
    assert scail2("bench", "compare", before, after).returncode == 0
    rows_of(changed)["forward/fp8/144"]["timing"]["median_s"] *= 1.04
    after.write_text(json.dumps(changed))
    result = scail2("bench", "compare", before, after)
    assert result.returncode == 1
    assert json.loads(result.stdout.splitlines()[-1])["regressions"] == ["forward/fp8/144"]
    timing = rows_of(changed)["forward/fp8/144"]["timing"]
    timing["high_s"] = timing["median_s"] * 1.03  # noise is then six per cent
    after.write_text(json.dumps(changed))
    assert scail2("bench", "compare", before, after).returncode == 0
    rows_of(changed)["vae/decode/fp16"]["values"]["error"] *= 1.2
    after.write_text(json.dumps(changed))
    assert scail2("bench", "compare", before, after).returncode == 1


@pytest.mark.slow
def test_merge_keeps_the_last_measured_row(everything: tuple[dict[str, Any], str], tmp_path: Path, scail2: Run) -> None:
    document = everything[0]
    first, second, merged = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "merged.json"
    rows = rows_of(document)
    rows["forward/fp8/144"]["values"] = {"tflops": 1.0}
    first.write_text(json.dumps(document))
    rows["forward/fp8/144"]["values"] = {"tflops": 2.0}
    rows["forward/bf16/144"] |= {"timing": None, "values": {}, "failure": "it broke"}
    second.write_text(json.dumps(document))
    assert scail2("bench", "merge", first, second, "-o", merged).returncode == 0
    found = rows_of(json.loads(merged.read_text()))
    assert found["forward/fp8/144"]["values"] == {"tflops": 2.0}
    assert found["forward/fp8/144"]["run"] >= len(document["runs"])
    assert not found["forward/bf16/144"]["failure"]
    report = scail2("bench", "report", merged, "-o", tmp_path / "m.html", "--summary", tmp_path / "s.json")
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "m.html").is_file()
    assert "forward_fp8_144_s" in json.loads((tmp_path / "s.json").read_text())


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    words = ["bench", "kernels", "--config", "tiny", "--runs", "500", "--work", str(tmp_path), "--json", str(output)]
    process = subprocess.Popen(
        [str(SCAIL2_RT), *words],
        env=unmeasured(command_environment(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if output.is_file() and len(json.loads(output.read_text())["rows"]) >= 3:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait(timeout=30)
    rows = rows_of(json.loads(output.read_text()))
    assert rows["ceiling/copy"]["timing"]["runs"] == 500


def test_only_measures_what_it_names(tmp_path: Path, scail2: Run) -> None:
    words = ("--config", "tiny", "--runs", 1, "--work", tmp_path, "--only", "forward/compile/*")
    result = scail2("bench", "forward", *words, "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    rows = rows_of(json.loads((tmp_path / "r.json").read_text()))
    assert {name for name in rows if name.startswith("forward/")} == {"forward/compile/144"}


def test_a_baseline_can_be_chosen_and_other_rows_are_not_shown(tmp_path: Path, scail2: Run) -> None:
    words = ("--config", "tiny", "--work", tmp_path, "--only", "load/first-step-unchecked")
    result = scail2("bench", "load", *words, "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    rows = rows_of(json.loads((tmp_path / "r.json").read_text()))
    assert {name for name in rows if name.startswith("load/")} == {"load/first-step", "load/first-step-unchecked"}


def test_mistakes_are_one_line(tmp_path: Path, scail2: Run) -> None:
    assert "no standard size" in error_of(scail2("bench", "stages", "--config", "tiny", "--sizes", "777"))
    assert "divisible by 32" in error_of(scail2("bench", "stages", "--config", "tiny", "--sizes", "50x64x13"))
    wrong = scail2("bench", "stages", "--config", "tiny", "--weights", tmp_path, "--work", tmp_path)
    assert "engine folder" in error_of(wrong)
    (tmp_path / "x.json").write_text("{}")
    assert "not a result of scail2-rt bench" in error_of(
        scail2("bench", "compare", tmp_path / "x.json", tmp_path / "x.json")
    )


def test_goals_are_judged_by_value() -> None:
    from scail2_rt.benchmarks.report.goals import Goal, judged
    from scail2_rt.benchmarks.report.record import Results, Row, Timing

    slow, fast = Goal("t", "k", 3.5, 3.1), Goal("t", "k", 830, 950, larger=True)
    assert [slow.status(value) for value in (None, 3.6, 3.5, 3.1)] == [
        "not measured",
        "FAIL",
        "PASS",
        "PASS, aim reached",
    ]
    assert [fast.status(value) for value in (829.0, 830.0, 951.0)] == ["FAIL", "PASS", "PASS, aim reached"]
    rows = [
        Row("forward/fp8/48832", timing=Timing(3.0, 3.0, 3.0, 5)),
        Row("forward/official/48832", "baseline", Timing(6.0, 6.0, 6.0, 5)),
        Row("forward/compile/48832", "baseline", failure="out of memory"),
    ]
    results = Results("14b", (), {row.name: row for row in rows})
    statuses = {goal.key: status for goal, _, status in judged(results)}
    assert statuses["forward_fp8_48832_s"] == statuses["speedup_vs_official"].replace("PASS", "PASS, aim reached")
    assert statuses["speedup_vs_compile"] == statuses["vae_decode_s"] == "not measured"
    other_run = replace(rows[1], run=1)  # a baseline of another run proves nothing
    statuses = {goal.key: status for goal, _, status in judged(results.with_row(other_run))}
    assert statuses["speedup_vs_official"] == "not measured"


def test_standard_sizes_have_the_tokens_they_are_named_for() -> None:
    from scail2_rt.benchmarks.command import MODELS as NAMES
    from scail2_rt.benchmarks.speed.models import MODELS, STANDARD

    assert [work.tokens for work in STANDARD] == [48_832, 95_920, 42_510]
    assert tuple(MODELS) == NAMES


@pytest.mark.slow
def test_grid_measures_short_schedules_and_computes_long_ones(work: Path, tmp_path: Path, scail2: Run) -> None:
    words = ("--config", "tiny", "--runs", 1, "--work", work, "--json", tmp_path / "grid.json")
    result = scail2("bench", "grid", *words, "--steps", "2,40:5", "--limits", "none,12", "--measure", "3")
    assert result.returncode == 0, result.stderr
    rows = rows_of(json.loads((tmp_path / "grid.json").read_text()))
    short, long = (rows[f"grid/64x96x13/resident/{name}"] for name in ("2steps", "40steps-guidance5"))
    assert (short["note"], long["note"]) == ("", "computed from 3 steps")
    assert long["timing"]["median_s"] > 37 * long["values"]["step_s"]
    assert "needs a GPU" in rows["grid/64x96x13/limit-12GiB"]["note"]
    table = [line for line in result.stdout.splitlines() if line.startswith("| 64x96x13")]
    assert [line.split(" | ")[2:4] for line in table[:2]] == [["2", "1"], ["40", "5"]]
    assert table[0].endswith("measured |")
    assert table[1].endswith("computed from 3 steps |")


@pytest.mark.parametrize(
    ("option", "value"), [("--steps", "4,x"), ("--steps", "0"), ("--steps", "4:0.5"), ("--limits", "12GiB")]
)
def test_a_grid_of_nonsense_is_refused(option: str, value: str, work: Path, scail2: Run) -> None:
    result = scail2("bench", "grid", "--config", "tiny", "--work", work, option, value)
    assert option in error_of(result)
