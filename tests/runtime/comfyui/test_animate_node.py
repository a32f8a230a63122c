"""The Animate node on tensors, with stand-ins for ComfyUI: frames, video, report, progress, cancel."""

import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from scail2_rt.runtime import Clip, InputError, Request, Session
from tests.runtime.comfyui.conftest import Graph
from tests.support.comfyui_standins import Host, InterruptProcessingException, VideoFromFile

pytest_plugins = ["tests.support.runtime_fixtures"]

SMALL = {"width": 96, "height": 64, "steps": 2, "guidance": 1.0, "segment_length": 13, "preset": "as set below"}


def inputs_of(graph: Graph, nodes: ModuleType, engines: Path, **changes: Any) -> dict[str, Any]:
    """The arguments that ComfyUI passes to `execute`: all inputs of the schema, with default or connected values."""
    schema = nodes.Animate.define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    how = {"backend": "torch", "attention": "auto", "vram_limit_gib": 0.0}
    (chosen,) = nodes.ChooseEngines.execute(folder="the path below", path=str(engines), **how).args
    pictures = {name: graph[name] for name in ("image", "driving", "reference_mask", "driving_mask")}
    return {**defaults, "engines": chosen, **pictures, **SMALL, **changes}


@pytest.fixture(scope="module")
def made(nodes: ModuleType, host: Host, graph: Graph, engines: Path) -> Any:
    output = nodes.Animate.execute(**inputs_of(graph, nodes, engines, prompt="a figure", seed=3))
    return output.args


def test_the_frames_are_those_of_the_session(made: Any, graph: Graph, engines: Path) -> None:
    arrays = graph.arrays
    request = Request(
        arrays["image"],
        arrays["reference_mask"],
        Clip(arrays["driving"], Fraction(16)),
        Clip(arrays["driving_mask"], Fraction(16)),
        prompt="a figure",
        seed=3,
        size=(64, 96),
        steps=2,
        guidance=1.0,
        scheduler="euler",
        shift=5.0,
        segment_length=13,
    )
    with Session.open(engines, backend="torch") as session:
        expected = np.concatenate(list(session.animate(session.check(request))))
    images = made[0]
    assert images.shape == (21, 64, 96, 3)
    assert np.array_equal((images.numpy() * 255).astype(np.uint8), expected)  # as ComfyUI saves pictures


def test_the_video_is_the_frames_with_their_rate(made: Any) -> None:
    images, video, _ = made
    parts = video.get_components()
    assert parts.images is images
    assert parts.frame_rate == 16
    assert parts.audio is None


def test_the_report_says_what_was_done(made: Any) -> None:
    report = json.loads(made[2])
    assert (report["mode"], report["frames"], report["seed"], report["steps"]) == ("animate", 21, 3, 2)
    assert report["timings_s"]["denoise"] > 0
    assert report["engines"]["precision"] == "fp32"


def test_a_cancelled_run_ends_within_a_step(nodes: ModuleType, host: Host, graph: Graph, engines: Path) -> None:
    inputs = inputs_of(graph, nodes, engines, steps=40)
    nodes_before = len(host.progress)
    original = host.set_progress

    def set_progress(value: int, *words: Any) -> None:
        original(value, *words)
        if value > 0:
            host.interrupted.set()

    host.set_progress = set_progress  # type: ignore[method-assign]
    try:
        with pytest.raises(InterruptProcessingException):
            nodes.Animate.execute(**inputs)
    finally:
        del host.set_progress
    shares = [share for share, _ in host.progress[nodes_before:]]
    assert sum(share > 0 for share in shares) == 1  # the step during which the button was pressed was the last
    assert not host.interrupted.is_set()


def test_a_video_file_gives_rate_and_sound(
    nodes: ModuleType, host: Host, graph: Graph, engines: Path, case: Path
) -> None:
    driving = VideoFromFile(str(case / "rendered_v2.mp4"))
    inputs = inputs_of(graph, nodes, engines, driving=driving, start=4, frames=9)
    parts = nodes.Animate.execute(**inputs).args[1].get_components()
    rate = parts.audio["sample_rate"]
    assert parts.audio["waveform"].shape[-1] == round(9 / 16 * rate)
    assert parts.audio["waveform"].abs().max() > 0.01


def test_sentences_name_inputs_of_the_node(nodes: ModuleType, host: Host, graph: Graph, engines: Path) -> None:
    with pytest.raises(InputError, match=r"^start 400 is beyond the end"):
        nodes.Animate.execute(**inputs_of(graph, nodes, engines, start=400))
