"""`scail2-rt demo` through the installed command: a drawn picture and clip, masks, engines, a video, a sheet."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from scail2_rt.benchmarks.sprites import shipped
from scail2_rt.export.checkpoint.random_checkpoint import make_checkpoint
from scail2_rt.kernels.errors import InputError
from tests.support.command import Run, one_json, read_video

pytest_plugins = ["tests.support.runtime_fixtures"]


def command_after(line: str, text: str) -> str:
    """What follows `scail2-rt` in the line below."""
    return text.partition(f"{line}\n  scail2-rt ")[2].splitlines()[0]


@pytest.mark.slow
def test_demo_animates_with_sound_and_reuses_its_engines(scail2: Run, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    first = scail2("demo", "-o", out)
    assert first.returncode == 0, first.stderr
    video = read_video(out / "demo.mp4")
    assert (video.frames, video.width, video.height, video.frame_rate) == (33, 128, 128, 16)
    assert video.audio_s == pytest.approx(33 / 16, abs=0.05)
    assert "33 frames, 16 fps, with audio" in first.stdout
    assert "best baseline without a model" in first.stdout
    assert " s with a small SAM 2; mean IoU" in first.stdout
    assert {path.name for path in (out / "case").iterdir()} >= {"ref.png", "rendered_v2.mp4", "masks.png"}
    assert Image.open(out / "contact_sheet.png").width > 6 * 128
    (tmp_path / "elsewhere").mkdir()
    repeated = scail2(*shlex.split(command_after("same video again:", first.stdout)), cwd=tmp_path / "elsewhere")
    assert repeated.returncode == 0, repeated.stderr
    assert (out / "again.mp4").read_bytes() == (out / "demo.mp4").read_bytes()
    reply = one_json(scail2("demo", "-o", out, "--json"))
    assert reply["build"]["up_to_date"] is True
    assert reply["demo"]["masks"]["mask_iou"] > 0.9
    assert reply["demo"]["masks"]["exchanged"] == 0
    scores = reply["demo"]["scores"]
    best = max(figures["character_psnr"] for who, figures in scores.items() if who != "ours")
    assert scores["ours"]["character_psnr"] > best + 3


def test_a_damaged_engine_folder_is_built_anew(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "engines"
    assert not shipped.make_engines(tiny_checkpoint, folder).up_to_date
    assert shipped.make_engines(tiny_checkpoint, folder).up_to_date
    (folder / "manifest.json").write_text("{}")
    assert not shipped.make_engines(tiny_checkpoint, folder).up_to_date
    other = tmp_path / "other"
    make_checkpoint(other, seed=1)
    assert not shipped.make_engines(other, folder).up_to_date
    assert capsys.readouterr().err.count("building the engines again") == 2


def test_a_missing_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "CHECKPOINT", tmp_path / "nowhere")
    with pytest.raises(InputError, match="sprite checkpoint is missing"):
        shipped.shipped_checkpoint()
