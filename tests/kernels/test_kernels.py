"""The PyTorch twins of the kernels against formulas written out naively in fp64."""

import math

import pytest
import torch
from torch import Tensor

from scail2_rt.kernels.attention.ops import cross_attention, prepare_qkv, self_attention
from scail2_rt.kernels.rope import multipliers, rope_table, rotate
from scail2_rt.kernels.rows.ops import (
    E4M3_MAX,
    fp8_linear,
    gate_residual,
    gelu,
    gelu_quant,
    norm_modulate,
    norm_modulate_quant,
    quantise_columns,
    quantise_rows,
    rms_norm,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H, L, D] in fp64, one row at a time."""
    rows = []
    for row in range(q.shape[1]):
        scores = (q[:, row : row + 1].double() * k.double()).sum(-1) / math.sqrt(q.shape[-1])
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rows.append((weights[..., None] * v.double()).sum(1) / weights.sum(-1, keepdim=True))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [1, 3])
def test_prepare_and_self_attention(dtype: torch.dtype, heads: int) -> None:
    rope = rope_table(2, 4, 2, 128, additional_refs=1, replace=True)
    length, c = rope.cos.shape[0], heads * 128
    qkv, q_weight, k_weight = random(length, 3 * c, dtype=dtype), random(c, seed=1) + 1.5, random(c, seed=2) + 1.5
    prepared = prepare_qkv(qkv, q_weight, k_weight, rope)
    expected = []
    for part, weight in zip(qkv.double().chunk(3, -1), (q_weight, k_weight, None), strict=True):
        if weight is not None:
            part = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
            turned = (
                torch.view_as_complex(part.reshape(length, heads, 64, 2))
                * torch.complex(rope.cos.double(), rope.sin.double())[:, None]
            )
            part = torch.view_as_real(turned).flatten(1)
        expected.append(part.reshape(length, heads, 128).transpose(0, 1))
    for got, want in zip((prepared.q, prepared.k, prepared.v), expected, strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]
    out = self_attention(prepared)
    assert out.shape == (length, c)
    assert out.dtype == dtype
    want = attention(*expected).transpose(0, 1).flatten(1)
    assert relative_error(out, want) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_attention_adds_two_softmaxes(dtype: torch.dtype) -> None:
    q, text, image = (
        random(7, 256, dtype=dtype),
        random(11, 512, seed=1, dtype=dtype),
        random(5, 512, seed=2, dtype=dtype),
    )

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, 128).transpose(0, 1)

    want = sum(attention(heads(q), *(heads(t) for t in kv.chunk(2, -1))) for kv in (text, image))
    got = cross_attention(q, text, image, 128)
    assert got.dtype == dtype
    assert relative_error(got, want.transpose(0, 1).flatten(1)) < 4 * TOLERANCE[dtype]
    joint = attention(
        heads(q),
        *(torch.cat([heads(a), heads(b)], 1) for a, b in zip(text.chunk(2, -1), image.chunk(2, -1), strict=True)),
    )
    assert relative_error(got, joint.transpose(0, 1).flatten(1)) > 0.1  # one joint softmax is another function


def test_driving_multipliers_are_means_and_others_have_unit_modulus() -> None:
    table = multipliers(2, 4, 6, 128, additional_refs=1)
    references, video = 2 * 24, 2 * 24
    assert table.shape == (references + video + 2 * 6, 64)
    assert torch.allclose(table[: references + video].abs(), torch.ones((), dtype=torch.float64))
    driving = table[references + video :]
    assert driving.abs().min() < 0.95  # averaging shortens the fast pairs
    first_axis = driving[:, :22]  # time does not vary inside a 2×2 cell
    assert torch.allclose(first_axis.abs(), torch.ones((), dtype=torch.float64))


def test_replacement_moves_references_down_and_shares_time_zero_with_them() -> None:
    animate, replace = (multipliers(1, 2, 2, 128, replace=flag) for flag in (False, True))
    assert torch.equal(animate[:4, :22], replace[:4, :22])  # same time
    assert not torch.allclose(animate[:4, 22:43], replace[:4, 22:43])  # 120 rows lower
    assert torch.equal(animate[:4, 43:], replace[:4, 43:])  # same columns
    assert torch.allclose(replace[4:8, :22], replace[:4, :22])  # r = 0: the video starts at the reference's time


def test_rotation_keeps_distances_of_positions() -> None:
    rope = rope_table(1, 2, 4, 128)
    q, k = random(rope.cos.shape[0], 1, 128), random(rope.cos.shape[0], 1, 128, seed=1)
    one = (rotate(q[:1].expand_as(q), rope)[:, 0] * rotate(k[:1].expand_as(k), rope)[:, 0]).sum(-1)
    assert torch.allclose(one[:16], one[0].expand(16), rtol=1e-4)  # equal positions: the dot product is unchanged


def test_row_operations_against_fp64() -> None:
    x, shift, scale, gate, weight = random(5, 64) + 3, *(random(64, seed=i) for i in range(1, 5))
    d = x.double()
    normed = (d - d.mean(-1, keepdim=True)) / (d.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    want = normed * (1 + scale.double()) + shift.double()
    assert relative_error(norm_modulate(x, shift, scale, 1e-6, torch.float32), want) < 2e-6
    assert (
        relative_error(rms_norm(x, weight, 1e-6), d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight) < 2e-6
    )
    assert relative_error(gate_residual(x, shift.expand(5, -1), gate), d + gate.double() * shift.double()) < 2e-6
    assert torch.equal(gate_residual(x, x), x + x)
    tanh = 0.5 * d * (1 + torch.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3)))
    assert relative_error(gelu(x), tanh) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_is_the_stated_rule(dtype: torch.dtype) -> None:
    x, weight, bias = random(9, 64, dtype=dtype), random(32, 64, seed=1), random(32, seed=2)
    x[3] *= 1000  # rows have their own scale
    data, row_scale = quantise_rows(x)
    columns, column_scale = quantise_columns(weight)
    assert data.dtype == columns.dtype == torch.float8_e4m3fn
    assert data.float().abs().amax(-1).min() > E4M3_MAX * 0.9
    restored = data.double() * row_scale.double()
    assert relative_error(restored[3:4], x[3:4]) < 0.05
    assert relative_error(restored[:3], x[:3]) < 0.05
    got = fp8_linear((data, row_scale), (columns, column_scale), bias, dtype)
    want = restored @ (columns.double() * column_scale.double()[:, None]).T + bias.double()
    assert got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]


def test_quantising_row_operations_are_compositions() -> None:
    x, shift, scale = random(5, 64), random(64, seed=1), random(64, seed=2)
    normed = norm_modulate(x, shift, scale, 1e-6, torch.bfloat16)
    for got, want in (
        (norm_modulate_quant(x, shift, scale, 1e-6, torch.bfloat16), quantise_rows(normed)),
        (gelu_quant(x), quantise_rows(gelu(x))),
    ):
        assert torch.equal(got[0].float(), want[0].float())
        assert torch.equal(got[1], want[1])


def test_zero_rows_quantise_to_zeros() -> None:
    data, scale = quantise_rows(torch.zeros(2, 16))
    assert torch.isfinite(scale).all()
    assert torch.equal(data.float() * scale, torch.zeros(2, 16))
