"""The six scripts of `examples` run as their docstrings say, with the tiny engines in place of the demo's."""

import importlib
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scail2_rt.benchmarks.sprites.quality.trials import held_out_case
from scail2_rt.benchmarks.sprites.segmenting import shipped_segmenter
from scail2_rt.benchmarks.sprites.world.case_files import FRAME_RATE, write_case
from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.random_checkpoint import PRESETS
from scail2_rt.runtime.comfyui.installing import PACK
from scail2_rt.runtime.media.lossless import write_video
from tests.support.comfyui_server import Graphs, answering
from tests.support.comfyui_standins import standing_in
from tests.support.command import read_video
from tests.support.served import serving

pytest_plugins = ["tests.support.runtime_fixtures"]

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("python_api", "batch", "service_client", "masks", "lora", "comfyui_client")
Script = Callable[..., str]


@pytest.fixture(scope="module")
def demo_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The case of `make demo`, with its true masks: 33 frames of 128x128."""
    folder = tmp_path_factory.mktemp("demo") / "case"
    write_case(held_out_case("animate", 0), folder)
    return folder


@pytest.fixture
def script(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Script:
    """Runs a script in this process, as `python examples/NAME.py WORDS`, and gives what it printed."""
    monkeypatch.setenv("SCAIL2_RT_CACHE", str(cache))

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 30
    assert f"python examples/{name}.py" in text.split('"""')[1]


def test_python_api(script: Script, engines: Path, demo_case: Path, tmp_path: Path) -> None:
    said = script("python_api", engines, demo_case, tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4").pixels.shape == (33, 128, 128, 3)
    assert said.startswith("33 frames of 128x128")
    assert "100 %" in said
    assert said.endswith(f"{tmp_path / 'a.mp4'} {tmp_path / 'a.json'}\n")


def test_batch(
    script: Script, engines: Path, demo_case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for last_code, cases in ((1, (tmp_path / "nothing", demo_case)), (0, (demo_case,))):
        with pytest.raises(SystemExit) as end:
            script("batch", engines, tmp_path / "out", *cases)
        assert end.value.code == last_code
        said = capsys.readouterr()
        assert said.out.split() == [str(tmp_path / "out" / f"case-{seed}.mp4") for seed in (0, 1)]
        assert said.err.count("error: ") == 2 * last_code
    first, second = (read_video(Path(path)).pixels for path in said.out.split())
    assert len(first) == len(second) == 33
    assert (first != second).any()


def test_service_client(script: Script, engines: Path, demo_case: Path, cache: Path, tmp_path: Path) -> None:
    with serving(engines, tmp_path / "data", cache, "--no-warm") as served:
        script("service_client", served.url, demo_case, tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4").pixels.shape == (33, 128, 128, 3)


def test_masks(script: Script, engines: Path, demo_case: Path, tmp_path: Path) -> None:
    """With the boxes that the docstring gives, on the first frames of the demo's clip."""
    boxes = re.findall(r"\S+:red", (EXAMPLES / "masks.py").read_text().split('"""')[1])
    assert len(boxes) == 2
    write_video(tmp_path / "clip.mp4", held_out_case("animate", 0).driving[:9], FRAME_RATE)
    files = (demo_case / "ref.png", tmp_path / "clip.mp4", tmp_path / "a.mp4")
    said = script("masks", engines, *files, shipped_segmenter(), *boxes)
    assert "masks for animate: 1 character, red" in said
    assert (tmp_path / "a.masks" / "masks.png").is_file()
    assert len(read_video(tmp_path / "a.mp4").pixels) == 9


def test_lora(script: Script, tiny_checkpoint: Path, demo_case: Path, tmp_path: Path) -> None:
    rows, columns = dit_shapes(PRESETS["tiny"].dit)["blocks.1.ffn.0.weight"]
    pair = {"lora_B": torch.ones(rows, 2) / 8, "lora_A": torch.ones(2, columns) / 8}
    save_file({f"blocks.1.ffn.0.{name}.weight": tensor for name, tensor in pair.items()}, tmp_path / "l.safetensors")
    said = script("lora", tiny_checkpoint, tmp_path / "l.safetensors", demo_case, tmp_path / "out")
    assert said.count("2 tensors applied") == 2
    weak, strong = (read_video(tmp_path / "out" / f"{strength}.mp4").pixels for strength in (0.5, 1.0))
    assert (weak != strong).any()


def test_comfyui_client(script: Script, engines: Path, tmp_path: Path) -> None:
    """On stand-ins for ComfyUI; the sprite engines of its workflow are the tiny ones here."""
    changes = {"Scail2Engines": {"folder": "the path below", "path": str(engines), "backend": "torch"}}
    with standing_in(tmp_path / "models"):
        graphs = Graphs(
            importlib.import_module("scail2_rt.runtime.comfyui.extension"), PACK / "example_inputs", changes
        )
        with answering(graphs) as url:
            workflow = EXAMPLES / "comfyui" / "animate_api.json"
            outputs = [script("comfyui_client", url, workflow, seed) for seed in (7, 8)]
        importlib.import_module("scail2_rt.runtime.comfyui.sessions").WARM.drop()
    assert outputs == ["output/video/scail2_00001_.mp4\n"] * 2
    first, second = (video.source.images for video in graphs.made.values())
    assert first.shape == second.shape == (33, 128, 128, 3)
    assert (first != second).any()
