"""Continue training the VAE decoder of a sprite checkpoint, with the outputs of its transformer.

    python -m scail2_rt.benchmarks.sprites.training.train_decoder CHECKPOINT OUTPUT --work DIR

The errors of the transformer are larger than the noise that the VAE is trained with, and of another kind: at uncertain
edges it predicts the mean of several latents, which no encoder produces. The decoder learns the best pixels for such
latents. The encoder is not changed, so the meaning of latents stays. The cases are new, because the transformer's
outputs for its training cases are too good. Some latents are those of the truth, so that a round trip stays sharp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.training.dataset import FRAMES_AT_ONCE, GROUPS, NEW_CASES, Encoding, group_requests
from scail2_rt.benchmarks.sprites.training.drawing import draw_pictures, make_scenes
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Training, Workers, adam, fit
from scail2_rt.benchmarks.sprites.training.model import Weights, digest, make_vae, write_checkpoint
from scail2_rt.benchmarks.sprites.training.train import (
    COUNT,
    MINUTES,
    SHORT_FRAMES,
    check_new,
    given_weights,
    make_encoding,
    pieces,
)
from scail2_rt.benchmarks.sprites.training.train_dit import folded_padding
from scail2_rt.benchmarks.sprites.training.train_vae import folded_convolutions
from scail2_rt.benchmarks.sprites.world.cases import FRAMES, Scene
from scail2_rt.export.models.dit import DiT
from scail2_rt.runtime.pipeline.preprocess import normalise_video
from scail2_rt.runtime.pipeline.schedulers import TRAINING_STEPS

WINDOW = (10, 8)  # rows and columns of latent cells of a training sample
TRUE_SHARE = 0.1  # share of samples with latents of the truth
CHARACTER_WEIGHT = 6.0
RATE = 5e-4


@dataclass(frozen=True, slots=True)
class DecoderOptions:
    """The command's arguments and options."""

    checkpoint: Path
    output: Path
    work: Path
    minutes: float
    steps: int
    frames: int
    cases: int
    short_cases: int
    batch: int

    @property
    def budget(self) -> Budget:
        return Budget(self.minutes, self.steps)

    @property
    def sets(self) -> tuple[tuple[int, int, int], ...]:
        """(number of cases, frames per case, cases per step) of the full-length and of the short cases."""
        short = min(SHORT_FRAMES, self.frames)
        return (self.cases, self.frames, self.batch), (self.short_cases, short, 4 * self.batch)


@dataclass(frozen=True, slots=True)
class Answers:
    """Outputs of the transformer.

    latent   [N, 16, F, h, w], predicted
    true     [N, 16, F, h, w], encoded truth
    video    uint8 [N, T, 3, 8h, 8w], the truth
    inside   bool [N, T, 8h, 8w], pixels of characters"""

    latent: Tensor
    true: Tensor
    video: Tensor
    inside: Tensor

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        """Concatenate outputs of one layout."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def windows(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random windows → latent [B, 16, F, *WINDOW], video [B, 3, T, h, w] in -1..1, inside [B, 1, T, h, w]."""
        device = generator.device

        def pick(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (size, 1), generator=generator, device=device)

        chosen = pick(0, len(self.latent))[:, :, None]
        sides = self.latent.shape[-2:]
        first = [pick(0, side - part + 1) for side, part in zip(sides, WINDOW, strict=True)]
        cells = [at + torch.arange(part, device=device) for at, part in zip(first, WINDOW, strict=True)]
        pixels = [8 * at + torch.arange(8 * part, device=device) for at, part in zip(first, WINDOW, strict=True)]
        latents = (chosen, slice(None), slice(None), cells[0][:, :, None], cells[1][:, None])
        places = (chosen, slice(None), slice(None), pixels[0][:, :, None], pixels[1][:, None])
        true = torch.rand(size, 1, 1, 1, 1, generator=generator, device=device) < TRUE_SHARE
        answer, truth = (part[latents].permute(0, 3, 4, 1, 2).float() for part in (self.latent, self.true))
        video = normalise_video(self.video[places].permute(0, 3, 4, 1, 2)).transpose(1, 2)
        inside = self.inside[:, :, None][places].permute(0, 4, 3, 1, 2).float()
        return torch.where(true, truth, answer), video, inside


@torch.no_grad()
def collect_answers(dit: DiT, encoding: Encoding, count: int, frames: int, workers: Workers) -> Answers:
    """The transformer's outputs after one step from pure noise, for this process's part of `count` cases."""
    own = workers.part(range(NEW_CASES, NEW_CASES + count))
    generator = torch.Generator(encoding.device).manual_seed(workers.rank)
    parts = []
    for name in GROUPS:
        scenes = pieces(make_scenes(group_requests(name, own), frames=frames), FRAMES_AT_ONCE // frames // 4)
        with folded_convolutions(encoding.device):
            parts += [_answers(dit, encoding, piece, name == "replace", generator) for piece in scenes]
    return Answers.join(parts)


def _answers(
    dit: DiT, encoding: Encoding, scenes: Sequence[Scene], replace: bool, generator: torch.Generator
) -> Answers:
    device = encoding.device
    stored = encoding.samples(scenes)
    samples = stored.take(torch.arange(len(scenes), device=device))
    noise = torch.randn(samples.latent.shape, generator=generator, device=device)
    history = torch.zeros_like(noise[:, :4])
    times = torch.full((len(scenes),), float(TRAINING_STEPS), device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = dit(samples.inputs(noise, history, samples.text, replace), times)
    video, labels = draw_pictures([scene.truth for scene in scenes], device)
    return Answers((noise - velocity.float()).to(stored.latent.dtype), stored.latent, video, labels > 0)


def train_decoder(
    kinds: Sequence[tuple[Answers, int]], start: Weights, budget: Budget, workers: Workers, work: Path, identity: str
) -> Weights:
    """Train the decoder. kinds: (answers, samples per step), used alternately. Returns the weights of a VAE with the
    encoder of `start`."""
    vae = make_vae(start, workers.compute).to(workers.device)
    vae.requires_grad_(False)
    trained = [*vae.decoder.requires_grad_(True).parameters(), *vae.conv2.requires_grad_(True).parameters()]

    def loss(answers: Answers, size: int, generator: torch.Generator) -> Tensor:
        latent, video, inside = answers.windows(size, generator)
        weight = 1 + CHARACTER_WEIGHT * inside
        return ((vae.decode_clip(latent) - video).square() * weight).mean() / weight.mean()

    losses = [partial(loss, *kind) for kind in kinds]
    with folded_convolutions(workers.device):
        training = Training(budget, workers, work, "decoder", identity)
        weights = fit(vae, losses, lambda step: step % len(losses), [adam(trained, RATE)], training)
    return {**start, **weights}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the state and the log.")
@click.option("--minutes", type=MINUTES, default=3.0, show_default=True, help="Training time.")
@click.option("--steps", default=0, help="Number of steps, instead of --minutes.")
@click.option("--frames", default=FRAMES, show_default=True, help="Frames per case, 4n+1.")
@click.option("--cases", default=1_000, type=COUNT, show_default=True, help="Training cases.")
@click.option("--short-cases", default=4_000, type=COUNT, show_default=True, help="Further cases, of 9 frames.")
@click.option(
    "--batch",
    default=16,
    type=COUNT,
    show_default=True,
    help="Cases per step and process; four times as many for short cases.",
)
def main(**given: Any) -> None:
    """Train the decoder of CHECKPOINT with the transformer's outputs and write the checkpoint to OUTPUT."""
    options = DecoderOptions(**given)
    check_new(options.output)
    weights = given_weights(options.checkpoint)
    options.work.mkdir(parents=True, exist_ok=True)
    workers = Workers.here()
    encoding = make_encoding(weights["vae"], workers)
    dit = folded_padding(weights["dit"]).to(workers.device)
    kinds = [(collect_answers(dit, encoding, count, length, workers), size) for count, length, size in options.sets]
    begun = ", ".join(f"{part} {digest(tensors)}" for part, tensors in weights.items())
    identity = f"{begun}, {options.cases} cases of {options.frames} frames and {options.short_cases} short ones"
    print(f"answers: {identity}", flush=True)
    vae = train_decoder(kinds, weights["vae"], options.budget, workers, options.work, identity)
    if workers.rank == 0:
        write_checkpoint(options.output, weights["dit"], vae)
    workers.wait()


if __name__ == "__main__":
    main()
