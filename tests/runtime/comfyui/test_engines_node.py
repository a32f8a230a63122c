"""Engines: selecting a folder, the open session, ComfyUI's memory management, building from ComfyUI's files."""

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file

from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.kernels.errors import InputError
from tests.runtime.comfyui.conftest import Graph
from tests.runtime.comfyui.test_animate_node import inputs_of
from tests.support.comfyui_standins import Host, InterruptProcessingException
from tests.support.repackaged import hugging_face_clip, hugging_face_umt5, tensors_of

pytest_plugins = ["tests.support.runtime_fixtures"]

HOW = {"backend": "torch", "attention": "auto", "vram_limit_gib": 0.0}
BUILD = {"vae": "auto", "umt5": "auto", "clip": "auto", "precision": "fp32", **HOW}


@pytest.fixture
def warm(nodes: ModuleType) -> Any:
    kept = importlib.import_module("scail2_rt.runtime.comfyui.sessions").WARM
    kept.drop()
    return kept


@pytest.fixture
def listed(host: Host, engines: Path) -> Path:
    """The tiny engines in the folder that ComfyUI's page lists."""
    folder = host.models / "scail2_rt" / "tiny"
    if not folder.exists():
        shutil.copytree(engines, folder)
    return folder


def test_folders_in_models_are_listed(nodes: ModuleType, listed: Path) -> None:
    (folder, *_) = nodes.ChooseEngines.define_schema().inputs
    assert folder.options == ["tiny", "the path below"]
    (engines,) = nodes.ChooseEngines.execute(folder="tiny", path="", **HOW).args
    assert engines.folder == listed


def test_a_folder_that_was_built_again_is_another_one(nodes: ModuleType, listed: Path) -> None:
    before = nodes.ChooseEngines.fingerprint_inputs(folder="tiny", path="", **HOW)
    assert nodes.ChooseEngines.fingerprint_inputs(folder="tiny", path="", **HOW) == before
    os.utime(listed / "manifest.json", ns=(1, 1))
    assert nodes.ChooseEngines.fingerprint_inputs(folder="tiny", path="", **HOW) != before


@pytest.mark.parametrize(
    ("folder", "path", "said"),
    [
        ("the path below", "", "path is empty"),
        ("the path below", "/nowhere", "/nowhere has no engines"),
        ("gone", "", "no engine folder gone"),
    ],
)
def test_what_is_no_folder_is_named(nodes: ModuleType, folder: str, path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        nodes.ChooseEngines.execute(folder=folder, path=path, **HOW)


def test_the_session_stays_open_until_the_memory_is_wanted(
    nodes: ModuleType, host: Host, graph: Graph, engines: Path, warm: Any
) -> None:
    inputs = inputs_of(graph, nodes, engines, frames=5)
    first = nodes.Animate.execute(**inputs).args[0]
    session = warm.get(inputs["engines"])
    nodes.Animate.execute(**{**inputs, "seed": 9})
    assert warm.get(inputs["engines"]) is session
    (model,) = host.loaded
    model.detach(False)  # as ComfyUI does when it loads a model that is loaded
    assert warm.is_open
    host.unload()
    assert not warm.is_open
    assert (nodes.Animate.execute(**inputs).args[0] == first).all()
    assert warm.get(inputs["engines"]) is not session


def test_it_is_opened_again_where_making_room_closes_it(
    nodes: ModuleType, host: Host, graph: Graph, engines: Path, warm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = host.load_models_gpu

    def unload_first(models: list[Any], memory_required: float = 0) -> None:
        load(models, memory_required)
        models[0].detach(True)

    monkeypatch.setattr(host, "load_models_gpu", unload_first)
    images = nodes.Animate.execute(**inputs_of(graph, nodes, engines, frames=5)).args[0]
    assert len(images) == 5


def test_other_engines_close_those_before(
    nodes: ModuleType, graph: Graph, engines: Path, listed: Path, warm: Any
) -> None:
    inputs = inputs_of(graph, nodes, engines, frames=5)
    nodes.Animate.execute(**inputs)
    session = warm.get(inputs["engines"])
    (others,) = nodes.ChooseEngines.execute(folder="tiny", path="", **HOW).args
    assert warm.get(others) is not session
    with pytest.raises(Exception, match="session is closed"):
        next(session.animate(session.check(make_request(graph))))


def make_request(graph: Graph) -> Any:
    from scail2_rt.runtime import Clip, Request

    arrays = graph.arrays
    clips = Clip(arrays["driving"], 16), Clip(arrays["driving_mask"], 16)  # type: ignore[arg-type]
    return Request(arrays["image"], arrays["reference_mask"], *clips, size=(64, 96), steps=1, guidance=1)


@pytest.fixture(scope="module")
def files(host: Host, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint as files of ComfyUI's model folders."""
    sources = open_checkpoint(tiny_checkpoint).sources
    made = {
        "diffusion_models/scail2.safetensors": tensors_of(sources["dit"]),
        "vae/wan_2.1_vae.safetensors": tensors_of(sources["vae"]),
        "text_encoders/umt5_xxl.safetensors": hugging_face_umt5(tensors_of(sources["umt5"])),
        "clip_vision/clip_vision_h.safetensors": hugging_face_clip(tensors_of(sources["clip"])),
    }
    for name, tensors in made.items():
        (host.models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, host.models / name)
    return tiny_checkpoint / "umt5-xxl" / "tokenizer.json"


@pytest.fixture
def build(nodes: ModuleType, files: Path) -> Callable[..., Any]:
    inputs = {"checkpoint": "scail2.safetensors", "tokenizer": str(files), **BUILD}
    return lambda **changes: nodes.BuildEngines.execute(**{**inputs, **changes})


def test_engines_are_built_once_and_found_by_content(build: Callable[..., Any], host: Host) -> None:
    host.progress.clear()
    engines, folder = build().args
    assert engines.folder == Path(folder)
    assert (Path(folder) / "manifest.json").is_file()
    assert Path(folder).parent == host.models / "scail2_rt"
    assert [share for share, _ in host.progress][-1] == 1
    assert any(text.startswith("weights 1/") for _, text in host.texts)
    hashed = json.loads((host.models / "scail2_rt" / "hashes.json").read_text())["hashed"]
    assert len(hashed) == 5
    state = (Path(folder) / "manifest.json").stat().st_mtime_ns
    host.progress.clear()
    assert build().args[1] == folder
    assert host.progress == []  # nothing was hashed, nothing built
    assert (Path(folder) / "manifest.json").stat().st_mtime_ns == state
    os.utime(host.models / "vae" / "wan_2.1_vae.safetensors")  # the same content
    assert build().args[1] == folder
    assert build(precision="bf16").args[1] != folder


def test_a_cancelled_build_goes_on(build: Callable[..., Any], host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def said(entry: tuple[str, str]) -> None:
        texts.append(entry[1])
        if entry[1].startswith("weights 5/"):
            host.interrupted.set()

    monkeypatch.setattr(host, "said", said)
    with pytest.raises(InterruptProcessingException):
        build(precision="fp16")
    texts.clear()
    assert not host.interrupted.is_set()
    build(precision="fp16")
    assert not any(text.startswith("weights 1/") for text in texts)
    assert any(text.startswith("weights 6/") for text in texts)


def test_a_lora_makes_other_engines(build: Callable[..., Any], host: Host, tiny_checkpoint: Path) -> None:
    weight = open_checkpoint(tiny_checkpoint).sources["dit"].get("blocks.0.self_attn.q.weight")
    (host.models / "loras").mkdir(exist_ok=True)
    pair = {"lora_A": weight[:4].contiguous() * 0.1, "lora_B": weight[:, :4].contiguous() * 0.1}
    save_file(
        {f"blocks.0.self_attn.q.{name}.weight": t for name, t in pair.items()}, host.models / "loras" / "l.safetensors"
    )
    folder = build(lora_1="l.safetensors", strength_1=0.8).args[1]
    assert folder != build().args[1]
    lora = json.loads((Path(folder) / "manifest.json").read_text())["loras"][0]
    assert lora["strength"] == 0.8


def test_a_missing_tokenizer_is_named(build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"There is no tokenizer\.json"):
        build(tokenizer="")
