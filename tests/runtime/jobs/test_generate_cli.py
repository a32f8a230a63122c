"""`scail2-rt generate` end to end through the installed command, with the tiny checkpoint."""

import json
import os
import shutil
import signal
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.media.lossless import write_video
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.command import SMALL, Run, error_of, one_json, read_video, sabotage, signal_at
from tests.support.tiny_segmenters import write_sam2

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
    assert "attention 8bit (" in result.stderr


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


_WRONG = (  # options of a line, and what is said of them
    ({"config": "my.toml"}, "'config' applies to all lines"),
    ({"from-video": "a.mp4"}, "'from-video' repeats one run and cannot be used in a batch"),
    ({"no-metadata": True}, """'no-metadata' is not an option of generate. Write "metadata": false."""),
    ({"prompt": "\0"}, "'prompt' holds a zero byte"),
    ({"output": ""}, "The output . must end in"),
    ({"output": "https://example.org/a.mp4"}, "The output https://example.org/a.mp4 is a URL"),
    ({"seeds": [1, "01"]}, "seeds: '1,01' is not a list of different seeds"),
)


def test_batch_runs_the_good_lines_and_names_the_bad_ones(
    scail2: Run, engines: Path, replace_case: Path, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    name = replace_case.name
    shutil.copytree(replace_case, tmp_path / "more" / name)
    changed = {"case": f"more/{name}", "prompt": "second", "frames": 5, "fps": "8", "seeds": [3, 4], "crf": 20}
    lines = [
        f"first@@{replace_case}",
        "# a comment",
        "None@@missing",
        json.dumps(changed),
        "a prompt alone",
        json.dumps({"case": "x", "sed": 3}),
        json.dumps({"case": "x", "steps": 1.5}),
        json.dumps({"case": "x", "backend": "torch"}),
        *(json.dumps({"case": "x", **wrong}) for wrong, _ in _WRONG),
    ]
    (tmp_path / "batch.txt").write_text("\n".join(lines), encoding="utf-16")
    words = ("--batch", tmp_path / "batch.txt", "-o", tmp_path / "out", *SMALL, "--steps", "1", "--json")
    result = scail2("generate", engines, *words)
    assert result.returncode == 1
    reply = one_json(result)
    states = [entry["status"] for entry in reply["cases"]]
    assert states == ["complete", "failed", *["complete"] * 2, *["failed"] * (4 + len(_WRONG))]
    assert reply["failed"] == 5 + len(_WRONG)
    for number, (_, said) in enumerate(_WRONG, 9):
        assert f"error: line {number}: {said}" in result.stderr
    for said in (
        f"error: line 3, {tmp_path}/missing: The case folder",
        "error: line 5: 'a prompt alone' is neither",
        "error: line 6: 'sed' is not an option of generate. Use 'seed'.",
        "error: line 7: steps: '1.5' is not a valid integer",
        "error: line 8: 'backend' applies to all lines",
        f"case 3/3: line 4, {tmp_path}/more/{name}, seed 4",
    ):
        assert said in result.stderr
    assert result.stderr.count("engines:") == 1
    stems = (f"{name}-2-seed3", f"{name}-2-seed4", name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{stem}.{ending}" for stem in stems for ending in ("json", "mp4")
    ]
    options = json.loads((tmp_path / "out" / f"{stems[1]}.json").read_text())["options"]
    assert [options[name] for name in ("prompt", "frames", "fps", "seed", "crf")] == ["second", 5, "8", 4, 20]
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["options"]["frames"] is None


def test_seeds_make_a_video_each_and_resume(scail2: Run, engines: Path, replace_case: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", replace_case, *SMALL, "--steps", "1", "--frames", "5")
    words = (*words, "-o", tmp_path / "s.mp4", "--json")
    result = scail2(*words, "--seeds", "1,22")
    first = one_json(result)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("engines:") == 1
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"s-seed1.mp4", "s-seed22.mp4"}
    hashes = [entry["output_sha256"] for entry in first["cases"]]
    assert [entry["seed"] for entry in first["cases"]] == [1, 22]
    assert hashes[0] != hashes[1]
    more = scail2(*words, "--seeds", "1,3", "--resume")
    assert "s-seed1.mp4 is complete: nothing to resume" in more.stderr
    assert [entry["seed"] for entry in one_json(more)["cases"]] == [1, 3]
    assert "Use one of them" in error_of_json(scail2(*words, "--seeds", "1,2", "--seed", "4"))
    assert "is not a list of different seeds" in error_of_json(scail2(*words, "--seeds", "1,1"))
    (tmp_path / "none").mkdir()
    assert "lacks" in error_of_json(scail2(*words[:2], "--case", tmp_path / "none", *words[4:], "--seeds", "1,2"))


def error_of_json(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2
    return one_json(result)["error"]


def test_the_case_folder_has_the_prompt_and_what_was_chosen_is_told(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    shutil.copytree(case, tmp_path / "case")
    (tmp_path / "case" / "prompt.txt").write_text("ein Spaziergang über Land", encoding="utf-16")
    shutil.copy(case / "rendered_v2.mp4", tmp_path / "case" / "driving.mp4")
    words = ("generate", engines, "--case", tmp_path / "case", *SMALL, "--steps", "1", "--frames", "5")
    result = scail2(*words, "-o", tmp_path / "p.mp4")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["options"]["prompt"] == "ein Spaziergang über Land"
    chosen, prompt = report["notes"]
    assert chosen.endswith("chosen: rendered_v2.mp4 (not driving.mp4).")
    assert "The prompt comes from" in prompt
    assert f"note: {chosen}\nnote: {prompt}\n" in result.stderr
    given = scail2(*words, "--prompt", "", "-o", tmp_path / "q.mp4", "--dry-run")
    assert "The prompt comes from" not in given.stderr
    (tmp_path / "case" / "prompt.txt").write_text("über", encoding="latin-1")
    said = error_of(scail2(*words, "-o", tmp_path / "q.mp4", "--dry-run"))
    assert "prompt.txt is not UTF-8 text (byte 0xfc in line 1): save it as UTF-8" in said


def test_fps_samples_clip_and_mask_and_keeps_the_sound(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """A clip of 21 frames at 16 fps, sampled at 8 fps from frame 2 on, which is 0.25 s."""
    words = (*SMALL, "--steps", "1", "--fps", "8", "--start", "2", "--frames", "6", "--prompt", "", "--json")
    reply = one_json(scail2("generate", engines, "--case", case, "-o", tmp_path / "f.mp4", *words))
    video = read_video(tmp_path / "f.mp4")
    assert (video.frames, video.frame_rate) == (6, 8)
    assert video.audio_s == pytest.approx(6 / 8, abs=0.05)
    assert (reply["options"]["fps"], reply["frame_rate"], reply["frames"]) == ("8", "8", 6)
    with VideoReader(case / "rendered_v2.mp4") as driving, VideoReader(case / "rendered_mask_v2.mp4") as mask:
        clips = driving.read(99)[4:15:2], mask.read(99)[4:15:2]
    for name, frames in zip(("d", "m"), clips, strict=True):
        write_video(tmp_path / f"{name}.mp4", iter(frames), Fraction(8))
    files = ("--image", case / "ref.png", "--mask-image", case / "ref_mask.png")
    files = (*files, "--driving", tmp_path / "d.mp4", "--mask-video", tmp_path / "m.mp4")
    assert scail2("generate", engines, *files, "-o", tmp_path / "g.mp4", *SMALL, "--steps", "1").returncode == 0
    assert np.array_equal(video.pixels, read_video(tmp_path / "g.mp4").pixels)
    late = scail2("generate", engines, "--case", case, "-o", tmp_path / "h.mp4", "--fps", "8", "--start", "11")
    assert "whose frames are 0 to 10 at 8 fps" in error_of(late)


def test_folders_of_images_and_a_heic_reference(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    for name in ("rendered_v2", "rendered_mask_v2"):
        (tmp_path / name).mkdir()
        with VideoReader(case / f"{name}.mp4") as reader:
            for number, frame in enumerate(reader.read(12)):
                Image.fromarray(frame).save(tmp_path / name / f"{number}.png")
    pillow_heif.from_pillow(Image.open(case / "ref.png").convert("RGB")).save(tmp_path / "ref.heic")
    files = ("--image", tmp_path / "ref.heic", "--mask-image", case / "ref_mask.png")
    files = (*files, "--driving", tmp_path / "rendered_v2", "--mask-video", tmp_path / "rendered_mask_v2")
    words = ("generate", engines, *files, *SMALL, "--steps", "1", "-o", tmp_path / "v.mp4")
    result = scail2(*words, "--fps", "24")
    assert result.returncode == 0, result.stderr
    video = read_video(tmp_path / "v.mp4")
    assert (video.frames, video.frame_rate) == (12, 24)
    assert json.loads((tmp_path / "v.json").read_text())["inputs"]["driving"]["path"] == str(tmp_path / "rendered_v2")
    assert "12 frames at 16 fps" in scail2(*words, "--overwrite", "--dry-run").stdout
    without = scail2(*words, "--overwrite", **sabotage(tmp_path, "import sys; sys.modules['pillow_heif'] = None"))
    assert "needs the package pillow-heif: pip install 'scail2-rt[heic]'" in error_of(without)
    (tmp_path / "rendered_v2" / "5.png").unlink()
    assert "has 11 frames but its mask" in error_of(scail2(*words, "--overwrite"))


def test_a_case_folder_without_masks_gets_them(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Runs in a batch, together with a case that has masks."""
    sam2 = write_sam2(tmp_path_factory.mktemp("sam2"), image=64)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("ref.png", "rendered_v2.mp4"):
        shutil.copy(case / name, bare)
    (tmp_path / "b.txt").write_text(f"@@bare\n@@{case}\n")
    words = ("--batch", tmp_path / "b.txt", "-o", tmp_path / "out", *SMALL, "--steps", "1", "--frames", "3")
    boxes = ("--box", "image:20,5,80,60", "--box", "2:20,5,80,60", "--fps", "8", "--start", "1")
    result = scail2("generate", engines, *words, *boxes, "--segmenter-weights", sam2)
    assert result.returncode == 0, result.stderr
    assert f"note: {bare} holds no masks: they are made first." in result.stderr
    assert (tmp_path / "out" / "bare.masks" / "ref_mask.png").is_file()
    report = json.loads((tmp_path / "out" / "bare.json").read_text())
    assert (report["frames"], report["frame_rate"]) == (3, "8")
    lonely = scail2("generate", engines, "--case", bare, "-o", tmp_path / "a.mp4", SCAIL2_RT_CACHE=str(tmp_path))
    assert "get one with `scail2-rt download --segmenter sam2`" in error_of(lonely)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--image", "https://host/ref.png", "--driving", "d.mp4"), "The reference image https://host/ref.png"),
        (("--case", "s3://bucket/case"), "The case folder s3://bucket/case"),
        (("--batch", "https://host/b.txt"), "The batch file https://host/b.txt"),
    ],
)
def test_a_url_is_called_one(scail2: Run, tmp_path: Path, words: tuple[str, ...], what: str) -> None:
    said = error_of(scail2("generate", tmp_path, *words, "-o", tmp_path / "a.mp4"))
    assert said == f"{what} is a URL: download it first, then give its path."


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
    """A `sitecustomize` module makes the scheduler fail in the second segment."""
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
