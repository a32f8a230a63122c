"""Section `attention`: speed of every self-attention variant and installed peer (`peers`) at full length, and error on
every input family.

Speed is that of the attention alone on prepared N(0, 1) operands; the variants alternate. The preparation is measured
in section `kernels`. Error covers preparation and attention, against exact attention in fp64 on the same bf16 inputs,
for evenly spaced query rows. The preparation applies an RMS norm to q and k. Here its weight is one constant per
tensor, so the norm changes only the lengths of rows, by about 1 %.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scail2_rt.benchmarks.report.record import Kind
from scail2_rt.benchmarks.speed import attention_families as families
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.harness import synchronise, time_calls
from scail2_rt.benchmarks.speed.peers import PEERS, Peer
from scail2_rt.kernels.attention.ops import (
    EPS,
    VARIANTS,
    AttentionVariant,
    PreparedQKV,
    choose_attention,
    prepare_qkv,
    self_attention,
)
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rope import Rope
from scail2_rt.kernels.rows.ops import rms_norm

LIBRARIES = ("cudnn", "flash", "sage", "sdpa")  # variants of other libraries: baselines
REFERENCE_ROWS = 256
CPU_ERROR_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Contestant:
    """One attention. prepare: qkv [L, 3·C], weights of q and k fp32 [C], rope → a call that returns [L, C]."""

    kind: Kind
    eight_bit: bool
    prepare: Callable[[Tensor, Tensor, Tensor, Rope], Callable[[], Tensor]]
    note: str = ""


def run(bench: Bench) -> None:
    contestants = _usable(bench)
    for work in bench.options.sizes:
        _speed(bench, contestants, work.tokens)
    tokens = bench.options.sizes[0].tokens if bench.on_gpu else CPU_ERROR_TOKENS
    for family in families.FAMILIES:
        with bench.attempt(f"attention/inputs/{family}"):
            _error(bench, contestants, family, tokens)


def _usable(bench: Bench) -> dict[str, Contestant]:
    """The variants and peers that this machine supports. For each other one, a row with the reason is added."""
    named = bench.options.attention
    usable = {}
    for name in VARIANTS if named == "auto" else (named,):
        if bench.on_gpu and name == "sdpa" and named == "auto":
            continue  # PyTorch would choose one of the other variants
        kind: Kind = "baseline" if name in LIBRARIES else "ours"
        try:
            variant, _ = choose_attention(name, "bf16", bench.device, bench.dit.head_dim)
        except InputError as error:
            bench.skip(f"attention/{name}", f"not measured: {error}", kind)
            continue
        usable[variant.name] = Contestant(kind, variant.eight_bit, partial(_prepare_variant, variant))
    for peer in PEERS.values() if named == "auto" else ():
        problem = peer.obstacle(bench.device)
        if problem is not None:
            bench.skip(f"attention/{peer.name}", f"not measured: {problem}", "baseline")
            continue
        usable[peer.name] = Contestant("baseline", peer.eight_bit, partial(_prepare_peer, peer), peer.note)
    return usable


def _prepare_variant(
    variant: AttentionVariant, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope
) -> Callable[[], Tensor]:
    return partial(self_attention, prepare_qkv(qkv, q_weight, k_weight, rope, variant))


def _prepare_peer(peer: Peer, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> Callable[[], Tensor]:
    prepared = prepare_qkv(qkv, q_weight, k_weight, rope)
    assert isinstance(prepared, PreparedQKV)
    return peer.prepare(prepared)


def identity_rope(tokens: int, head_dim: int, device: torch.device) -> Rope:
    """RoPE multipliers for a rotation by 0: cos 1 and sin 0, fp32 [tokens, head_dim / 2]."""
    shape = (tokens, head_dim // 2)
    return Rope(torch.ones(shape, device=device), torch.zeros(shape, device=device))


def _speed(bench: Bench, contestants: Mapping[str, Contestant], tokens: int) -> None:
    heads, width, device = bench.dit.heads, bench.dit.head_dim, bench.device
    flops = 4.0 * tokens**2 * width * heads
    qkv = torch.randn(tokens, 3 * heads * width, device=device, dtype=torch.bfloat16)
    weight, rope = torch.ones(heads * width, device=device), identity_rope(tokens, width, device)
    calls: dict[str, Callable[[], Any]] = {}
    for name, contestant in contestants.items():
        with bench.attempt(f"attention/{name}/{tokens}"):
            call = contestant.prepare(qkv, weight, weight, rope)
            call()  # compiles here, so that a failure is attributed to this row
            synchronise(device)
            calls[name] = call
    times = time_calls(calls, device, bench.options.runs)
    cudnn = times.get("cudnn")
    for name, timing in times.items():
        contestant = contestants[name]
        ceiling = "gemm_fp8" if contestant.eight_bit else "gemm_bf16"
        bench.add(
            f"attention/{name}/{tokens}",
            timing,
            contestant.kind,
            contestant.note,
            **bench.rate(timing, ceiling, flops),
            percent_of_cudnn=100 * cudnn.median_s / timing.median_s if cudnn else None,
            flops=flops,
            bytes=4.0 * tokens * heads * width * (1 if name in ("8bit", "8bit-triton", "fa3-fp8") else 2),
        )


def _error(bench: Bench, contestants: Mapping[str, Contestant], family: str, tokens: int) -> None:
    heads, width, device = bench.dit.heads, bench.dit.head_dim, bench.device
    q, k, v = families.make(family, tokens, heads, width, device)
    weights = [x.square().mean().sqrt().expand(heads * width).contiguous() for x in (q, k)]
    qkv = torch.cat([x.transpose(0, 1).flatten(1).bfloat16() for x in (q, k, v)], dim=1)
    del q, k, v
    q, k, v = _as_the_op_sees_them(qkv, weights, width)
    index, exact = families.reference(q, k, v, REFERENCE_ROWS)
    del q, k, v
    rope = identity_rope(tokens, width, device)
    for label, contestant in contestants.items():
        name = f"attention/{label}/error/{family}"
        with bench.attempt(name):
            out = contestant.prepare(qkv, weights[0], weights[1], rope)()
            rows = out[index].unflatten(1, (heads, width)).transpose(0, 1)
            error, mean, worst = families.error(rows, exact)
            bench.add(
                name, None, contestant.kind, f"{tokens} tokens", error=error, mean_cosine=mean, worst_cosine=worst
            )


def _as_the_op_sees_them(qkv: Tensor, weights: list[Tensor], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k after the preparation's RMS norm, and v, each fp32 [H, L, D]."""
    q, k, v = qkv.chunk(3, dim=1)
    normed = (rms_norm(q, weights[0], EPS), rms_norm(k, weights[1], EPS), v.float())
    q, k, v = (x.unflatten(1, (-1, width)).transpose(0, 1) for x in normed)
    return q, k, v
