"""Section `forward`: speed and error of one forward pass of the transformer, compared with two baselines.

The pass is that of a denoising step (`Transformer.velocities`, guidance 1, with CUDA graphs if enabled). At the first
size it alternates with a pass whose result is checked for NaN as in the denoising loop (`watched`). The error is that
of the velocity against fp32 stages with the same weights and PyTorch's attention. It is measured with fewer blocks and
tokens, because fp32 attention over 48,832 tokens takes minutes. Baselines run at the first size.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scail2_rt.benchmarks.report.goals import slow_baseline
from scail2_rt.benchmarks.speed import baselines
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.breakdown import gpu_breakdown
from scail2_rt.benchmarks.speed.harness import synchronise, time_call, time_calls
from scail2_rt.benchmarks.speed.models import SMALL, Work
from scail2_rt.benchmarks.speed.random_weights import random_engines, random_on
from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.export.models.config import DiTConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.kernels.attention.variants import is_eight_bit
from scail2_rt.runtime.core.geometry import Layout, forward_flops
from scail2_rt.runtime.distributed.leading import LeadingConstants
from scail2_rt.runtime.distributed.opening import open_on
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.async_copy import StepMarks
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.finite import value_range
from scail2_rt.runtime.pipeline.transformer import References

ERROR_LAYERS = 4
ERROR_WORK = Work(256, 448, 33)  # 5,488 tokens
BASELINES = {"official": baselines.official, "compile": baselines.compiled}


def run(bench: Bench) -> None:
    first = bench.options.sizes[0]
    for precision in _precisions(bench):
        for work in bench.options.sizes if precision == "fp8" else (first,):
            if bench.wants(name := row_name(bench, precision, work)):
                with bench.attempt(name):
                    _ours(bench, name, precision, work)
    for baseline, make in BASELINES.items():
        if bench.wants(name := f"forward/{baseline}/{first.tokens}"):
            with bench.attempt(name, "baseline"):
                _baseline(bench, baseline, make, first)
    if bench.wants("forward/error/fp32"):
        with bench.attempt("forward/error/fp32"):
            _errors(bench)


def _precisions(bench: Bench) -> tuple[Precision, ...]:
    """All precisions to measure, or that of the given engine folder."""
    if bench.options.folder is None:
        return bench.precisions
    from scail2_rt.engines.folder.manifest import read_manifest

    return (read_manifest(bench.options.folder).precision,)


def opened(bench: Bench, precision: Precision, layers: int | None = None) -> EngineSet:
    """Open the given engine folder, or random engines. layers: number of blocks, for random engines; None: all."""
    execution = Execution(attention=bench.options.attention)
    if bench.options.folder is not None and layers is None:
        return open_engines(bench.options.folder, "torch", execution, bench.device.type)
    if precision in ("fp32", "bf16") and is_eight_bit(bench.options.attention):
        execution = Execution()
    return random_engines(bench.options.config, precision, bench.device, layers, execution)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a step, all fp32.

    references   latent and mask of the reference image
    driving      latent [16, F, h/2, w/2] and mask of the driving clip
    text         [40, text_dim]
    clip         CLIP features [257, clip_dim]
    noise        [16, F, h, w]"""

    references: References
    driving: tuple[Tensor, Tensor]
    text: Tensor
    clip: Tensor
    noise: Tensor


def random_inputs(config: DiTConfig, layout: Layout, device: torch.device) -> Inputs:
    """Seeded random inputs of a step."""
    generator = torch.Generator(device).manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    f, h, w = layout.frames, layout.height, layout.width
    masks = config.mask_channels
    references = normal(16, 1, h, w), normal(masks, 1, h, w).gt(0).float()
    driving = normal(16, f, h // 2, w // 2), normal(masks, f, h // 2, w // 2).gt(0).float()
    shown = References(*references, normal(16, 0, h, w), normal(masks, 0, h, w))
    text, clip, noise = normal(40, config.text_dim), normal(257, config.clip_dim), normal(16, f, h, w)
    return Inputs(shown, driving, text, clip, noise)


def step(
    engines: EngineSet, layout: Layout, constants: Constants | None = None, passes: int = 1
) -> Callable[[], list[Tensor]]:
    """A call that runs a denoising step of 1 or 2 guidance passes; values that are constant over the steps are computed
    beforehand. constants: for several GPUs, those of the leading process."""
    assert engines.config.dit is not None
    constants = constants or Constants(engines)
    inputs = random_inputs(engines.config.dit, layout, engines.device)
    contexts = constants.contexts([inputs.text, inputs.text.flip(0)][:passes], inputs.clip)
    transformer = constants.transformer(layout, contexts)
    transformer.show_references(inputs.references)
    transformer.show_driving(*inputs.driving)
    history = inputs.noise.new_zeros(4, *inputs.noise.shape[1:])
    return partial(transformer.velocities, inputs.noise, history, constants.schedule([900.0]), 0)


@contextmanager
def sharing(bench: Bench, engines: EngineSet, precision: Precision) -> Iterator[Constants]:
    """The constants of these engines on `options.gpus` GPUs; starts and stops the other ranks."""
    gpus, folder, execution = bench.options.gpus, bench.options.folder, engines.execution
    if gpus == 1:
        yield Constants(engines)
        return
    if folder is not None:
        opener = partial(open_on, folder, "torch", execution)
    else:
        opener = partial(random_on, bench.options.config, precision, execution)
    team = Team(gpus, engines.device, opener)
    try:
        yield LeadingConstants(engines, team)
    finally:
        team.close()


def watched(call: Callable[[], list[Tensor]]) -> Callable[[], object]:
    """The same step with the NaN check of the denoising loop: one value range per step, read one step later."""
    marks, count = StepMarks(lambda step, seen: None), itertools.count()
    return lambda: marks.passed(next(count), value_range(call()[0]))


def row_name(bench: Bench, precision: Precision, work: Work) -> str:
    gpus = f"-{bench.options.gpus}gpus" if bench.options.gpus > 1 else ""
    return f"forward/{precision}{gpus}/{work.tokens}"


def _ours(bench: Bench, name: str, precision: Precision, work: Work) -> None:
    flops = float(forward_flops(bench.dit, work.layout))
    with torch.no_grad(), opened(bench, precision) as engines, sharing(bench, engines, precision) as constants:
        call = step(engines, work.layout, constants)
        call()  # draws weights and compiles; the second call records a CUDA graph, later ones replay it
        calls: dict[str, Callable[[], object]] = {"": call}
        if work == bench.options.sizes[0]:
            calls["watched"] = watched(call)
        with bench.peaks() as peaks:
            times = time_calls(calls, bench.device, bench.options.runs)
        groups: dict[str, float] = {}
        unknown = ""
        if bench.on_gpu:
            groups, unknown = gpu_breakdown(call)
        chosen = engines.attention
        del call, calls
    timing = times[""]
    if "watched" in times:
        bench.add(name.replace(precision, f"{precision}-watched", 1), times["watched"])
    bench.add(
        name,
        timing,
        note=f"attention {chosen}" + (f"; other: {unknown}" if unknown else ""),
        **bench.rate(timing, "gemm_fp8" if precision == "fp8" else "gemm_bf16", flops),
        flops=flops,
        breakdown=groups,
        **peaks,
    )


def _baseline(
    bench: Bench, name: str, make: Callable[[DiTConfig, Layout, torch.device], Callable[[], Tensor]], work: Work
) -> None:
    flops = float(forward_flops(bench.dit, work.layout))
    with bench.peaks() as peaks:
        call = make(bench.dit, work.layout, bench.device)
        timing = time_call(call, bench.device, bench.options.runs, warm_up=1)
    bench.add(
        f"forward/{name}/{work.tokens}",
        timing,
        "baseline",
        slow_baseline(name, timing, bench.options.config, work.tokens)
        or ("eager mode: compiled only on a GPU" if name == "compile" and not bench.on_gpu else ""),
        tflops=flops / timing.median_s / 1e12,
        flops=flops,
        breakdown=gpu_breakdown(call)[0] if bench.on_gpu else {},
        **peaks,
    )


def _errors(bench: Bench) -> None:
    """Measure the relative error of the velocity of each fast path against fp32, with few blocks and tokens."""
    layers = min(ERROR_LAYERS, bench.dit.layers)
    layout = (ERROR_WORK if bench.on_gpu else SMALL).layout

    def velocity(precision: Precision, attention: str) -> Tensor:
        execution = Execution(attention=attention, cuda_graphs=False)
        with torch.inference_mode():
            engines = random_engines(bench.options.config, precision, bench.device, layers, execution)
            with engines:
                result = step(engines, layout)()[0].double()
                synchronise(bench.device)
        return result

    exact = velocity("fp32", "sdpa")
    where = f"{layers} blocks, {layout.tokens} tokens, against fp32"
    paths: list[tuple[Precision, str]] = [("bf16", "auto")]
    paths += [("fp8", variant) for variant in ("auto", "8bit", "8bit-bf16pv")] if "fp8" in bench.precisions else []
    for precision, attention in paths:
        name = f"forward/error/{precision}-{attention}"
        with bench.attempt(name):
            found = velocity(precision, attention)
            bench.add(name, note=where, error=((found - exact).norm() / exact.norm()).item())
