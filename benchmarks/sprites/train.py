"""Train the sprite checkpoint: VAE, then the data set, then the transformer; into the official folder layout.

    python -m scail2_rt.benchmarks.sprites.train OUTPUT --work DIR            all of it, on one GPU
    torchrun --nproc-per-node 2 -m scail2_rt.benchmarks.sprites.train …       on two

Flow matching under the pipeline's exact conditioning: x_σ = (1-σ)·x₀ + σ·noise, the model predicts noise - x₀. In part
of the samples the first latents are history: clean up to a little noise, marked in the history mask, not in the loss.
In part the prompt is dropped, so that guidance has something to compare with. An interrupted run goes on; the VAE that
is finished in DIR (`vae.pt`) is not trained again, the data set is encoded anew.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites import train_vae
from scail2_rt.benchmarks.sprites.cases import FRAMES, CasePlan
from scail2_rt.benchmarks.sprites.dataset import GROUPS, Encoding, Samples, group_requests
from scail2_rt.benchmarks.sprites.drawing import plan_many
from scail2_rt.benchmarks.sprites.fitting import Budget, Muon, Workers, adam, fit
from scail2_rt.benchmarks.sprites.model import UMT5, Weights, make_dit, make_vae, weights_of, write_checkpoint
from scail2_rt.export.dit import DiT
from scail2_rt.export.errors import InputError
from scail2_rt.export.random_checkpoint import write_tokenizer
from scail2_rt.runtime.solvers import TRAINING_STEPS

RATE, MATRIX_RATE = 3e-3, 8e-3  # peaks, of AdamW and of Muon
SHIFT = 3.0  # of the noise levels, as the solvers' default
HISTORY, HISTORY_LATENTS = 0.3, (1, 5)  # share of the samples; latents, from … to below: overlaps of 1 to 13 frames
HISTORY_NOISE = 0.1  # its largest deviation on them
DROPPED_TEXT = 0.1
TURN = 0.6180339887  # multiples of it, without their whole part, fill 0…1 evenly
CHARACTER_WEIGHT = 3.0
PLANS_AT_ONCE = 32
MINUTES = click.FloatRange(min=0, min_open=True)


class Batches:
    """Draws samples of a group, noise levels and history; → the loss of a model on them."""

    def __init__(self, groups: dict[str, Samples], empty: Tensor, size: int) -> None:
        self.groups, self.empty, self.size = groups, empty, size
        self.names = list(groups)
        parts = torch.tensor([float(sum(GROUPS[name].values())) for name in self.names])
        self.bounds = (parts / parts.sum()).cumsum(0)

    def turn(self, step: int) -> int:
        """The number of a step's group; over many steps each has its share."""
        return min(int(torch.searchsorted(self.bounds, step * TURN % 1)), len(self.names) - 1)

    def loss(self, dit: DiT, name: str, generator: torch.Generator) -> Tensor:
        device = generator.device
        group = self.groups[name]
        chosen = torch.randint(len(group), (self.size,), generator=generator, device=device)
        batch = group.take(chosen)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(self.size, *shape, generator=generator, device=device)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=device)

        clean, even = batch.latent, uniform(1, 1, 1, 1)
        sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
        noise = normal(clean)
        noisy = clean + sigma * (noise - clean)
        kept = torch.randint(*HISTORY_LATENTS, (self.size, 1, 1, 1, 1), generator=generator, device=device)
        kept = kept.clamp(max=clean.shape[2] - 1) * (uniform(1, 1, 1, 1) < HISTORY)
        frozen = (torch.arange(clean.shape[2], device=device).view(1, 1, -1, 1, 1) < kept).float()
        frozen = frozen.expand_as(clean[:, :1])
        history = clean + HISTORY_NOISE * uniform(1, 1, 1, 1) * normal(clean)
        noisy = torch.lerp(noisy, history, frozen)
        dropped = uniform(1, 1) < DROPPED_TEXT
        text = torch.where(dropped, self.empty, batch.text)
        inputs = batch.inputs(noisy, frozen.expand(-1, 4, -1, -1, -1), text, name == "replace")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = dit(inputs, TRAINING_STEPS * sigma.flatten())
        weight = (1 + CHARACTER_WEIGHT * batch.weight[:, None]) * (1 - frozen)
        return ((velocity.float() - (noise - clean)).square() * weight).sum() / (weight.sum() * clean.shape[1])


def train_dit(
    batches: Batches, budget: Budget, workers: Workers, work: Path, identity: str, start: Weights | None, slower: float
) -> Weights:
    """start: weights to begin with, else random ones; slower: what the learning rates are divided by."""
    dit = make_dit(start).to(workers.device)
    if workers.device.type == "cuda":
        for block in dit.blocks:
            block.compile(dynamic=False)
    losses = [partial(batches.loss, dit, name) for name in batches.names]
    state, log = work / "dit.state", work / "dit.jsonl"
    matrices = [p for name, p in dit.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    chosen = set(matrices)
    others = [p for p in dit.parameters() if p not in chosen]
    optimisers = [Muon(matrices, MATRIX_RATE / slower), adam(others, RATE / slower)]
    return fit(dit, losses, batches.turn, optimisers, budget, workers, state, log, identity)


def make_trained_vae(
    plans: list[CasePlan], budget: Budget, batch: int, workers: Workers, work: Path, start: Weights | None
) -> Weights:
    clips = train_vae.Clips(plans, workers.device)
    weights = train_vae.train_vae(clips, budget, batch, workers, work, start)
    whole, characters = train_vae.reconstruction_psnr(make_vae(weights).to(workers.device), clips)
    if workers.rank == 0:
        print(f"VAE: PSNR {whole:.2f} dB, of characters {characters:.2f} dB", flush=True)
    return weights


def encoded_groups(encoding: Encoding, samples: int, frames: int, workers: Workers) -> dict[str, Samples]:
    """This process's share of a set of `samples`, encoded."""
    mine = samples // workers.count
    groups = {}
    for name in GROUPS:
        plans = plan_many(group_requests(name, mine, first=workers.rank * mine), frames=frames)
        with train_vae.folded_convolutions(workers.device):
            groups[name] = Samples.join([encoding.samples(part) for part in _pieces(plans)])
    return groups


def _pieces(plans: Iterator[CasePlan]) -> Iterator[list[CasePlan]]:
    piece = []
    for plan in plans:
        piece.append(plan)
        if len(piece) == PLANS_AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for states and logs.")
@click.option("--vae-minutes", type=MINUTES, default=7.0, show_default=True, help="Training of the VAE.")
@click.option("--minutes", type=MINUTES, default=10.0, show_default=True, help="Training of the transformer.")
@click.option("--vae-steps", default=0, help="Steps instead of minutes.")
@click.option("--steps", default=0, help="Steps instead of minutes.")
@click.option("--frames", default=FRAMES, show_default=True, help="Frames of a case, 4n+1.")
@click.option("--vae-cases", default=1600, show_default=True)
@click.option("--samples", default=28_000, show_default=True, help="Cases of the transformer's data set.")
@click.option("--vae-batch", default=32, show_default=True, help="Clips a step and process.")
@click.option("--batch", default=32, show_default=True, help="Samples a step and process.")
@click.option("--vae-from", type=click.Path(exists=True, dir_okay=False), help="A vae.pt to begin the VAE with.")
@click.option(
    "--from",
    "start",
    type=click.Path(exists=True, path_type=Path),
    help="A checkpoint of this kind: its VAE is taken as it is, and its transformer is trained on.",
)
@click.option("--slower", default=1.0, show_default=True, help="What the transformer's learning rates are divided by.")
@click.option(
    "--only", type=click.Choice(["vae", "dit"]), help="One of the two; `dit` needs --from, or the VAE in --work."
)
def main(
    output: Path, work: Path, vae_minutes: float, minutes: float, vae_steps: int, steps: int, frames: int,
    vae_cases: int, samples: int, vae_batch: int, batch: int, vae_from: str | None, start: Path | None,
    slower: float, only: str | None,
) -> None:  # fmt: skip
    """Train a small SCAIL-2 on the sprite world and write it to OUTPUT."""
    if output.exists():
        raise click.UsageError(f"{output} exists: choose another name for the checkpoint.")
    finished = work / "vae.pt"
    if only == "dit" and start is None and not finished.is_file():
        raise click.UsageError(f"{work} has no vae.pt: train the VAE first (without --only, or with --only vae).")
    if start is not None and (only == "vae" or vae_from):
        raise click.UsageError("--from brings its own VAE: leave out --only vae and --vae-from.")
    try:
        begun = None if start is None else weights_of(start)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    workers = Workers.here()
    if begun is not None:
        if workers.rank == 0 and not finished.is_file():
            torch.save(begun["vae"], finished)
    elif not finished.is_file() and only != "dit":
        plans = list(plan_many(train_vae.vae_requests(vae_cases), frames=frames))
        given = torch.load(vae_from, weights_only=True) if vae_from else None
        weights = make_trained_vae(plans, Budget(vae_minutes, vae_steps), vae_batch, workers, work, given)
        if workers.rank == 0:
            torch.save(weights, finished)
    if only == "vae":
        return
    workers.wait()
    vae_weights = torch.load(finished, weights_only=True)
    write_tokenizer(work / f"tokenizer.{workers.rank}.json", UMT5.vocab)
    compute = torch.bfloat16 if workers.device.type == "cuda" else torch.float32
    encoding = Encoding(make_vae(vae_weights, compute), work / f"tokenizer.{workers.rank}.json", workers.device)
    groups = encoded_groups(encoding, samples, frames, workers)
    batches = Batches(groups, encoding.text([""]), batch)
    print(f"data set: { ({name: len(group) for name, group in groups.items()}) } samples here", flush=True)
    identity = f"vae {hashlib.sha256(finished.read_bytes()).hexdigest()[:12]}, {samples} samples of {frames} frames"
    first = None if begun is None else begun["dit"]
    dit = train_dit(batches, Budget(minutes, steps), workers, work, identity, first, slower)
    if workers.rank == 0:
        write_checkpoint(output, dit, vae_weights)
        print(json.dumps({"output": str(output)}), flush=True)
    workers.wait()


if __name__ == "__main__":
    main()
