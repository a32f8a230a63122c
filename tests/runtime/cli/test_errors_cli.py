"""Every bad input of `generate` through the installed command: one clear line, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.export.checkpoint.random_checkpoint import make_checkpoint
from scail2_rt.runtime.media.lossless import write_video
from tests.support.command import SMALL, Run, error_of, one_json

pytest_plugins = ["tests.support.runtime_fixtures"]

HEIGHT, WIDTH, FRAMES = 64, 96, 21


@dataclass(frozen=True, slots=True)
class Bad:
    """A modification of a case folder or of the arguments, and the expected error text."""

    name: str
    says: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda case: None
    arguments: tuple[str, ...] = ()


def squares(*colours: tuple[int, int, int]) -> np.ndarray:
    """A mask with one square per colour on black, uint8 [H, W, 3]."""
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for i, colour in enumerate(colours):
        y, x = 4 + 30 * (i // 4), 4 + 23 * (i % 4)
        mask[y : y + 20, x : x + 18] = colour
    return mask


def mask_video(*colours: tuple[int, int, int], frames: int = FRAMES) -> Callable[[Path], object]:
    mask = squares(*colours)
    return lambda case: write_video(case / "rendered_mask_v2.mp4", iter([mask] * frames), Fraction(16))


def mask_image(*colours: tuple[int, int, int]) -> Callable[[Path], object]:
    return lambda case: Image.fromarray(squares(*colours)).save(case / "ref_mask.png")


def cut(name: str, size: int) -> Callable[[Path], object]:
    def spoil(case: Path) -> None:
        data = (case / name).read_bytes()
        (case / name).write_bytes(data[:size])

    return spoil


def text(name: str) -> Callable[[Path], object]:
    return lambda case: (case / name).write_text("neither an image nor a video\n" * 40)


def remove(name: str) -> Callable[[Path], object]:
    return lambda case: (case / name).unlink()


RED, GREEN, ORANGE, GREY = (255, 0, 0), (0, 255, 0), (255, 140, 0), (128, 128, 128)
SEVEN = (RED, GREEN, (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), ORANGE)

BAD = [
    Bad("no reference image", ("ref.jpg", "lacks the reference image"), remove("ref.png")),
    Bad("no driving clip", ("lacks the driving clip",), remove("rendered_v2.mp4")),
    Bad("no mask video", ("lacks the mask video",), remove("rendered_mask_v2.mp4")),
    Bad("empty image", ("ref.png", "empty"), cut("ref.png", 0)),
    Bad("empty video", ("rendered_v2.mp4", "empty"), cut("rendered_v2.mp4", 0)),
    Bad("truncated image", ("ref.png", "damaged"), cut("ref.png", 200)),
    Bad("truncated video", ("rendered_v2.mp4", "cannot be opened"), cut("rendered_v2.mp4", 2000)),
    Bad("an image that is none", ("ref_mask.png", "not an image"), text("ref_mask.png")),
    Bad("a video that is none", ("rendered_mask_v2.mp4", "cannot be opened"), text("rendered_mask_v2.mp4")),
    Bad("mask frames differ", ("has 21 frames", "has 20"), mask_video(RED, frames=20)),
    Bad("no palette colour", ("ref_mask.png", "none of the mask colours", "(255,0,0)"), mask_image()),
    Bad("driving mask without a character", ("shows no character", "rendered_mask_v2.mp4"), mask_video()),
    Bad("only grey", ("shows no character",), mask_video(GREY)),
    Bad("a colour of no class", ("(255,140,0)", "not one of the mask colours"), mask_image(RED, ORANGE)),
    Bad("seven characters", ("more than six characters",), mask_video(*SEVEN)),
    Bad("a character without a reference", ("green", "no reference mask has green"), mask_video(RED, GREEN)),
    Bad("mask of another shape", ("aspect", "ref_mask.png")[1:], lambda case: _square(case / "ref_mask.png")),
    Bad("size", ("divisible by 32", "64x96", "96x96"), arguments=("--size", "70x96")),
    Bad("overlap 4n+1", ("overlap must be 4n+1", "5 or 9"), arguments=("--segment-overlap", "6")),
    Bad("overlap too long", ("below the segment length",), arguments=("--segment-overlap", "13")),
    Bad("more blended than overlaps", ("--overlap-blend must be 0 to",), arguments=("--overlap-blend", "6")),
    Bad("length 4n+1", ("segment length must be 4n+1", "13 or 17"), arguments=("--segment-length", "14")),
    Bad("start beyond the end", ("--start 21", "0 to 20"), arguments=("--start", "21")),
    Bad("too many frames", ("--frames 20", "11 frames"), arguments=("--start", "10", "--frames", "20")),
    Bad("no frames", ("--frames must be 1 or more",), arguments=("--frames", "0")),
    Bad("no steps", ("--steps must be 1 to 1000",), arguments=("--steps", "0")),
    Bad("two mistakes at once", ("--shift", "--guidance"), arguments=("--shift", "0", "--guidance", "-1")),
    Bad("guidance nan", ("--guidance",), arguments=("--guidance", "nan")),
    Bad("seed", ("--seed",), arguments=("--seed", "-1")),
    Bad("crf", ("--crf must be 0 to 51",), arguments=("--crf", "99")),
    Bad("max rows", ("--max-rows",), arguments=("--max-rows", "0")),
    Bad("a backend that is not built", ("onnxruntime", "build-engines"), arguments=("--backend", "onnxruntime")),
    Bad("memory limit on a CPU", ("GPU memory", "--backend torch"), arguments=("--vram-limit", "12GiB")),
    Bad("memory limit of no size", ("'plenty'", "12GiB"), arguments=("--vram-limit", "plenty")),
    Bad("attention of a GPU", ("'cudnn' cannot run", "a CPU"), arguments=("--attention", "cudnn")),
    Bad("cuda noise", ("--noise-device cuda",), arguments=("--noise-device", "cuda")),
    Bad("case and files", ("--case and --image",), arguments=("--image", "a.png")),
    Bad(
        "no such extra reference", ("extra reference 1", "does not exist"), arguments=("--extra-ref", "a.png", "b.png")
    ),
    Bad("two prompts", ("--prompt and --prompt-file",), arguments=("--prompt", "a", "--prompt-file", "b.txt")),
    Bad("no prompt file", ("prompt file b.txt",), arguments=("--prompt-file", "b.txt")),
]


def _square(path: Path) -> None:
    Image.fromarray(squares(RED)[:, :64]).save(path)


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_a_bad_case_is_one_line_and_leaves_nothing(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, bad: Bad
) -> None:
    copy = tmp_path / "case"
    shutil.copytree(case, copy)
    bad.spoil(copy)
    arguments = [*SMALL, *bad.arguments]
    result = scail2("generate", engines, "--case", copy, "-o", tmp_path / "out" / "a.mp4", *arguments, cwd=tmp_path)
    message = error_of(result)
    assert [part for part in bad.says if part not in message] == [], message
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["case"]


def test_missing_files_are_named(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "-o", tmp_path / "a.mp4")
    assert "--image, --mask-image, --driving, --mask-video" in error_of(scail2(*words))
    files = ("--image", case / "ref.png", "--mask-image", case / "ref_mask.png", "--driving", tmp_path / "none.mp4")
    message = error_of(scail2(*words, *files, "--mask-video", case / "rendered_mask_v2.mp4"))
    assert "driving clip" in message
    assert "none.mp4 does not exist" in message
    assert "does not exist" in error_of(scail2(*words, "--case", tmp_path / "nowhere"))


# the output


def test_an_existing_output_is_kept(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("mine")
    message = error_of(scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL))
    assert "--overwrite" in message
    assert (tmp_path / "a.mp4").read_text() == "mine"


def test_a_file_in_the_place_of_the_report_is_kept(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"poses": []}')
    message = error_of(scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL))
    assert "a.json" in message
    assert (tmp_path / "a.json").read_text() == '{"poses": []}'


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("file/a.mp4", "is a file"),
        ("folder.mp4", "is a folder"),
        ("a.avi", "must end in .mp4"),
        ("/proc/a.mp4", "not writable"),
    ],
)
def test_an_output_that_cannot_be_written(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, output: str, says: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    result = scail2("generate", engines, "--case", case, "-o", tmp_path / output, *SMALL)
    assert says in error_of(result)


def test_the_output_may_not_be_an_input(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    shutil.copytree(case, tmp_path / "case")
    video = tmp_path / "case" / "rendered_v2.mp4"
    before = video.read_bytes()
    result = scail2("generate", engines, "--case", video.parent, "-o", video, "--overwrite", *SMALL)
    assert "is the driving clip" in error_of(result)
    assert video.read_bytes() == before


def test_a_full_disk_is_noticed_before_the_work(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    full = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)\n"
    (tmp_path / "sitecustomize.py").write_text(full)  # Python imports it at its start: a disk with 1000 bytes free
    words = ("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL)
    message = error_of(scail2(*words, PYTHONPATH=str(tmp_path)))
    assert "free" in message
    assert "MiB" in message
    assert not (tmp_path / "a.mp4").exists()


# the engine folder


def _lost_manifest(engines: Path) -> str:
    (engines / "manifest.json").unlink()
    return "manifest.json"


def _damaged_manifest(engines: Path) -> str:
    (engines / "manifest.json").write_text('{"format_version": 1')
    return "manifest.json"


def _other_version(engines: Path) -> str:
    manifest = json.loads((engines / "manifest.json").read_text())
    manifest["format_version"] = 999
    (engines / "manifest.json").write_text(json.dumps(manifest))
    return "format_version is 999"


def _lost_file(engines: Path) -> str:
    (engines / "stages" / "weights.safetensors").unlink()
    return "weights.safetensors"


def _other_config(engines: Path) -> str:
    manifest = json.loads((engines / "manifest.json").read_text())
    manifest["model"]["dit"]["layers"] += 1
    (engines / "manifest.json").write_text(json.dumps(manifest))
    return "dit.blocks.2"


@pytest.mark.parametrize("damage", [_lost_manifest, _damaged_manifest, _other_version, _lost_file, _other_config])
def test_an_engine_folder_that_does_not_match_is_refused(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    shutil.copytree(engines, tmp_path / "engines")
    named = damage(tmp_path / "engines")
    result = scail2("generate", tmp_path / "engines", "--case", case, "-o", tmp_path / "a.mp4", *SMALL)
    message = error_of(result)
    assert named in message
    assert "build-engines" in message
    assert not (tmp_path / "a.mp4").exists()


def test_a_checkpoint_is_no_engine_folder(scail2: Run, case: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "c")
    message = error_of(scail2("generate", tmp_path / "c", "--case", case, "-o", tmp_path / "a.mp4", *SMALL))
    assert "not a finished engine folder" in message


# batch


def test_batch_files_that_cannot_work(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    batch = tmp_path / "batch.txt"
    words = ("generate", engines, "--batch", batch, "-o", tmp_path / "out")
    assert "cannot be read" in error_of(scail2(*words))
    batch.write_text("a prompt without a folder\n")
    wrong = scail2(*words)
    assert wrong.returncode == 1
    assert "error: line 1: 'a prompt without a folder' is neither" in wrong.stderr
    batch.write_text(f"a prompt@@{case}\n")
    assert "--batch and --prompt" in error_of(scail2(*words, "--prompt", "b"))
    (tmp_path / "out").write_text("")
    assert "is a file" in error_of(scail2(*words))


def test_a_batch_without_a_good_case_loads_nothing(scail2: Run, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "batch.txt").write_text("None@@nowhere\n")
    result = scail2("generate", engines, "--batch", tmp_path / "batch.txt", "-o", tmp_path / "out", "--json")
    assert result.returncode == 1
    reply = one_json(result)
    assert reply["failed"] == 1
    assert "nowhere" in reply["cases"][0]["error"]
    assert "engines:" not in result.stderr
    assert not (tmp_path / "out").exists()
