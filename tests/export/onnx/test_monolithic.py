"""The one-graph transformer: against the golden fixtures and the plain reference in ONNX Runtime, in every precision,
and its structure; and the folders that `export-onnx` writes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.build.onnx_folder import LAYOUTS, TRANSFORMER, OnnxReport, export_onnx
from scail2_rt.engines.engine_set import open_engines
from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout, StoreReader
from scail2_rt.engines.onnx_backend.engine import onnxruntime_numerics
from scail2_rt.export.checkpoint.derive import dit_config, dit_shapes
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import MappingSource, shapes_of
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.export.models.dit import DiT, DiTInputs
from scail2_rt.export.onnx import stages
from scail2_rt.export.onnx.monolithic import OPSET, graph_inputs, signature, transformer_model
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.transformer import References, Schedule, Transformer, context_kv
from tests.parity.fixtures import Golden
from tests.parity.networks import _dit_inputs, dit_fixture
from tests.support.small import DIT, random_tensors, small_checkpoint

TOLERANCE = 2e-4  # of the golden DiT fixtures
CASES = [(1, 4, 4, 0, False), (2, 8, 4, 0, True), (3, 4, 8, 1, False), (1, 4, 8, 3, True)]  # F, h, w, N, replace


def dit_only(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Checkpoint:
    source = MappingSource(tensors, metadata)
    config = dit_config(shapes_of(source), source.metadata)
    return Checkpoint(Path("memory"), ModelConfig(dit=config), {"dit": source}, None)


def small_dit() -> Checkpoint:
    """Weights scaled so that signals stay of order one; the head width is that of two heads."""
    tensors = random_tensors(dit_shapes(DIT))
    return dit_only(tensors, {"config": json.dumps({"num_heads": DIT.heads})})


def inputs_of(config: DiTConfig, frames: int, height: int, width: int, refs: int, replace: bool) -> DiTInputs:
    generator = torch.Generator().manual_seed(frames + height)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return DiTInputs(
        latent=values(16, frames, height, width),
        driving=values(16, frames, height // 2, width // 2),
        reference=values(16, 1, height, width),
        reference_mask=values(28, frames + 1, height, width),
        driving_mask=values(28, frames, height // 2, width // 2),
        text=values(7, config.text_dim),
        clip=values(257, config.clip_dim),
        history_mask=values(4, frames, height, width) if refs else None,
        additional_refs=values(16, refs, height, width) if refs else None,
        additional_masks=values(28, refs, height, width) if refs else None,
        replace=replace,
    )


def session(path: Path):  # type: ignore[no-untyped-def]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, config: DiTConfig, inputs: DiTInputs, timestep: float) -> Tensor:
    feed = {name: tensor.numpy() for name, tensor in graph_inputs(config, inputs, timestep).items()}
    return torch.from_numpy(session(path).run(None, feed)[0])


def reference_of(checkpoint: Checkpoint) -> DiT:
    assert checkpoint.config.dit is not None
    model = DiT(checkpoint.config.dit).eval()
    source = checkpoint.sources["dit"]
    model.load_state_dict({name: source.get(name).float() for name in source.keys()}, assign=True)  # noqa: SIM118
    return model


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mono") / "fp32"
    export_onnx(small_dit(), folder, "monolithic", "fp32")
    return folder


@pytest.mark.parametrize("model", ["a", "b"])
def test_golden_fixtures(golden: Path, tmp_path: Path, model: str) -> None:
    with Golden(golden) as data:
        weights = dit_fixture(data, f"dit/{model}_weights.safetensors")
        checkpoint = dit_only(weights.weights(), weights.raw_metadata())
        export_onnx(checkpoint, tmp_path / "m", "monolithic")
        config, seen = checkpoint.config.dit, 0
        assert config is not None
        for path in sorted((golden / "dit").glob(f"{model}_*.safetensors")):
            if "out" not in data.names(path):
                continue
            fixture = data.load(path.relative_to(golden))
            _, inputs, timestep = _dit_inputs(data, fixture)
            error = (run(tmp_path / "m" / TRANSFORMER, config, inputs, timestep) - fixture["out"]).abs().max()
            assert error <= TOLERANCE, fixture.name
            seen += 1
        assert seen >= 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_size_runs_in_one_graph(fp32: Path, case: tuple[int, int, int, int, bool]) -> None:
    checkpoint = small_dit()
    inputs = inputs_of(DIT, *case)
    with torch.inference_mode():
        expected = reference_of(checkpoint)(inputs, 731.5)
    actual = run(fp32 / TRANSFORMER, DIT, inputs, 731.5)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 2e-3), ("fp8", 0.15)])
def test_stored_values_of_other_precisions(tmp_path: Path, precision: str, tolerance: float) -> None:
    """ONNX Runtime has no bf16 on a CPU: the same stored values and the same rules, in fp32 arithmetic."""
    checkpoint = small_dit()
    export_onnx(checkpoint, tmp_path / "m", "monolithic", precision)
    layout = StoreLayout.read(tmp_path / "m" / STORE_NAME)
    model = transformer_model(DIT, lambda d: onnxruntime_numerics(d.numerics(precision)), layout)  # type: ignore[arg-type]
    onnx.save(model, tmp_path / "m" / "fp32.onnx")
    inputs = inputs_of(DIT, *CASES[2])
    with torch.inference_mode():
        expected = reference_of(checkpoint)(inputs, 500.0)
    error = (run(tmp_path / "m" / "fp32.onnx", DIT, inputs, 500.0) - expected).norm() / expected.norm()
    assert 1e-5 < error <= tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp8", 0.15)])
def test_the_exported_form_in_the_reference_evaluator(tmp_path: Path, precision: str, tolerance: float) -> None:
    """The exported file in real bf16 and e4m3 arithmetic, node by node; only softmax sums in fp32, as fused kernels
    do."""
    checkpoint = small_dit()
    export_onnx(checkpoint, tmp_path / "m", "monolithic", precision)
    inputs = inputs_of(DIT, *CASES[0])
    with torch.inference_mode():
        expected = reference_of(checkpoint)(inputs, 500.0)
    feed = {name: tensor.numpy() for name, tensor in graph_inputs(DIT, inputs, 500.0).items()}
    model = onnx.load(tmp_path / "m" / TRANSFORMER)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("softmax_precision", onnx.TensorProto.FLOAT))
    (actual,) = ReferenceEvaluator(model).run(None, feed)
    error = (torch.from_numpy(np.asarray(actual)) - expected).norm() / expected.norm()
    assert error <= tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_structure(tmp_path: Path, precision: str) -> None:
    export_onnx(small_dit(), tmp_path / "m", "monolithic", precision)
    model = onnx.load(tmp_path / "m" / TRANSFORMER, load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    fused = 0 if precision == "fp32" else 2 * DIT.layers  # self, text; the image's is spelt out
    assert (kinds["Attention"], kinds["Softmax"]) == (fused, 3 * DIT.layers - fused)
    assert kinds["RotaryEmbedding"] == 2 * DIT.layers
    assert all(a.i == 1 for n in model.graph.node if n.op_type == "RotaryEmbedding" for a in n.attribute)
    assert not {node.domain for node in model.graph.node} - {""}
    layout = StoreLayout.read(tmp_path / "m" / STORE_NAME)
    external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert external == set(layout.names)  # every weight is used, and none is copied into the graph
    assert (tmp_path / "m" / TRANSFORMER).stat().st_size < 300_000
    inputs, outputs = signature(DIT)
    values = (*model.graph.input, *model.graph.output)
    assert [value.name for value in values] == [spec.name for spec in (*inputs, *outputs)]
    dims = [d.dim_param or d.dim_value for v in values for d in v.type.tensor_type.shape.dim]
    assert dims == [dim for spec in (*inputs, *outputs) for dim in spec.dims]


def test_no_operator_that_tensorrt_lacks(golden: Path, tmp_path: Path) -> None:
    table = golden.parent / "trt_operators.json"
    if not table.is_file():
        pytest.skip(f"no operator table at {table}")
    known = json.loads(table.read_text())
    for precision in ("fp32", "bf16", "fp8"):
        export_onnx(small_dit(), tmp_path / precision, "monolithic", precision)
        model = onnx.load(tmp_path / precision / TRANSFORMER, load_external_data=False)
        assert {node.op_type for node in model.graph.node} <= known["operators"].keys() | known["later"].keys()


def test_what_opset_23_changed_is_only_types() -> None:
    """The stage graphs are traced at opset 21. An operator with a newer version must not have lost an attribute or
    changed a default."""
    definitions = {node.op_type for node in _model(small_dit()).graph.node}
    for kind in definitions - {"Attention", "RotaryEmbedding", "RMSNormalization"}:
        old, new = (onnx.defs.get_schema(kind, opset, "") for opset in (21, OPSET))
        assert [i.name for i in old.inputs] == [i.name for i in new.inputs][: len(old.inputs)], kind
        for name, attribute in old.attributes.items():
            assert new.attributes[name].default_value == attribute.default_value, kind


def _model(checkpoint: Checkpoint) -> onnx.ModelProto:
    from scail2_rt.engines.build.onnx_folder import _plan

    export = _plan(checkpoint, "monolithic", "fp8", (), False)
    return transformer_model(DIT, lambda d: d.numerics("fp8"), export.layout)


def test_forty_real_blocks_need_no_memory_and_few_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The graph of the 14B model, over a store that has no file: stages of one family are traced once."""
    from scail2_rt.engines.folder.store import TensorShape
    from scail2_rt.engines.folder.weights import plan_store, planned_tensors
    from scail2_rt.export.stages.definitions import stage_definitions
    from scail2_rt.export.stages.dit import table_sources

    config = DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13824)
    parts = ModelConfig(dit=config)
    tensors = planned_tensors(parts, stage_definitions(parts), "bf16")
    rows = {name: (2 if name.startswith("head") else 6) for name in table_sources(config)}
    tensors["tables"] = {
        name: TensorShape(torch.float32, (count, 5120) if name.endswith("modulation") else (5120,))
        for name, count in rows.items()
    }
    traced: list[str] = []
    trace = stages._traced
    monkeypatch.setattr(stages, "_traced", lambda stage, n: (traced.append(stage.name), trace(stage, n))[1])
    monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path))
    stages._graph.cache_clear()
    model = transformer_model(config, lambda d: d.numerics("bf16"), plan_store(tensors))
    stages._graph.cache_clear()
    assert len(traced) == len(set(traced)) < 12
    assert not [name for name in traced if ".1." in name]
    assert model.ByteSize() < 4_000_000
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 80
    elements = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.external_data)
    assert elements == 16_395_544_384


class TestFolders:
    def test_stages_of_the_tiny_checkpoint_run(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        from scail2_rt.export.checkpoint.open import open_checkpoint
        from scail2_rt.export.stages.definitions import stage_definitions

        checkpoint = open_checkpoint(tiny_checkpoint)
        report = export_onnx(checkpoint, tmp_path / "s", "stages")
        names = set(stage_definitions(checkpoint.config))
        assert {Path(name).stem for name in report.graphs} == names
        assert {f.name for f in (tmp_path / "s").iterdir()} == {*report.graphs, STORE_NAME}
        assert report.folder_bytes == sum(f.stat().st_size for f in (tmp_path / "s").iterdir())
        x, mod = np.ones((3, 256), np.float32), np.ones((2, 256), np.float32)
        (out,) = session(tmp_path / "s" / "dit.head.onnx").run(None, {"x": x, "mod": mod})
        assert out.shape == (3, 64)
        store = StoreReader(tmp_path / "s" / STORE_NAME)
        table = checkpoint.sources["dit"].get("head.modulation")
        assert torch.equal(store.get("tables.head.modulation"), table[0].float())
        embedding = checkpoint.sources["umt5"].get("token_embedding.weight")
        assert torch.equal(store.get("umt5.token_embedding.weight"), embedding.float())

    def test_stages_hold_what_an_engine_folder_holds(self, tmp_path: Path) -> None:
        from tests.support.small import build_small

        checkpoint = small_checkpoint()
        export_onnx(checkpoint, tmp_path / "s", "stages")
        build_small(tmp_path / "e")
        mine, theirs = (StoreReader(tmp_path / part / STORE_NAME) for part in ("s", "e/stages"))
        for name in theirs.layout.names:
            assert torch.equal(mine.get(name), theirs.get(name)), name

    def test_lora_reaches_the_graph(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        from scail2_rt.export.checkpoint.lora import LoRASpec

        save_file({"blocks.1.self_attn.norm_q.diff": torch.ones(DIT.dim)}, tmp_path / "l.safetensors")
        specs = (LoRASpec(tmp_path / "l.safetensors", 0.5),)
        report: OnnxReport = export_onnx(small_dit(), tmp_path / "m", "monolithic", loras=specs)
        assert report.loras[0].applied == 1
        stored = StoreReader(tmp_path / "m" / STORE_NAME).get("tables.blocks.1.norm_q")
        plain = small_dit().sources["dit"].get("blocks.1.self_attn.norm_q.weight")
        torch.testing.assert_close(stored, plain + 0.5)

    def test_an_output_with_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        export_onnx(small_dit(), tmp_path / "m", "monolithic")  # an empty folder is taken
        with pytest.raises(InputError, match="not an empty folder"):
            export_onnx(small_dit(), tmp_path / "m", "monolithic")

    def test_wrong_requests(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"Use one of {', '.join(LAYOUTS)}"):
            export_onnx(small_dit(), tmp_path / "m", "flat")
        with pytest.raises(InputError, match="precision 'int4' is unknown"):
            export_onnx(small_dit(), tmp_path / "m", "monolithic", "int4")
        text_only = small_checkpoint()
        del text_only.sources["dit"]
        with pytest.raises(InputError, match="no transformer"):
            export_onnx(text_only, tmp_path / "m", "monolithic")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_an_error_leaves_nothing(self, tmp_path: Path, layout: str) -> None:
        large = torch.full((DIT.dim, DIT.dim), 7e4)
        with pytest.raises(Scail2Error, match="--precision bf16"):
            export_onnx(
                small_checkpoint(blocks__1__ffn__0__bias=large[0][:48].repeat(2)[:48]), tmp_path / "m", layout, "fp16"
            )
        assert not list(tmp_path.iterdir())

    def test_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import shutil

        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("scail2_rt.engines.build.onnx_folder.shutil.disk_usage", lambda path: usage)
        with pytest.raises(InputError, match=r"needs 0\.06 GiB"):
            export_onnx(small_dit(), tmp_path / "m", "monolithic")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_graph_computes_what_the_stages_do(tmp_path: Path, case: tuple[int, int, int, int, bool]) -> None:
    """Both in ONNX Runtime, on the same stored values: the stages by the runtime's own transformer."""
    checkpoint = small_checkpoint()
    build(BuildRequest(Path("small"), tmp_path / "e", ("onnxruntime",), "fp32"), checkpoint)
    source = checkpoint.sources["dit"]
    export_onnx(Checkpoint(Path("memory"), ModelConfig(dit=DIT), {"dit": source}, None), tmp_path / "m", "monolithic")
    frames, height, width, refs, replace = case
    inputs = inputs_of(DIT, *case)
    layout = Layout.of(4 * frames - 3, 8 * height, 8 * width, refs, replace)
    empty = torch.empty(16, 0, height, width), torch.empty(28, 0, height, width)
    more = empty if inputs.additional_refs is None else (inputs.additional_refs, inputs.additional_masks)
    history = torch.zeros(4, frames, height, width) if inputs.history_mask is None else inputs.history_mask
    with torch.inference_mode(), open_engines(tmp_path / "e", "onnxruntime") as engines:
        transformer = Transformer(engines, layout, context_kv(engines, [inputs.text], inputs.clip))
        transformer.show_references(References(inputs.reference, inputs.reference_mask, *more))  # type: ignore[arg-type]
        transformer.show_driving(inputs.driving, inputs.driving_mask)
        (staged,) = transformer.velocities(inputs.latent, history, Schedule.of(engines, [731.5]), 0)
    whole = run(tmp_path / "m" / TRANSFORMER, DIT, inputs, 731.5)
    torch.testing.assert_close(whole, staged, atol=TOLERANCE, rtol=1e-4)
