"""Section `vae`: decoding a segment and encoding its driving clip, one latent frame per call.

The baselines are the reference layers of `export.models.vae` in fp32 (with TF32 convolutions, PyTorch's default) and in
bf16 (with fp32 sums between blocks; the official code rounds these too). `error` is relative to fp32 without TF32, with
the same random weights and latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scail2_rt.benchmarks.report.goals import slow_baseline
from scail2_rt.benchmarks.report.record import Kind
from scail2_rt.benchmarks.speed.bench import Bench
from scail2_rt.benchmarks.speed.harness import time_call
from scail2_rt.benchmarks.speed.random_weights import RandomWeights
from scail2_rt.export.models.precision import BF16, FP32, Numerics
from scail2_rt.export.models.vae import VAE
from scail2_rt.runtime.core.geometry import vae_decode_flops, vae_encode_flops
from scail2_rt.runtime.pipeline.vae import frame_groups

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BASELINES: dict[str, Numerics] = {"official-fp32": FP32, "official-bf16": BF16}


@dataclass(frozen=True, slots=True)
class Half:
    """One direction, `decode` or `encode`. steps: the input of each step; flops: FLOP of all steps."""

    name: str
    steps: tuple[Tensor, ...]
    flops: float


def run(bench: Bench) -> None:
    assert bench.model.vae is not None
    weights = RandomWeights(bench.model, bench.device).component("vae")
    for half in _halves(bench):
        with bench.attempt(f"vae/{half.name}/exact"), torch.inference_mode():
            exact = _exact(bench, weights, half)
            for name, dtype in DTYPES.items():
                if not bench.wants(f"vae/{half.name}/{name}"):
                    continue
                with bench.attempt(f"vae/{half.name}/{name}"):
                    _ours(bench, weights, half, name, dtype, exact)
            for name, numerics in BASELINES.items():
                if not bench.wants(f"vae/{half.name}/{name}"):
                    continue
                with bench.attempt(f"vae/{half.name}/{name}", "baseline"):
                    _baseline(bench, weights, half, name, numerics, exact)


def _halves(bench: Bench) -> list[Half]:
    """The inputs for a segment of the first size: its latent [16, F, h, w], and its driving clip at half the
    resolution [3, T, H/2, W/2] in -1..1."""
    work, device = bench.options.sizes[0], bench.device
    layout = work.layout
    generator = torch.Generator(device).manual_seed(3)
    latent = torch.randn(16, layout.frames, layout.height, layout.width, generator=generator, device=device)
    height, width = work.height // 2, work.width // 2
    coarse = torch.rand(3, work.frames, height // 8, width // 8, generator=generator, device=device)
    clip = torch.nn.functional.interpolate(coarse, scale_factor=8.0, mode="bilinear") * 2 - 1
    groups = tuple(clip[:, group].contiguous() for group in frame_groups(work.frames))
    return [
        Half("decode", latent.split(1, dim=1), vae_decode_flops(work.frames, work.height, work.width)),
        Half("encode", groups, vae_encode_flops(work.frames, height, width)),
    ]


def _plain(weights: dict[str, Tensor], bench: Bench, numerics: Numerics) -> VAE:
    assert bench.model.vae is not None
    with torch.device("meta"):
        vae = VAE(bench.model.vae, numerics)
    types = {name: value.dtype for name, value in vae.state_dict().items()}
    vae.load_state_dict({name: weights[name].to(dtype) for name, dtype in types.items()}, assign=True)
    return vae


def _run_plain(vae: VAE, half: Half) -> Tensor:
    """Run all steps with the plain layers; returns all pixel or latent frames [C, T, ...]."""
    first, later = (vae.decode_first, vae.decode_step) if half.name == "decode" else (vae.encode_first, vae.encode_step)
    out, caches = first(half.steps[0][None])
    results = [out]
    for x in half.steps[1:]:
        out, caches = later(x[None], caches)
        results.append(out)
    return torch.cat(results, dim=2)[0]


def _exact(bench: Bench, weights: dict[str, Tensor], half: Half) -> Tensor:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return _run_plain(_plain(weights, bench, FP32), half)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _ours(bench: Bench, weights: dict[str, Tensor], half: Half, name: str, dtype: torch.dtype, exact: Tensor) -> None:
    from scail2_rt.engines.torch_backend.vae_streams import DecodeStream, EncodeStream

    assert bench.model.vae is not None
    form = DecodeStream if half.name == "decode" else EncodeStream
    stream = form(weights, bench.model.vae, bench.device, dtype)

    def all_steps() -> Tensor:
        stream.reset()
        return torch.cat([stream.step(x).float() for x in half.steps], dim=1)

    _record(bench, half, name, "ours", all_steps, exact)


def _baseline(
    bench: Bench, weights: dict[str, Tensor], half: Half, name: str, numerics: Numerics, exact: Tensor
) -> None:
    vae = _plain(weights, bench, numerics)
    _record(bench, half, name, "baseline", lambda: _run_plain(vae, half), exact)


def _record(bench: Bench, half: Half, name: str, kind: Kind, call: Callable[[], Tensor], exact: Tensor) -> None:
    with bench.peaks() as peaks:
        out = call()
        error = ((out - exact).double().norm() / exact.double().norm()).item()
        del out
        timing = time_call(call, bench.device, bench.options.runs, warm_up=1)
    bench.add(
        f"vae/{half.name}/{name}",
        timing,
        kind,
        slow_baseline(f"vae-{half.name}-{name}", timing, bench.options.config, bench.options.sizes[0].tokens),
        error=error,
        **bench.rate(timing, "gemm_bf16", half.flops),
        flops=half.flops,
        **peaks,
    )
