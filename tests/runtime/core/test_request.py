"""From a request to its plan, its estimate, its progress and its report, without weights."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.engines.folder.manifest import Manifest, read_manifest
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.geometry import forward_flops
from scail2_rt.runtime.core.progress import BarProgress, LineProgress, SilentProgress
from scail2_rt.runtime.core.request import Request, check_request
from scail2_rt.runtime.jobs import generate
from scail2_rt.runtime.session import estimate, report
from tests.support.clips import write_clip

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.fixture
def request_of(case: Path, tmp_path: Path) -> Callable[..., Request]:
    def make(**changes: object) -> Request:
        names = ("ref.png", "ref_mask.png", "rendered_v2.mp4", "rendered_mask_v2.mp4")
        request = Request(*(case / name for name in names), tmp_path / "a.mp4", size=(64, 96))
        return replace(request, **changes)

    return make


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
    check_request(request_of(output=tmp_path / "deep" / "er" / "a.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_masks_of_another_shape_than_the_clip_warn(request_of: Callable[..., Request], tmp_path: Path) -> None:
    frames = np.zeros((21, 64, 64, 3), np.uint8)
    frames[:, 10:50, 30:50] = (255, 0, 0)
    write_clip(tmp_path / "m.mp4", frames, codec="libx264rgb", pixel_format="rgb24", options={"crf": "0"})
    plan = check_request(request_of(mask_video=tmp_path / "m.mp4"))
    assert any("64x64" in warning for warning in plan.warnings)


# batch and case


def test_batch_names_are_unique(case: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"a@@{case}\nb@@{case}\nc@@{case}-2\n")
    options = dict.fromkeys(("case", *generate.FILES, "extra_refs", "prompt", "prompt_file"))
    cases = generate.batch_cases({**options, "batch": tmp_path / "b.txt", "output": tmp_path}, {"mode": "auto"})
    outputs = [case.request.output.name for case in cases if case.request]
    assert outputs == [f"{case.name}.mp4", f"{case.name}-2.mp4"]
    assert isinstance(cases[2].error, InputError)


# estimate


@pytest.fixture
def manifest(engines: Path) -> Manifest:
    return read_manifest(engines)


def test_work_counts_every_segment_step_and_pass(request_of: Callable[..., Request], manifest: Manifest) -> None:
    plan = check_request(request_of(segment_length=13, steps=4, guidance=1.0))
    once = estimate.work(plan, manifest)
    assert manifest.config.dit is not None
    assert once["denoise"] == 2 * 4 * forward_flops(manifest.config.dit, plan.layout)
    guided = estimate.work(check_request(request_of(segment_length=13, steps=8, guidance=2.0)), manifest)
    assert guided["denoise"] == 4 * once["denoise"]
    assert guided["decode"] == once["decode"]
    wider = estimate.work(check_request(request_of(segment_length=13, steps=4, guidance=1.0, size=(64, 192))), manifest)
    assert wider["decode"] == pytest.approx(2 * once["decode"])


def test_memory_grows_with_the_layout(request_of: Callable[..., Request], manifest: Manifest) -> None:
    small = estimate.memory_gib(check_request(request_of()), manifest, 16384)
    large = estimate.memory_gib(check_request(request_of(size=(512, 768))), manifest, 16384)
    chunked = estimate.memory_gib(check_request(request_of(size=(512, 768))), manifest, 1024)
    weights = sum(stage.weight_bytes for stage in manifest.stages if stage.name.startswith("dit.blocks")) / 2**30
    assert weights / 2 < small["denoise"] < large["denoise"]
    assert chunked["denoise"] < large["denoise"]
    assert small["text"] == large["text"]


def test_estimate_text(request_of: Callable[..., Request], manifest: Manifest, tmp_path: Path) -> None:
    plan = check_request(request_of(segment_length=13))
    result = estimate.estimate(plan, manifest, tmp_path, "torch", 16384)
    text = estimate.as_text(plan, result)
    assert "2: frames 8 to 20, 5 of them from the segment before" in text
    assert "40 unipc steps of 2 passes a segment" in text
    assert math.isclose(result.total_s, sum(result.seconds.values()))
    assert json.loads(json.dumps(estimate.describe(plan, result)))["frames"] == 21


def test_rates_of_another_device_are_not_used(tmp_path: Path) -> None:
    (tmp_path / estimate.LAST_RUN).write_text('{"device": "torch on another", "flop_per_s": {"denoise": 1, "vae": 1}}')
    rates, basis = estimate.rates_for(tmp_path, "torch")
    assert rates["denoise"] > 1e6
    assert "matrix product" in basis
    here = {"device": estimate.device_name("torch"), "flop_per_s": {"denoise": 5.0, "vae": 7.0}}
    (tmp_path / estimate.LAST_RUN).write_text(json.dumps(here))
    assert estimate.rates_for(tmp_path, "torch")[0] == {"denoise": 5.0, "vae": 7.0}


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (725, "12 min 5 s"), (7800, "2 h 10 min")])
def test_duration(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text


# progress


def test_phases_add_up_and_positions_count() -> None:
    progress = SilentProgress()
    for _ in range(2):
        with progress.phase("decode"):
            pass
    first = progress.timings["decode"]
    with pytest.raises(ValueError), progress.phase("decode"):
        raise ValueError
    assert progress.timings["decode"] > first > 0
    assert progress.position() == ""
    progress.begin(3, 5)
    progress.segment(1)
    progress.step(1)
    assert progress.position() == "segment 2/3, step 2/5"


def test_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    progress.begin(2, 50)
    for segment in range(2):
        progress.segment(segment)
        for step in range(50):
            progress.step(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "segment 1/2, step 0/50"
    assert lines[-1].startswith("segment 2/2, step 50/50")
    assert len(lines) == 3


def test_the_bar_shows_segment_step_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with BarProgress() as progress:
        progress.begin(2, 4)
        progress.segment(1)
        with progress.phase("denoise"):
            progress.step(1)
        task = progress.bar.tasks[0]
        assert (task.completed, task.total) == (6, 8)
        assert task.description == "segment 2/2, step 2/4"


# report


def test_a_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = report.report_path(tmp_path / "a.b.mp4")
    assert path.name == "a.b.json"
    report.write_report(path, {"status": "failed"})
    report.write_report(path, {"status": "complete", "where": str(tmp_path)})
    assert json.loads(path.read_text())["status"] == "complete"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        report.write_report(path, {"status": object()})
    assert json.loads(path.read_text())["status"] == "complete"
    assert list(tmp_path.iterdir()) == [path]


def test_plain_makes_json_of_plans(request_of: Callable[..., Request]) -> None:
    described = plain({"plan": check_request(request_of()), "rate": Fraction(30000, 1001)})
    assert json.loads(json.dumps(described))["rate"] == "30000/1001"
    assert described["plan"]["segments"][0]["start"] == 0
