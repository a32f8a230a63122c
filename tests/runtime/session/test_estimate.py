"""The estimate of a plan's time and memory, and its text."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scail2_rt.engines.engine_set import Execution
from scail2_rt.runtime.core.geometry import forward_flops
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.session import estimate
from scail2_rt.runtime.session.session import Session

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.fixture(scope="module")
def session(engines: Path) -> Iterator[Session]:
    with Session.open(engines, backend="torch") as opened:
        yield opened


@pytest.fixture
def plan_of(session: Session, request_of: Callable[..., Request]) -> Callable[..., Plan]:
    return lambda **changes: session.check(request_of(**changes))


def test_work_counts_every_segment_step_and_pass(plan_of: Callable[..., Plan], session: Session) -> None:
    plan = plan_of(segment_length=13, steps=4, guidance=1.0)
    assert plan.estimate is not None
    once = plan.estimate.flop
    assert session.engines.config.dit is not None
    assert once["denoise"] == 2 * 4 * forward_flops(session.engines.config.dit, plan.layout)
    guided = plan_of(segment_length=13, steps=8, guidance=2.0).estimate
    assert guided is not None
    assert guided.flop["denoise"] == 4 * once["denoise"]
    assert guided.flop["decode"] == once["decode"]
    wider = plan_of(segment_length=13, steps=4, guidance=1.0, size=(64, 192)).estimate
    assert wider is not None
    assert wider.flop["decode"] == pytest.approx(2 * once["decode"])


def test_memory_grows_with_the_layout_and_falls_with_row_chunks(
    plan_of: Callable[..., Plan], session: Session, engines: Path
) -> None:
    small, large = plan_of().estimate, plan_of(size=(512, 768)).estimate
    assert small is not None
    assert large is not None
    with Session.open(engines, backend="torch", execution=Execution(max_rows=1024)) as chunked:
        fewer = chunked.fit(plan_of(size=(512, 768))).estimate
    assert fewer is not None
    stages = session.engines.manifest.stages
    weights = sum(stage.weight_bytes for stage in stages if stage.name.startswith("dit.blocks"))
    assert weights / 2 < small.memory["denoise"] < large.memory["denoise"]
    assert fewer.memory["denoise"] < large.memory["denoise"]
    assert small.memory["text"] == large.memory["text"]
    assert small.peak == max(small.memory.values())  # on a CPU no library reserves memory


def test_text_and_json(plan_of: Callable[..., Plan]) -> None:
    plan = replace(plan_of(segment_length=13), warnings=("Look at the masks.",))
    assert plan.estimate is not None
    text = estimate.as_text(plan, plan.estimate)
    assert "2: frames 8 to 20, 5 of them shared with the previous segment" in text
    assert "40 unipc steps per segment, 2 passes per step" in text
    assert text.endswith("warning: Look at the masks.")
    assert math.isclose(plan.estimate.total_s, sum(plan.estimate.seconds.values()))
    described = json.loads(json.dumps(estimate.described(plan, plan.estimate)))
    assert described["frames"] == 21
    assert described["peak_gib"] == plan.estimate.peak / 2**30


def test_one_of_a_thing_is_not_many() -> None:
    assert [estimate.counted(n, "frame") for n in (1, 2)] == ["1 frame", "2 frames"]
    assert [estimate.counted(n, "pass") for n in (1, 2)] == ["1 pass", "2 passes"]


def test_rates_of_another_device_are_not_used(session: Session, engines: Path) -> None:
    last = engines / estimate.LAST_RUN
    before = last.read_text() if last.exists() else None
    try:
        last.write_text('{"device": "torch on another", "flop_per_s": {"denoise": 1, "vae": 1}}')
        rates, basis = estimate.Rates(session.engines).get()
        assert rates["denoise"] > 1e6
        assert "matrix product" in basis
        here = {"device": estimate.device_name(session.engines), "flop_per_s": {"denoise": 5.0, "vae": 7.0}}
        last.write_text(json.dumps(here))
        assert estimate.Rates(session.engines).get()[0] == {"denoise": 5.0, "vae": 7.0}
    finally:
        last.unlink() if before is None else last.write_text(before)


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (725, "12 min 5 s"), (7800, "2 h 10 min")])
def test_duration(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text
