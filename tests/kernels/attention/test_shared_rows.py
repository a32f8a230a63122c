"""Attention over rows distributed over several ranks equals attention in one process."""

import pytest
import torch
from torch.nn import functional as F

from scail2_rt.kernels.attention.eight_bit import Prepared8, empty_prepared8
from scail2_rt.kernels.attention.ops import (
    VARIANTS,
    HeadExchange,
    RowShare,
    prepare_qkv,
    self_attention,
    shared_attention,
)
from scail2_rt.kernels.rope import Rope
from tests.support.thread_peers import ThreadPeers, on_ranks

HEAD_DIM = 64


def inputs(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rope]:
    """qkv whose V has a common component and a channel that is constant; norms near one; any rotations."""
    generator = torch.Generator().manual_seed(tokens)
    width = heads * HEAD_DIM
    qkv = torch.randn(tokens, 3 * width, generator=generator)
    qkv[:, 2 * width :] += torch.randn(width, generator=generator)
    qkv[:, -1] = 0.25
    weights = 1 + 0.1 * torch.randn(2, width, generator=generator)
    angle = torch.randn(tokens, HEAD_DIM // 2, generator=generator)
    return qkv, weights[0], weights[1], Rope(angle.cos(), angle.sin())


@pytest.mark.parametrize(("tokens", "size", "heads"), [(300, 2, 4), (257, 4, 4), (1, 2, 2), (129, 5, 5), (640, 5, 10)])
@pytest.mark.parametrize("variant", ["sdpa", "8bit", "8bit-bf16pv"])
def test_shared_attention_equals_attention_in_one_process(variant: str, tokens: int, size: int, heads: int) -> None:
    qkv, q_weight, k_weight, rope = inputs(tokens, heads)
    chosen = VARIANTS[variant]
    alone = self_attention(prepare_qkv(qkv, q_weight, k_weight, rope, chosen)).float()

    def rank(peers: ThreadPeers) -> torch.Tensor:
        share = RowShare.of(peers, tokens, chosen.eight_bit)
        padded = F.pad(qkv, (0, 0, 0, size * share.rows - tokens), value=7.0)  # padding may have any values
        mine = padded[share.first : share.first + share.rows]
        prepared = prepare_qkv(mine, q_weight, k_weight, share.rope(rope), chosen, share)
        exchange = HeadExchange(share)
        first = shared_attention(prepared, exchange, HEAD_DIM).float()
        again = shared_attention(prepared, exchange, HEAD_DIM).float()  # buffers of the block before serve this one
        assert torch.equal(first, again)
        return first[: share.valid]

    together = torch.cat(on_ranks(size, rank))
    assert together.shape == alone.shape
    bound = 1e-5 if variant == "sdpa" else 2e-2  # a sum in another order may round a value to its neighbour in bf16
    assert (together - alone).abs().max() <= bound
    assert (together - alone).square().mean().sqrt() <= bound / 20


@pytest.mark.parametrize(("tokens", "size"), [(1000, 2), (1000, 4), (520, 4)])
def test_operands_of_8_bit_are_those_of_one_process(tokens: int, size: int) -> None:
    """Means over tokens are summed in another order, so their last bits differ, and a few 8-bit values differ by one
    step."""
    heads = 4
    qkv, q_weight, k_weight, rope = inputs(tokens, heads)
    variant = VARIANTS["8bit"]
    alone = prepare_qkv(qkv, q_weight, k_weight, rope, variant)

    def rank(peers: ThreadPeers) -> Prepared8:
        share = RowShare.of(peers, tokens, eight_bit=True)
        padded = F.pad(qkv, (0, 0, 0, size * share.rows - tokens))
        mine = padded[share.first : share.first + share.rows]
        prepared = prepare_qkv(mine, q_weight, k_weight, share.rope(rope), variant, share)
        made = HeadExchange(share).to_heads(prepared)
        assert isinstance(made, Prepared8)
        return made

    parts = on_ranks(size, rank)
    assert isinstance(alone, Prepared8)
    q, k, v = (torch.cat([getattr(part, name).float() for part in parts]) for name in ("q", "k", "v"))
    assert torch.equal(q, alone.q.float())
    steps = (k - alone.k.float()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() <= 1e-4
    assert (v != alone.v.float()).float().mean() <= 1e-4
    for name, bound in (("q_scale", 0.0), ("k_scale", 1e-6), ("v_scale", 1e-6), ("v_shift", 1e-5)):
        ours, theirs = torch.cat([getattr(part, name) for part in parts]), getattr(alone, name)
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() <= bound * theirs.abs().clamp_min(1e-2)).all()


def test_rows_of_a_part_lie_where_the_sequence_has_them() -> None:
    def rank(peers: ThreadPeers) -> list[int]:
        share = RowShare.of(peers, 10, eight_bit=False)
        sequence = torch.arange(10)
        found = []
        for part in (slice(0, 2), slice(2, 9), slice(9, 10)):
            held, source = share.held(part)
            assert torch.equal(sequence[part][source], sequence[share.first :][: share.valid][held])
            found += sequence[part][source].tolist()
        return found

    assert [row for rows in on_ranks(4, rank) for row in rows] == list(range(10))


def test_eight_bit_rows_keep_the_tiles_of_one_process() -> None:
    (share, *_) = on_ranks(2, lambda peers: RowShare.of(peers, 48_832, eight_bit=True))
    assert share.rows % 128 == 0
    assert share.rows == 24_448
    (share, *_) = on_ranks(2, lambda peers: RowShare.of(peers, 48_831, eight_bit=False))
    assert share.rows == 24_416


@pytest.mark.parametrize("tokens", [200, 130])
def test_triton_prepares_shared_rows_as_the_twin_does(tokens: int, exact_e4m3: None) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scail2_rt.kernels.attention import launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv, q_weight, k_weight, rope = (t.to(device) for t in inputs(tokens, 2))

    def rank(peers: ThreadPeers) -> tuple[float, float, float, float]:
        share = RowShare.of(peers, tokens, eight_bit=True)
        padded = F.pad(qkv, (0, 0, 0, 2 * share.rows - tokens), value=7.0)
        mine = padded[share.first : share.first + share.rows].contiguous()
        turns = share.rope(rope)
        made = empty_prepared8(2, share.rows, HEAD_DIM, None, mine.device)
        launch.prepare_8bit(mine, q_weight, k_weight, turns, 1e-6, made, share)
        twin = prepare_qkv(mine.cpu(), q_weight.cpu(), k_weight.cpu(), turns.to("cpu"), VARIANTS["8bit"], share)
        assert twin.v_scale is not None
        assert twin.v_shift is not None
        assert made.v_scale is not None
        assert made.v_shift is not None
        return (
            (made.k.cpu().int() - twin.k.int()).abs().max().item(),
            (made.k_scale.cpu() / twin.k_scale - 1).abs().max().item(),
            (made.v_scale.cpu() / twin.v_scale - 1).abs().max().item(),
            (made.v_shift.cpu() - twin.v_shift).abs().max().item(),
        )

    for k, k_scale, v_scale, v_shift in on_ranks(2, rank):
        assert k <= 1
        assert k_scale <= 2e-3
        assert v_scale <= 1e-5
        assert v_shift <= 1e-3
