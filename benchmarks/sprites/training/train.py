"""Train the sprite checkpoint: VAE, then the data set, then the transformer; into the official folder layout.

    python -m scail2_rt.benchmarks.sprites.training.train OUTPUT --work DIR            all of it, on one GPU
    torchrun --nproc-per-node 2 -m scail2_rt.benchmarks.sprites.training.train …       on two

An interrupted run goes on; the VAE that is finished in DIR (`vae.pt`) is not trained again, the data set is encoded
anew. `train_decoder` comes after it, then `round_weights`.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from scail2_rt.benchmarks.sprites.training import train_vae
from scail2_rt.benchmarks.sprites.training.dataset import FRAMES_AT_ONCE, GROUPS, Encoding, Samples, group_requests
from scail2_rt.benchmarks.sprites.training.drawing import plan_many
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Workers
from scail2_rt.benchmarks.sprites.training.model import UMT5, Weights, digest, make_vae, weights_of, write_checkpoint
from scail2_rt.benchmarks.sprites.training.train_dit import Batches, Kind, train_dit
from scail2_rt.benchmarks.sprites.world.cases import FRAMES, CasePlan
from scail2_rt.export.checkpoint.random_checkpoint import write_tokenizer
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

SHORT_FRAMES = 9  # of the clips of half of the steps, which hold twice as many
MINUTES = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


def make_trained_vae(
    plans: list[CasePlan], budget: Budget, batch: int, workers: Workers, work: Path, start: Weights | None
) -> Weights:
    clips = train_vae.Clips(plans, workers.device)
    weights = train_vae.train_vae(clips, budget, batch, workers, work, start)
    whole, characters = train_vae.reconstruction_psnr(make_vae(weights).to(workers.device), clips)
    if workers.rank == 0:
        print(f"VAE: PSNR {whole:.2f} dB, of characters {characters:.2f} dB", flush=True)
    return weights


def encoded_kinds(encoding: Encoding, seeds: range, frames: int, batch: int, workers: Workers) -> list[Kind]:
    """Cases of some length, encoded, as kinds of batches; each process draws its own from its part of `seeds`."""
    own, kinds = workers.part(seeds), []
    for name, tasks in GROUPS.items():
        plans = plan_many(group_requests(name, own), frames=frames)
        with train_vae.folded_convolutions(workers.device):
            samples = Samples.join([encoding.samples(part) for part in pieces(plans, FRAMES_AT_ONCE // frames)])
        kinds.append(Kind(f"{name}, {frames} frames", samples, name == "replace", batch, float(sum(tasks.values()))))
    return kinds


def pieces(plans: Iterator[CasePlan], size: int) -> Iterator[list[CasePlan]]:
    """The plans by `size`, at least one."""
    while piece := list(islice(plans, max(size, 1))):
        yield piece


def make_encoding(vae: Weights, workers: Workers) -> Encoding:
    with TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        write_tokenizer(tokenizer, UMT5.vocab)
        return Encoding(make_vae(vae, workers.compute), tokenizer, workers.device)


def check_new(output: Path) -> None:
    if output.exists():
        raise click.UsageError(f"{output} exists: choose another name for the checkpoint.")


def given_weights(checkpoint: Path) -> dict[Component, Weights]:
    """`weights_of`, for a command. UsageError: it is no sprite checkpoint."""
    try:
        return weights_of(checkpoint)
    except InputError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for states and logs.")
@click.option("--vae-minutes", type=MINUTES, default=7.0, show_default=True, help="Training of the VAE.")
@click.option("--minutes", type=MINUTES, default=10.0, show_default=True, help="Training of the transformer.")
@click.option("--vae-steps", default=0, help="Steps instead of minutes.")
@click.option("--steps", default=0, help="Steps instead of minutes.")
@click.option("--frames", default=FRAMES, show_default=True, help="Frames of a case, 4n+1.")
@click.option("--vae-cases", default=1600, show_default=True)
@click.option("--samples", default=48_000, show_default=True, help="Cases of the transformer's data set.")
@click.option("--short-samples", default=96_000, show_default=True, help="Short cases of it, of 9 frames.")
@click.option("--vae-batch", default=32, show_default=True, help="Clips a step and process.")
@click.option(
    "--batch", default=32, show_default=True, help="Samples a step and process, of short cases twice as many."
)
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
    vae_cases: int, samples: int, short_samples: int, vae_batch: int, batch: int, vae_from: str | None,
    start: Path | None, slower: float, only: str | None,
) -> None:  # fmt: skip
    """Train a small SCAIL-2 on the sprite world and write it to OUTPUT."""
    check_new(output)
    finished = work / "vae.pt"
    if only == "dit" and start is None and not finished.is_file():
        raise click.UsageError(f"{work} has no vae.pt: train the VAE first (without --only, or with --only vae).")
    if start is not None and (only == "vae" or vae_from):
        raise click.UsageError("--from brings its own VAE: leave out --only vae and --vae-from.")
    begun = None if start is None else given_weights(start)
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
    encoding = make_encoding(vae_weights, workers)
    short = min(SHORT_FRAMES, frames)
    kinds = encoded_kinds(encoding, range(samples), frames, batch, workers)
    kinds += encoded_kinds(encoding, range(samples, samples + short_samples), short, 2 * batch, workers)
    identity = f"vae {digest(vae_weights)}, {samples} samples of {frames} frames and {short_samples} of {short}"
    print(f"data set: {identity}; here { ({kind.name: len(kind.samples) for kind in kinds}) }", flush=True)
    batches = Batches(kinds, encoding.text([""]))
    first = None if begun is None else begun["dit"]
    dit = train_dit(batches, Budget(minutes, steps), workers, work, identity, first, slower)
    if workers.rank == 0:
        write_checkpoint(output, dit, vae_weights)
        print(json.dumps({"output": str(output)}), flush=True)
    workers.wait()


if __name__ == "__main__":
    main()
