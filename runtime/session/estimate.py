"""Estimate of a planned run, made without loading weights: FLOP, memory and time per phase.

FLOP follow from the plan (`core.geometry`), memory from the memory model (`session.memory`). A time is FLOP divided by
a rate. The rate is that of the last complete run of this engine folder on this device (`last_run.json`). If there is
none, it is half the rate of a short matrix product on this device. `Estimate.basis` says which one was used. Small
models are slower than the estimate, because the overhead per call is not counted.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.engines.folder.manifest import write_json
from scail2_rt.engines.registry import gpu
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.geometry import forward_flops, vae_decode_flops, vae_encode_flops
from scail2_rt.runtime.core.plan import Estimate, Plan
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.session.memory import LIBRARY_BYTES, memory_model

LAST_RUN = "last_run.json"
BENCHMARK_S = 0.1
BENCHMARK_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_SHARE = 0.5  # share of the matrix product's rate; complete runs reach 0.3 to 0.7
VAE_REFERENCE_DIM = 96  # width of the VAE for which FLOP were measured
VAE_PHASES = ("reference", "driving", "decode")


class Rates:
    """FLOP/s of one set of engines on `gpus` GPUs, measured at the first use."""

    def __init__(self, engines: EngineSet, gpus: int = 1) -> None:
        self._engines, self.gpus = engines, gpus
        self._known: tuple[dict[str, float], str] | None = None

    def get(self) -> tuple[dict[str, float], str]:
        """Return ({"denoise": FLOP/s, "vae": FLOP/s}, a phrase that names their source)."""
        if self._known is None:
            self._known = _last_run(self._engines, self.gpus) or _measured(self._engines, self.gpus)
        return self._known

    def remember(self, plan: Plan, timings: Mapping[str, float]) -> None:
        """Store the rates of a complete run, also in the engine folder if it can be written. timings: seconds per
        phase."""
        flop = work(plan, self._engines)
        vae_s = sum(timings.get(phase, 0.0) for phase in VAE_PHASES)
        denoise_s = timings.get("denoise", 0.0)
        if not (vae_s and denoise_s):
            return
        rates = {"denoise": flop["denoise"] / denoise_s, "vae": sum(flop[phase] for phase in VAE_PHASES) / vae_s}
        device = device_name(self._engines, self.gpus)
        self._known = rates, f"the speed of the last run with these engines ({device})"
        try:
            document = {"device": device, "flop_per_s": rates}
            write_json(self._engines.directory / LAST_RUN, document)
        except OSError:
            return


def estimate(plan: Plan, engines: EngineSet, placement: Placement | None, rates: Rates) -> Estimate:
    """Return the estimate of a plan on these engines. Without a placement all weights stay in memory."""
    flop = work(plan, engines)
    speeds, basis = rates.get()
    seconds = {phase: amount / speeds["vae" if phase in VAE_PHASES else "denoise"] for phase, amount in flop.items()}
    model = memory_model(plan, engines, rates.gpus)
    phases = model.phases(placement)
    libraries = LIBRARY_BYTES if engines.device.type == "cuda" else 0
    line = "" if placement is None else placement.line
    return Estimate(flop, phases, max(phases.values()) + libraries, line, seconds, basis)


def work(plan: Plan, engines: EngineSet) -> dict[str, float]:
    """Return FLOP per phase of a plan, without use of the prompt cache."""
    dit, vae, umt5, clip = (getattr(engines.config, part) for part in ("dit", "vae", "umt5", "clip"))
    request, size = plan.request, (plan.height, plan.width)
    wide = (vae.dim / VAE_REFERENCE_DIM) ** 2
    driving = denoise = decode = 0.0
    for segment in plan.segments:
        frames = segment.padded_frames
        driving += vae_encode_flops(frames, plan.height // 2, plan.width // 2)
        if segment.overlap:
            driving += vae_encode_flops(segment.overlap, *size)
        denoise += request.steps * request.passes * forward_flops(dit, plan.segment_layout(segment))
        decode += vae_decode_flops(frames, *size)
    umt5_weights = umt5.layers * (4 * umt5.dim * umt5.attn_dim + 3 * umt5.dim * umt5.ffn_dim)
    clip_weights = clip.layers * (4 * clip.dim**2 + 2 * clip.dim * clip.mlp_dim)
    return {
        "text": 2.0 * request.passes * dit.text_len * umt5_weights,
        "clip": 2.0 * clip.tokens * clip_weights,
        "reference": len(request.references) * wide * vae_encode_flops(1, *size),
        "driving": wide * driving,
        "denoise": float(denoise),
        "decode": wide * decode,
    }


def device_name(engines: EngineSet, gpus: int = 1) -> str:
    """Return the key under which rates are stored: the executor and the device that it runs on."""
    several = f" x{gpus}" if gpus > 1 else ""
    return f"{engines.backend} on {gpu() if engines.device.type == 'cuda' else 'cpu'}{several}"


def _last_run(engines: EngineSet, gpus: int) -> tuple[dict[str, float], str] | None:
    try:
        last = json.loads((engines.directory / LAST_RUN).read_text())
        rates = {name: float(last["flop_per_s"][name]) for name in ("denoise", "vae")}
        if last["device"] == device_name(engines, gpus) and min(rates.values()) > 0:
            return rates, f"the speed of the last run with these engines ({last['device']})"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no run yet, or a file of another version
    return None


def _measured(engines: EngineSet, gpus: int) -> tuple[dict[str, float], str]:
    device = engines.device.type
    rate = MATMUL_SHARE * _matmul_rate(device)
    basis = f"half the speed of a matrix product on this {device}, because no run was measured yet"
    return {"denoise": gpus * rate, "vae": rate}, basis


def _matmul_rate(device: str) -> float:
    """Return FLOP/s of a square matrix product, repeated for `BENCHMARK_S` seconds."""
    import torch

    size = BENCHMARK_SIZE[device]
    a = torch.ones(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)

    def run() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < BENCHMARK_S:
        run()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def described(plan: Plan, expected: Estimate) -> dict[str, Any]:
    """Return the plan and its estimate as one JSON object."""
    return {
        "status": "dry-run",
        "mode": plan.mode,
        "height": plan.height,
        "width": plan.width,
        "frames": plan.frames,
        "frame_rate": str(plan.frame_rate),
        "segments": [
            {"start": s.start, "end": s.valid_end, "padded_frames": s.padded_frames, "overlap": s.overlap}
            for s in plan.segments
        ],
        "tokens": plan.layout.tokens,
        "steps": plan.request.steps,
        "passes": plan.request.passes,
        "flop": dict(expected.flop),
        "memory_gib": {phase: amount / 2**30 for phase, amount in expected.memory.items()},
        "peak_gib": expected.peak / 2**30,
        "placement": expected.placement,
        "seconds": dict(expected.seconds),
        "total_s": expected.total_s,
        "basis": expected.basis,
        "framing": plan.framing and plan.framing.described,
        "reference_fit": plain(plan.fit),
        "warnings": list(plan.warnings),
    }


def as_text(plan: Plan, expected: Estimate) -> str:
    """Return the plan, its estimate and all warnings as text."""
    request, layout = plan.request, plan.layout
    count = len(plan.segments)
    lines = [
        f"{counted(plan.frames, 'frame')} at {float(plan.frame_rate):.6g} fps, {plan.height}x{plan.width}, "
        f"mode {plan.mode}",
        f"{counted(count, 'segment')} of at most {max(s.padded_frames for s in plan.segments)} frames:",
    ]
    notes = [plan.framing.line if plan.framing else "", plan.fit.text if plan.fit else ""]
    lines[1:1] = [line for line in notes if line]
    for number, segment in enumerate(plan.segments, 1):
        overlap = f", {segment.overlap} of them shared with the previous segment" if segment.overlap else ""
        padding = f", padded by {counted(segment.padding, 'frame')}" if segment.padding else ""
        lines.append(f"  {number}: frames {segment.start} to {segment.valid_end - 1}{overlap}{padding}")
    lines += [
        f"{layout.tokens:,} tokens = {layout.reference_tokens:,} reference + {layout.video_tokens:,} video "
        f"+ {layout.driving_tokens:,} driving",
        f"{counted(request.steps, f'{request.scheduler} step')} per segment, "
        f"{counted(request.passes, 'pass')} per step",
        "",
        f"{'phase':<10} {'TFLOP':>12} {'GiB':>8} {'time':>10}",
    ]
    for phase in dict.fromkeys([*expected.flop, *expected.memory]):
        flop = f"{expected.flop[phase] / 1e12:.3f}" if phase in expected.flop else ""
        gib = f"{expected.memory[phase] / 2**30:.2f}" if phase in expected.memory else ""
        seconds = duration(expected.seconds[phase]) if phase in expected.seconds else ""
        lines.append(f"{phase:<10} {flop:>12} {gib:>8} {seconds:>10}")
    total = sum(expected.flop.values()) / 1e12
    lines += [
        f"{'all':<10} {total:>12.3f} {expected.peak / 2**30:>8.2f} {duration(expected.total_s):>10}",
        "",
        *([f"GPU memory: {expected.placement}"] if expected.placement else []),
        f"Times assume {expected.basis}. Memory is the weights and activations of a phase. The last line is the peak, "
        "including the GPU's libraries.",
        *(f"warning: {sentence}" for sentence in plan.warnings),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format seconds as `3.2 s`, `12 min 5 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
