"""Progress events of a run: phases, positions, fractions, cancellation."""

import threading
import time

import pytest

from scail2_rt.runtime.core.progress import Cancelled, Progress, RunProgress


def test_times_of_repeated_phases_are_added() -> None:
    progress = RunProgress()
    for _ in range(2):
        with progress.phase("decode"):
            pass
    first = progress.timings["decode"]
    with pytest.raises(ValueError), progress.phase("decode"):
        raise ValueError
    assert progress.timings["decode"] > first > 0


def test_events_have_position_and_fraction() -> None:
    events: list[Progress] = []
    progress = RunProgress(events.append)
    with progress.phase("text"):
        pass
    progress.begin(3, 4)
    progress.segment(1)
    with progress.phase("denoise"):
        progress.step(1)
    progress.end()
    first, start, phase, step, end = events
    assert (first.phase, first.position, first.fraction, first.seconds_left) == ("text", "", 0, None)
    assert (start.position, start.fraction) == ("segment 2/3, step 0/4", 5 / 15)  # 4 steps and `rest` 1 per segment
    assert phase.phase == step.phase == "denoise"
    assert (step.position, step.fraction) == ("segment 2/3, step 2/4", 7 / 15)
    assert step.seconds_left is not None
    assert (end.fraction, end.seconds_left) == (1, 0)
    assert "47 %  segment 2/3, step 2/4, denoise, about" in str(step)


def test_the_time_left_is_based_on_this_run() -> None:
    events: list[Progress] = []
    progress = RunProgress(events.append)
    progress.begin(2, 3, before=1, rest=0)
    time.sleep(0.01)
    progress.segment(1)
    assert events[-1].seconds_left is None  # an earlier run made the first segment, so this run has done nothing yet
    progress.step(1)
    left = events[-1].seconds_left
    assert left is not None
    assert left > 0  # two of three steps took at least 0.01 s, so one takes half as long


def test_a_cancelled_run_ends_at_the_next_event() -> None:
    cancel = threading.Event()
    progress = RunProgress(cancel=cancel)
    progress.begin(1, 5)
    progress.segment(0)
    progress.step(0)
    cancel.set()
    with pytest.raises(Cancelled), progress.phase("decode"):
        pass
    with pytest.raises(Cancelled):
        progress.step(1)
    progress.end()  # a finished run is not cancelled


def test_errors_of_a_listener_reach_the_caller() -> None:
    def stop(event: Progress) -> None:
        raise LookupError(event.phase)

    with pytest.raises(LookupError, match="text"), RunProgress(stop).phase("text"):
        pass
