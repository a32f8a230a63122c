"""The CUDA C++ attention for Hopper: fragment layout and compilation anywhere, results against the twin on sm_90."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from scail2_rt.kernels.attention import hopper_attention as hopper
from scail2_rt.kernels.attention.eight_bit import Prepared8, attention_8bit, stored_order
from scail2_rt.kernels.cuda.nvrtc import Kernel, compile_cubin
from scail2_rt.kernels.errors import Scail2Error

WIDTH = 128
UNAVAILABLE = hopper.available()
needs_hopper = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"CUDA C++ kernel: {UNAVAILABLE}")
SIZES = [(1, 1), (1, 3), (127, 3), (128, 1), (129, 3), (1000, 3), (4001, 3), (1000, 40)]


def prepared(tokens: int, heads: int, device: str, *, shift: float = 0.0, sharpness: float = 1.0) -> Prepared8:
    """Random operands as the preparation makes them: keys without their mean, V without its mean, zeros beyond L."""
    gen = torch.Generator().manual_seed(tokens * 64 + heads)
    padded = -(-tokens // 128) * 128

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    q, k, v = (torch.zeros(heads, padded, WIDTH) for _ in range(3))
    q[:, :tokens], k[:, :tokens], v[:, :tokens] = (randn(heads, tokens, WIDTH) for _ in range(3))
    k[:, :tokens] -= k[:, :tokens].mean(1, keepdim=True)
    q_scale = (q.abs().amax(2) / 127).clamp_min(1e-12)
    tiles = k.view(heads, -1, 128, WIDTH)
    k_scale = (tiles.abs().amax((2, 3)) / 127).clamp_min(1e-12)
    q8 = (q / q_scale[..., None]).round().to(torch.int8)
    k8 = (tiles / k_scale[..., None, None]).round().to(torch.int8).view_as(k)
    v[:, :tokens] -= v[:, :tokens].mean(1, keepdim=True)
    v_scale = (v.abs().amax(1) / 448).clamp_min(1e-12)
    v8 = (v / v_scale[:, None])[:, stored_order(padded)].transpose(1, 2).contiguous().to(torch.float8_e4m3fn)
    v_shift = shift * randn(heads, WIDTH)
    q_scale = q_scale * (sharpness * 1.4426950408889634 / WIDTH**0.5)
    q8, q_scale, k8, k_scale = (t.to(device).contiguous() for t in (q8, q_scale, k8, k_scale))
    v8, v_scale, v_shift = (t.to(device).contiguous() for t in (v8, v_scale, v_shift))
    return Prepared8(q8, q_scale, k8, k_scale, v8, v_scale, v_shift, tokens)


def run(operands: Prepared8, build: Kernel = hopper.DEFAULT) -> torch.Tensor:
    out = operands.q.new_full((operands.tokens, operands.q.shape[0] * WIDTH), float("nan"), dtype=torch.bfloat16)
    hopper.hopper_attention(operands, out, build)
    torch.cuda.synchronize()
    return out.float()


def error(out: torch.Tensor, expected: torch.Tensor, shift: torch.Tensor | None) -> float:
    """Error relative to the attention output without the common shift of V, which would hide errors."""
    assert shift is not None
    added = shift.flatten()
    return float((out - expected).norm() / (expected - added).norm().clamp_min(1e-6 * expected.norm()).clamp_min(1e-12))


# ---- anywhere -----------------------------------------------------------------------------------------------------


def test_softmax_registers_are_the_second_products_operand() -> None:
    """P·V through the fragment layouts of wgmma m64nNk32 as the PTX ISA gives them equals P·V: V's order is right."""
    rng = np.random.default_rng(0)
    p, v = rng.integers(0, 9, (64, 128)), rng.integers(-9, 9, (128, 16))
    a = np.zeros((64, 128), p.dtype)  # the A operand represented by the registers
    for thread in range(128):
        row, b = thread // 32 * 16 + thread % 32 // 4, thread % 4
        # accumulator element 4g + 2i + c: row + 8i, column 8g + 2b + c
        s = [p[row + 8 * (e // 2 % 2), 8 * (e // 4) + 2 * b + e % 2] for e in range(64)]
        for pair in range(8):  # as `probabilities` packs them
            at = 8 * pair
            registers = {0: (s[at], s[at + 1], s[at + 4], s[at + 5]), 1: (s[at + 2], s[at + 3], s[at + 6], s[at + 7])}
            step, half = pair // 2, pair % 2  # register 2·half + i of k-step `step`: row + 8i, k = 16·half + 4b + byte
            for i, register in registers.items():
                for byte, value in enumerate(register):
                    a[row + 8 * i, 32 * step + 16 * half + 4 * b + byte] = value
    order = stored_order(128).numpy()
    assert np.array_equal(a, p[:, order])
    assert np.array_equal(a @ v[order], p @ v)


def test_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    try:
        cubin = compile_cubin(hopper.DEFAULT)
    except Scail2Error as reason:
        if "could not compile" in str(reason):
            raise
        pytest.skip(f"NVRTC: {reason}")
    assert cubin[:4] == b"\x7fELF"
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == cubin == compile_cubin(hopper.DEFAULT)


def test_shared_memory_fits() -> None:
    assert all(hopper.kernel(stages).shared_bytes <= 227 * 1024 for stages in (3, 4, 5, 6))


@pytest.mark.parametrize("change", ["v_scale", "dtype", "rows", "device"])
def test_refuses_other_operands(change: str) -> None:
    operands, out = prepared(100, 2, "cpu"), torch.empty(100, 256, dtype=torch.bfloat16)
    if change == "v_scale":
        operands = dataclasses.replace(operands, v_scale=None)
    elif change == "dtype":
        out = out.float()
    elif change == "rows":
        operands = dataclasses.replace(operands, tokens=101)
    with pytest.raises(ValueError):
        hopper.hopper_attention(operands, out)


# ---- on Hopper ----------------------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize(("tokens", "heads"), SIZES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_agrees_with_twin(tokens: int, heads: int, shift: float) -> None:
    operands = prepared(tokens, heads, "cuda", shift=shift)
    out, expected = run(operands), attention_8bit(operands).float()
    assert torch.isfinite(out).all()
    if tokens == 1:  # V has mean 0, so only the shift remains
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
        return
    # e4m3 P is the difference; bf16 output adds 2^-9 of the shift, which is large against a mean of many values
    bf16 = 2**-8 * float(expected.norm() / (expected - torch.as_tensor(operands.v_shift).flatten()).norm())
    assert error(out, expected, operands.v_shift) < 0.045 + bf16


@needs_hopper
@pytest.mark.parametrize(("sharpness", "limit"), [(0.2, 0.18), (4.0, 0.045)])
def test_flat_and_peaked_softmax(sharpness: float, limit: float) -> None:
    """Peaked rows raise the maximum repeatedly; flat rows add 4,000 small products, which one-level fp8 sums lose.

    With a flat softmax over values of mean 0, only the small differences of p contribute, so the rounding of p to e4m3
    (2.6 %) has a relative error of 2.6 % over their spread of 20 %."""
    operands = prepared(4001, 2, "cuda", sharpness=sharpness)
    assert error(run(operands), attention_8bit(operands).float(), operands.v_shift) < limit


@needs_hopper
def test_common_component_of_v_survives() -> None:
    """V of one sign: two-level accumulation keeps the sum to 0.5 %, a running fp8 accumulator would not."""
    operands = prepared(4001, 2, "cuda")
    same_sign = operands.v.float().abs().to(torch.float8_e4m3fn)
    operands = dataclasses.replace(operands, v=same_sign)
    assert error(run(operands), attention_8bit(operands).float(), operands.v_shift) < 0.005


@needs_hopper
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_any_ring_length_agrees(stages: int) -> None:
    for tokens in (128, 129, 1000):
        operands = prepared(tokens, 3, "cuda")
        out = run(operands, hopper.kernel(stages))
        assert error(out, attention_8bit(operands).float(), operands.v_shift) < 0.045


@needs_hopper
def test_replays_in_a_graph() -> None:
    operands = prepared(1000, 3, "cuda")
    expected, out = run(operands), torch.zeros(1000, 3 * WIDTH, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.hopper_attention(operands, out)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.float(), expected)
