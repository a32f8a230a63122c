"""Exported files in the genuine library of TensorRT for RTX: its parser takes every node, and the one-graph transformer
becomes a plan in every precision."""

import time
from pathlib import Path

import onnx
import pytest
import torch

from scail2_rt.benchmarks.speed.models import model
from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.engines.build.onnx_check import check_capability, refused_nodes
from scail2_rt.engines.build.onnx_folder import TRANSFORMER, export_onnx
from scail2_rt.engines.folder.store import STORE_NAME, TensorShape
from scail2_rt.engines.folder.weights import plan_store, planned_tensors
from scail2_rt.engines.tensorrt_backend.children import Child
from scail2_rt.engines.tensorrt_backend.compiling import PlanJob
from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.export.models.precision import PRECISIONS, Precision
from scail2_rt.export.onnx.monolithic import CLIP_TOKENS, TABLES, signature, transformer_model
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.dit import table_sources
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.geometry import Layout
from tests.engines.tensorrt_backend.test_genuine import scail2

pytestmark = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT for RTX has wheels for Linux x86-64 only")


def sizes(frames: int, height: int, width: int, refs: int) -> dict[str, int]:
    """The value of every symbol of the graph's inputs, for F latent frames of h×w cells and N additional references."""
    layout = Layout.of(4 * (frames - 1) + 1, 8 * height, 8 * width)
    more = refs * height * width // 4
    values = {"F": frames, "F+1": frames + 1, "h": height, "w": width, "h/2": height // 2, "w/2": width // 2}
    return {**values, "N": refs, "L": layout.tokens + more}


SMALLEST, USUAL, LARGEST = sizes(1, 4, 4, 0), sizes(21, 64, 112, 0), sizes(21, 88, 160, 2)


def compiled(folder: Path, config: DiTConfig, clip_tokens: int, fp8_products: int) -> None:
    """Build the plan of the one-graph transformer in `folder`."""
    inputs = signature(config, clip_tokens)[0]
    profile = {
        spec.name: tuple(
            tuple(dim if isinstance(dim, int) else values[dim] for dim in spec.dims)
            for values in (SMALLEST, USUAL, LARGEST)
        )
        for spec in inputs
        if any(isinstance(dim, str) for dim in spec.dims)
    }
    paths = [str(folder / name) for name in (TRANSFORMER, "transformer.rtx", "transformer.log")]
    targets = ("sm89", "sm120")
    named = {spec.name: "FLOAT" for spec in inputs}
    job = PlanJob("tensorrt-rtx", "transformer", *paths, named, (profile,), 8 << 30, 3, targets, None, fp8_products)
    child = Child(job, {})
    while (outcome := child.outcome()) is None:
        time.sleep(0.01)
    assert outcome.error is None, outcome.error
    assert (folder / "transformer.rtx").stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_sprite_model_in_one_graph(tmp_path: Path, precision: str) -> None:
    checkpoint = open_checkpoint(CHECKPOINT, components=("dit",))
    export_onnx(checkpoint, tmp_path / "m", "monolithic", precision, check=True)
    config = checkpoint.config.dit
    assert config is not None
    compiled(tmp_path / "m", config, CLIP_TOKENS, 6 * config.layers if precision == "fp8" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_block_of_the_14b_model_in_one_graph(tmp_path: Path, precision: Precision) -> None:
    config = model("14b", layers=1).dit
    assert config is not None
    parts = ModelConfig(dit=config)
    tensors = planned_tensors(parts, stage_definitions(parts), precision)
    rows = {name: (2 if name.startswith("head") else 6) for name in table_sources(config)}
    tensors[TABLES] = {
        name: TensorShape(torch.float32, (count, config.dim) if name.endswith("modulation") else (config.dim,))
        for name, count in rows.items()
    }
    layout = plan_store(tensors)
    with (tmp_path / STORE_NAME).open("wb") as file:
        file.truncate(layout.size)  # zeros, because the plan does not depend on the values of the weights
    made = transformer_model(config, lambda definition: definition.numerics(precision), layout)
    (tmp_path / TRANSFORMER).write_bytes(made.SerializeToString())
    check_capability([tmp_path / TRANSFORMER])
    compiled(tmp_path, config, CLIP_TOKENS, 6 if precision == "fp8" else 0)
    for file in tmp_path.iterdir():
        file.unlink()  # pytest would keep them


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_parser_takes_every_stage(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    export_onnx(open_checkpoint(tiny_checkpoint), tmp_path / "s", "stages", precision, check=True)


def test_the_installed_command_says_who_takes_the_graphs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = scail2("export-onnx", tiny_checkpoint, "-o", tmp_path / "m", "--layout", "monolithic", "--check")
    assert done.returncode == 0, done.stderr
    assert f"; TensorRT for RTX {TENSORRT_RTX.api().__version__} accepts every node" in done.stdout


def test_refused_nodes_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_onnx(open_checkpoint(tiny_checkpoint), tmp_path / "m", "monolithic", "bf16")
    file = tmp_path / "m" / TRANSFORMER
    made = onnx.load(file, load_external_data=False)
    attention = next(node for node in made.graph.node if node.op_type == "Attention")
    attention.attribute.append(onnx.helper.make_attribute("softmax_precision", onnx.TensorProto.FLOAT))
    onnx.save(made, file)
    (found,) = refused_nodes(file, TENSORRT_RTX)
    assert found.startswith(f"Attention {attention.name} (")
    assert "Setting softmax precision is not supported" in found
    with pytest.raises(Scail2Error, match=r"rejects the exported graphs: transformer\.onnx: Attention .*--check"):
        check_capability([file])
    with pytest.raises(Scail2Error, match="could not inspect"):
        refused_nodes(tmp_path / "none.onnx", TENSORRT_RTX)
    assert {entry.name for entry in file.parent.iterdir()} == {TRANSFORMER, STORE_NAME}, "the tool left its dumps"
