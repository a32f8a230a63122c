"""Training the sprite transformer by flow matching, under the pipeline's exact conditioning.

x_σ = (1-σ)·x₀ + σ·noise, the model predicts noise - x₀. In part of the samples the first latents are history: clean up
to a little noise, marked in the history mask, not in the loss. In part the prompt is dropped, so that guidance has
something to compare with. Mask colours are dealt anew in every sample. Half of the steps see short clips: they show
twice the cases in the time, and what a frame should look like hardly depends on how many follow it.

A transformer that is to run in fp8 can be trained with that rounding (`round_as_fp8`), and learns to bear it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.dataset import TEXT_ROWS, Samples
from scail2_rt.benchmarks.sprites.fitting import Budget, Muon, Workers, adam, fit
from scail2_rt.benchmarks.sprites.model import Weights, make_dit
from scail2_rt.export.dit import CrossAttention, DiT
from scail2_rt.kernels.rows import E4M3, E4M3_MAX
from scail2_rt.runtime.masks import CHARACTERS
from scail2_rt.runtime.solvers import TRAINING_STEPS

RATE, MATRIX_RATE = 3e-3, 8e-3  # peaks, of AdamW and of Muon
SHIFT = 6.0  # of the noise levels: what is shown is decided where there is most noise
PURE = 0.5  # share of the samples that are nothing but noise: with less, who is where can be seen in the noisy answer
HISTORY, HISTORY_LATENTS = 0.3, (1, 5)  # share of the samples; latents, from … to below: overlaps of 1 to 13 frames
HISTORY_NOISE = 0.1  # its largest deviation on them
DROPPED_TEXT = 0.1
TURN = 0.6180339887  # multiples of it, without their whole part, fill 0…1 evenly
CHARACTER_WEIGHT = 6.0
PADDING_ROWS = 16  # behind the text, for all of the pipeline's
FP8_LINEARS = (*(f"self_attn.{name}" for name in "qkvo"), "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@dataclass(frozen=True, slots=True)
class Kind:
    """Batches of one shape: what they are drawn from, how many samples they hold, their share of the steps."""

    name: str
    samples: Samples
    replace: bool
    size: int
    share: float


class Batches:
    """Draws samples of a kind, noise levels and history; → the loss of a model on them.

    empty: encoding of an empty prompt [1, TEXT_ROWS, C]."""

    def __init__(self, kinds: Sequence[Kind], empty: Tensor) -> None:
        self.kinds, self.empty = kinds, empty
        parts = torch.tensor([kind.share for kind in kinds])
        self.bounds = (parts / parts.sum()).cumsum(0)

    def turn(self, step: int) -> int:
        """The number of a step's kind; over many steps each has its share."""
        return min(int(torch.searchsorted(self.bounds, step * TURN % 1)), len(self.kinds) - 1)

    def loss(self, dit: DiT, kind: Kind, generator: torch.Generator) -> Tensor:
        device = generator.device
        batch = kind.samples.take(torch.randint(len(kind.samples), (kind.size,), generator=generator, device=device))

        def uniform(*shape: int) -> Tensor:
            return torch.rand(kind.size, *shape, generator=generator, device=device)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=device)

        batch = batch.recoloured(uniform(len(CHARACTERS)).argsort(1))
        clean, even = batch.latent, uniform(1, 1, 1, 1)
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        sigma = torch.where(uniform(1, 1, 1, 1) < PURE, torch.ones_like(sigma), sigma)
        noise = normal(clean)
        noisy = clean + sigma * (noise - clean)
        kept = torch.randint(*HISTORY_LATENTS, (kind.size, 1, 1, 1, 1), generator=generator, device=device)
        kept = kept.clamp(max=clean.shape[2] - 1) * (uniform(1, 1, 1, 1) < HISTORY)
        frozen = (torch.arange(clean.shape[2], device=device).view(1, 1, -1, 1, 1) < kept).float()
        frozen = frozen.expand_as(clean[:, :1])
        history = clean + HISTORY_NOISE * uniform(1, 1, 1, 1) * normal(clean)
        noisy = torch.lerp(noisy, history, frozen)
        dropped = uniform(1, 1) < DROPPED_TEXT
        text = torch.where(dropped, self.empty, batch.text)
        inputs = batch.inputs(noisy, frozen.expand(-1, 4, -1, -1, -1), text, kind.replace)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = dit(inputs, TRAINING_STEPS * sigma.flatten())
        weight = (1 + CHARACTER_WEIGHT * batch.weight[:, None]) * (1 - frozen)
        return ((velocity.float() - (noise - clean)).square() * weight).sum() / (weight.sum() * clean.shape[1])


def train_dit(
    batches: Batches, budget: Budget, workers: Workers, work: Path, identity: str, start: Weights | None, slower: float,
    fp8: bool,
) -> Weights:  # fmt: skip
    """start: weights to begin with, else random ones; slower: what the learning rates are divided by; fp8: with the
    rounding of fp8 engines."""
    dit = folded_padding(start).to(workers.device)
    if fp8:
        round_as_fp8(dit)
    if workers.device.type == "cuda":
        for block in dit.blocks:
            block.compile(dynamic=False)
    losses = [partial(batches.loss, dit, kind) for kind in batches.kinds]
    state, log = work / "dit.state", work / "dit.jsonl"
    matrices = [p for name, p in dit.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = set(matrices)
    others = [p for p in dit.parameters() if p not in chosen]
    optimisers = [Muon(matrices, MATRIX_RATE / slower), adam(others, RATE / slower)]
    return fit(dit, losses, batches.turn, optimisers, budget, workers, state, log, identity)


def folded_padding(weights: Weights | None = None) -> DiT:
    """A transformer that computes the same from `TEXT_ROWS` rows of text, faster: the rows that pad a prompt are alike,
    so that a few stand for all of them, with the logarithm of how many each stands for on their scores."""
    dit = make_dit(weights)
    rows = dit.config.text_len - TEXT_ROWS
    dit.config = replace(dit.config, text_len=TEXT_ROWS + PADDING_ROWS)
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            module.text_bias = F.pad(torch.full((PADDING_ROWS,), math.log(rows / PADDING_ROWS)), (TEXT_ROWS, 0))
    return dit


def rounded(x: Tensor) -> Tensor:
    """x [..., C] by the fp8 rule (`kernels.rows`): each row in e4m3 of its own scale, and scaled back. Gradients pass
    as if it were x."""
    fixed = x.detach()
    scale = (fixed.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(1e-12)
    held = (fixed.float() / scale).to(E4M3).float() * scale
    return x + (held.to(x.dtype) - fixed)


class RoundedLinear(nn.Module):
    """A linear layer, with the parameters of another, whose rows and weight are `rounded`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x), rounded(self.weight), self.bias)


def round_as_fp8(dit: DiT) -> None:
    """Let the layers of the blocks that fp8 engines compute in e4m3 round as these do; names of weights stay."""
    for block in dit.blocks:
        for name in FP8_LINEARS:
            parent, _, child = name.rpartition(".")
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            setattr(block.get_submodule(parent), child, RoundedLinear(layer))
