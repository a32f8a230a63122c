"""The examples run and give the described results."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from scail2_rt.runtime import Cancelled
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.command import command_environment, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]

EXAMPLES = Path(__file__).parents[2] / "examples"
PACK = EXAMPLES.parent / "runtime" / "comfyui" / "pack"
SMALL = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 1.0, "segment_length": 13}


def run(script: Path, *words: object, cache: Path) -> None:
    command = [sys.executable, str(script), *map(str, words)]
    environment = unmeasured(command_environment(cache))
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def style() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diffusers_style", EXAMPLES / "diffusers_style.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pipeline_takes_files_pictures_and_tensors(style: ModuleType, engines: Path, case: Path) -> None:
    files = [case / name for name in ("ref.png", "rendered_v2.mp4", "ref_mask.png", "rendered_mask_v2.mp4")]
    image, driving, mask, masks = files
    with VideoReader(driving) as clip, VideoReader(masks) as clip_masks:
        arrays = clip.read(100), clip_masks.read(100)
    steps: list[int] = []
    with style.Scail2Pipeline.from_pretrained(engines, backend="torch") as pipe:
        seeded = {**SMALL, "generator": torch.Generator().manual_seed(5), "output_type": "np"}
        (first,) = pipe(*files, **seeded, callback_on_step_end=lambda pipe, step, steps_, _: steps.append(step)).frames
        pictures = [Image.fromarray(frame) for frame in arrays[0]]
        tensors = torch.from_numpy(arrays[1]) / 255
        (second,) = pipe(Image.open(image), pictures, mask, tensors, **seeded).frames
        (third,) = pipe(*files, **{**seeded, "output_type": "pil"}).frames
        assert np.array_equal(first, second)
        assert np.array_equal((first * 255).round(), np.stack([np.asarray(frame) for frame in third]))
        assert steps[:3] == [0, 1, 0]

        def stop(pipe: object, *_: object) -> None:
            pipe.interrupt = True  # type: ignore[attr-defined]

        with pytest.raises(Cancelled):
            pipe(*files, **seeded, callback_on_step_end=stop)
        assert pipe(*files, **seeded).frames[0].shape == (21, 64, 96, 3)


def test_it_runs_as_a_script(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    size = ("--height", 64, "--width", 96)
    run(EXAMPLES / "diffusers_style.py", engines, case, *size, "-o", tmp_path / "a.gif", cache=cache)
    assert Image.open(tmp_path / "a.gif").n_frames > 1  # type: ignore[attr-defined]


def test_the_packs_workflows_are_those_that_the_script_writes(cache: Path, tmp_path: Path) -> None:
    run(EXAMPLES / "comfyui" / "make_workflows.py", tmp_path, cache=cache)
    for path in tmp_path.iterdir():
        assert path.read_text() == (PACK / "example_workflows" / path.name).read_text()


def test_the_packs_pictures_are_those_that_the_script_draws(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "example_workflows").mkdir()
    run(EXAMPLES / "comfyui" / "draw_inputs.py", tmp_path, cache=cache)
    drawn = sorted((tmp_path / "example_inputs").iterdir())
    assert [path.name for path in drawn] == [path.name for path in sorted((PACK / "example_inputs").iterdir())]
    for path in drawn:
        if path.suffix == ".png":  # what an encoder writes depends on its version
            ours = Image.open(PACK / "example_inputs" / path.name)
            assert np.array_equal(np.asarray(Image.open(path)), np.asarray(ours))
