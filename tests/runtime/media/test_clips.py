"""Selection of frames by time, and folders of images as clips."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.request import Clip
from scail2_rt.runtime.media.clips import nearest_frames, open_video, own_span, probe
from scail2_rt.runtime.media.lossless import write_video


def numbered(count: int) -> np.ndarray:
    """Frames [count, 32, 32, 3] whose level is the frame number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 32, 32, 3)).copy()


@pytest.mark.parametrize(
    ("count", "own", "rate", "expected"),
    [
        (8, 16, 8, [0, 2, 4, 6]),
        (9, 16, 8, [0, 2, 4, 6, 8]),
        (4, 8, 16, [0, 0, 1, 1, 2, 2, 3, 3]),  # the earlier of two equally near frames
        (6, 24, 16, [0, 1, 3, 4]),
        (5, Fraction(30000, 1001), Fraction(30000, 1001), [0, 1, 2, 3, 4]),
        (1, 25, 1, [0]),
        (2, 1, 3, [0, 0, 1, 1, 1, 1]),
    ],
)
def test_the_nearest_frame_in_time(count: int, own: Fraction, rate: Fraction, expected: list[int]) -> None:
    video = probe(Clip(numbered(count), Fraction(own)))
    assert list(nearest_frames(video, Fraction(rate))) == expected


def test_times_of_a_variable_rate_count(tmp_path: Path) -> None:
    video = probe(Clip(numbered(4), Fraction(10)))
    times = tuple(Fraction(time, 1000) for time in (0, 40, 300, 320))
    assert nearest_frames(replace(video, timestamps=times), Fraction(10)) == (0, 1, 2, 2, 3)


@pytest.mark.parametrize("kind", ["file", "array", "iterable"])
def test_only_chosen_frames_are_read(tmp_path: Path, kind: str) -> None:
    frames = numbered(10)
    source: Path | Clip = tmp_path / "a.mp4"
    if kind == "file":
        write_video(tmp_path / "a.mp4", iter(frames), Fraction(10))
    else:
        source = Clip(frames if kind == "array" else list(frames), Fraction(10))
    chosen = (1, 1, 4, 5, 5, 9, 9)
    with open_video(source, 1, chosen) as reader:
        parts = [reader.read(2), reader.read(3), reader.read(4), reader.read(4)]
    assert [part[:, 0, 0, 0].tolist() for part in parts] == [[1, 4], [5, 5, 9], [9], []]


def test_own_span() -> None:
    clip = Clip(numbered(12), Fraction(24))
    assert own_span(clip, Fraction(8), 1, 2) == (3, 4)
    assert own_span(clip, None, 1, 2) == (1, 2)
    with pytest.raises(InputError, match=r"--start 9 is beyond the end .* 0 to 3 at 8 fps"):
        own_span(clip, Fraction(8), 9, None)


def test_a_folder_of_images_is_sorted_by_number(tmp_path: Path) -> None:
    for number, frame in zip((1, 2, 10), numbered(3), strict=True):
        Image.fromarray(frame).save(tmp_path / f"f{number}.png")
    (tmp_path / "._f3.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    info = probe(tmp_path)
    assert (info.frames, info.frame_rate, info.width, info.audio) == (3, 16, 32, False)
    assert probe(tmp_path, Fraction(24)).frame_rate == 24
    with open_video(tmp_path, 1) as reader:
        assert reader.read(9)[:, 0, 0, 0].tolist() == [1, 2]
    Image.fromarray(numbered(1)[0, :16]).save(tmp_path / "f11.png")
    with pytest.raises(InputError, match=r"f11.png is 16x32, but f1.png is 32x32 .*one size"):
        probe(tmp_path)


def test_a_case_folder_is_refused(tmp_path: Path) -> None:
    for name in ("ref.png", "driving.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="is a case folder: give it with --case"):
        probe(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image: give a video, or a folder of frames"):
        probe(tmp_path)
