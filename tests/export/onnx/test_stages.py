"""The structure of exported stages, and the results of the bf16, fp16 and fp8 files in ONNX's reference evaluator."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.export.models.precision import BF16, FP16, FP32, Numerics
from scail2_rt.export.onnx import stages
from scail2_rt.export.onnx.stages import OPSET, export_stage, split_dim, stage_graph, stage_model
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import Scail2Error
from tests.support.onnx_case import SMALL, STAGES, kinds_of_numerics, make_case, plan, relative_error, write_store

FP8 = Numerics(torch.bfloat16, torch.bfloat16, fp8=True)
FP8_STAGES = ("dit.blocks.0.qkv", "dit.blocks.0.mid", "dit.blocks.0.ffn")
VAE_STEPS = ("vae.encode_step", "vae.decode_step")


def variants() -> Iterator[object]:
    """Every stage in the numerics of every precision flag, and in fp32 arithmetic where bf16 is stored."""
    for name, stage in STAGES.items():
        vae = name.startswith("vae")
        for n in [FP32] if vae and name not in VAE_STEPS else kinds_of_numerics(stage):
            kind = f"{str(n.storage)[6:]}-{str(n.compute)[6:]}{'-fp8' if n.fp8 else ''}"
            yield pytest.param(name, n, id=f"{name}-{kind}", marks=[pytest.mark.slow] if vae else [])


@pytest.mark.parametrize(("name", "numerics"), list(variants()))
def test_form_of_every_file(name: str, numerics: Numerics, tmp_path: Path) -> None:
    """Checker and strict shape inference pass; names and dimensions are the specs'; weights are references."""
    stage = STAGES[name]
    layout = write_store([stage], numerics, tmp_path)
    path = tmp_path / "stage.onnx"
    export_stage(stage, numerics, path, layout)
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes_path(path, tmp_path / "o.onnx", check_type=True, strict_mode=True, data_prop=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.load(tmp_path / "o.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    for specs, values in zip(stage.io(numerics), (model.graph.input, model.graph.output), strict=True):
        assert [(spec.name, stages.element_type(spec.dtype), spec.dims) for spec in specs] == [
            (value.name, value.type.tensor_type.elem_type, dims_of(value)) for value in values
        ]
    check_weights(model, name, layout)
    types = {value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert TensorProto.DOUBLE not in types | {tensor.data_type for tensor in model.graph.initializer}
    assert b"site-packages" not in path.read_bytes()
    assert b"scail2_rt" not in path.read_bytes()


def dims_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def check_weights(model: onnx.ModelProto, stage: str, layout: StoreLayout) -> None:
    """Parameters refer to the store, all other initialisers are small constants, and every initialiser is used."""
    used = {name for node in model.graph.node for name in node.input}
    references = 0
    for tensor in model.graph.initializer:
        assert tensor.name in used
        if tensor.data_location != TensorProto.EXTERNAL:
            assert tensor.ByteSize() < 1000
            continue
        references += 1
        place = layout.location(f"{stage}.{tensor.name}")
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries == {"location": STORE_NAME, "offset": str(place.offset), "length": str(place.length)}
        assert tuple(tensor.dims) == place.shape
    parameters = set(layout.names)
    skipped = {n for n in parameters if n.removeprefix(f"{stage}.") not in used}
    assert references == len(parameters) - len(skipped)
    assert not skipped or stage in ("vae.encode_first", "vae.decode_first")  # no mixing in the first frame


@pytest.mark.parametrize(("name", "numerics"), list(variants()))
def test_only_operators_that_tensorrt_knows(golden: Path, name: str, numerics: Numerics) -> None:
    table = golden.parent / "trt_operators.json"
    if not table.is_file():
        pytest.skip(f"no operator table at {table}")
    known = json.loads(table.read_text())["operators"]
    graph = onnx.shape_inference.infer_shapes(stage_graph(STAGES[name], numerics), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    type_names = {TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16"}
    for node in graph.node:
        assert node.op_type in known
        kind = type_names.get(types[node.output[0]])
        if node.op_type != "DequantizeLinear" and kind is not None:  # whose listed types are those of its input
            assert kind in known[node.op_type], f"{node.op_type} in {kind}"
        assert (node.op_type, kind) != ("Resize", "BF16")


@pytest.mark.parametrize("name", FP8_STAGES)
@pytest.mark.parametrize("numerics", [FP8, FP8.in_arithmetic(torch.float32)], ids=["bf16", "fp32"])
def test_fp8_matmuls_have_unit_scales(name: str, numerics: Numerics) -> None:
    """Quantize, dequantize, MatMul, with the scalar 1 in the compute type; the e4m3 weight is [out, in]."""
    model = stage_model(STAGES[name], numerics, plan([STAGES[name]], numerics))
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {n: t for n, t in constants.items() if t.data_type == TensorProto.FLOAT8E4M3FN and t.external_data}
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(matmuls) == len(weights) == {"qkv": 1, "mid": 2, "ffn": 3}[name.rpartition(".")[2]]
    base = stages.element_type(numerics.compute)

    def dequantized(node: onnx.NodeProto) -> str:
        assert node.op_type == "DequantizeLinear"
        scale = constants[node.input[1]]
        assert (list(scale.dims), scale.data_type, float(onnx.numpy_helper.to_array(scale))) == ([], base, 1.0)
        return node.input[0]

    for matmul in matmuls:
        quantize = makers[dequantized(makers[matmul.input[0]])]
        assert quantize.op_type == "QuantizeLinear"
        scale, zero = (constants[quantize.input[i]] for i in (1, 2))
        assert (list(scale.dims), scale.data_type, float(onnx.numpy_helper.to_array(scale))) == ([], base, 1.0)
        assert (list(zero.dims), zero.data_type) == ([], TensorProto.FLOAT8E4M3FN)
        transpose = makers[matmul.input[1]]
        assert transpose.op_type == "Transpose"
        weight = weights.pop(dequantized(makers[transpose.input[0]]))
        module = dict(STAGES[name].build(numerics).named_parameters())
        assert tuple(weight.dims) == tuple(module[weight.name].shape)
    assert not weights


# How far a file may lie from the PyTorch stage in the same numerics, of the largest output: a few roundings of the
# compute type, which do not fall alike because the reference evaluator sums a matrix product in another order and type.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize(
    ("name", "numerics"),
    [
        pytest.param(name, numerics, id=f"{name}-{kind}")
        for kind, numerics in (("bf16", BF16), ("fp16", FP16), ("fp8", FP8))
        for name in STAGES
        if not name.startswith(("vae", "dit.time", "dit.head", "umt5.final"))
        if kind != "fp8" or name in FP8_STAGES
        if kind != "fp16" or not name.startswith("umt5")
    ],
)
def test_reference_evaluator_agrees(name: str, numerics: Numerics, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    case = make_case(STAGES[name], numerics, tmp_path)
    evaluator = ReferenceEvaluator(onnx.load(case.path))
    for rows in (1, 5):
        inputs = case.inputs({"rows": rows, "t": rows, "i": rows + 1, "n": rows})
        specs = case.definition.io(numerics)[0]
        outputs = evaluator.run(None, {s.name: to_numpy(x) for s, x in zip(specs, inputs, strict=True)})
        for actual, expected in zip(outputs, case.expected(inputs), strict=True):
            assert onnx.helper.np_dtype_to_tensor_dtype(actual.dtype) == stages.element_type(expected.dtype)
            assert relative_error(torch.from_numpy(actual.astype(np.float32)), expected) <= TOLERANCE[numerics.compute]


def to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype != torch.bfloat16:
        return x.numpy()
    return x.view(torch.int16).numpy().view(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))


def test_a_family_differs_in_references_only() -> None:
    stages = stage_definitions(SMALL)
    for kind in ("qkv", "mid", "ffn", "context_kv"):
        pair = [stages[f"dit.blocks.{i}.{kind}"] for i in (0, 1)]
        layout = plan(pair, FP32)
        models = [stage_model(stage, FP32, layout) for stage in pair]
        assert models[0].SerializeToString(deterministic=True) != models[1].SerializeToString(deterministic=True)
        for model in models:
            for tensor in model.graph.initializer:
                del tensor.external_data[:]
        assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The names of the stages that were traced; with empty caches."""
    names: list[str] = []
    original: Callable[..., onnx.ModelProto] = stages._traced

    def counted(definition: object, numerics: Numerics) -> onnx.ModelProto:
        names.append(getattr(definition, "name", ""))
        return original(definition, numerics)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "_traced", counted)
    monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path / "cache"))
    stages._graph.cache_clear()
    yield names
    stages._graph.cache_clear()


def test_160_stages_of_the_14b_are_one_trace_a_family(traces: list[str], tmp_path: Path) -> None:
    config = ModelConfig(dit=DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13824))
    stages = [stage for name, stage in stage_definitions(config).items() if name.endswith((".qkv", ".ffn"))]
    layout = plan(stages, BF16)
    for stage in stages:
        export_stage(stage, BF16, tmp_path / f"{stage.name}.onnx", layout)
    assert len(stages) == 80
    assert traces == ["dit.blocks.0.qkv", "dit.blocks.0.ffn"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.onnx")) < 80 * 64_000  # no weights in them


def test_graphs_are_kept_on_disk(traces: list[str], tmp_path: Path) -> None:
    stage = STAGES["umt5.final"]
    first = stage_graph(stage, FP32).SerializeToString(deterministic=True)
    stages._graph.cache_clear()
    assert stage_graph(stage, FP32).SerializeToString(deterministic=True) == first
    assert traces == ["umt5.final"]
    (kept,) = (tmp_path / "cache" / "graphs").glob("*")
    for damage in (first[: len(first) // 2], b"", b"no graph"):
        kept.write_bytes(damage)
        stages._graph.cache_clear()
        assert stage_graph(stage, FP32).SerializeToString(deterministic=True) == first
        assert kept.read_bytes() == first
    assert traces == ["umt5.final"] * 4


def test_other_numerics_and_sizes_are_other_graphs(traces: list[str]) -> None:
    other = stage_definitions(ModelConfig(dit=DiTConfig(dim=48, heads=2, layers=1, ffn_dim=40)))["dit.blocks.0.qkv"]
    stage = STAGES["dit.blocks.0.qkv"]
    models = [stage_graph(*pair) for pair in ((stage, FP32), (stage, FP16), (other, FP32))]
    assert len(traces) == 3
    assert len({model.SerializeToString(deterministic=True) for model in models}) == 3


def test_a_cache_that_cannot_be_written_does_no_harm(
    traces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path / "file"))
    assert len(stage_graph(STAGES["umt5.final"], FP32).graph.node) > 3
    assert traces == ["umt5.final"]


def test_a_store_of_other_numerics_is_refused() -> None:
    stage = STAGES["dit.head"]
    with pytest.raises(
        Scail2Error, match=r"holds dit\.head\.linear\.weight as torch\.float16 .*needs FLOAT \[64, 32\]"
    ):
        stage_model(stage, FP32, plan([stage], FP16))


def test_split_dim() -> None:
    assert [split_dim(dim) for dim in (5120, "rows", "8*h")] == [(5120, ""), (1, "rows"), (8, "h")]
