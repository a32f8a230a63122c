"""Compilation of the GPU kernels when engines are built, so that the first generation compiles nothing.

One small forward pass and a few VAE frames run every kernel. Triton and NVRTC store the compiled kernels in the folder
`kernels` of the engine folder. Two layouts are used, because Triton compiles separate kernels for sizes that are
divisible by 16.
"""

import time
from pathlib import Path

import torch

from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.transformer import References
from scail2_rt.runtime.pipeline.vae import decode, encode_clip

SIZES = ((5, 256, 256), (5, 96, 160))  # frames, height, width


def warm_kernels(directory: Path) -> str | None:
    """Run every kernel of a folder's torch executor once. Returns one line about it, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    start = time.perf_counter()
    with open_engines(directory, "torch") as engines:
        run_small(engines)
        torch.cuda.synchronize()
    return f"kernels compiled for {torch.cuda.get_device_name()} in {time.perf_counter() - start:.1f} s"


def run_small(engines: EngineSet) -> None:
    """Run a small denoising pass and a round trip through the VAE, for the networks that the folder has."""
    for frames, height, width in SIZES:
        if engines.config.vae is not None:
            for _ in decode(engines, encode_clip(engines, torch.zeros(3, frames, height, width))):
                pass
        if engines.config.dit is not None:
            _denoise(engines, Layout.of(frames, height, width))


def _denoise(engines: EngineSet, layout: Layout) -> None:
    dit = engines.config.dit
    assert dit is not None
    device = engines.device

    def noise(channels: int, frames: int, half: bool = False) -> torch.Tensor:
        return torch.randn(channels, frames, layout.height >> half, layout.width >> half, device=device)

    frames = layout.frames
    constants = Constants(engines)
    texts, clip = [torch.randn(7, dit.text_dim, device=device)], torch.randn(257, dit.clip_dim, device=device)
    transformer = constants.transformer(layout, constants.contexts(texts, clip))
    transformer.show_references(References(noise(16, 1), noise(28, 1), noise(16, 0), noise(28, 0)))
    transformer.show_driving(noise(16, frames, True), noise(28, frames, True))
    schedule, history = constants.schedule([500.0]), noise(4, frames).zero_()
    for _ in range(2 if engines.cuda_graphs else 1):
        transformer.velocities(noise(16, frames), history, schedule, 0)
