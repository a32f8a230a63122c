"""Values that are computed once: calls are counted on a CPU, with recorded steps simulated by functions of fixed
buffers."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime import Request, Session
from scail2_rt.runtime.pipeline.constants import LAYOUTS
from scail2_rt.runtime.pipeline.cuda_graph import Function, GraphPool, Recording, StepGraph

pytest_plugins = ["tests.support.runtime_fixtures"]
THREE_EQUAL = {"segment_length": 9, "frames": 17, "steps": 3, "guidance": 1.0}  # 0..9, 4..13, 8..17


def record_on_cpu(self: GraphPool, function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Like a CUDA graph: fixed inputs and outputs, and a replay without arguments."""
    static = tuple(tensor.clone() for tensor in inputs)
    outputs = function(*static)

    def replay() -> None:
        for output, value in zip(outputs, function(*static), strict=True):
            output.copy_(value)

    self.recorded += 1
    return Recording(static, outputs, replay)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each stage was run."""
    counts: Counter[str] = Counter()
    run = EngineSet.run

    def counted(self: EngineSet, name: str, *inputs: Tensor, **more: Any) -> tuple[Tensor, ...]:
        counts[name] += 1
        return run(self, name, *inputs, **more)

    monkeypatch.setattr(EngineSet, "run", counted)
    return counts


@pytest.fixture
def session(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(EngineSet, "cuda_graphs", True)
    monkeypatch.setattr(GraphPool, "record", record_on_cpu)
    with Session.open(engines, backend="torch") as opened:
        yield opened


@pytest.fixture
def eager(engines: Path) -> Iterator[Session]:
    with Session.open(engines, backend="torch") as opened:
        yield opened


def frames_of(session: Session, request: Request) -> np.ndarray:
    return np.concatenate(list(session.animate(session.check(request))))


def test_three_equal_segments_record_one_graph_and_load_time_once(
    session: Session, runs: Counter[str], request_of: Callable[..., Request]
) -> None:
    frames_of(session, request_of(**THREE_EQUAL))
    constants = session.constants
    assert (constants.graphs_recorded, runs["dit.time"]) == (1, 1)
    frames_of(session, request_of(**THREE_EQUAL, seed=3, prompt="another"))
    assert (constants.graphs_recorded, runs["dit.time"]) == (1, 1)
    frames_of(session, request_of(**{**THREE_EQUAL, "frames": 15}))  # the last segment is shorter, padded to 4n+1
    assert (constants.graphs_recorded, runs["dit.time"]) == (1, 1)
    frames_of(session, request_of(**{**THREE_EQUAL, "frames": 5, "steps": 4}))
    assert (constants.graphs_recorded, runs["dit.time"]) == (2, 2)  # another layout, another schedule


def test_references_are_embedded_once_per_request(
    session: Session, runs: Counter[str], request_of: Callable[..., Request]
) -> None:
    frames_of(session, request_of(**THREE_EQUAL))
    steps = 2 + 1 + 1 + 3 + 3 + 3  # in the first segment one eager and one recorded call before each is replayed
    assert runs["dit.embed"] == 1 + 3 + runs["dit.head"]  # references once, driving per segment, video per call
    assert steps >= runs["dit.head"] > 9


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_recorded_steps_give_what_eager_ones_do(
    session: Session, eager: Session, request_of: Callable[..., Request], guidance: float
) -> None:
    """Also for the next request: other references, prompt and driving frames use the same buffers."""
    monkey = {**THREE_EQUAL, "guidance": guidance}
    requests = [request_of(**monkey, prompt="one"), request_of(**monkey, prompt="two", seed=5, start=3)]
    for request in requests:
        recorded = frames_of(session, request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EngineSet, "cuda_graphs", False)
            assert np.array_equal(recorded, frames_of(eager, request))
    assert session.constants.graphs_recorded == 1


def test_another_number_of_passes_has_buffers_of_its_own(
    session: Session, eager: Session, request_of: Callable[..., Request]
) -> None:
    requests = [request_of(**{**THREE_EQUAL, "frames": 9, "guidance": g}) for g in (1.0, 3.0, 1.0)]
    made = [frames_of(session, request) for request in requests]
    assert session.constants.graphs_recorded == 3  # the buffers of one pass went when two were asked for
    assert np.array_equal(made[0], made[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineSet, "cuda_graphs", False)
        assert np.array_equal(made[1], frames_of(eager, requests[1]))


def test_few_layouts_are_kept(session: Session, request_of: Callable[..., Request]) -> None:
    widths = [64, 96, 128, 160][: LAYOUTS + 1]
    for width in (*widths, widths[0]):
        frames_of(session, request_of(**{**THREE_EQUAL, "frames": 5, "size": (64, width)}))
    assert session.constants.graphs_recorded == len(widths) + 1  # the first was given up for the last


def test_a_step_runs_eagerly_then_is_recorded_then_replayed() -> None:
    calls: list[str] = []

    class Pool(GraphPool):
        def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
            calls.append("record")
            return record_on_cpu(self, function, inputs)

    def double(x: Tensor) -> list[Tensor]:
        calls.append("call")
        return [2 * x]

    graph = StepGraph(Pool())
    results = [graph.call(double, torch.tensor([float(i)]))[0] for i in range(4)]
    assert [result.item() for result in results] == [0, 2, 4, 6]  # each result is a copy, which is not overwritten
    assert calls == ["call", "record", "call", "call", "call", "call"]
