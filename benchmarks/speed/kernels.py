"""Section `kernels`: kernels other than matrix products, compared with the copy ceiling and their PyTorch twins.

`tbytes_s` counts the bytes that a kernel must read and write, each once. `error` is the relative Frobenius difference
from the twin (the same function on CPU tensors) on `CHECKED_ROWS` rows of the same input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.harness import time_call
from scail2_rt.benchmarks.speed.models import Work
from scail2_rt.kernels.attention.ops import VARIANTS, choose_attention, cross_attention, prepare_qkv
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rope import Rope, rope_table
from scail2_rt.kernels.rows import ops
from scail2_rt.runtime.pipeline.async_copy import copy_to_cpu
from scail2_rt.runtime.pipeline.finite import colour_range, value_range

CHECKED_ROWS = 256
TEXT_TOKENS, IMAGE_TOKENS = 512, 257


@dataclass(frozen=True, slots=True)
class RowOperation:
    """`call(*tensors)`. cut: indices of the tensors with one row per token; moved: bytes read and written."""

    name: str
    call: Callable[..., ops.Rows]
    tensors: Sequence[Tensor]
    cut: tuple[int, ...]
    moved: float


def run(bench: Bench) -> None:
    for work in bench.options.sizes[:1]:
        with bench.attempt("kernels/inputs"):
            for operation in _row_operations(bench, work.tokens):
                _measure(bench, operation, work.tokens)
            _cross(bench, work.tokens)
            _watch(bench, work)
        layout = work.layout
        table = rope_table(layout.frames, *layout.grid, bench.dit.head_dim).to(bench.device)
        for variant in ("8bit", "8bit-bf16pv", "bf16"):
            with bench.attempt(f"kernels/prepare_qkv-{variant}/{work.tokens}"):
                _prepare(bench, variant, work.tokens, table)


def _row_operations(bench: Bench, tokens: int) -> list[RowOperation]:
    c, f, device = bench.dit.dim, bench.dit.ffn_dim, bench.device
    x = torch.randn(tokens, c, device=device)
    y = torch.randn(tokens, c, device=device, dtype=torch.bfloat16)
    h = torch.randn(tokens, f, device=device, dtype=torch.bfloat16)
    gate, shift, scale = (0.1 * torch.randn(c, device=device) for _ in range(3))
    weight = 1 + 0.1 * torch.randn(c, device=device)
    n, bf16, eps = float(tokens), torch.bfloat16, 1e-6
    form = ops.RowForm(bf16, quantised=True)

    def residual_norm(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> ops.Rows:
        return ops.residual_norm(x, y, gate, ops.modulation(shift, scale), eps, form)[1]

    def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return ops.norm_modulate(x, shift, scale, eps, bf16)

    def norm_modulate_quant(x: Tensor, shift: Tensor, scale: Tensor) -> ops.Quantised:
        return ops.norm_modulate_quant(x, shift, scale, eps, bf16)

    def rms_norm_rows(y: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm_rows(y, weight, eps)

    return [
        RowOperation("norm_modulate", norm_modulate, (x, shift, scale), (0,), n * c * 6),
        RowOperation("norm_modulate_quant", norm_modulate_quant, (x, shift, scale), (0,), n * (c * 5 + 4)),
        RowOperation("residual_norm_quant", residual_norm, (x, y, gate, shift, scale), (0, 1), n * (c * 11 + 4)),
        RowOperation("gate_residual", ops.gate_residual, (x, y, gate), (0, 1), n * c * 10),
        RowOperation("rms_norm_rows", rms_norm_rows, (y, weight), (0,), n * c * 4),
        RowOperation("quantise_rows", ops.quantise_rows, (y,), (0,), n * (c * 3 + 4)),
        RowOperation("gelu", ops.gelu, (h,), (0,), n * f * 4),
        RowOperation("gelu_quant", ops.gelu_quant, (h,), (0,), n * (f * 3 + 4)),
    ]


def _measure(bench: Bench, operation: RowOperation, tokens: int) -> None:
    name = f"kernels/{operation.name}/{tokens}"
    with bench.attempt(name):
        timing = time_call(lambda: operation.call(*operation.tensors), bench.device, bench.options.runs)
        few = [t[:CHECKED_ROWS] if i in operation.cut else t for i, t in enumerate(operation.tensors)]
        error = difference(operation.call(*few), operation.call(*(t.cpu() for t in few)))
        rate = bench.rate(timing, "copy", operation.moved)
        bench.add(name, timing, error=error, **rate, bytes=operation.moved)


def difference(out: Tensor | tuple[Tensor, Tensor], twin: Tensor | tuple[Tensor, Tensor]) -> float:
    """Relative Frobenius difference of two results. A pair is quantised data [L, C] and one scale per row [L]."""

    def value(x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return (x.double() if isinstance(x, Tensor) else x[0].double() * x[1].double().view(-1, 1)).cpu()

    return ((value(out) - value(twin)).norm() / value(twin).norm()).item()


def _cross(bench: Bench, tokens: int) -> None:
    c, device, bf16 = bench.dit.dim, bench.device, torch.bfloat16
    q = torch.randn(tokens, c, device=device, dtype=bf16)
    text, image = (torch.randn(n, 2 * c, device=device, dtype=bf16) for n in (TEXT_TOKENS, IMAGE_TOKENS))
    name = f"kernels/cross_attention/{tokens}"
    with bench.attempt(name):
        timing = time_call(
            lambda: cross_attention(q, text, image, bench.dit.head_dim), bench.device, bench.options.runs
        )
        flops = 4.0 * tokens * (TEXT_TOKENS + IMAGE_TOKENS) * c
        few = q[:CHECKED_ROWS]
        out = cross_attention(few, text, image, bench.dit.head_dim)
        twin = cross_attention(few.cpu().float(), text.cpu().float(), image.cpu().float(), bench.dit.head_dim)
        bench.add(
            name,
            timing,
            error=difference(out, twin),
            **bench.rate(timing, "gemm_bf16", flops),
            flops=flops,
            bytes=4.0 * tokens * c,
        )


def _watch(bench: Bench, work: Work) -> None:
    """Measure the NaN checks: of the latent, once per step, and of each decoded group of four frames. `bytes` are the
    bytes read. The time covers the kernels and the asynchronous copy of the result."""
    latent = torch.randn(16, work.layout.frames, work.layout.height, work.layout.width, device=bench.device)
    pixels = torch.randn(3, 4, work.height, work.width, device=bench.device)
    for name, seen, look in (("finite_flag", latent, value_range), ("finite_flag-pixels", pixels, colour_range)):
        row = f"kernels/{name}/{work.tokens}"
        with bench.attempt(row):
            timing = time_call(partial(_look, look, seen), bench.device, bench.options.runs)
            bench.add(row, timing, **bench.rate(timing, "copy", seen.nbytes), bytes=seen.nbytes)


def _look(look: Callable[[Tensor], Tensor], seen: Tensor) -> object:
    return copy_to_cpu(look(seen))


def _prepare(bench: Bench, variant: str, tokens: int, rope: Rope) -> None:
    c, device = bench.dit.dim, bench.device
    name = f"kernels/prepare_qkv-{variant}/{tokens}"
    try:
        choose_attention(variant, "bf16", device, bench.dit.head_dim)
    except InputError as error:
        bench.skip(name, f"not measured: {error}")
        return
    qkv = torch.randn(tokens, 3 * c, device=device, dtype=torch.bfloat16)
    weight = 1 + 0.1 * torch.randn(c, device=device)
    timing = time_call(lambda: prepare_qkv(qkv, weight, weight, rope, VARIANTS[variant]), device, bench.options.runs)
    written = {"8bit": 3, "8bit-bf16pv": 2, "bf16": 4}[variant]  # bytes per channel; V in bf16 is not copied
    read = 6 if variant == "8bit" else 4
    moved = float(tokens) * (c * (read + written) + 4 * bench.dit.head_dim)
    bench.add(
        name,
        timing,
        note="error: see section attention",
        **bench.rate(timing, "copy", moved),
        bytes=moved,
    )
