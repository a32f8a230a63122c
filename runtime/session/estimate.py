"""What a planned run will take, worked out without loading anything: FLOP, memory and time by phase.

FLOP follow from the plan (`geometry`), weights from the manifest, activations from the token layout. Times divide FLOP
by a rate: the one measured in the last run of this engine folder on this device (`last_run.json`, written by every
complete run), else half of what a short matrix product reaches here; the text says which. Both are estimates: a small
model is slower than its FLOP say, because calls cost time too.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scail2_rt.engines.folder.manifest import Manifest, write_json
from scail2_rt.engines.registry import choose_backend, device_of, gpu
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from scail2_rt.kernels.attention.variants import usual_attention
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout, forward_flops, vae_decode_flops, vae_encode_flops
from scail2_rt.runtime.core.request import JobPlan
from scail2_rt.runtime.session.memory import activation_bytes, context_bytes, decode_bytes

LAST_RUN = "last_run.json"
BENCHMARK_S = 0.3
BENCHMARK_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_SHARE = 0.5  # of the bare matrix product's rate; whole runs reach 0.3 to 0.7
VAE_REFERENCE_DIM = 96  # the width for which the VAE's FLOP were measured


@dataclass(frozen=True, slots=True)
class Estimate:
    """FLOP, GiB (weights and activations together) and seconds by phase, and where the times come from."""

    tokens: int
    passes: int
    flop: Mapping[str, float]
    memory_gib: Mapping[str, float]
    seconds: Mapping[str, float]
    basis: str

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def estimate(plan: JobPlan, manifest: Manifest, directory: Path, backend: str, max_rows: int) -> Estimate:
    """The estimate for one plan on the engines of `directory`, run by `backend` (or what `auto` chooses)."""
    chosen, _ = choose_backend(backend, manifest.backends)
    flop = work(plan, manifest)
    rates, basis = rates_for(directory, chosen)
    seconds = {phase: amount / rates["vae" if phase in VAE_PHASES else "denoise"] for phase, amount in flop.items()}
    memory = memory_gib(plan, manifest, max_rows)
    return Estimate(plan.layout.tokens, plan.request.passes, flop, memory, seconds, basis)


VAE_PHASES = ("reference", "driving", "decode")


def work(plan: JobPlan, manifest: Manifest) -> dict[str, float]:
    """FLOP of each phase of a plan (nothing taken from the prompt cache)."""
    dit, vae, umt5, clip = _parts(manifest)
    request = plan.request
    wide = (vae.dim / VAE_REFERENCE_DIM) ** 2
    references = len(request.extra_refs) + 1
    driving = denoise = decode = 0.0
    for segment in plan.segments:
        frames, size = segment.padded_frames, (plan.height, plan.width)
        layout = Layout.of(frames, *size, len(request.extra_refs), plan.mode == "replace")
        driving += vae_encode_flops(frames, plan.height // 2, plan.width // 2)
        if segment.overlap:
            driving += vae_encode_flops(segment.overlap, *size)
        denoise += request.steps * request.passes * forward_flops(dit, layout)
        decode += vae_decode_flops(frames, *size)
    umt5_weights = umt5.layers * (4 * umt5.dim * umt5.attn_dim + 3 * umt5.dim * umt5.ffn_dim)
    clip_weights = clip.layers * (4 * clip.dim**2 + 2 * clip.dim * clip.mlp_dim)
    return {
        "text": 2.0 * request.passes * dit.text_len * umt5_weights,
        "clip": 2.0 * clip.tokens * clip_weights,
        "reference": references * wide * vae_encode_flops(1, plan.height, plan.width),
        "driving": wide * driving,
        "denoise": float(denoise),
        "decode": wide * decode,
    }


def memory_gib(plan: JobPlan, manifest: Manifest, max_rows: int) -> dict[str, float]:
    """GiB of weights and activations while each phase runs, beside what Python and its libraries take."""
    dit, vae, _, _ = _parts(manifest)
    element = 4 if manifest.precision == "fp32" else 2
    passes = plan.request.passes
    streams = activation_bytes(dit, plan.layout, passes, element, usual_attention(manifest.precision))
    context = context_bytes(dit, passes, element)
    hidden = 2 * min(plan.layout.tokens, max_rows) * dit.ffn_dim * element
    vae_work = decode_bytes(vae, plan.height, plan.width, element)
    kv = _weights(manifest, "dit.", ".context_kv")
    resident = _weights(manifest, "dit.") - kv + _weights(manifest, "vae.")
    phases = {
        "text": _weights(manifest, "umt5."),
        "clip": _weights(manifest, "clip"),
        "reference": _weights(manifest, "vae.encode") + vae_work,
        "denoise": resident + streams + context + hidden,
        "decode": resident + context + vae_work,
    }
    return {phase: amount / 2**30 for phase, amount in phases.items()}


def _weights(manifest: Manifest, prefix: str, suffix: str = "") -> int:
    """Bytes of the weights of the stages with this prefix and suffix."""
    names = (stage for stage in manifest.stages if stage.name.startswith(prefix) and stage.name.endswith(suffix))
    return sum(stage.weight_bytes for stage in names)


def _parts(manifest: Manifest) -> tuple[DiTConfig, VAEConfig, UMT5Config, CLIPConfig]:
    config = manifest.config
    if config.dit is None or config.vae is None or config.umt5 is None or config.clip is None:
        parts = {"dit": config.dit, "vae": config.vae, "umt5": config.umt5, "clip": config.clip}
        lacking = ", ".join(name for name, part in parts.items() if part is None)
        raise InputError(f"The engine folder has no {lacking}: build it from a complete checkpoint.")
    return config.dit, config.vae, config.umt5, config.clip


def device_name(backend: str) -> str:
    """What rates are filed under: the executor and the machine it runs on."""
    return f"{backend} on {gpu() if device_of(backend) == 'cuda' else 'cpu'}"


def rates_for(directory: Path, backend: str) -> tuple[dict[str, float], str]:
    """({"denoise", "vae"} FLOP/s, where they come from)."""
    try:
        last = json.loads((directory / LAST_RUN).read_text())
        rates = {name: float(last["flop_per_s"][name]) for name in ("denoise", "vae")}
        if last["device"] == device_name(backend) and min(rates.values()) > 0:
            return rates, f"the speed of the last run with these engines ({last['device']})"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no run yet, or a file of another version: measure instead
    device = device_of(backend)
    rate = MATMUL_SHARE * _matmul_rate(device)
    return {"denoise": rate, "vae": rate}, f"half the speed of a matrix product on this {device}; no run measured yet"


def _matmul_rate(device: str) -> float:
    """FLOP/s of a square matrix product, repeated for about a third of a second."""
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


def remember_run(
    directory: Path, plan: JobPlan, manifest: Manifest, backend: str, timings: Mapping[str, float]
) -> None:
    """Keep the measured rates in the engine folder for later estimates; a folder that is read-only stays as it is."""
    flop = work(plan, manifest)
    vae_s = sum(timings.get(phase, 0.0) for phase in VAE_PHASES)
    denoise_s = timings.get("denoise", 0.0)
    if not (vae_s and denoise_s):
        return
    rates = {"denoise": flop["denoise"] / denoise_s, "vae": sum(flop[phase] for phase in VAE_PHASES) / vae_s}
    try:
        write_json(directory / LAST_RUN, {"device": device_name(backend), "flop_per_s": rates})
    except OSError:
        return


def describe(plan: JobPlan, result: Estimate) -> dict[str, Any]:
    """The estimate as one JSON object."""
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
        "tokens": result.tokens,
        "steps": plan.request.steps,
        "passes": result.passes,
        "flop": dict(result.flop),
        "memory_gib": dict(result.memory_gib),
        "seconds": dict(result.seconds),
        "total_s": result.total_s,
        "basis": result.basis,
        "warnings": list(plan.warnings),
    }


def as_text(plan: JobPlan, result: Estimate) -> str:
    """The estimate for people."""
    request, layout = plan.request, plan.layout
    lines = [
        f"{plan.frames} frames at {float(plan.frame_rate):.6g} fps, {plan.height}x{plan.width}, mode {plan.mode}",
        f"{len(plan.segments)} segments of at most {max(s.padded_frames for s in plan.segments)} frames:",
    ]
    if plan.fit is not None:
        lines.insert(1, plan.fit.text)
    for number, segment in enumerate(plan.segments, 1):
        overlap = f", {segment.overlap} of them from the segment before" if segment.overlap else ""
        padding = f", padded by {segment.padding}" if segment.padding else ""
        lines.append(f"  {number}: frames {segment.start} to {segment.valid_end - 1}{overlap}{padding}")
    lines += [
        f"{result.tokens:,} tokens = {layout.reference_tokens:,} reference + {layout.video_tokens:,} video "
        f"+ {layout.driving_tokens:,} driving",
        f"{request.steps} {request.solver} steps of {result.passes} pass{'es' if result.passes > 1 else ''} a segment",
        "",
        f"{'phase':<10} {'TFLOP':>12} {'GiB':>8} {'time':>10}",
    ]
    for phase, flop in result.flop.items():
        gib = result.memory_gib.get(phase)
        memory = "" if gib is None else f"{gib:.2f}"
        lines.append(f"{phase:<10} {flop / 1e12:>12.3f} {memory:>8} {duration(result.seconds[phase]):>10}")
    total = sum(result.flop.values()) / 1e12
    peak = max(result.memory_gib.values())
    lines += [
        f"{'all':<10} {total:>12.3f} {peak:>8.2f} {duration(result.total_s):>10}",
        "",
        f"Times assume {result.basis}. Memory is weights and activations of a phase, without the libraries themselves.",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`3.2 s`, `12 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
