"""From a request to its generation plan, without weights: reading, derived values and errors."""

import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.media import clips
from scail2_rt.runtime.session.check import check_output, check_request, check_room
from tests.support.clips import write_clip

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_plan_of_a_request(request_of: Callable[..., Request]) -> None:
    plan = check_request(request_of(segment_length=13, prompt="  a&amp;amp;b \n c ", start=4))
    assert (plan.height, plan.width, plan.frames, plan.frame_rate) == (64, 96, 17, 16)
    assert plan.request.prompt == "a&b c"
    assert [(s.start, s.valid_end) for s in plan.segments] == [(0, 13), (8, 17)]
    assert plan.mode == "animate"
    assert plan.audio
    assert (plan.start_s, plan.timestamps) == (Fraction(1, 4), None)
    assert plan.layout.tokens == 24 + 4 * 24 + 4 * 6
    assert plan.warnings == ()


@pytest.mark.parametrize(("shape", "size"), [((64, 96), (512, 896)), ((96, 64), (896, 512)), ((80, 80), (512, 896))])
def test_default_size_turns_with_the_reference(
    request_of: Callable[..., Request], tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    Image.new("RGB", shape[::-1], (255, 255, 255)).save(tmp_path / "ref.png")
    mask = np.full((*shape, 3), 255, np.uint8)
    mask[20:40, 20:40] = (255, 0, 0)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    plan = check_request(request_of(image=tmp_path / "ref.png", mask_image=tmp_path / "mask.png", size=None))
    assert (plan.height, plan.width) == size


def test_variable_frame_rate_keeps_its_times(request_of: Callable[..., Request], tmp_path: Path) -> None:
    frames = np.full((6, 64, 96, 3), 90, np.uint8)
    pts = [0, 40, 120, 160, 280, 300]
    write_clip(tmp_path / "v.mp4", frames, pts=pts, time_base=Fraction(1, 1000))
    frames[:, 10:50, 30:60] = (255, 0, 0)
    write_clip(
        tmp_path / "m.mp4", frames, pts=pts, time_base=Fraction(1, 1000), codec="libx264rgb", pixel_format="rgb24"
    )
    frames[(frames == 90).all(-1)] = 0
    write_clip(tmp_path / "m.mp4", frames, codec="libx264rgb", pixel_format="rgb24", options={"crf": "0"})
    plan = check_request(request_of(driving=tmp_path / "v.mp4", mask_video=tmp_path / "m.mp4", start=2))
    assert plan.timestamps == tuple(Fraction(n, 1000) for n in pts[2:])
    assert plan.start_s == Fraction(120, 1000)
    assert not plan.audio


def test_nothing_is_written(request_of: Callable[..., Request], tmp_path: Path) -> None:
    request, output = request_of(), Output(tmp_path / "deep" / "er" / "a.mp4")
    check_output(output, request)
    check_room(output, check_request(request))
    assert list(tmp_path.iterdir()) == []


def test_masks_of_another_shape_than_the_clip_warn(request_of: Callable[..., Request], tmp_path: Path) -> None:
    frames = np.zeros((21, 64, 64, 3), np.uint8)
    frames[:, 10:50, 30:50] = (255, 0, 0)
    write_clip(tmp_path / "m.mp4", frames, codec="libx264rgb", pixel_format="rgb24", options={"crf": "0"})
    plan = check_request(request_of(mask_video=tmp_path / "m.mp4"))
    assert any("64x64" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "--steps must be 1 to 1000, not 0"),
        ({"shift": float("nan")}, "--shift must be a number above 0"),
        ({"scheduler": "heun"}, "--scheduler must be one of unipc, dpm"),
        ({"mode": "swap"}, "--mode must be one of auto, animate, replace, not swap"),
        ({"size": (60, 96)}, "divisible by 32"),
        ({"segment_length": 12}, "4n"),
        ({"overlap_blend": 6}, "--overlap-blend must be 0 to --segment-overlap 5"),
    ],
)
def test_a_request_checks_its_numbers(
    request_of: Callable[..., Request], changes: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        request_of(**changes)
    assert says in str(caught.value)


def test_all_wrong_numbers_are_told_at_once(request_of: Callable[..., Request]) -> None:
    with pytest.raises(InputError, match=r"--steps .*; --seed .*--overlap-blend"):
        request_of(steps=-1, seed=-1, overlap_blend=9)


@pytest.mark.parametrize("reason", [InputError("unreadable"), KeyboardInterrupt()])
def test_a_check_that_ends_early_does_not_read_the_mask_video_to_its_end(
    request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    request, began, ended = request_of(), threading.Event(), threading.Event()

    def probe(source: object, rate: object = None, tell: Tell = untold) -> None:
        if source == request.driving:
            assert began.wait(30)
            raise reason
        began.set()
        for _ in range(200):
            time.sleep(0.05)
            tell(0.5)
        ended.set()

    monkeypatch.setattr(clips, "probe", probe)
    with pytest.raises(type(reason)):
        check_request(request)
    assert not ended.is_set()
