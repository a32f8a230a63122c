"""Round the transformer of a sprite checkpoint to weights that fp8 engines represent exactly.

    python -m scail2_rt.benchmarks.sprites.training.round_weights CHECKPOINT OUTPUT

An fp8 engine rounds every weight to the nearest e4m3 value. Where inputs are correlated, the rounding errors of a row
of weights accumulate. Here the weights of a row are rounded one after another, and the remaining weights compensate,
based on the covariance of the inputs in some cases. The bias compensates the remaining mean error. Only the error of
quantising the token rows remains.
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023.
"""

from pathlib import Path

import click
import torch
from torch import Tensor, nn

from scail2_rt.benchmarks.sprites.training.dataset import NEW_CASES
from scail2_rt.benchmarks.sprites.training.fitting import Workers
from scail2_rt.benchmarks.sprites.training.model import Weights, write_checkpoint
from scail2_rt.benchmarks.sprites.training.train import COUNT, check_new, encoded_kinds, given_weights, make_encoding
from scail2_rt.benchmarks.sprites.training.train_dit import Batches, folded_padding
from scail2_rt.benchmarks.sprites.world.cases import FRAMES
from scail2_rt.export.models.dit import DiT
from scail2_rt.export.stages.dit import definitions
from scail2_rt.kernels.rows.ops import E4M3, E4M3_MAX, quantise_columns, quantise_rows

DAMPING = 0.01  # share of the mean variance that is added to each variance


class Moments:
    """Statistics of a layer's input rows x, quantised as in fp8 engines: number of rows, sum of x [C], sum of x·xᵀ
    [C, C]."""

    def __init__(self, width: int) -> None:
        self.rows, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, width, dtype=torch.float64)

    def add(self, module: nn.Module, given: tuple[Tensor]) -> None:
        """Add the rows of one call. Used as a forward pre-hook."""
        data, scales = quantise_rows(given[0].flatten(0, -2))
        x = data.float() * scales
        self.rows += len(x)
        self.sum += x.sum(0)
        self.square += x.T @ x

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(mean [C], covariance [C, C]) of the rows, fp64."""
        mean = self.sum / self.rows
        return mean, self.square / self.rows - mean[:, None] * mean


def make_up(weight: Tensor, covariance: Tensor) -> Tensor:
    """Round a weight [O, C] to e4m3 values times one scale per row, with the covariance of its inputs, fp64 [C, C].
    Returns fp64 [O, C].

    Columns are rounded in the order of decreasing input variance. The largest weight of each row is not changed, so
    that the row keeps its scale."""
    scale = quantise_columns(weight)[1].double()[:, None]
    variance = covariance.diag()
    order = variance.argsort(descending=True)
    damped = (covariance + DAMPING * variance.mean() * torch.eye(len(covariance)))[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    given = weight.double()[:, order]
    largest = given.abs() == given.abs().amax(1, keepdim=True)
    left, done = given.clone(), given.clone()
    for column in range(given.shape[1]):
        here = slice(column, column + 1)
        nearest = (left[:, here] / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).double() * scale
        done[:, here] = torch.where(largest[:, here], given[:, here], nearest)
        left[:, column:] -= (left[:, here] - done[:, here]) / factor[column, column] * factor[column, column:]
    return done[:, order.argsort()]


def fp8_layers(dit: DiT) -> dict[str, nn.Linear]:
    """Name → layer, for the layers whose weights fp8 engines store as e4m3."""
    stages = [stage for stage in definitions(dit.config) if stage.numerics("fp8").fp8]
    held = {name for stage in stages for names in stage.weights.values() for name in names}
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if f"{name}.weight" in held}


@torch.no_grad()
def round_weights(dit: DiT, batches: Batches, count: int) -> Weights:
    """The weights of `dit`, with those of its fp8 layers rounded. The input statistics come from `count` batches."""
    layers = fp8_layers(dit)
    moments = {name: Moments(layer.in_features) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(moments[name].add) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        batch = batches.draw(batches.kinds[batches.turn(step)], generator)
        dit(batch.inputs, batch.times)
    for hook in hooks:
        hook.remove()
    weights = dict(dit.state_dict())
    for name in layers:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        mean, covariance = moments[name].mean_and_covariance()
        rounded = make_up(weight, covariance)
        weights[f"{name}.weight"] = rounded.float()
        weights[f"{name}.bias"] = (bias + (weight - rounded) @ mean).float()
    return weights


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--frames", default=FRAMES, show_default=True, help="Frames of a case, 4n+1.")
@click.option("--cases", default=48, type=COUNT, show_default=True, help="Cases for the input statistics.")
def main(checkpoint: Path, output: Path, frames: int, cases: int) -> None:
    """Round the transformer of CHECKPOINT for fp8 engines and write the checkpoint to OUTPUT."""
    check_new(output)
    weights = given_weights(checkpoint)
    alone = Workers(0, 1, torch.device("cpu"))
    encoding = make_encoding(weights["vae"], alone)
    kinds = encoded_kinds(encoding, range(NEW_CASES, NEW_CASES + cases), frames, 1, alone)
    print(f"data set: { ({kind.name: len(kind.samples) for kind in kinds}) }", flush=True)
    dit = folded_padding(weights["dit"])
    write_checkpoint(output, round_weights(dit, Batches(kinds, encoding.text([""])), cases), weights["vae"])


if __name__ == "__main__":
    main()
