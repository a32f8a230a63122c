"""Train the sprite checkpoint: VAE, data set, transformer; the result has the official folder layout.

    python -m scail2_rt.benchmarks.sprites.training.train OUTPUT --work DIR            on one GPU
    torchrun --nproc-per-node 2 -m scail2_rt.benchmarks.sprites.training.train …       on two GPUs

An interrupted run resumes. A finished VAE in DIR (`vae.pt`) is not trained again, but the data set is encoded again.
The next steps are `train_decoder` and then `round_weights`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from scail2_rt.benchmarks.sprites.training import train_vae
from scail2_rt.benchmarks.sprites.training.dataset import FRAMES_AT_ONCE, GROUPS, Encoding, Samples, group_requests
from scail2_rt.benchmarks.sprites.training.drawing import make_scenes
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Workers
from scail2_rt.benchmarks.sprites.training.model import UMT5, Weights, digest, make_vae, weights_of, write_checkpoint
from scail2_rt.benchmarks.sprites.training.train_dit import Batches, Kind, train_dit
from scail2_rt.benchmarks.sprites.world.cases import FRAMES, Scene
from scail2_rt.export.checkpoint.random_checkpoint import write_tokenizer
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

SHORT_FRAMES = 9  # frames of short clips, which half of the steps use, with twice the batch size
MINUTES = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """The command's argument and options."""

    output: Path
    work: Path
    vae_minutes: float
    minutes: float
    vae_steps: int
    steps: int
    frames: int
    vae_cases: int
    samples: int
    short_samples: int
    vae_batch: int
    batch: int
    vae_from: str | None
    start: Path | None
    slower: float
    only: str | None

    @property
    def finished_vae(self) -> Path:
        return self.work / "vae.pt"


def check_options(options: TrainOptions) -> None:
    """Raises UsageError for an existing output and for contradictory options."""
    check_new(options.output)
    if options.only == "dit" and options.start is None and not options.finished_vae.is_file():
        raise click.UsageError(
            f"{options.work} has no vae.pt. Train the VAE first (without --only, or with --only vae)."
        )
    if options.start is not None and (options.only == "vae" or options.vae_from):
        raise click.UsageError("--from includes a VAE. Leave out --only vae and --vae-from.")


def provide_vae(options: TrainOptions, begun: dict[Component, Weights] | None, workers: Workers) -> None:
    """Write vae.pt, unless it exists: the VAE of the initial checkpoint, or a trained one."""
    if options.finished_vae.is_file():
        return
    if begun is not None:
        weights = begun["vae"]
    elif options.only != "dit":
        weights = make_trained_vae(options, workers)
    else:
        return
    if workers.rank == 0:
        torch.save(weights, options.finished_vae)


def make_trained_vae(options: TrainOptions, workers: Workers) -> Weights:
    """Train the VAE and print its PSNR. Returns fp32 weights."""
    scenes = list(make_scenes(train_vae.vae_requests(options.vae_cases), frames=options.frames))
    start = torch.load(options.vae_from, weights_only=True) if options.vae_from else None
    budget = Budget(options.vae_minutes, options.vae_steps)
    clips = train_vae.Clips(scenes, workers.device)
    weights = train_vae.train_vae(clips, budget, options.vae_batch, workers, options.work, start)
    overall, characters = train_vae.reconstruction_psnr(make_vae(weights).to(workers.device), clips)
    if workers.rank == 0:
        print(f"VAE: PSNR {overall:.2f} dB, of characters {characters:.2f} dB", flush=True)
    return weights


def make_trained_dit(options: TrainOptions, vae: Weights, start: Weights | None, workers: Workers) -> Weights:
    """Train the transformer for a VAE. start: initial weights; None: random ones."""
    encoding, frames, samples = make_encoding(vae, workers), options.frames, options.samples
    short, short_samples = min(SHORT_FRAMES, frames), options.short_samples
    kinds = encoded_kinds(encoding, range(samples), frames, options.batch, workers)
    kinds += encoded_kinds(encoding, range(samples, samples + short_samples), short, 2 * options.batch, workers)
    identity = f"vae {digest(vae)}, {samples} samples of {frames} frames and {short_samples} of {short}"
    print(f"data set: {identity}; in this process { ({kind.name: len(kind.samples) for kind in kinds}) }", flush=True)
    batches, budget = Batches(kinds, encoding.text([""])), Budget(options.minutes, options.steps)
    return train_dit(batches, budget, workers, options.work, identity, start, options.slower)


def encoded_kinds(encoding: Encoding, seeds: range, frames: int, batch: int, workers: Workers) -> list[Kind]:
    """Encode this process's part of the cases, as kinds of batches. frames: length of a case; batch: samples per
    batch."""
    own, kinds = workers.part(seeds), []
    for name, tasks in GROUPS.items():
        scenes = make_scenes(group_requests(name, own), frames=frames)
        with train_vae.folded_convolutions(workers.device):
            samples = Samples.join([encoding.samples(part) for part in pieces(scenes, FRAMES_AT_ONCE // frames)])
        kinds.append(Kind(f"{name}, {frames} frames", samples, name == "replace", batch, float(sum(tasks.values()))))
    return kinds


def pieces(scenes: Iterator[Scene], size: int) -> Iterator[list[Scene]]:
    """The scenes in lists of `size`, at least 1."""
    while piece := list(islice(scenes, max(size, 1))):
        yield piece


def make_encoding(vae: Weights, workers: Workers) -> Encoding:
    """The encoders with this VAE."""
    with TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        write_tokenizer(tokenizer, UMT5.vocab)
        return Encoding(make_vae(vae, workers.compute), tokenizer, workers.device)


def check_new(output: Path) -> None:
    """Raises UsageError if the output exists."""
    if output.exists():
        raise click.UsageError(f"{output} exists. Give another name for the checkpoint.")


def given_weights(checkpoint: Path) -> dict[Component, Weights]:
    """`weights_of`, for a command. Raises UsageError for another folder."""
    try:
        return weights_of(checkpoint)
    except InputError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for states and logs.")
@click.option("--vae-minutes", type=MINUTES, default=7.0, show_default=True, help="Training time of the VAE.")
@click.option("--minutes", type=MINUTES, default=10.0, show_default=True, help="Training time of the transformer.")
@click.option("--vae-steps", default=0, help="Steps of the VAE, instead of --vae-minutes.")
@click.option("--steps", default=0, help="Steps of the transformer, instead of --minutes.")
@click.option("--frames", default=FRAMES, show_default=True, help="Frames per case, 4n+1.")
@click.option("--vae-cases", default=1600, show_default=True, help="Training cases of the VAE.")
@click.option("--samples", default=48_000, show_default=True, help="Training cases of the transformer.")
@click.option(
    "--short-samples", default=96_000, show_default=True, help="Further cases of the transformer, of 9 frames."
)
@click.option("--vae-batch", default=32, show_default=True, help="Clips per step and process.")
@click.option(
    "--batch", default=32, show_default=True, help="Samples per step and process; twice as many for short cases."
)
@click.option("--vae-from", type=click.Path(exists=True, dir_okay=False), help="A vae.pt with initial weights.")
@click.option(
    "--from",
    "start",
    type=click.Path(exists=True, path_type=Path),
    help="A sprite checkpoint: use its VAE unchanged, and continue training its transformer.",
)
@click.option("--slower", default=1.0, show_default=True, help="Divisor of the transformer's learning rates.")
@click.option(
    "--only", type=click.Choice(["vae", "dit"]), help="Train only this; `dit` needs --from, or the VAE in --work."
)
def main(**given: Any) -> None:
    """Train a small SCAIL-2 on the sprite world and write it to OUTPUT."""
    options = TrainOptions(**given)
    check_options(options)
    begun = None if options.start is None else given_weights(options.start)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    workers = Workers.here()
    provide_vae(options, begun, workers)
    if options.only == "vae":
        return
    workers.wait()
    vae = torch.load(options.finished_vae, weights_only=True)
    dit = make_trained_dit(options, vae, None if begun is None else begun["dit"], workers)
    if workers.rank == 0:
        write_checkpoint(options.output, dit, vae)
        print(json.dumps({"output": str(options.output)}), flush=True)
    workers.wait()


if __name__ == "__main__":
    main()
