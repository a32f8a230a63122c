"""Train the sprite transformer by flow matching, with the conditioning of the pipeline.

x_σ = (1-σ)·x₀ + σ·noise; the model predicts noise - x₀ (Lipman et al., "Flow Matching for Generative Modeling", 2023).
In some samples the first latent frames are history: almost clean, marked in the history mask and excluded from the
loss. In some the prompt is dropped, as classifier-free guidance requires. The mask colours are permuted for every
sample. Half of the steps use short clips, which allow twice as many cases in the same time; the look of a frame hardly
depends on the number of later frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.training.dataset import TEXT_ROWS, Samples
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Muon, Training, Workers, adam, fit
from scail2_rt.benchmarks.sprites.training.model import Weights, make_dit
from scail2_rt.benchmarks.sprites.training.networks import FoldedDiT
from scail2_rt.export.models.dit import DiT, DiTInputs
from scail2_rt.runtime.masks.palette import CHARACTERS
from scail2_rt.runtime.pipeline.schedulers import TRAINING_STEPS

RATE, MATRIX_RATE = 3e-3, 8e-3  # peak learning rates of AdamW and Muon
SHIFT = 6.0  # of the noise levels, because the content is decided at high noise
PURE = 0.5  # share of samples of pure noise; at lower noise the noisy answer shows the positions of the characters
HISTORY, HISTORY_LATENTS = 0.3, (1, 5)  # share of samples; latent frames (end exclusive): overlaps of 1 to 13 frames
HISTORY_NOISE = 0.1  # largest standard deviation of the noise on history
DROPPED_TEXT = 0.1  # share of samples without a prompt
TURN = 0.6180339887  # golden ratio: the fractional parts of its multiples are evenly distributed in 0…1
CHARACTER_WEIGHT = 6.0
PADDING_ROWS = 16  # padding rows after the text, which represent all padding rows of the pipeline


@dataclass(frozen=True, slots=True)
class Kind:
    """Batches of one shape. samples: the data; replace: replace mode; size: samples per batch; share: weight in the
    choice of a kind per step."""

    name: str
    samples: Samples
    replace: bool
    size: int
    share: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    inputs     inputs of the transformer
    times      time steps [N]
    velocity   the target [N, 16, F, h, w]
    weight     weight of the error [N, 1, F, h, w]"""

    inputs: DiTInputs
    times: Tensor
    velocity: Tensor
    weight: Tensor


class Batches:
    """Draws batches of a kind with random noise levels and history, and computes the loss of a model.

    empty: encoding of an empty prompt [1, TEXT_ROWS, C]."""

    def __init__(self, kinds: Sequence[Kind], empty: Tensor) -> None:
        self.kinds, self.empty = kinds, empty
        parts = torch.tensor([kind.share for kind in kinds])
        self.bounds = (parts / parts.sum()).cumsum(0)

    def turn(self, step: int) -> int:
        """The index of the kind for a step. Over many steps each kind gets its share."""
        return min(int(torch.searchsorted(self.bounds, step * TURN % 1)), len(self.kinds) - 1)

    def draw(self, kind: Kind, generator: torch.Generator) -> Batch:
        """A random batch of a kind."""
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
        weight = (1 + CHARACTER_WEIGHT * batch.weight[:, None]) * (1 - frozen)
        return Batch(inputs, TRAINING_STEPS * sigma.flatten(), noise - clean, weight)

    def loss(self, dit: DiT, kind: Kind, generator: torch.Generator) -> Tensor:
        """The mean squared error of the velocity, weighted, on a random batch of a kind."""
        batch = self.draw(kind, generator)
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=generator.device.type == "cuda"):
            velocity = dit(batch.inputs, batch.times)
        error = (velocity.float() - batch.velocity).square() * batch.weight
        return error.sum() / (batch.weight.sum() * error.shape[1])


def train_dit(
    batches: Batches, budget: Budget, workers: Workers, work: Path, identity: str, start: Weights | None, slower: float
) -> Weights:
    """Train the transformer. start: initial weights; None: random ones. slower: divisor of the learning rates. Returns
    the averaged weights, fp32 on the CPU."""
    dit = folded_padding(start).to(workers.device)
    if workers.device.type == "cuda":
        for block in dit.blocks:
            block.compile(dynamic=False)
    losses = [partial(batches.loss, dit, kind) for kind in batches.kinds]
    matrices = [p for name, p in dit.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = set(matrices)
    others = [p for p in dit.parameters() if p not in chosen]
    optimisers = [Muon(matrices, MATRIX_RATE / slower), adam(others, RATE / slower)]
    return fit(dit, losses, batches.turn, optimisers, Training(budget, workers, work, "dit", identity))


def folded_padding(weights: Weights | None = None) -> FoldedDiT:
    """The transformer for training, with `TEXT_ROWS` rows of text. weights: None for random initial weights."""
    full = make_dit(weights)
    dit = FoldedDiT(full.config, TEXT_ROWS, PADDING_ROWS)
    dit.load_state_dict(full.state_dict())
    return dit
