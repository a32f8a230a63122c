"""The audio of a part of a video, as samples."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from scail2_rt.runtime.media.lossless import SAMPLE_RATE, write_video
from scail2_rt.runtime.media.sound import read_sound


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Two seconds whose second half has a tone."""
    seconds = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    sound = np.where(seconds >= 1, 0.5 * np.sin(2 * np.pi * 440 * seconds), 0)
    write_video(tmp_path / "film.mp4", np.zeros((32, 16, 16, 3), np.uint8), Fraction(16), sound)
    return tmp_path / "film.mp4"


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt((samples**2).mean()))


def test_a_part_is_selected_by_time(film: Path) -> None:
    sound = read_sound(film, Fraction(1, 2), Fraction(1))
    assert sound is not None
    assert (sound.samples.shape, sound.rate) == ((1, SAMPLE_RATE), SAMPLE_RATE)
    assert sound.samples.dtype == np.float32
    before, after = sound.samples[0, : SAMPLE_RATE // 2 - 2048], sound.samples[0, SAMPLE_RATE // 2 + 2048 :]
    assert loudness(before) < 0.01
    assert loudness(after) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_beyond_the_end_is_silence(film: Path) -> None:
    sound = read_sound(film, Fraction(3, 2), Fraction(2))
    assert sound is not None
    assert sound.samples.shape == (1, 2 * SAMPLE_RATE)
    assert loudness(sound.samples[0, SAMPLE_RATE:]) == 0


def test_a_file_without_sound(tmp_path: Path) -> None:
    write_video(tmp_path / "silent.mp4", np.zeros((8, 16, 16, 3), np.uint8), Fraction(16))
    assert read_sound(tmp_path / "silent.mp4", Fraction(0), Fraction(1)) is None
