"""Train the sprite VAE, on outputs and driving clips at full and at half size.

Some clips are as long as a segment, because after training on 13 frames only, colours drift from frame 20 on. The loss
is computed on pixels, with a higher weight for characters. Noise is added to the latents before decoding, so that small
errors of the transformer have small effects. After training, `conv1` and `conv2` are rescaled, which does not change
the reconstruction, so that the latents have the per-channel mean and standard deviation of Wan's constants.

Clips are processed in one pass instead of frame by frame. On a GPU, 3-D convolutions run as channels-last 2-D
convolutions with the taps in time folded into channels, and norms are compiled: for 16 to 64 channels, cuDNN's 3-D
convolutions and PyTorch's norms are slow.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.training.drawing import draw_pictures
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Training, Workers, adam, fit
from scail2_rt.benchmarks.sprites.training.model import Weights, digest, make_vae
from scail2_rt.benchmarks.sprites.world.cases import TASKS, Scene
from scail2_rt.export.models import vae as layers
from scail2_rt.export.models.vae import LATENT_MEAN, LATENT_STD, VAE
from scail2_rt.runtime.pipeline.preprocess import half_resolution, normalise_video

# Kinds and lengths of the batches. "whole": full pictures, in which the attention sees four times as many pixels.
KINDS = ("crop", "half", "crop", "whole")
CLIP_FRAMES = (9, 33, 17)  # frames per clip; all batches have about the same total number of frames
STRIDE = 5  # step through the combinations of kind and length from batch to batch
BATCH_FRAMES = 9  # frames per clip for which --vae-batch holds
CROP = 64
NOISE = 0.15  # largest noise, relative to the standard deviation of the latents
CHARACTER_WEIGHT = 3.0
RATE = 2e-3
ROUNDS, SEGMENT_FRAMES = 16, 144  # batches for statistics on a GPU, and frames per batch


class Clips:
    """The drawn videos of the training set: image uint8 [N, T, 3, H, W], labels uint8 [N, T, H, W]."""

    def __init__(self, scenes: Sequence[Scene], device: torch.device) -> None:
        parts = []
        for start in range(0, len(scenes), 32):
            chosen = scenes[start : start + 32]
            parts.append(draw_pictures([scene.truth for scene in chosen], device))
            parts.append(draw_pictures([scene.driving.picture for scene in chosen], device))
        self.image, self.labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def batch(self, size: int, frames: int, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch → video [B, 3, T, h, w] in -1..1, weight [B, 1, T, h, w]. kind: "whole" (full pictures),
        "half" (half size) or "crop"."""

        def pick(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (size,), generator=generator, device=self.image.device)

        chosen, first = pick(0, len(self.image)), pick(0, self.image.shape[1] - frames + 1)
        times = first[:, None] + torch.arange(frames, device=first.device)
        video, labels = self.image[chosen[:, None], times], self.labels[chosen[:, None], times]
        if kind == "crop":
            rows, columns = (pick(0, side - CROP + 1)[:, None] for side in video.shape[-2:])
            span = torch.arange(CROP, device=first.device)
            every = torch.arange(size, device=first.device)[:, None, None]
            place = (every, slice(None), (rows + span)[:, :, None], (columns + span)[:, None, :])
            video = video.permute(0, 1, 3, 4, 2)[place].permute(0, 3, 4, 1, 2)
            labels = labels[place].permute(0, 3, 1, 2)
        video = normalise_video(video)
        weight = (labels > 0).float()[:, :, None]
        if kind == "half":
            video, weight = (half_resolution(x.flatten(0, 1)).unflatten(0, (size, frames)) for x in (video, weight))
        return video.transpose(1, 2), 1 + CHARACTER_WEIGHT * weight.transpose(1, 2)


def train_vae(
    clips: Clips, budget: Budget, batch: int, workers: Workers, work: Path, start: Weights | None = None
) -> Weights:
    """Train the VAE. start: initial weights; None: random ones. Returns fp32 weights with normalised latents."""
    identity = f"{len(clips.image)} clips of {clips.image.shape[1]} frames"
    if start is not None:
        identity += f", begun with {digest(start)}"
    vae = make_vae(start, workers.compute).to(workers.device)
    kinds = [(kind, min(frames, clips.image.shape[1])) for kind in KINDS for frames in CLIP_FRAMES]

    def loss(kind: str, frames: int, generator: torch.Generator) -> Tensor:
        size = batch * BATCH_FRAMES // (frames * (4 if kind == "whole" else 1))
        video, weight = clips.batch(max(size, 1), frames, kind, generator)
        latent = vae.encode_clip(video)
        deviation = latent.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        noise = torch.randn(latent.shape, generator=generator, device=latent.device)
        share = torch.rand(len(latent), 1, 1, 1, 1, generator=generator, device=latent.device)
        error = vae.decode_clip(latent + NOISE * share * deviation * noise) - video
        return ((error.square() + 0.1 * (error.square() + 1e-4).sqrt()) * weight).mean()

    losses = [partial(loss, *kind) for kind in kinds]
    with folded_convolutions(workers.device):
        optimisers, training = [adam(vae.parameters(), RATE)], Training(budget, workers, work, "vae", identity)
        weights = fit(vae, losses, lambda step: step * STRIDE % len(losses), optimisers, training)
    vae.load_state_dict(weights)
    return normalised(vae, clips)


@contextmanager
def folded_convolutions(device: torch.device) -> Iterator[None]:
    """Inside this context, on a GPU, the VAE's layers use `folded_conv3d`, `fused_norm` and cached constants."""
    if device.type != "cuda":
        yield
        return
    saved = layers.conv3d, layers.statistics, layers.RMSNorm.forward
    statistics = cache(layers.statistics)
    layers.conv3d, layers.statistics, layers.RMSNorm.forward = folded_conv3d, statistics, fused_norm  # type: ignore[method-assign]
    try:
        with torch._dynamo.config.patch(recompile_limit=32):
            yield
    finally:
        layers.conv3d, layers.statistics, layers.RMSNorm.forward = saved  # type: ignore[method-assign]


def fused_norm(self: layers.RMSNorm, x: Tensor) -> Tensor:
    """`RMSNorm.forward`, compiled for contiguous rows of channels, the memory layout of `folded_conv3d`'s result."""
    last = x.movedim(-self.gamma.ndim, -1)
    rows = last.flatten(0, -2)
    torch._dynamo.mark_static(rows, 1)
    torch._dynamo.mark_dynamic(rows, 0)
    normed = (_compiled_norm() if rows.is_cuda else _norm_rows)(rows, self.gamma.flatten())
    return normed.view(last.shape).movedim(-1, -self.gamma.ndim)


@cache
def _compiled_norm() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_norm_rows)


def _norm_rows(rows: Tensor, gamma: Tensor) -> Tensor:
    """rows [R, C] → rows / rms · gamma; bf16 on a GPU, as input of the convolutions."""
    x = rows.float()
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-12) * gamma
    return normed.bfloat16() if rows.is_cuda else normed


def folded_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...] = (1, 1, 1), padding: tuple[int, ...] = (0, 0, 0)
) -> Tensor:
    """`F.conv3d` without padding in time, as one 2-D convolution over the frames of all taps concatenated as
    channels."""
    count, _, frames, _, _ = x.shape
    taps, step = weight.shape[2], stride[0]
    last = x.permute(0, 2, 3, 4, 1)
    shifted = [last[:, tap : frames - taps + tap + 1 : step] for tap in range(taps)]
    rows = torch.cat(shifted, dim=-1).flatten(0, 1).permute(0, 3, 1, 2)  # [N·T', taps·C, H, W], channels last
    kernel = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(rows, kernel, bias, stride[1:], padding[1:])
    return out.unflatten(0, (count, -1)).transpose(1, 2)


@torch.no_grad()
def normalised(vae: VAE, clips: Clips) -> Weights:
    """The weights, rescaled so that latents have the mean and standard deviation of Wan's constants per channel, that
    is, 0 and 1 after normalisation."""
    encoded = [vae.encode(video) for kind in ("whole", "half") for video, _ in _segments(clips, kind, seed=1)]
    values = torch.cat([latent.transpose(0, 1).flatten(1) for latent in encoded], dim=1).cpu()
    mean, deviation = values.mean(1), values.std(1)
    offset, scale = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    weights = {name: tensor.detach().float().cpu().clone() for name, tensor in vae.state_dict().items()}
    # before: z = scale·n + offset with n of `mean`, `deviation`; wanted: z' = scale·(n - mean)/deviation + offset
    low, factor = scale * mean + offset, 1 / deviation
    out = weights["conv1.weight"].shape[0] // 2
    weights["conv1.weight"][:out] *= factor.view(-1, 1, 1, 1, 1)
    weights["conv1.bias"][:out] = (weights["conv1.bias"][:out] - low) * factor + offset
    mixing = weights["conv2.weight"]
    weights["conv2.bias"] += (mixing[:, :, 0, 0, 0] * (low - offset * deviation)).sum(1)
    weights["conv2.weight"] = mixing * deviation.view(1, -1, 1, 1, 1)
    return weights


@torch.no_grad()
def reconstruction_psnr(vae: VAE, clips: Clips) -> tuple[float, float]:
    """(PSNR in dB over all pixels of full pictures, PSNR over the pixels of characters)."""
    every, inside = [], []
    for video, weight in _segments(clips, "whole", seed=2):
        error = ((vae.decode(vae.encode(video)).clamp(-1, 1) - video) / 2).square().mean(1, keepdim=True)
        every.append(error.mean())
        inside.append(error[weight > 1].mean())
    overall, characters = (float(-10 * torch.stack(errors).mean().log10()) for errors in (every, inside))
    return overall, characters


def _segments(clips: Clips, kind: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of clips of full length, because errors are largest at the end of a segment; one batch on a CPU, `ROUNDS`
    on a GPU."""
    generator, frames = torch.Generator(clips.image.device).manual_seed(seed), clips.image.shape[1]
    for _ in range(ROUNDS if clips.image.is_cuda else 1):
        yield clips.batch(max(SEGMENT_FRAMES // frames, 1), frames, kind, generator)


def vae_requests(count: int) -> list[tuple[str, range]]:
    """(task, seeds) of the training cases, distributed evenly over the tasks."""
    return [(task, range(count // len(TASKS))) for task in TASKS]
