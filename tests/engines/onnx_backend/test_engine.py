"""ONNX Runtime against PyTorch, stage by stage: small sizes in every arithmetic, real sizes in fp32; and its errors."""

import contextlib
import ctypes
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scail2_rt.engines.folder.store import STORE_NAME
from scail2_rt.engines.onnx_backend.engine import CUDA, ELEMENT_TYPES, OnnxEngine, onnxruntime_numerics
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.export.models.precision import BF16, FP16, FP32, Numerics
from scail2_rt.export.onnx.stages import element_type
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError, Scail2Error
from tests.support.onnx_case import REAL, STAGES, Case, make_case, on_meta, relative_error

FP8 = Numerics(torch.bfloat16, torch.bfloat16, fp8=True)
SIZES = [
    {"rows": 1, "t": 1, "i": 2, "n": 1, "h": 1, "w": 2},
    {"rows": 2, "t": 3, "i": 1, "n": 2, "h": 3, "w": 1},
    {"rows": 7, "t": 8, "i": 5, "n": 9, "h": 2, "w": 5},
    {"rows": 64, "t": 33, "i": 64, "n": 64, "h": 4, "w": 6},
]
VAE_STAGES = [pytest.param(name, marks=pytest.mark.slow) for name in STAGES if name.startswith("vae")]
ROW_STAGES = [name for name in STAGES if not name.startswith("vae")]
FP8_STAGES = ["dit.blocks.0.qkv", "dit.blocks.0.mid", "dit.blocks.0.ffn"]


def engine_of(case: Case) -> OnnxEngine:
    return OnnxEngine(case.definition, case.numerics, case.path)


def worst(case: Case, engine: OnnxEngine, sizes: dict[str, int]) -> float:
    inputs = case.inputs(sizes)
    outputs, expected = engine(*inputs), case.expected(inputs)
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in expected]
    return max(relative_error(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("name", ROW_STAGES + VAE_STAGES)
def test_fp32_agrees_with_pytorch(name: str, tmp_path: Path) -> None:
    case = make_case(STAGES[name], FP32, tmp_path)
    engine = engine_of(case)
    for sizes in SIZES:
        assert worst(case, engine, sizes) <= 1e-5, sizes


@pytest.mark.parametrize(
    "name", ["dit.embed", "dit.context", "dit.blocks.0.context_kv", "dit.blocks.0.ffn", "umt5.layers.0"]
)
def test_bf16_storage_in_fp32_arithmetic(name: str, tmp_path: Path) -> None:
    numerics = onnxruntime_numerics(BF16)
    assert numerics == Numerics(torch.bfloat16, torch.float32)
    case = make_case(STAGES[name], numerics, tmp_path, stored=BF16)
    engine = engine_of(case)
    for sizes in SIZES:
        assert worst(case, engine, sizes) <= 1e-5, sizes


@pytest.mark.parametrize(
    "name",
    ["dit.blocks.0.mid", "clip", *(p for p in VAE_STAGES if p.values[0] in ("vae.encode_step", "vae.decode_step"))],
)
def test_fp16_is_as_near_to_fp32_as_pytorch(name: str, tmp_path: Path) -> None:
    """With the same fp16 weights and inputs. A decoder rounds about thirty times, in a different order per library."""
    assert onnxruntime_numerics(FP16) == FP16
    case = make_case(STAGES[name], FP16, tmp_path)
    exact = on_meta(case.definition, FP16.in_arithmetic(torch.float32))
    exact.load_state_dict(case.module.state_dict(), assign=True)
    engine = engine_of(case)
    for sizes in SIZES:
        inputs = case.inputs(sizes)
        truth = replace(case, module=exact).expected([x.float() for x in inputs])
        for ours, torchs, true in zip(engine(*inputs), case.expected(inputs), truth, strict=True):
            assert ours.dtype == torchs.dtype
            assert relative_error(ours, true) <= 2 * relative_error(torchs, true) + 1e-3, sizes
            assert relative_error(ours, true) <= 0.02, sizes


@pytest.mark.parametrize("name", FP8_STAGES)
def test_fp8_is_exact_up_to_rounding_flips(name: str, tmp_path: Path) -> None:
    """Q/DQ in fp32 rounds as PyTorch's cast does. Where the fp32 value before it differs in its last bit, a value that
    lies on a boundary may fall to the other side; that moves its row by one e4m3 step of one element."""
    numerics = onnxruntime_numerics(FP8)
    case = make_case(STAGES[name], numerics, tmp_path, stored=FP8)
    engine = engine_of(case)
    rows = flipped = 0
    for seed in range(4):
        inputs = case.inputs({"rows": 64}, seed)
        for actual, expected in zip(engine(*inputs), case.expected(inputs), strict=True):
            error = (actual - expected).abs().amax(1) / expected.abs().max()
            assert error.max() < 0.02
            rows, flipped = rows + len(error), flipped + int((error > 1e-5).sum())
    assert flipped <= rows // 20


def test_fp8_rounds_at_all(tmp_path: Path) -> None:
    """The session must not optimise the Q/DQ pairs away: without them the result would be ten times closer to fp32."""
    case = make_case(STAGES["dit.blocks.0.qkv"], onnxruntime_numerics(FP8), tmp_path, stored=FP8)
    inputs = case.inputs({"rows": 64})
    (actual,) = engine_of(case)(*inputs)
    x, mod = inputs
    h = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod[1]) + mod[0]
    weight = case.module.linear.weight.float() * case.module.linear.scale[:, None]
    assert relative_error(actual, h @ weight.T + case.module.linear.bias.float()) > 3e-3


REAL_STAGES = list(stage_definitions(REAL))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_STAGES)
def test_real_size_fp32(name: str, tmp_path: Path) -> None:
    """The widths of the 14B model, umT5-XXL, the VAE; three of CLIP's 31 blocks."""
    case = make_case(stage_definitions(REAL)[name], FP32, tmp_path)
    engine = engine_of(case)
    try:
        assert worst(case, engine, {"rows": 64, "t": 64, "i": 64, "n": 64, "h": 2, "w": 3}) <= 1e-5
    finally:
        engine.close()
        (tmp_path / STORE_NAME).unlink()  # up to 0.8 GB


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("stored", [FP32, BF16, FP8], ids=["fp32", "bf16", "fp8"])
def test_weights_stay_in_the_mapping(stored: Numerics, tmp_path: Path) -> None:
    stage = stage_definitions(ModelConfig(dit=DiTConfig(dim=2048, heads=16, layers=1, ffn_dim=64)))["dit.blocks.0.qkv"]
    case = make_case(stage, onnxruntime_numerics(stored), tmp_path, stored=stored)
    inputs = case.inputs({"rows": 4})
    kept, grown = [], []
    for _ in range(3):  # copies would appear every time, unlike other allocations of the process
        before = anonymous_mib()
        kept.append(engine_of(case))
        kept[-1](*inputs)
        grown.append(anonymous_mib() - before)
    assert min(grown) < 20  # the weights in fp32: 48


def anonymous_mib() -> float:
    """Anonymous memory of this process, without memory that the allocator has free."""
    with contextlib.suppress(AttributeError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


@pytest.fixture
def head(tmp_path: Path) -> Case:
    return make_case(STAGES["dit.head"], FP32, tmp_path)


def test_converts_the_callers_types(head: Case) -> None:
    inputs = head.inputs({"rows": 3})
    (expected,) = head.expected([inputs[0].half().float(), inputs[1]])
    (actual,) = engine_of(head)(inputs[0].half(), inputs[1].double().T.contiguous().T)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) <= 1e-5


def test_wrong_shapes_are_named(head: Case) -> None:
    engine = engine_of(head)
    x, mod = head.inputs({"rows": 3})
    with pytest.raises(Scail2Error, match=r"dit\.head was given mod of shape \[3, 32\].*'2', '32'.*rows = 3"):
        engine(x, x)
    with pytest.raises(Scail2Error, match=r"x of shape \[32\]"):
        engine(x[0], mod)
    with pytest.raises(Scail2Error, match="takes 2 inputs and was given 1"):
        engine(x)


def test_one_symbol_has_one_value(tmp_path: Path) -> None:
    case = make_case(STAGES["dit.embed"], FP32, tmp_path)
    latent, mask, driving = case.inputs({"rows": 4})
    with pytest.raises(Scail2Error, match="was given mask"):
        engine_of(case)(latent, mask[:3], driving)


def test_closed_engine_refuses(head: Case) -> None:
    engine = engine_of(head)
    engine.close()
    with pytest.raises(Scail2Error, match=r"dit\.head was closed"):
        engine(*head.inputs({"rows": 2}))


def test_missing_weights(head: Case) -> None:
    (head.folder / STORE_NAME).unlink()
    with pytest.raises(Scail2Error, match=r"cannot load the stage .*stage\.onnx: .*weights\.safetensors"):
        engine_of(head)


def test_truncated_weights(head: Case) -> None:
    store = head.folder / STORE_NAME
    store.write_bytes(store.read_bytes()[:5000])
    with pytest.raises(Scail2Error, match=r"cannot load the stage .*stage\.onnx: .*Build the engine folder again"):
        engine_of(head)


def test_damaged_graph(head: Case) -> None:
    head.path.write_bytes(head.path.read_bytes()[:200])
    with pytest.raises(Scail2Error, match=r"cannot load the stage .*stage\.onnx"):
        engine_of(head)


def test_failure_while_running(tmp_path: Path) -> None:
    case = make_case(STAGES["umt5.layers.0"], FP32, tmp_path)
    x, buckets, mask = case.inputs({"n": 3})
    with pytest.raises(Scail2Error, match=r"failed in the stage .*stage\.onnx: .*"):
        engine_of(case)(x, buckets + 1000, mask)  # no such row in the table


def test_provider_that_is_not_there(head: Case) -> None:
    with pytest.raises(InputError, match=r"no TensorrtExecutionProvider.*use --backend torch"):
        OnnxEngine(head.definition, FP32, head.path, providers=["TensorrtExecutionProvider"])


def test_onnxruntime_not_installed(head: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="ONNX Runtime is not installed"):
        engine_of(head)


def test_element_types_are_those_of_onnx() -> None:
    assert {dtype: element_type(dtype) for dtype in ELEMENT_TYPES} == ELEMENT_TYPES


def test_a_provider_that_does_not_start_is_refused(head: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime warns and falls back to the next provider; exact fp32 is requested from the CUDA provider."""
    import onnxruntime

    asked: list[object] = []
    real = onnxruntime.InferenceSession

    def fallen_back(path: str, options: object, providers: list[object], **chosen: object) -> object:
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"], **chosen)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    with pytest.raises(InputError, match=r"could not start its CUDAExecutionProvider .* use --backend torch"):
        OnnxEngine(head.definition, FP32, head.path, providers=[CUDA, "CPUExecutionProvider"])
    name, chosen = asked[0]  # type: ignore[misc]
    assert (name, chosen["use_tf32"]) == (CUDA, "0")
