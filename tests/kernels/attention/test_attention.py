"""The Triton kernels of attention and its preparation against their PyTorch twins: on the GPU if there is one, else
through Triton's interpreter (its e4m3 cast and bf16 dot are wrong: the cast is replaced, bf16 dots need a GPU)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scail2_rt.kernels.attention import eight_bit, ops, variants
from scail2_rt.kernels.attention.eight_bit import Prepared8
from scail2_rt.kernels.attention.ops import (
    PreparedQKV,
    choose_attention,
    cross_attention,
    prepare_qkv,
    self_attention,
)
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rope import Rope, rotate
from scail2_rt.kernels.rows.ops import rms_norm

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("exact_e4m3")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (9, 0)
DOT_TYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
SHAPES = [(201, 2, 64), (130, 3, 64), (256, 1, 128)]  # tokens, heads, width: odd, one past a tile, whole tiles
EPS = 1e-6
fp8 = pytest.mark.skipif(CAPABILITY < (8, 9), reason="e4m3 needs a GPU of capability 8.9")
tma_paths = pytest.mark.parametrize("tma", [True, False] if CAPABILITY[0] >= 9 else [False])


def case(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Rope]:
    """qkv with outlier channels, a common key and shifted V; RoPE multipliers of modulus below one."""
    gen = torch.Generator().manual_seed(0)
    channels = heads * dim
    weights = [torch.rand(channels, generator=gen) + 0.5 for _ in range(2)]
    for weight in weights:
        weight[torch.randperm(channels, generator=gen)[:4]] = 5.0
    qkv = torch.randn(tokens, 3 * channels, generator=gen) + 0.7 * torch.randn(3 * channels, generator=gen)
    angle = 6 * torch.rand(tokens, dim // 2, generator=gen)
    modulus = 0.6 + 0.4 * torch.rand(tokens, 1, generator=gen)
    rope = Rope((angle.cos() * modulus).to(DEVICE), (angle.sin() * modulus).to(DEVICE))
    return qkv.to(DEVICE, dtype), weights[0].to(DEVICE), weights[1].to(DEVICE), rope


def normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [H, L, D] each, by the plain formulas."""
    q, k, v = (t.unflatten(-1, (-1, rope.head_dim)) for t in qkv.float().chunk(3, -1))
    q, k = (rotate(rms_norm(t.flatten(1), w, EPS).view_as(t), rope) for t, w in ((q, q_weight), (k, k_weight)))
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (p @ v.double()).transpose(0, 1).flatten(1)


def error(actual: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(actual.float()).all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def poisoned(prepared: Prepared8) -> Prepared8:
    for name in ("q_scale", "k_scale", "v_scale", "v_shift"):
        tensor = getattr(prepared, name)
        if tensor is not None:
            tensor.fill_(math.nan)
    prepared.q.fill_(77)
    prepared.k.fill_(77)
    return prepared


def unwritten(tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, channels), math.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(7, 3, 64), (33, 5, 128)])
def test_prepare_16bit(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    from scail2_rt.kernels.attention import launch

    qkv, q_weight, k_weight, rope = case(tokens, heads, dim, dtype)
    outputs = [unwritten(tokens, heads * dim, dtype) for _ in range(2)]
    launch.prepare_16bit(qkv, q_weight, k_weight, rope, EPS, *outputs)
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3 if CUDA else 6e-3}[
        dtype
    ]  # interpreter: truncates
    for out, want in zip(outputs, normed(qkv, q_weight, k_weight, rope)[:2], strict=True):
        assert error(out, want.transpose(0, 1).flatten(1)) < tolerance


@fp8
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_prepare_8bit_agrees_with_its_twin(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    from scail2_rt.kernels.attention import launch

    qkv, q_weight, k_weight, rope = case(tokens, heads, dim, dtype)
    twin = eight_bit.prepare_8bit(qkv, q_weight, k_weight, rope, EPS)
    made = poisoned(eight_bit.empty_prepared8(heads, tokens, dim, None, DEVICE))
    launch.prepare_8bit(qkv, q_weight, k_weight, rope, EPS, made)
    for name in ("q", "k"):
        difference = (getattr(made, name).int() - getattr(twin, name).int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.02
    assert torch.equal(made.k[:, tokens:], torch.zeros_like(made.k[:, tokens:]))
    for name, tolerance in (("q_scale", 1e-3), ("k_scale", 1e-3), ("v_scale", 1e-6), ("v_shift", 1e-5)):
        assert error(getattr(made, name), getattr(twin, name)) < tolerance
    assert (made.v.float() != twin.v.float()).float().mean() < 1e-3
    assert error(made.v.float(), twin.v.float()) < 2e-3


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_prepared_8bit_means_what_it_says(tokens: int, heads: int, dim: int) -> None:
    """The twin's operands, unpacked by the documented layout, give the scores and values of the plain formulas."""
    inputs = case(tokens, heads, dim, torch.float32)
    q, k, v = normed(*inputs)
    prepared = eight_bit.prepare_8bit(*inputs, EPS)
    k = k - k.mean(1, keepdim=True)
    score = (prepared.q.float() @ prepared.k.float().mT) * prepared.q_scale[..., None]
    score = score * prepared.k_scale.repeat_interleave(128, 1)[:, None]
    want = q @ k.mT * math.log2(math.e) / math.sqrt(dim)
    assert error(score[:, :tokens, :tokens], want) < 0.02
    values = torch.stack([eight_bit.values(prepared, head) for head in range(heads)])
    assert error(values, v) < 0.04
    assert error(values.mean(1), v.mean(1)) < 1e-5  # the shift restores the mean that e4m3 would lose
    assert prepared.v_scale is not None
    token = 21  # = 16 + 0·8 + 2·2 + 1, stored at 16 + 2·4 + 0·2 + 1
    stored = prepared.v[:, :, 16 + 9].float() * prepared.v_scale
    assert error(stored, v[:, token] - v.mean(1)) < 0.04


@fp8
@tma_paths
@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_8bit_attention(tokens: int, heads: int, dim: int, tma: bool) -> None:
    from scail2_rt.kernels.attention import launch

    inputs = case(tokens, heads, dim, torch.float16)
    prepared = eight_bit.prepare_8bit(*inputs, EPS)
    out = unwritten(tokens, heads * dim, torch.bfloat16)
    config = launch.Config(stages=2)
    launch.attention_8bit(prepared, out, config, tma)
    assert error(out, eight_bit.attention_8bit(prepared)) < 0.02  # P in e4m3
    assert error(out, exact(*normed(*inputs))) < 0.04


@pytest.mark.skipif(not CUDA or CAPABILITY < (8, 9), reason="only a GPU's fp8 unit loses small addends")
def test_8bit_attention_adds_up_a_common_component() -> None:
    """One-level fp8 accumulation would have an error of tens of per cent here."""
    inputs = case(16000, 2, 128, torch.bfloat16)  # whole tiles: padding must stay zero in v
    prepared = prepare_qkv(*inputs, variant=variants.EIGHT_BIT)
    prepared.v_shift.zero_()  # the kernel must not lean on the removed mean
    prepared.v.copy_((prepared.v.float().abs() + 16).clamp(max=448).to(prepared.v.dtype))
    assert error(self_attention(prepared), eight_bit.attention_8bit(prepared)) < 0.01


@tma_paths
@pytest.mark.parametrize("dtype", DOT_TYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_8bit_attention_with_16bit_values(tokens: int, heads: int, dim: int, dtype: torch.dtype, tma: bool) -> None:
    from scail2_rt.kernels.attention import launch

    inputs = case(tokens, heads, dim, dtype)
    v = eight_bit.sixteen_bit_v(inputs[0], dim)
    prepared = poisoned(eight_bit.empty_prepared8(heads, tokens, dim, v, DEVICE))
    launch.prepare_8bit(*inputs, EPS, prepared)
    out = unwritten(tokens, heads * dim, dtype)
    launch.attention_8bit(prepared, out, launch.Config(stages=2), tma)
    assert error(out, eight_bit.attention_8bit(prepared)) < (1e-3 if dtype == torch.float16 else 5e-3)
    assert error(out, exact(*normed(*inputs))) < 0.02


@tma_paths
@pytest.mark.parametrize("dtype", DOT_TYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_16bit_attention(tokens: int, heads: int, dim: int, dtype: torch.dtype, tma: bool) -> None:
    from scail2_rt.kernels.attention import launch

    q, k, v = (t.to(dtype) for t in normed(*case(tokens, heads, dim, dtype)))
    q, k = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k))
    wide = torch.cat((torch.zeros_like(q), v), 0).transpose(0, 1).contiguous().transpose(0, 1)
    out = unwritten(tokens, heads * dim, dtype)
    launch.attention_16bit(q, k, wide[heads:], out, None, tma)
    assert error(out, exact(q, k, v)) < (1e-3 if dtype == torch.float16 else 8e-3)


@tma_paths
@pytest.mark.parametrize("dtype", DOT_TYPES)
@pytest.mark.parametrize(("texts", "images"), [(128, 33), (70, 257), (5, 64)])
def test_cross_attention(texts: int, images: int, dtype: torch.dtype, tma: bool) -> None:
    from scail2_rt.kernels.attention import launch

    gen, dim, channels = torch.Generator().manual_seed(0), 64, 192
    q, text, image = (
        torch.randn(n, width, generator=gen).to(DEVICE, dtype)
        for n, width in ((67, channels), (texts, 2 * channels), (images, 2 * channels))
    )
    want = cross_attention(q.float(), text.float(), image.float(), dim)
    out = unwritten(67, channels, dtype)
    launch.cross_attention(q, text, image, dim, out, launch.Config(keys=64, stages=2), tma)
    assert error(out, want) < (1e-3 if dtype == torch.float16 else 8e-3)


@pytest.mark.parametrize("variant", ["sdpa", "8bit", "8bit-triton", "8bit-bf16pv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_and_attend_by_variant(variant: str, dtype: torch.dtype) -> None:
    if CUDA and variant in ("8bit", "8bit-triton") and CAPABILITY < (8, 9):
        pytest.skip("e4m3 needs a GPU of capability 8.9")
    inputs = case(131, 2, 128, dtype)
    prepared = prepare_qkv(*inputs, variant=variants.VARIANTS[variant])
    assert prepared.variant.name == variant
    out = self_attention(prepared)
    assert error(out, exact(*normed(*inputs))) < (0.04 if variant in ("8bit", "8bit-triton") else 0.02)
    again = prepare_qkv(*inputs, variant=variants.VARIANTS[variant])
    assert torch.equal(self_attention(again), out)  # same inputs, same bits


@pytest.mark.parametrize(
    ("capability", "precision", "variant"),
    [
        ((9, 0), "fp8", "8bit"),
        ((8, 9), "fp8", "8bit"),
        ((8, 0), "fp8", "sdpa"),
        ((9, 0), "bf16", "cudnn"),
        ((10, 0), "fp16", "cudnn"),
        ((8, 6), "bf16", "sdpa"),
        ((9, 0), "fp32", "sdpa"),
    ],
)
def test_auto_choice(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, variant: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(variants, "hopper_obstacle", lambda *_: "no cuda-python")
    chosen, reason = choose_attention("auto", precision, "cuda", 128)
    assert chosen.name == variant
    assert precision in reason or "16-bit" in reason
    assert ("Triton, not the sm90 CUDA kernel: no cuda-python" in reason) == (variant == "8bit")
    assert ("8bit cannot run" in reason) == (precision == "fp8" and variant != "8bit")


@pytest.mark.parametrize("problem", [None, "no cuda-python"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_auto_takes_the_16_bit_sm90_kernel_where_that_runs(
    monkeypatch: pytest.MonkeyPatch, precision: str, problem: str | None
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(variants, "hopper_obstacle", lambda *args: asked.append(args[-1]) or problem)
    chosen, reason = choose_attention("auto", precision, "cuda", 128)
    assert chosen.name == ("cudnn" if problem else "bf16")
    assert ("(the sm90 CUDA kernel)" in reason) == (problem is None)
    assert ("sm90 CUDA kernel: no cuda-python" in reason) == (problem is not None)
    assert set(asked) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert choose_attention("auto", "fp32", "cuda", 128)[0].name == "sdpa"


def test_auto_takes_cudnn_for_heads_that_the_sm90_kernel_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    chosen, reason = choose_attention("auto", "bf16", "cuda", 64)
    assert chosen.name == "cudnn"
    assert "its heads are 128 wide, here they are 64" in reason


@pytest.mark.parametrize("problem", [None, "no cuda-python"])
def test_16bit_takes_the_sm90_kernel_where_that_runs(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    from scail2_rt.kernels.attention import hopper_attention_16bit, launch

    called = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (ops, variants):
        monkeypatch.setattr(module, "hopper_obstacle", lambda *_: problem)
    monkeypatch.setattr(
        hopper_attention_16bit, "hopper_attention_16bit", lambda *args: called.append("sm90") or args[-1]
    )
    monkeypatch.setattr(launch, "attention_16bit", lambda *args: called.append("triton") or args[-1])
    reason = choose_attention("bf16", "bf16", "cuda", 128)[1]
    assert "the sm90 CUDA kernel" in reason
    assert ("Triton" in reason) == (problem is not None)
    x = torch.zeros(2, 30, 128, dtype=torch.bfloat16)
    assert self_attention(PreparedQKV(x, x, x, variants.SIXTEEN_BIT)).shape == (30, 256)
    assert called == ["triton" if problem else "sm90"]


@pytest.mark.parametrize("problem", [None, "no cuda-python"])
def test_8bit_takes_the_sm90_kernel_where_that_runs(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    """Stand-ins for both kernels and for a GPU, to test which kernel is called for a variant, and the reason text."""
    from scail2_rt.kernels.attention import hopper_attention, launch

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    called = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (ops, variants):
        monkeypatch.setattr(module, "hopper_obstacle", lambda *_: problem)
    monkeypatch.setattr(hopper_attention, "hopper_attention", lambda p, out: called.append("sm90") or out)
    monkeypatch.setattr(launch, "attention_8bit", lambda p, out: called.append("triton") or out)
    reason = choose_attention("8bit", "fp8", "cuda", 128)[1]
    assert "the sm90 CUDA kernel" in reason
    assert ("Triton" in reason) == (problem is not None)
    assert "sm90" not in choose_attention("8bit-triton", "fp8", "cuda", 128)[1]
    made = eight_bit.empty_prepared8(2, 30, 128, None, torch.device("cpu"))
    for variant in (variants.EIGHT_BIT, variants.EIGHT_BIT_TRITON):
        on_gpu = replace(made, q=made.q.as_subclass(OnGpu), variant=variant)
        assert self_attention(on_gpu).shape == (30, 256)
    assert called == ["triton" if problem else "sm90", "triton"]


def test_a_named_variant_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("auto", "bf16", "cpu", 128)[0].name == "sdpa"
    assert choose_attention("8bit", "fp32", "cpu", 128)[0].name == "8bit"
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        choose_attention("cudnn", "bf16", "cpu", 128)
    with pytest.raises(InputError, match="unknown attention"):
        choose_attention("fast", "bf16", "cpu", 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(InputError, match=r"capability 8\.9, this one has 8\.0"):
        choose_attention("8bit", "fp8", "cuda", 128)
    with pytest.raises(InputError, match="precision is fp32"):
        choose_attention("bf16", "fp32", "cuda", 128)
    with pytest.raises(InputError, match="64 or 128 wide"):
        choose_attention("bf16", "bf16", "cuda", 96)
    monkeypatch.setattr(variants, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="flash_attn is not installed"):
        choose_attention("flash", "bf16", "cuda", 128)


def test_a_variant_says_its_bytes() -> None:
    """Memory besides the projected q, k, v, in bytes per channel: q, k, and v or (if v stays in place) the output."""
    at_two = {name: variant.prepared_bytes(2) for name, variant in variants.VARIANTS.items()}
    assert at_two == dict.fromkeys(at_two, 6) | {"8bit": 3, "8bit-triton": 3, "8bit-bf16pv": 4}
    assert variants.SDPA.prepared_bytes(4) == 12
    assert [name for name, variant in variants.VARIANTS.items() if variant.eight_bit] == list(at_two)[:3]
    assert str(variants.usual_attention("fp8")) == "8bit"
    assert not variants.usual_attention("bf16").eight_bit
