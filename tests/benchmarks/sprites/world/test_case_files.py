"""Drawn cases as official folders: the files have exactly the drawn pixels, and the installed command accepts them."""

from pathlib import Path

import numpy as np
import pytest

from scail2_rt.benchmarks.sprites.quality.trials import TASKS, frame_of, held_out_case
from scail2_rt.benchmarks.sprites.world.case_files import case_request, motion_sound, write_case
from scail2_rt.benchmarks.sprites.world.cases import make_scene, render_case
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.lossless import SAMPLE_RATE
from scail2_rt.runtime.media.video_reader import VideoReader
from scail2_rt.runtime.session.check import check_request
from tests.support.command import Run, one_json, read_video

pytest_plugins = ["tests.support.runtime_fixtures"]


def read(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return reader.read(1000)


@pytest.mark.parametrize("task", ["replace", "extra"])
def test_files_hold_what_was_drawn(task: str, tmp_path: Path) -> None:
    case = render_case(make_scene(task, 1, frames=9), (64, 96))
    write_case(case, tmp_path)
    request = case_request(tmp_path)
    assert request.mode == case.scene.mode
    assert request.prompt == case.scene.prompt
    np.testing.assert_array_equal(read(request.driving), case.driving)
    np.testing.assert_array_equal(read(request.mask_video), case.driving_mask)
    np.testing.assert_array_equal(load_image(request.image), case.reference)
    np.testing.assert_array_equal(load_image(request.mask_image), case.reference_mask)
    assert len(request.extra_refs) == len(case.extras) == (task == "extra")
    for files, images in zip(request.extra_refs, case.extras, strict=True):
        for file, image in zip(files, images, strict=True):
            np.testing.assert_array_equal(load_image(file), image)
    assert read_video(request.driving).audio_s == pytest.approx(9 / 16, abs=0.05)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "long"])
def test_every_task_passes_the_checks(task: str, tmp_path: Path) -> None:
    """No warning except the expected one for a close-up."""
    write_case(held_out_case(task, 1), tmp_path)
    plan = check_request(case_request(tmp_path, size=frame_of(task), segment_length=33))
    assert len(plan.warnings) == (task == "closeup")
    assert all("--fit-reference" in warning for warning in plan.warnings)
    assert plan.mode == ("replace" if task in ("replace", "closeup", "edge") else "animate")


def test_the_command_takes_a_folder(scail2: Run, engines: Path, tmp_path: Path) -> None:
    write_case(held_out_case("two", 0), tmp_path / "case")
    words = ("--prompt-file", tmp_path / "case" / "prompt.txt", "--size", "128x128", "--segment-length", 33)
    command = ("generate", engines, "--case", tmp_path / "case", "-o", tmp_path / "o.mp4", *words, "--dry-run")
    reply = one_json(scail2(*command, "--json"))
    assert (reply["mode"], reply["frames"], reply["tokens"]) == ("animate", 33, 784)


def test_the_tone_follows_the_height_of_the_figure() -> None:
    joints = np.full((32, 3, 2), 100.0)
    joints[16:, :, 1] = 20
    sound = motion_sound(joints)
    assert len(sound) == 2 * SAMPLE_RATE
    pitches = [np.abs(np.fft.rfft(part)).argmax() for part in (sound[: SAMPLE_RATE // 2], sound[-SAMPLE_RATE // 2 :])]
    assert pitches[1] > 2 * pitches[0]
