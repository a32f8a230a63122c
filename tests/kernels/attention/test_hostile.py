"""Every self-attention on inputs that are difficult for low precision, and on NaN and infinity, against fp64: on a GPU
the kernels, on a CPU their twins and Triton's kernels in the interpreter."""

import pytest
import torch
from torch import Tensor

from scail2_rt.kernels.attention import eight_bit
from tests.support.hostile_attention import (
    CUDA,
    DEVICE,
    FAMILIES,
    attentions,
    dtype_of,
    error,
    exact,
    limit,
    make,
    operands,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("exact_e4m3")
ATTENTIONS = attentions()
LENGTHS = (1, 2, 129, 4001, 48_833) if CUDA else (2, 129)
ROWS = 257  # maximum number of compared queries
HEADS, WIDTH = 2, 128

each_attention = pytest.mark.parametrize("name", ATTENTIONS)


def compared(tokens: int) -> Tensor:
    return torch.linspace(0, tokens - 1, min(ROWS, tokens), device=DEVICE).long().unique()


@each_attention
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_stay_near_fp64(family: str, tokens: int, name: str) -> None:
    inputs = operands(*make(family, tokens, HEADS, WIDTH), dtype_of(name))
    out, rows = ATTENTIONS[name](*inputs), compared(tokens)
    assert out.isfinite().all()
    assert error(out[rows], exact(*inputs, rows)) < limit(name)


@each_attention
@pytest.mark.parametrize("family", ["sinks", "heavy_v", "constant_v"])
def test_one_token_alone_is_its_own_value(family: str, name: str) -> None:
    """Keys and values with a range of 0: q·k is 0 or any number, and V equals its mean."""
    qkv, *others = operands(*make(family, 1, HEADS, WIDTH), dtype_of(name))
    out = ATTENTIONS[name](qkv, *others)
    value = qkv[:, 2 * HEADS * WIDTH :].float()
    assert torch.allclose(out.float(), value, rtol=2**-7 if out.dtype == torch.bfloat16 else 2**-10)


@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_one_token_is_prepared_as_numbers(tokens: int) -> None:
    """Each operand separately, so that a failure identifies it. Triton would compile other kernels for a count of 1."""
    from scail2_rt.kernels.attention import launch

    inputs = operands(*make("sinks", tokens, HEADS, WIDTH), torch.bfloat16)
    made = eight_bit.empty_prepared8(HEADS, tokens, WIDTH, None, DEVICE)
    launch.prepare_8bit(*inputs, 1e-6, made)
    twin = eight_bit.prepare_8bit(*inputs, 1e-6)
    for field in ("q_scale", "k_scale", "v", "v_scale", "v_shift"):
        found, want = getattr(made, field).float(), getattr(twin, field).float()
        assert found.isfinite().all(), field
        assert want.isfinite().all(), field
        if field != "k_scale" or tokens > 1:  # the rounding error of a key without its mean
            assert error(found, want) < 2e-2, field


@each_attention
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_what_is_not_a_number_comes_out(part: str, value: float, name: str) -> None:
    """The result is non-finite exactly where exact attention is: one row for a query, all rows for a key, one channel
    of all rows for a value. All other values are unaffected."""
    qkv, *others = operands(*make("sinks", 201, HEADS, WIDTH), dtype_of(name))
    channels = HEADS * WIDTH
    qkv[77, {"q": 0, "k": 1, "v": 2}[part] * channels + 5] = value
    rows = torch.arange(201, device=DEVICE)
    out, want = ATTENTIONS[name](qkv, *others), exact(qkv, *others, rows)
    assert not want.isfinite().all()
    assert torch.equal(out.isfinite(), want.isfinite())
    assert error(out, want) < limit(name)
    if part == "q":
        assert (~out.isfinite()).any(1).nonzero().flatten().tolist() == [77]
    elif part == "k":
        assert (~out.isfinite()).any(1).all()


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name.startswith("8bit")])
def test_a_key_outside_the_sample_carries_nan_too(name: str) -> None:
    """The mean key is computed from a sample of tokens; a key outside the sample affects only the scale of its tile."""
    tokens = 1027
    assert eight_bit.sample_step(tokens) == 2
    qkv, *others = operands(*make("outlier_tokens", tokens, 1, 64), dtype_of(name))
    qkv[131, 64 + 7] = float("nan")
    assert ATTENTIONS[name](qkv, *others).isnan().all()


@each_attention
def test_every_row_of_a_tile_can_be_lost(name: str) -> None:
    """NaN queries next to finite ones, at both ends of tiles."""
    tokens, lost = 193, [0, 63, 64, 127, 128, 191, 192]
    qkv, *others = operands(*make("outlier_channels", tokens, HEADS, WIDTH), dtype_of(name))
    qkv[lost, WIDTH] = float("nan")
    out = ATTENTIONS[name](qkv, *others)
    assert out[lost].isnan().all()
    kept = [row for row in range(tokens) if row not in lost]
    assert out[kept].isfinite().all()
    assert error(out[kept], exact(qkv, *others, torch.tensor(kept, device=DEVICE))) < limit(name)
