"""`scail2-rt generate` end to end through the installed command, with the tiny checkpoint."""

import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.media.lossless import write_video
from tests.support.command import SMALL, Run, one_json, read_video, signal_at

pytest_plugins = ["tests.support.runtime_fixtures"]


def files_of(case: Path, mask: str = "rendered_mask_v2.mp4") -> tuple[object, ...]:
    names = {"--image": "ref.png", "--mask-image": "ref_mask.png", "--driving": "rendered_v2.mp4", "--mask-video": mask}
    return tuple(word for flag, name in names.items() for word in (flag, case / name))


def test_animate_with_guidance_two_extra_references_and_sound(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    """21 frames in two segments; frame rate and audio of the driving clip."""
    extra = ("--extra-ref", case / "ref.png", case / "ref_mask.png") * 2
    output = tmp_path / "new folder" / "a.mp4"
    words = (*SMALL, "--guidance", "5", "--prompt", "a walk", "--negative-prompt", "blur", "--seed", "7")
    reply = one_json(scail2("generate", engines, "--case", case, "-o", output, *extra, *words, "--json"))
    video = read_video(output)
    assert (video.frames, video.width, video.height, video.frame_rate) == (21, 96, 64, 16)
    assert video.audio_s == pytest.approx(21 / 16, abs=0.05)
    assert video.pixels.std() > 5
    report = json.loads((tmp_path / "new folder" / "a.json").read_text())
    assert {name: value for name, value in reply.items() if name != "report"} == report
    assert report["status"] == "complete"
    assert report["mode"] == "animate"
    assert report["options"]["seed"] == 7
    assert report["options"]["guidance"] == 5
    assert len(report["segments"]) == 2
    assert report["tokens"] == 3 * 24 + 4 * 24 + 4 * 6
    assert {"image", "driving", "extra_ref_2_mask"} <= set(report["inputs"])
    assert {"text", "clip", "reference", "driving", "denoise", "decode"} <= set(report["timings_s"])
    assert report["memory"]["host_peak_gib"] > 0.1
    assert report["engines"]["precision"] == "fp32"
    assert len(report["output_sha256"]) == 64
    assert report["versions"]["torch"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.json", "a.mp4"]


def test_replace_over_three_segments_with_files_named(
    scail2: Run, engines: Path, replace_case: Path, tmp_path: Path
) -> None:
    """13 frames, segments of 5 with one frame of overlap; `auto` reads the mode from the mask's white background."""
    output = tmp_path / "r.mp4"
    words = (*SMALL, "--segment-length", "5", "--segment-overlap", "1", "--scheduler", "euler")
    files = files_of(replace_case, "replace_mask.mp4")
    result = scail2("generate", engines, *files, "-o", output, *words)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["mode"] == "replace"
    assert [s["start"] for s in report["segments"]] == [0, 4, 8]
    assert read_video(output).frames == 13
    assert "segment 3/3, step 2/2" in result.stderr
    assert "13 frames of 64x96 at 16 fps" in result.stdout


def test_equal_seeds_give_equal_videos_and_a_repeated_prompt_is_cached(
    scail2: Run, engines: Path, replace_case: Path, tmp_path: Path
) -> None:
    words = (*SMALL, "--guidance", "3", "--steps", "1", "--json", "--overwrite", "--prompt", "a prompt of this test")

    def run(seed: int) -> dict[str, object]:
        result = scail2("generate", engines, "--case", replace_case, "-o", tmp_path / "s.mp4", *words, "--seed", seed)
        assert result.returncode == 0, result.stderr
        return one_json(result)

    first, again, other = run(1), run(1), run(2)
    assert first["prompt_cache"]["misses"] >= 1
    assert again["prompt_cache"] == {"hits": 2, "misses": 0}
    assert first["output_sha256"] == again["output_sha256"] != other["output_sha256"]


def test_trim_keeps_the_sound_of_the_frames(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = (*SMALL, "--steps", "1", "--start", "4", "--frames", "8", "--crf", "0", "--codec", "hevc")
    reply = one_json(scail2("generate", engines, "--case", case, "-o", tmp_path / "t.mp4", *words, "--json"))
    video = read_video(tmp_path / "t.mp4")
    assert (video.frames, video.frame_rate) == (8, 16)
    assert video.audio_s == pytest.approx(8 / 16, abs=0.05)
    assert reply["segments"] == [{"start": 0, "valid_end": 8, "padded_frames": 9, "overlap": 0}]


def test_a_named_attention_is_used_and_reported(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = (*SMALL, "--steps", "1", "--frames", "5", "--attention", "8bit", "--no-graphs", "--json")
    result = scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *words)
    assert result.returncode == 0, result.stderr
    assert one_json(result)["engines"]["attention"] == "8bit"
    assert "attention 8bit, because" in result.stderr


def test_fast_preset_warns_without_a_distilled_lora(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = ("--preset", "fast", "--size", "64x96", "--dry-run")
    result = scail2("generate", engines, "--case", case, "-o", tmp_path / "f.mp4", *words, "--json")
    estimate = one_json(result)
    assert (estimate["steps"], estimate["passes"]) == (6, 1)
    assert any("step-distilled LoRA" in warning for warning in estimate["warnings"])


def test_dry_run_tells_and_loads_nothing(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    result = scail2(
        "generate", engines, "--case", case, "-o", tmp_path / "d.mp4", "--segment-length", "13", "--dry-run"
    )
    assert result.returncode == 0, result.stderr
    assert "2 segments of at most 13 frames" in result.stdout
    assert "512x896" in result.stdout
    tokens = 1792 * (1 + 4) + 448 * 4
    assert f"{tokens:,} tokens" in result.stdout
    assert "Times assume" in result.stdout
    assert "engines:" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_after_a_run_uses_its_speed(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", case, "-o", tmp_path / "d.mp4", *SMALL, "--json")
    shutil.copytree(engines, tmp_path / "engines")
    (tmp_path / "engines" / "last_run.json").unlink(missing_ok=True)
    before = one_json(scail2("generate", tmp_path / "engines", *words[2:], "--dry-run"))
    assert "matrix product" in before["basis"]
    run = one_json(scail2("generate", tmp_path / "engines", *words[2:]))
    after = one_json(scail2("generate", tmp_path / "engines", *words[2:], "--overwrite", "--dry-run"))
    assert "last run" in after["basis"]
    assert after["seconds"]["denoise"] == pytest.approx(run["timings_s"]["denoise"], rel=0.01)


def test_batch_runs_the_good_cases_and_reports_the_bad_one(
    scail2: Run, engines: Path, replace_case: Path, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    shutil.copytree(replace_case, tmp_path / "more" / replace_case.name)
    lines = [f"first@@{replace_case}", "# a comment", "None@@missing", f"second@@more/{replace_case.name}"]
    (tmp_path / "batch.txt").write_text("\n".join(lines))
    words = ("--batch", tmp_path / "batch.txt", "-o", tmp_path / "out", *SMALL, "--steps", "1", "--json")
    result = scail2("generate", engines, *words)
    assert result.returncode == 1
    reply = one_json(result)
    assert reply["failed"] == 1
    assert sorted(entry["status"] for entry in reply["cases"]) == ["complete", "complete", "failed"]
    assert "error: line 3" in result.stderr
    assert "case 2/2: line 4" in result.stderr
    assert result.stderr.count("engines:") == 1
    name = replace_case.name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}-2.json",
        f"{name}-2.mp4",
        f"{name}.json",
        f"{name}.mp4",
    ]
    assert json.loads((tmp_path / "out" / f"{name}-2.json").read_text())["options"]["prompt"] == "second"


def test_a_long_prompt_warns(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a very long walk " * 400)
    words = (*SMALL, "--dry-run", "--prompt-file", tmp_path / "prompt.txt", "--json")
    estimate = one_json(scail2("generate", engines, "--case", case, "-o", tmp_path / "p.mp4", *words))
    assert any("512 tokens" in warning for warning in estimate["warnings"])


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_finished_segments_as_a_playable_video(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    output, partial = tmp_path / "i.mp4", tmp_path / "i.partial.mp4"
    words = (*SMALL, "--segment-length", "5", "--segment-overlap", "1")
    words = ("generate", engines, "--case", case, "-o", output, *words)
    result = scail2(*words, **signal_at(tmp_path, output, 2, stop))
    stdout, stderr = result.stdout, result.stderr
    assert result.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert f"finished segments are in {partial}" in stderr
    assert stderr.strip().endswith("error: interrupted")
    video = read_video(partial)
    assert video.frames in (9, 13)
    report = json.loads((tmp_path / "i.json").read_text())
    assert report["status"] == "partial"
    assert report["output"] == str(partial)
    assert not output.exists()


def test_a_fault_in_the_middle_is_reported_and_keeps_finished_segments(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    """A scheduler that fails in the second segment, put in place before the program starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "from scail2_rt.runtime.pipeline import schedulers\n"
        "step, calls = schedulers.Scheduler.step, []\n"
        "def failing(self, *arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3:\n"
        "        raise RuntimeError('the device fell over')\n"
        "    return step(self, *arguments)\n"
        "schedulers.Scheduler.step = failing\n"
    )
    words = ("--case", case, "-o", tmp_path / "c.mp4", *SMALL, "--json")
    result = scail2("generate", engines, *words, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert one_json(result)["error"].startswith("RuntimeError: the device fell over")
    assert "Traceback" not in result.stderr
    assert "c.partial.mp4" in result.stderr
    assert read_video(tmp_path / "c.partial.mp4").frames == 13
    report = json.loads((tmp_path / "c.json").read_text())
    assert (report["status"], report["error"]) == ("partial", "RuntimeError: the device fell over")


# a real clip


@pytest.fixture(scope="session")
def dance(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real case in the golden data, with masks drawn here: a character in the middle of image and clip."""
    source = golden.parent / "cases" / "dance_001"
    if not source.is_dir():
        pytest.skip(f"the real case was not found at {source}")
    case = tmp_path_factory.mktemp("real") / "dance"
    case.mkdir()
    for name in ("ref.jpg", "driving.mp4"):
        os.symlink(source / name, case / name)
    mask = np.zeros((108, 192, 3), np.uint8)
    mask[:, :] = (255, 255, 255)
    mask[10:105, 70:120] = (255, 0, 0)
    Image.fromarray(mask).save(case / "ref_mask.png")
    frames = np.zeros((65, 108, 205, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[10:105, 70 + i // 4 : 120 + i // 4] = (255, 0, 0)
    write_video(case / "rendered_mask_v2.mp4", iter(frames[:, :, :204]), Fraction(16))
    frames[(frames == 0).all(-1)] = (255, 255, 255)
    write_video(case / "replace.mp4", iter(frames[:, :, :204]), Fraction(16))
    return case


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "guidance"), [("animate", "1"), ("replace", "4")])
def test_a_real_clip_over_three_segments_with_two_extra_references(
    scail2: Run, engines: Path, dance: Path, tmp_path: Path, mode: str, guidance: str
) -> None:
    case = tmp_path / "case"
    shutil.copytree(dance, case, symlinks=True)
    (case / "replace.mp4").rename(case / "replace_mask.mp4") if mode == "replace" else (case / "replace.mp4").unlink()
    extra = ("--extra-ref", case / "ref.jpg", case / "ref_mask.png") * 2
    words = ("--size", "64x96", "--segment-length", "25", "--steps", "2", "--guidance", guidance, "--prompt", "a dance")
    reply = one_json(scail2("generate", engines, "--case", case, "-o", tmp_path / "d.mp4", *extra, *words, "--json"))
    assert reply["mode"] == mode
    assert len(reply["segments"]) == 3
    video = read_video(tmp_path / "d.mp4")
    assert (video.frames, video.width, video.height, video.frame_rate) == (65, 96, 64, 16)
    assert video.audio_s == 0
    assert video.pixels.std() > 5
