"""Attention of other projects as baselines: what they are given and what is made of their answers.

Their packages need a GPU. Here stand-ins with the packages' signatures compute in fp32 what they are given, so that a
wrong layout, a missing scale or a scale of the wrong operand shows as an error."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.speed.peers import PEERS, quantise_per_head
from scail2_rt.kernels.attention.ops import PreparedQKV, self_attention

HEADS, TOKENS, WIDTH = 3, 40, 16


@pytest.fixture
def prepared() -> PreparedQKV:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.tensor([0.3, 0.6, 1.2])[:, None, None]  # a scale for each head
    q, k, v = (torch.randn(HEADS, TOKENS, WIDTH, generator=generator) * sizes for _ in range(3))
    return PreparedQKV(q.bfloat16(), k.bfloat16(), v.bfloat16() + 2)


def fa3(q: Tensor, k: Tensor, v: Tensor, **descale: Any) -> tuple[Tensor, None]:
    """[1, L, H, D], and descales [1, H]."""
    scaled = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert x.shape == (1, TOKENS, HEADS, WIDTH)
        assert x.is_contiguous()
        scale = descale.get(f"{name}_descale")
        assert (scale is None) == (x.dtype == torch.bfloat16)
        scaled.append(x.float().transpose(1, 2) * (1 if scale is None else scale[:, :, None, None]))
    return F.scaled_dot_product_attention(*scaled).transpose(1, 2).bfloat16(), None


def comfy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert q.shape == k.shape == v.shape == (1, HEADS, TOKENS, WIDTH)
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()


@pytest.mark.parametrize(("name", "tolerance"), [("fa3-bf16", 0.01), ("fa3-fp8", 0.05), ("comfy-int8", 0.01)])
def test_a_peer_attends_as_ours(
    name: str, tolerance: float, prepared: PreparedQKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, function, stand_in in (
        ("fa3_fwd_interface", "flash_attn_func", fa3),
        ("comfy_kitchen", "int8_attention", comfy),
    ):
        fake = ModuleType(module)
        setattr(fake, function, stand_in)
        monkeypatch.setitem(sys.modules, module, fake)
    expected = self_attention(prepared).float()
    found = PEERS[name].prepare(prepared)().float()
    assert found.shape == (TOKENS, HEADS * WIDTH)
    assert (found - expected).norm() < tolerance * expected.norm()


def test_quantisation_uses_the_range_of_each_head(prepared: PreparedQKV) -> None:
    x, scale = quantise_per_head(prepared.k)
    assert torch.equal(x.float().abs().amax(dim=(0, 1, 3)), torch.full((HEADS,), 448.0))
    back = (x.float() * scale[0, :, None]).squeeze(0).transpose(0, 1)
    assert (back - prepared.k.float()).norm() < 0.04 * prepared.k.float().norm()
