"""The public API: the example of the README, inputs in memory, cancelling, use after failures, and wrong use."""

import gc
import json
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime import Cancelled, Clip, NotFinite, Output, Plan, Progress, Request, Result, Session
from scail2_rt.runtime.media.images import load_image, load_mask_image
from scail2_rt.runtime.media.unfinished import partial_path
from scail2_rt.runtime.media.video_reader import VideoReader
from scail2_rt.runtime.pipeline import schedulers
from tests.support.command import read_video

pytest_plugins = ["tests.support.runtime_fixtures"]
QUICK = {"steps": 2, "guidance": 1.0, "segment_length": 13, "frames": 17}  # segments 0..13, 8..17


@pytest.fixture(scope="module")
def session(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session.open(engines, backend="torch", prompt_cache=tmp_path_factory.mktemp("prompts")) as opened:
        yield opened


@pytest.fixture
def quick(request_of: Callable[..., Request]) -> Callable[..., Request]:
    return lambda **changes: request_of(**{**QUICK, **changes})


def frames_of(session: Session, request: Request) -> np.ndarray:
    return np.concatenate(list(session.animate(session.check(request))))


@pytest.fixture
def expected(engines: Path, quick: Callable[..., Request], tmp_path: Path) -> np.ndarray:
    """The frames of a new session."""
    with Session.open(engines, backend="torch", prompt_cache=tmp_path / "fresh") as fresh:
        return frames_of(fresh, quick())


def test_the_lines_of_the_readme_in_a_thread(
    engines: Path, case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Paths as text, in a thread other than the main one; nothing is printed, and no files are left."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = list(logging.getLogger("scail2_rt").handlers), list(logging.getLogger().handlers)
    found: dict[str, Any] = {}

    def work() -> None:
        try:
            with Session.open(str(engines)) as session:
                request = Request(
                    image=str(case / "ref.png"),
                    mask_image=str(case / "ref_mask.png"),
                    driving=str(case / "rendered_v2.mp4"),
                    mask_video=str(case / "rendered_mask_v2.mp4"),
                    prompt="a girl dances",
                    seed=7,
                    size=(64, 96),
                    **QUICK,  # type: ignore[arg-type]
                )
                plan = session.check(request)
                events: list[Progress] = []
                found["result"] = session.generate(plan, str(tmp_path / "out.mp4"), on_progress=events.append)
                found["plan"], found["events"] = plan, events
                found["frames"] = [frames.shape for frames in session.animate(plan)]
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "error" not in found, found
    plan: Plan = found["plan"]
    result: Result = found["result"]
    assert plan.estimate is not None
    assert plan.estimate.total_s > 0
    assert (result.path, result.frames, result.warnings) == (tmp_path / "out.mp4", 17, ())
    assert result.report == json.loads((tmp_path / "out.json").read_text())
    assert result.report["status"] == "complete"
    assert read_video(tmp_path / "out.mp4").frames == 17
    assert sum(shape[0] for shape in found["frames"]) == 17
    assert {shape[1:] for shape in found["frames"]} == {(64, 96, 3)}
    events = found["events"]
    assert [event.step for event in events if event.phase == "denoise" and event.segment == 2][-1] == 2
    assert events[-1].fraction == 1
    assert all(a.fraction <= b.fraction for a, b in pairwise(events))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert (logging.getLogger("scail2_rt").handlers, logging.getLogger().handlers) == loggers


# inputs in memory


@pytest.fixture
def pixels(case: Path) -> dict[str, np.ndarray]:
    """The case as arrays."""
    found = {"image": load_image(case / "ref.png"), "mask_image": load_mask_image(case / "ref_mask.png")}
    for name, file in (("driving", "rendered_v2.mp4"), ("mask_video", "rendered_mask_v2.mp4")):
        with VideoReader(case / file) as reader:
            found[name] = reader.read(1000)
    return found


@pytest.mark.parametrize("form", ["array", "list", "PIL images", "generator", "object"])
def test_equal_content_gives_equal_frames(
    session: Session,
    quick: Callable[..., Request],
    pixels: dict[str, np.ndarray],
    expected: np.ndarray,
    form: str,
) -> None:
    class Frames:
        """An object that can be iterated repeatedly."""

        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __iter__(self) -> Iterator[np.ndarray]:
            return iter(self.array)

    forms: dict[str, Callable[[np.ndarray], Any]] = {
        "array": lambda array: array,
        "list": list,
        "PIL images": lambda array: [Image.fromarray(frame) for frame in array],
        "generator": lambda array: (frame for frame in array),
        "object": Frames,
    }
    clips = {name: Clip(forms[form](pixels[name]), 16) for name in ("driving", "mask_video")}
    still: Callable[[np.ndarray], Any] = Image.fromarray if form == "PIL images" else np.asarray
    stills = {name: still(pixels[name]) for name in ("image", "mask_image")}
    plan = session.check(quick(**clips, **stills))
    assert (plan.frame_rate, plan.frames) == (16, 17)
    for _ in range(2):  # a plan can be run twice, also with a generator's frames
        made = np.concatenate(list(session.animate(plan)))
        assert np.array_equal(made, expected)


def test_a_generator_is_kept_in_a_file_that_goes_with_the_plan(
    session: Session, quick: Callable[..., Request], pixels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    import tempfile

    tempfile.tempdir = str(tmp_path)
    try:
        plan = session.check(quick(driving=Clip((frame for frame in pixels["driving"]), "16")))
        assert len(list(tmp_path.iterdir())) == 1
        result = session.generate(plan, tmp_path / "out" / "a.mp4")
        assert result.report["inputs"]["driving"]["path"] is None
        assert result.report["options"]["driving"] == "Clip in memory"
        del plan
        gc.collect()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    finally:
        tempfile.tempdir = None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"driving": Clip(np.zeros((9, 64, 96, 3), np.float32), 16)}, "driving clip is float32"),
        ({"driving": Clip(np.zeros((9, 64, 96), np.uint8), 16)}, "driving clip has the shape [9, 64, 96]"),
        ({"driving": Clip([], 16)}, "driving clip holds no frame"),
        ({"driving": Clip(iter([]), 16)}, "driving clip holds no frame"),
        ({"driving": Clip(7, 16)}, "driving clip holds int, not frames"),  # type: ignore[arg-type]
        (
            {"driving": Clip([np.zeros((s, 96, 3), np.uint8) for s in (64, 32)], 16)},
            "Frame 1 of the driving clip is 32",
        ),
        ({"image": np.zeros((64, 96), np.uint8)}, "An image in memory is uint8 of shape [64, 96]"),
        ({"start": 30}, "--start 30 is beyond the end"),
        ({"image": "nowhere.png"}, "reference image nowhere.png does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_the_session_goes_on(
    session: Session, quick: Callable[..., Request], expected: np.ndarray, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        session.check(quick(**changes))
    assert says in str(caught.value)
    assert np.array_equal(frames_of(session, quick()), expected)


@pytest.mark.parametrize("rate", [0, -1, "fast", float("nan"), 2000])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(InputError, match="rate of the clip"):
        Clip(np.zeros((1, 8, 8, 3), np.uint8), rate)
    assert Clip(np.zeros((1, 8, 8, 3), np.uint8), "30000/1001").rate == Fraction(30000, 1001)


# cancelling and failing


def test_an_event_ends_the_run_within_a_step(
    session: Session, quick: Callable[..., Request], expected: np.ndarray
) -> None:
    cancel, events = threading.Event(), list[Progress]()

    def listen(event: Progress) -> None:
        events.append(event)
        if event.step == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        list(session.animate(session.check(quick(steps=9)), listen, cancel))
    assert max(event.step for event in events) == 2
    assert np.array_equal(frames_of(session, quick()), expected)


def test_what_a_listener_raises_ends_the_run(
    session: Session, quick: Callable[..., Request], expected: np.ndarray, tmp_path: Path
) -> None:
    def listen(event: Progress) -> None:
        if event.segment == 2 and event.step == 1:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        session.generate(session.check(quick()), tmp_path / "a.mp4", listen)
    assert read_video(partial_path(tmp_path / "a.mp4")).frames == 13  # the finished segment stays
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["status"], report["error"]) == ("partial", "LookupError: enough")
    result = session.generate(session.check(quick()), Output(tmp_path / "a.mp4", resume=True))
    assert result.resumed == 1
    assert result.frames == 17
    assert np.array_equal(frames_of(session, quick()), expected)


def test_closing_the_iterator_ends_the_run(
    session: Session, quick: Callable[..., Request], expected: np.ndarray
) -> None:
    frames = session.animate(session.check(quick()))
    assert len(next(frames))
    with pytest.raises(Scail2Error, match="already generating"):
        next(session.animate(session.check(quick())))
    with pytest.raises(Scail2Error, match="End the generation before"):
        session.close()
    frames.close()  # type: ignore[attr-defined]
    assert np.array_equal(frames_of(session, quick()), expected)


def test_out_of_memory_is_told_and_the_next_request_is_a_fresh_ones(
    session: Session, quick: Callable[..., Request], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = EngineSet.run, []

    def greedy(self: EngineSet, name: str, *inputs: torch.Tensor, **more: Any) -> tuple[torch.Tensor, ...]:
        calls.append(name)
        if calls.count("dit.blocks.1.mid") == 2:
            torch.empty(2**50)
        return run(self, name, *inputs, **more)

    monkeypatch.setattr(EngineSet, "run", greedy)
    with pytest.raises(Scail2Error, match="memory ran out in the phase denoise"):
        frames_of(session, quick())
    assert session.engines.loaded == ()
    monkeypatch.undo()
    assert np.array_equal(frames_of(session, quick()), expected)


def test_nan_ends_the_run_and_leaves_nothing_behind(
    session: Session, quick: Callable[..., Request], expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = schedulers.Scheduler.step
    monkeypatch.setattr(schedulers.Scheduler, "step", lambda self, v, x: step(self, v, x) * float("nan"))
    with pytest.raises(NotFinite, match="after step 1 of 2 of segment 1 of 2") as caught:
        frames_of(session, quick())
    assert session.engines.loaded == ()
    del caught
    monkeypatch.undo()
    assert np.array_equal(frames_of(session, quick()), expected)


# wrong use, and more than one


def test_two_sessions_work_at_once(engines: Path, quick: Callable[..., Request], expected: np.ndarray) -> None:
    with Session.open(engines, backend="torch") as one, Session.open(engines, backend="torch") as other:
        pairs = zip(one.animate(one.check(quick())), other.animate(other.check(quick())), strict=True)
        found = [(a, b) for a, b in pairs]
    for made in zip(*found, strict=True):
        assert np.array_equal(np.concatenate(made), expected)


def test_a_closed_session_says_so(engines: Path, quick: Callable[..., Request]) -> None:
    with Session.open(engines, backend="torch") as session:
        plan = session.check(quick())
    session.close()  # a second call does nothing
    with pytest.raises(Scail2Error, match="session is closed"):
        next(session.animate(plan))


def test_an_output_is_not_replaced_unasked(session: Session, quick: Callable[..., Request], tmp_path: Path) -> None:
    plan = session.check(quick(frames=5))
    first = session.generate(plan, tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"exists.*--overwrite"):
        session.generate(plan, tmp_path / "a.mp4")
    again = session.generate(plan, Output(tmp_path / "a.mp4", overwrite=True))
    assert again.report["output_sha256"] == first.report["output_sha256"]
    with pytest.raises(InputError, match="--crf must be 0 to 51"):
        session.generate(plan, Output(tmp_path / "b.mp4", crf=99))
    assert not (tmp_path / "b.mp4").exists()


def test_a_driving_clip_in_memory_is_part_of_what_a_resumed_run_compares(
    session: Session, quick: Callable[..., Request], pixels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    def stop(event: Progress) -> None:
        if event.segment == 2 and event.step == 1:
            raise LookupError

    request = quick(driving=Clip(pixels["driving"], 16))
    with pytest.raises(LookupError):
        session.generate(session.check(request), tmp_path / "a.mp4", stop)
    other = quick(driving=Clip(pixels["driving"][::-1].copy(), 16))
    with pytest.raises(InputError, match="the input driving has changed"):
        session.generate(session.check(other), Output(tmp_path / "a.mp4", resume=True))
    assert session.generate(session.check(request), Output(tmp_path / "a.mp4", resume=True)).resumed == 1


def test_a_run_that_failed_holds_nothing_while_its_error_is_handled(
    session: Session, quick: Callable[..., Request], expected: np.ndarray, tmp_path: Path
) -> None:
    """The traceback of an error refers to the suspended generator. The session can still be used."""

    def stop(event: Progress) -> None:
        if event.segment == 2:
            raise LookupError

    with pytest.raises(LookupError) as caught:
        session.generate(session.check(quick()), tmp_path / "a.mp4", stop)
    assert caught.tb is not None
    assert np.array_equal(frames_of(session, quick()), expected)


def test_a_refused_run_touches_no_file(session: Session, quick: Callable[..., Request], tmp_path: Path) -> None:
    """The files of an interrupted run and the report of a finished one are kept."""
    plan = session.check(quick())
    session.generate(plan, tmp_path / "whole.mp4")
    with pytest.raises(KeyError):
        session.generate(plan, tmp_path / "part.mp4", on_progress=_raise_in_second_segment)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert partial_path(tmp_path / "part.mp4") in before
    running = session.animate(plan)
    next(running)
    for name in ("whole.mp4", "part.mp4", "new.mp4"):
        with pytest.raises(Scail2Error, match="already generating"):
            session.generate(plan, Output(str(tmp_path / name), overwrite=True))
    running.close()  # type: ignore[attr-defined]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def _raise_in_second_segment(progress: Progress) -> None:
    if progress.segment == 2 and progress.phase == "denoise":
        raise KeyError("stop")


def test_an_error_is_told_although_the_session_is_busy(engines: Path, quick: Callable[..., Request]) -> None:
    running = []

    def fail_while_generating() -> None:
        with Session.open(engines, backend="torch") as opened:
            running.append(opened.animate(opened.check(quick())))
            next(running[0])
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_while_generating()
    running[0].close()  # type: ignore[attr-defined]


def test_numbers_and_pictures_of_numpy_are_taken(
    session: Session, quick: Callable[..., Request], pixels: dict[str, np.ndarray], expected: np.ndarray
) -> None:
    """Arrays that PyTorch cannot use directly (negative strides, read-only) and integers that JSON cannot store."""
    mirrored = np.ascontiguousarray(pixels["image"][:, :, ::-1])[:, :, ::-1]
    mask = pixels["mask_image"].copy()
    mask.flags.writeable = False
    request = quick(image=mirrored, mask_image=mask, seed=np.int64(quick().seed), frames=np.int64(17))
    assert type(request.seed) is int
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(frames_of(session, request), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1.5}, "--seed must be a whole number, not 1.5"),
        ({"steps": "4"}, "--steps must be a whole number, not '4'"),
        ({"guidance": None}, "--guidance must be a number, not None"),
        ({"size": 64}, r"The size must be \(height, width\), not 64"),
        ({"size": (64.0, 64)}, "--size must be a whole number, not 64.0"),
        ({"prompt": None}, "The prompt must be text, not a NoneType"),
        ({"image": [1]}, "The reference image must be a path, a PIL image or an array, not a list"),
        ({"driving": np.zeros((1, 2, 2, 3), np.uint8)}, r"The driving clip must be a path or a Clip\(frames, rate\)"),
        ({"extra_refs": ("a.png", "b.png")}, "Extra references must be pairs"),
    ],
)
def test_inputs_of_a_wrong_kind_are_named(quick: Callable[..., Request], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        quick(**changes)


def test_a_device_that_does_not_exist_is_named(engines: Path) -> None:
    with pytest.raises(InputError, match=r"the device 'mars' is unknown\. Use cpu or cuda"):
        Session.open(engines, device="mars")
