"""Making masks through the installed command: from an image and a clip to a case and to a video, and errors."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scail2_rt.runtime.cli import segmenter_options
from scail2_rt.runtime.jobs.download_segmenter import REPOSITORIES
from scail2_rt.runtime.masks.make import options as making
from tests.support.command import (
    SCAIL2_RT,
    SMALL,
    Run,
    command_environment,
    error_of,
    one_json,
    read_video,
    sabotage,
    unmeasured,
)
from tests.support.hub import COMMIT, FakeHub, serve
from tests.support.tiny_segmenters import write_grounding_dino, write_sam2, write_sam3

pytest_plugins = ["tests.support.runtime_fixtures"]

BOXES = ("--box", "image:20,5,80,60", "--box", "20,5,80,60")


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sam2(tmp_path_factory.mktemp("sam2"), image=64)
    write_grounding_dino(folder / "detector")
    return folder


@pytest.fixture
def given(case: Path, sam2: Path) -> tuple[object, ...]:
    """An image, a clip, and a segmenter."""
    return ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", "--segmenter-weights", sam2)


def test_the_lists_of_the_command_are_those_of_the_module() -> None:
    assert segmenter_options.SEGMENTERS == making.SEGMENTERS
    assert segmenter_options.SORTS == making.SORTS


def test_a_photo_and_a_clip_become_a_video(
    scail2: Run, engines: Path, given: tuple[object, ...], tmp_path: Path
) -> None:
    """The masks are kept beside the output and used by the next run, with another seed."""
    output = tmp_path / "out" / "a.mp4"
    words = ("generate", engines, *given, *BOXES, "--prompt", "a walk", "-o", output, *SMALL, "--json")
    first = scail2(*words)
    assert one_json(first)["mode"] == "animate"
    assert "masks for animate: 1 character, blue; made in" in first.stderr
    assert read_video(output).frames == 21
    kept = output.with_name("a.masks")
    assert {path.name for path in kept.iterdir()} == {"masks.json", "masks.png", "ref_mask.png", "rendered_mask_v2.mp4"}
    inputs = json.loads(output.with_suffix(".json").read_text())["inputs"]
    assert str(kept / "ref_mask.png") in json.dumps(inputs)
    made = (kept / "ref_mask.png").stat().st_mtime_ns
    again = scail2(*words, "--overwrite", "--seed", "5")
    assert again.returncode == 0, again.stderr
    assert "made before" in again.stderr
    assert (kept / "ref_mask.png").stat().st_mtime_ns == made


def test_an_interrupted_run_goes_on_with_its_masks(
    scail2: Run, engines: Path, given: tuple[object, ...], tmp_path: Path, cache: Path
) -> None:
    output = tmp_path / "a.mp4"
    words = ["generate", engines, *given, *BOXES, "-o", output, "--size", "64x96", "--steps", "2", "--guidance", "1"]
    words += ["--segment-length", "5", "--segment-overlap", "1"]
    env = unmeasured(command_environment(cache))
    run = subprocess.Popen(
        [str(SCAIL2_RT), *map(str, words)], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert run.stderr is not None
    lines = []
    for line in run.stderr:
        lines.append(line)
        if line.startswith("segment 2/"):
            run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, "".join(lines)
    assert not output.exists()
    result = scail2(*words, "--resume")
    assert result.returncode == 0, result.stderr
    assert "made before" in result.stderr
    assert "resuming after" in result.stderr
    assert read_video(output).frames == 21


def test_a_dry_run_says_what_it_would_do(
    scail2: Run, engines: Path, given: tuple[object, ...], sam2: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.mp4"
    result = scail2("generate", engines, *given, *BOXES, "-o", output, *SMALL, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"masks: made first, 21 frames with sam2 in {sam2}" in result.stdout
    assert not list(tmp_path.iterdir())
    assert scail2("generate", engines, *given, *BOXES, "-o", output, *SMALL).returncode == 0
    result = scail2("generate", engines, *given, *BOXES, "-o", output, *SMALL, "--dry-run", "--overwrite")
    assert "segment" in result.stdout
    assert "denoise" in result.stdout


def test_masks_make_writes_a_case_that_runs(
    scail2: Run, engines: Path, given: tuple[object, ...], case: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    words = ("masks", "make", *given, *BOXES, "-o", folder)
    reply = one_json(scail2(*words, "--mode", "replace", "--json"))
    assert reply["masks"]["mode"] == "replace"
    assert {path.name for path in folder.iterdir()} == {
        "masks.json", "masks.png", "ref.png", "ref_mask.png", "rendered_v2.mp4", "replace_mask.mp4",
    }  # fmt: skip
    assert (folder / "rendered_v2.mp4").read_bytes() == (case / "rendered_v2.mp4").read_bytes()
    assert scail2("masks", "check", "--case", folder).returncode == 0
    message = error_of(scail2(*words))
    assert "already holds a case" in message
    for other in ("ref.jpg", "replace_mask.mov", "mine.txt"):
        (folder / other).write_bytes(b"of another case")
    result = scail2(*words, "--overwrite")
    assert result.returncode == 0, result.stderr
    assert f"generate ENGINES --case {folder}" in result.stdout
    assert {path.name for path in folder.iterdir()} == {
        "masks.json", "masks.png", "mine.txt", "ref.png", "ref_mask.png", "rendered_mask_v2.mp4", "rendered_v2.mp4",
    }  # fmt: skip
    message = error_of(scail2(*words, "--driving", case / "ref.png", "--overwrite"))
    assert "has the extension .png, but a case needs a driving clip with one of .mp4" in message
    result = scail2("generate", engines, "--case", folder, "-o", tmp_path / "a.mp4", *SMALL)
    assert result.returncode == 0, result.stderr
    result = scail2(*words, "--overwrite", "--frames", 9)
    assert f"generate ENGINES --case {folder} --frames 9 -o" in result.stdout
    assert "shows no character" not in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("--box", "image:20,5,300,60", "--box", "20,5,80,60"),
            "is outside the reference image, which is 96 wide and 64 high",
        ),
        (
            ("--box", "image:20,5,80,60", "--box", "20,5,80,90"),
            "is outside the driving clip, which is 96 wide and 64 high",
        ),
        ((*BOXES, "--point", "30:5,5"), "is in frame 30: use one of the frames 0 to 20"),
        (("--box", "1,2,3"), "--box '1,2,3' is not [frame:]x0,y0,x1,y1[:colour]"),
        (("--box", "50,5,20,60"), "x0 must be less than x1"),
        (("--point", "x:5,5"), "'x' is neither a frame number nor `image`"),
        (("--point", "5,5:pink"), "'pink' is not a mask colour: use red, green"),
        (("--pairs", "1:2"), "is not DRIVING=REFERENCE"),
        (("--pairs", "1=2,2=2"), "names a character twice"),
        (("--mask-prompt", " . "), "--mask-prompt is empty"),
        (("--max-characters", "9"), "--max-characters must be 1 to 6"),
        (("--segmenter", "sam3"), "holds sam2, not sam3"),
        ((*BOXES, "--start", "40"), "--start 40 is beyond the end of the driving clip"),
        (("--driving", "nowhere.mp4"), "The driving clip nowhere.mp4 does not exist"),
        ((*BOXES, "--segmenter-device", "cuda"), "There is no GPU for --segmenter-device cuda"),
    ],
)
def test_one_sentence_for_what_cannot_be(
    scail2: Run, given: tuple[object, ...], tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    """The error is raised before engines are opened, so none are needed."""
    output = tmp_path / "a.mp4"
    assert told in error_of(scail2("generate", tmp_path / "no engines", *given, *words, "-o", output))
    assert not list(tmp_path.iterdir())


def test_without_a_segmenter_the_command_that_fetches_one(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    files = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4")
    message = error_of(scail2("generate", engines, *files, "-o", tmp_path / "a.mp4"))
    assert "scail2-rt download --segmenter sam2" in message
    message = error_of(scail2("generate", engines, *files, "--segmenter", "sam3", "-o", tmp_path / "a.mp4"))
    assert "scail2-rt download --segmenter sam3" in message
    assert not list(tmp_path.iterdir())


def test_masks_that_are_given_need_no_options_for_making(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    words = ("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", "--point", "5,5", "--sort", "area")
    assert "--sort, --point apply only if generate makes the masks" in error_of(scail2(*words))


def test_a_character_that_the_frame_crops_away(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """A matte at the left edge of a wide clip, and a square frame of its centre."""
    from fractions import Fraction

    from scail2_rt.runtime.media.lossless import write_image, write_video

    matte = np.zeros((21, 64, 96, 3), np.uint8)
    matte[:, 10:60, 0:12] = 255
    write_video(tmp_path / "matte.mp4", matte, Fraction(16))
    write_image(tmp_path / "matte.png", matte[0])
    files = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", "--mode", "replace")
    ready = ("--image-from", tmp_path / "matte.png", "--driving-from", tmp_path / "matte.mp4")
    words = ("--size", "64x64", "--fit", "official", "-o", tmp_path / "a.mp4")
    message = error_of(scail2("generate", tmp_path / "no engines", *files, *ready, *words))
    assert "The 64x64 frame shows 0 % of the blue character" in message


@pytest.fixture(scope="module")
def hub_files(sam2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    sam3 = write_sam3(tmp_path_factory.mktemp("sam3"))
    places = {"sam2/": sam2, "dino/": sam2 / "detector", "sam3/": sam3}
    files = {f"{at}{f.name}": f.read_bytes() for at, folder in places.items() for f in folder.iterdir() if f.is_file()}
    return files | {
        "sam2/sam2.1_hiera_large.pt": b"0" * 999,
        "dino/pytorch_model.bin": b"1" * 999,
        "sam3/README.md": b"2",
    }


@pytest.fixture
def hub(hub_files: dict[str, bytes]) -> Iterator[FakeHub]:
    with serve(hub_files) as running:
        running.prefixes = dict(
            zip(
                (*REPOSITORIES["sam2"].values(), *REPOSITORIES["sam3"].values()),
                ("sam2/", "dino/", "sam3/"),
                strict=True,
            )
        )
        yield running


def test_a_segmenter_arrives_and_is_found(
    scail2: Run, hub: FakeHub, case: Path, tmp_path: Path, installed: Callable[..., Any]
) -> None:
    """Only needed files are fetched, into the cache folder that `masks make` and `doctor` search. A second call fetches
    nothing."""
    env = {
        "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1,localhost",
        "SCAIL2_RT_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name in ("sam2", "sam3"):
        reply = one_json(scail2("download", "--segmenter", name, "--json", **env))
        folder = tmp_path / "cache" / "segmenters" / name
        assert reply["directory"] == str(folder)
        assert set(reply["repositories"].values()) == {COMMIT}
        assert (folder / "model.safetensors").is_file()
        assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.bin")) + list(folder.rglob("*.md"))
        asked = len(hub.asked)
        assert one_json(scail2("download", "--segmenter", name, "--json", **env))["fetched"] == 0
        assert len(hub.asked) == asked
    screen = scail2("doctor", **env).stdout
    assert f"sam2 in {tmp_path / 'cache' / 'segmenters' / 'sam2'}" in screen
    assert "GiB of weights, an estimated" in screen
    words = ("masks", "make", "--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", *BOXES)
    result = scail2(*words, "--segmenter", "sam2", "-o", tmp_path / "made", **env)
    assert result.returncode == 0, result.stderr


def test_a_segmenters_file_that_arrives_damaged(scail2: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.lies = {"dino/model.safetensors"}
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1,localhost"}
    result = scail2("download", tmp_path / "s", "--segmenter", "sam2", **env)
    assert "arrived damaged" in error_of(result, 1)
    assert not (tmp_path / "s" / "detector" / "model.safetensors").exists()
    hub.lies = set()
    assert scail2("download", tmp_path / "s", "--segmenter", "sam2", **env).returncode == 0


_SIGNAL_AT_FRAME = """
import os, signal, time
from scail2_rt.runtime.masks.make import work
tell = work.Work.tell
def signalled(self, done):
    if done == 1:
        {end}
        time.sleep(60)  # until the signal comes again
    tell(self, done)
work.Work.tell = signalled
"""
_ENDS = ("import ends", "os.kill(os.getpid(), signal.SIGTERM)")


@pytest.mark.parametrize("end", _ENDS)
def test_an_ended_making_leaves_nothing(scail2: Run, given: tuple[object, ...], tmp_path: Path, end: str) -> None:
    """Ctrl-C while a library imports one of its modules, and SIGTERM. The process signals itself after the first frame,
    so that it is the same moment on a machine of any speed."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "ends.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = sabotage(modules, _SIGNAL_AT_FRAME.format(end=end))
    result = scail2("masks", "make", *given, *BOXES, "-o", tmp_path / "made", **environment)
    assert error_of(result, 130) == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]
