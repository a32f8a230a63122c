"""The fused row operations in Triton against fp64 and against their twins: on the GPU, else in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.export.models.precision import FP8_ACCUMULATION, numerics_of
from scail2_rt.export.stages import layers
from scail2_rt.export.stages.dit import definitions
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.kernels.rows import ops

pytest.importorskip("triton")
from scail2_rt.kernels.rows import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-2  # large, so that a test sees it
SHAPES = [(1, 8), (5, 72), (3, 320), (2, 5120)]  # rows, columns: short of, equal to and beyond the powers of two
# relative; the interpreter truncates to bf16, which doubles the error
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.2e-3 if DEVICE == "cuda" else 4.5e-3, torch.float16: 5e-4}
STEP = 2.0**-4  # half an e4m3 step, of the value
CONFIGS = [launch.Config(1, 4), launch.Config(2, 8), launch.Config(4, 4, programs=1, stages=2)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, device=DEVICE).to(dtype)


def operand(count: int, c: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Output memory for rows: of a dtype, or for None e4m3 with scales."""
    return poisoned(count, c, dtype=dtype or ops.E4M3), None if dtype else poisoned(count, 1)


def check_operand(data: Tensor, scales: Tensor | None, want: Tensor) -> None:
    """The tolerance: for cast rows the last bit of the dtype, for e4m3 rows half a step of each value (and of the
    smallest normal value)."""
    if scales is None:
        assert relative_error(data, want) < TOLERANCE[data.dtype]
        return
    scale = (want.abs().amax(-1, keepdim=True) / ops.E4M3_MAX).clamp_min(1e-12)
    assert torch.allclose(scales.double(), scale, rtol=1e-5)
    off = (data.double() * scales.double() - want).abs()
    assert (off <= (want.abs() * STEP + scale * 2.0**-10) * 1.001 + 1e-6 * scale).all()


def layer_norm64(x: Tensor, weight: Tensor, bias: Tensor, offset: float) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * (weight.double() + offset) + bias.double()


@pytest.mark.parametrize("dtype", [*TOLERANCE, None], ids=str)
@pytest.mark.parametrize(("count", "c"), SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(count: int, c: int, offset: float, dtype: torch.dtype | None) -> None:
    x, weight, bias = random(count, c) * 3 + 2, random(c, seed=1), random(c, seed=2)
    data, scales = operand(count, c, dtype)
    launch.norm_rows(x, weight, bias, offset, EPS, data, scales)
    check_operand(data, scales, layer_norm64(x, weight, bias, offset))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("count", "c"), SHAPES[1:3])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_residual_and_norm(count: int, c: int, in_place: bool, gated: bool, config: launch.Config) -> None:
    """On a slice of rows; the neighbouring rows must not change."""
    whole, y = random(count + 2, c), random(count, c, seed=1, dtype=torch.bfloat16)
    before, x = whole.clone(), whole[1:-1]
    gate = random(c, seed=2) if gated else None
    weight, bias = random(c, seed=3), random(c, seed=4)
    want = x.double() + (y.double() if gate is None else gate.double() * y.double())
    x_out = x if in_place else poisoned(count, c)
    data, scales = operand(count, c, None)
    launch.norm_rows(x, weight, bias, 1.0, EPS, data, scales, y, gate, x_out, config)
    assert relative_error(x_out, want) < TOLERANCE[torch.float32]
    check_operand(data, scales, layer_norm64(want, weight, bias, 1.0))
    assert torch.equal(whole[[0, -1]], before[[0, -1]])
    assert in_place or torch.equal(whole, before)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gate_residual_in_place(gated: bool, dtype: torch.dtype, config: launch.Config) -> None:
    x, y, gate = random(5, 72), random(5, 72, seed=1, dtype=dtype), random(72, seed=2) if gated else None
    want = x.double() + (y.double() if gate is None else gate.double() * y.double())
    launch.residual_rows(x, y, gate, x, config)
    assert relative_error(x, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("to", [*TOLERANCE, None], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.filterwarnings("ignore:overflow")  # of exp2 in NumPy, far on the negative side
@pytest.mark.parametrize("gelu", [True, False])
def test_activation(gelu: bool, dtype: torch.dtype, to: torch.dtype | None) -> None:
    h = random(5, 320, dtype=dtype) * 4
    h[0, :3] = torch.tensor([-60.0, 60.0, 0.0])
    d = h.double()
    want = 0.5 * d * (1 + torch.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3))) if gelu else d
    data, scales = operand(5, 320, to)
    launch.activation_rows(h, data, scales, gelu)
    check_operand(data, scales, want)
    if to == dtype:
        launch.activation_rows(h, h, None, gelu, CONFIGS[-1])
        assert torch.equal(h, data)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("count", "c"), SHAPES)
def test_rms_norm(count: int, c: int, dtype: torch.dtype) -> None:
    x, weight = random(count, c, dtype=dtype) * 3, random(c, seed=1)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    launch.rms_rows(x, weight, EPS, x)
    assert relative_error(x, want) < TOLERANCE[dtype]


def test_every_e4m3_rounding() -> None:
    """All codes, all midpoints between neighbours (ties to even) and values beside them; rows with maximum 448 have
    scale 1, so that the codes are those of the values themselves."""
    codes = torch.arange(127, dtype=torch.uint8).view(ops.E4M3).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), codes[-1:]])
    x = torch.cat([values, -values])[None].to(DEVICE)
    data, scales = operand(1, x.shape[1], None)
    launch.activation_rows(x, data, scales, gelu=False)
    assert scales is not None
    assert scales.item() == 1
    assert torch.equal(data.cpu().view(torch.uint8), x.cpu().to(ops.E4M3).view(torch.uint8))


def test_zero_rows_and_not_a_number() -> None:
    x = torch.zeros(2, 16, device=DEVICE)
    data, scales = operand(2, 16, None)
    launch.activation_rows(x, data, scales, gelu=False)
    assert scales is not None
    assert torch.equal(data.float() * scales, x)
    x[1, 3] = math.nan
    launch.activation_rows(x, data, scales, gelu=False)
    restored = data.float() * scales
    assert torch.equal(restored[0], x[0])
    assert restored[1].isnan().all()  # by the scale, whatever became of the data
    assert scales[1].isnan()


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operation", ["quantise", "gelu", "norm", "residual"])
def test_what_is_not_a_number_stays_in_its_row(operation: str, value: float, twin: bool) -> None:
    """After the product with e4m3 weights, this row has only NaN, and all other rows are finite."""
    x, y = random(4, 320), random(4, 320, seed=1, dtype=torch.bfloat16)
    weight, bias = random(320, seed=2), random(320, seed=3)
    (y if operation == "residual" else x)[2, 300] = value
    if twin:
        x, y, weight, bias = (t.cpu() for t in (x, y, weight, bias))
        form = ops.RowForm(torch.float32, quantised=True)
        affine = ops.Affine(weight, bias)
        data, scales = {
            "quantise": lambda: ops.quantise_rows(x),
            "gelu": lambda: ops.gelu_rows(x, form),
            "norm": lambda: ops.norm_rows(x, affine, EPS, form),
            "residual": lambda: ops.residual_norm(x, y, None, affine, EPS, form)[1],
        }[operation]()
    else:
        data, scales = operand(4, 320, None)
        if operation in ("quantise", "gelu"):
            launch.activation_rows(x, data, scales, gelu=operation == "gelu")
        else:
            added = (y, None, torch.empty_like(x)) if operation == "residual" else ()
            launch.norm_rows(x, weight, bias, 0.0, EPS, data, scales, *added)
    assert scales is not None
    lost = torch.tensor([False, False, True, False])
    restored = (data.float() * scales).cpu()
    if operation == "gelu" and value == -math.inf:
        value = math.nan  # −∞·0
    assert torch.equal((~restored.isfinite()).any(1), lost)
    if math.isnan(value) or operation in ("norm", "residual"):
        assert torch.equal(scales[:, 0].isnan().cpu(), lost)
        assert restored[2].isnan().all()


def test_fused_quantisation_is_as_accurate_as_the_twin() -> None:
    """The kernel rounds once, the twin twice (through bf16): few codes differ, and the kernel's error is not larger."""
    x, shift, scale = random(9, 512) * 2 + 1, random(512, seed=1), random(512, seed=2) * 0.3
    data, scales = operand(9, 512, None)
    launch.norm_rows(x, scale, shift, 1.0, EPS, data, scales)
    assert scales is not None
    twin_data, twin_scales = ops.norm_modulate_quant(x.cpu(), shift.cpu(), scale.cpu(), EPS, torch.bfloat16)
    want = layer_norm64(x, scale, shift, 1.0).cpu()
    ours = relative_error(data.cpu().double() * scales.cpu().double(), want)
    assert ours < 1.01 * relative_error(twin_data.double() * twin_scales.double(), want)
    assert (data.cpu().float() != twin_data.float()).float().mean() < 0.08


SMALL = DiTConfig(dim=48, heads=2, layers=1, ffn_dim=80, freq_dim=16, text_dim=24, clip_dim=20)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("stage", ["qkv", "mid", "ffn"])
def test_stages_write_where_they_are_told(stage: str, precision: str) -> None:
    """Into row slices of larger tensors, the residual in place; the same as the twins' stage on the CPU."""
    definition = {d.name: d for d in definitions(SMALL)}[f"dit.blocks.0.{stage}"]
    numerics = numerics_of(definition.name, precision)  # type: ignore[arg-type]
    if numerics.fp8 and DEVICE == "cuda" and torch.cuda.get_device_capability() < ops.E4M3_GEMM:
        pytest.skip("no e4m3 GEMM on this GPU")
    module = definition.build(numerics)
    generator = torch.Generator().manual_seed(1)
    for value in module.state_dict().values():
        value.copy_((torch.randn(value.shape, generator=generator) * 0.3).to(value.dtype))
    inputs, outputs = definition.io(numerics)
    tensors = [torch.randn([d if isinstance(d, int) else 7 for d in s.dims], generator=generator) for s in inputs]
    tensors = [tensor.to(spec.dtype) for tensor, spec in zip(tensors, inputs, strict=True)]
    with torch.inference_mode():
        want = module(*tensors)
        want = want if isinstance(want, tuple) else (want,)
        module, tensors = module.to(DEVICE), [tensor.to(DEVICE) for tensor in tensors]
        wholes = [poisoned(9, int(spec.dims[1]), dtype=spec.dtype) for spec in outputs]
        if stage != "qkv":
            wholes[0][1:8] = tensors[0]
            tensors[0] = wholes[0][1:8]
        out = tuple(whole[1:8] for whole in wholes)
        module(*tensors, out=out if len(out) > 1 else out[0])
    for whole, expected in zip(wholes, want, strict=True):
        limit = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2, "fp8": 5e-2}[precision]
        assert relative_error(whole[1:8].cpu(), expected) < limit
        assert whole[[0, 8]].isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gelu_joins_the_16_bit_product_on_a_gpu(device: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations that run, on tensors without data: one operation for 16 bits on a GPU, else product and row
    operation."""
    numerics = numerics_of("dit.blocks.0.ffn", precision)  # type: ignore[arg-type]
    called = []

    def record(name: str, result: int) -> None:
        monkeypatch.setattr(layers, name, lambda *args, **_: called.append(name) or args[result])

    for name in ("gelu_linear", "gelu_rows", "fp8_linear"):
        record(name, 0)
    form = ops.RowForm(numerics.compute, numerics.fp8)
    with FakeTensorMode(), torch.device(device):
        linear = layers.Linear(64, 96, numerics)
        x = torch.empty(5, 64, dtype=numerics.compute)
        linear.project_gelu((x, x) if numerics.fp8 else x, form)
    joined = device == "cuda" and precision in ("bf16", "fp16")
    assert called == (["gelu_linear"] if joined else ["fp8_linear"] * numerics.fp8 + ["gelu_rows"])


@pytest.mark.skipif(DEVICE == "cpu", reason="cuBLASLt's epilogue")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "c", "o"), [(1, 64, 96), (7, 48, 80), (333, 512, 1024)])
def test_gelu_in_the_product(count: int, c: int, o: int, dtype: torch.dtype) -> None:
    """Against fp64. A single row, which cuBLASLt does not take, is rounded before GELU as well as after."""
    x, weight = random(count, c, dtype=dtype) * 2, random(o, c, seed=1, dtype=dtype) * c**-0.5
    bias = random(o, seed=2, dtype=dtype)
    h = x.double() @ weight.double().T + bias.double()
    want = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert relative_error(ops.gelu_linear(x, weight, bias), want) < 2 * TOLERANCE[dtype]


def test_every_fp8_linear_has_its_accumulation() -> None:
    numerics = numerics_of("dit.blocks.0.ffn", "fp8")
    found = {}
    for definition in definitions(SMALL):
        stage = definition.name.rpartition(".")[2]
        if numerics_of(definition.name, "fp8").fp8:
            for name, module in definition.build(numerics).named_children():
                if hasattr(module, "accumulation"):
                    found[f"{stage}.{name}"] = module.accumulation
    assert found == FP8_ACCUMULATION
    assert found["ffn.down"] == "accurate"


@pytest.mark.skipif(DEVICE == "cpu", reason="the twin takes every shape")
def test_gemm_refuses_what_it_cannot_do() -> None:
    data, weight = poisoned(3, 24, dtype=ops.E4M3), poisoned(16, 24, dtype=ops.E4M3)
    with pytest.raises(Scail2Error, match="e4m3 GEMM"):
        ops.fp8_linear((data, poisoned(3, 1)), (weight, poisoned(16)), None, torch.bfloat16)
