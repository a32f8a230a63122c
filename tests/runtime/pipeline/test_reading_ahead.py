"""Segments of files are read in threads, one ahead; frames of the caller are asked for in the caller's thread."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.core.request import Clip
from scail2_rt.runtime.pipeline import driving
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.driving import _in_turn, open_clips
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.pipeline.transformer import release_prefetched

FILES = SimpleNamespace(driving=Path("a.mp4"), mask_video=Path("m.mp4"))
WAIT_S = 30


@dataclass
class Source:
    """Stands for `read_clips`: gives numbers; `fails_at` raises; the events say which have been read."""

    count: int
    fails_at: int = -1

    def __post_init__(self) -> None:
        self.read = [threading.Event() for _ in range(self.count)]
        self.threads: set[int] = set()
        self.closed = False

    def __call__(self, plan: Any, first: int, run: Callable[..., Iterable[int]] = _in_turn) -> Iterator[int]:
        try:
            for number in range(first, self.count):
                if number == self.fails_at:
                    raise Scail2Error("the clip ended early")
                self.threads |= {threading.get_ident(), *run([threading.get_ident] * 2)}
                self.read[number].set()
                yield number
        finally:
            self.closed = True


@pytest.fixture
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Source:
    made = Source(*getattr(request, "param", (4,)))
    monkeypatch.setattr(driving, "read_clips", made)
    return made


def plan_of(inputs: Any) -> Any:
    return SimpleNamespace(request=inputs)


def test_the_next_segment_is_read_while_one_is_used(source: Source) -> None:
    with open_clips(plan_of(FILES), 1) as clips:
        assert source.read[1].wait(WAIT_S)  # before anybody asks
        assert next(clips) == 1
        assert source.read[2].wait(WAIT_S)
        assert not source.read[3].is_set()
        assert list(clips) == [2, 3]
    assert source.closed
    assert threading.get_ident() not in source.threads
    assert not source.read[0].is_set()


def test_a_run_that_ends_early_closes_the_files(source: Source) -> None:
    with pytest.raises(KeyboardInterrupt), open_clips(plan_of(FILES)):
        raise KeyboardInterrupt
    assert source.closed


@pytest.mark.parametrize("source", [(3, 1)], indirect=True)
def test_what_fails_ahead_is_raised_where_it_is_needed(source: Source) -> None:
    with open_clips(plan_of(FILES)) as clips:
        assert next(clips) == 0
        with pytest.raises(Scail2Error, match="ended early"):
            next(clips)
    assert source.closed


class Reader:
    """Stands for a video: its frame comes late (the mask), or it fails meanwhile (the clip)."""

    def __init__(self, name: str, began: threading.Event) -> None:
        self.name, self.began, self.position = name, began, 0
        self.closed, self.cut_off = threading.Event(), False

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def read(self, count: int) -> Any:
        if self.name == str(FILES.driving):
            assert self.began.wait(WAIT_S)
            raise Scail2Error("the clip ended early")
        self.began.set()
        self.cut_off = self.closed.wait(0.5)
        raise Scail2Error("not reported")


def test_no_file_is_closed_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    readers = {path: Reader(str(path), began) for path in (FILES.driving, FILES.mask_video)}
    monkeypatch.setattr(driving, "open_video", lambda source, *_: readers[source])
    request = SimpleNamespace(**vars(FILES), start=0)
    plan: Any = SimpleNamespace(request=request, segments=[Segment(0, 5, 5, 0)], chosen=None, driving_window=None)
    with open_clips(plan) as clips, pytest.raises(Scail2Error, match="ended early"):
        next(clips)
    assert all(reader.closed.is_set() for reader in readers.values())
    assert not readers[FILES.mask_video].cut_off


def test_frames_of_the_caller_are_asked_for_in_its_thread(source: Source) -> None:
    clip = Clip(np.zeros((4, 32, 32, 3), np.uint8), 16)
    with open_clips(plan_of(SimpleNamespace(driving=clip, mask_video=FILES.mask_video))) as clips:
        assert not source.read[0].is_set()
        assert list(clips) == [0, 1, 2, 3]
    assert source.threads == {threading.get_ident()}


def test_context_weights_are_prefetched_as_far_as_there_is_room() -> None:
    engines: Any = None
    way = Placement("resident", 40, 40, True, needed=100, budget=200, references=20, context_block=25)
    assert Constants(engines).stages_of_contexts(way) == [f"dit.blocks.{i}.context_kv" for i in range(3)]
    assert [way.contexts_ahead(reserved) for reserved in (0, 30, 56, 90)] == [3, 2, 0, 0]
    assert replace(way, context_block=1).contexts_ahead(0) == 40  # at most every block
    assert Constants(engines).stages_of_contexts(None) == []


def test_weights_that_were_prefetched_and_not_used_are_dropped() -> None:
    dropped: list[str] = []
    engines: Any = SimpleNamespace(release=dropped.append, config=SimpleNamespace(dit=SimpleNamespace(layers=2)))
    release_prefetched(engines)
    assert dropped == ["dit.blocks.0.context_kv", "dit.blocks.1.context_kv", "clip"]
