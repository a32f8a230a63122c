"""Section `stages`: the stages of one transformer block, embed and head, in every precision.

The stages run as in production, through the engine set in chunks, over all tokens of the first size. `error` is the
largest relative Frobenius error of an output against the fp32 stage with the same weights, on the first rows.
"""

import torch
from torch import Tensor

from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.harness import time_call
from scail2_rt.benchmarks.speed.random_weights import random_engines
from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.spec import ROWS

STAGES = ("dit.embed", "dit.blocks.0.qkv", "dit.blocks.0.mid", "dit.blocks.0.ffn", "dit.head")
CHECKED_ROWS = 1024


def run(bench: Bench) -> None:
    tokens = bench.options.sizes[0].tokens
    for stage in STAGES:
        short = stage.rpartition(".")[2]
        with (
            bench.attempt(f"stages/{short}/inputs"),
            random_engines(bench.options.config, "fp32", bench.device, 1) as exact,
        ):
            inputs = random_inputs(exact, stage, tokens)
            wanted = exact.run(stage, *_cut(exact, stage, inputs))
            for precision in bench.precisions:
                with bench.attempt(f"stages/{short}-{precision}/{tokens}"):
                    _measure(bench, stage, precision, inputs, wanted)


def random_inputs(engines: EngineSet, stage: str, tokens: int) -> list[Tensor]:
    """fp32 inputs of a stage, drawn from N(0, 1), one row per token; modulation is scaled by 0.1, the driving flag is
    0."""
    generator = torch.Generator(engines.device).manual_seed(1)
    specs, _ = engines.definitions[stage].io(engines.numerics(stage))
    found = []
    for spec in specs:
        shape = [tokens if dim == ROWS else int(dim) for dim in spec.dims]
        scale = {"mod": 0.1, "driving": 0.0}.get(spec.name, 1.0)
        found.append(scale * torch.randn(shape, generator=generator, device=engines.device))
    return found


def _cut(engines: EngineSet, stage: str, inputs: list[Tensor]) -> list[Tensor]:
    """The first `CHECKED_ROWS` rows of the inputs, in the stage's dtypes."""
    specs, _ = engines.definitions[stage].io(engines.numerics(stage))
    return [
        (x if spec.row_axis is None else x[:CHECKED_ROWS]).to(spec.dtype) for x, spec in zip(inputs, specs, strict=True)
    ]


def stage_flops(engines: EngineSet, stage: str, tokens: int) -> float:
    """FLOP of a stage's matrix products: 2 · tokens · elements of its two-dimensional weights."""
    locations = (
        engines.store.layout.location(name) for name in engines.store.layout.names if name.startswith(f"{stage}.")
    )
    return 2.0 * tokens * sum(place.shape[0] * place.shape[1] for place in locations if len(place.shape) == 2)


def _measure(bench: Bench, stage: str, precision: Precision, inputs: list[Tensor], wanted: tuple[Tensor, ...]) -> None:
    tokens = inputs[0].shape[0]
    with random_engines(bench.options.config, precision, bench.device, 1) as engines:
        specs, _ = engines.definitions[stage].io(engines.numerics(stage))
        typed = [x.to(spec.dtype) for x, spec in zip(inputs, specs, strict=True)]
        out = engines.run(stage, *_cut(engines, stage, inputs))
        error = max(
            ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(out, wanted, strict=True)
        )
        timing = time_call(lambda: engines.run(stage, *typed), bench.device, bench.options.runs)
        flops = stage_flops(engines, stage, tokens)
        ceiling = "gemm_fp8" if engines.numerics(stage).fp8 else "gemm_bf16"
        layout = engines.store.layout
    traffic = sum(float(x.nbytes) for x in typed) + layout.stage_bytes(stage)
    bench.add(
        f"stages/{stage.rpartition('.')[2]}-{precision}/{tokens}",
        timing,
        error=error,
        **bench.rate(timing, ceiling, flops),
        flops=flops,
        bytes=traffic,
    )
