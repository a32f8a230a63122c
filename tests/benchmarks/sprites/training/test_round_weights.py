"""Rounding the sprite transformer's weights for fp8: the remaining error, the unchanged weights, and the command."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.benchmarks.sprites.training import round_weights as module
from scail2_rt.benchmarks.sprites.training.model import DIT, make_dit, make_vae, weights_of, write_checkpoint
from scail2_rt.benchmarks.sprites.training.round_weights import Moments, fp8_layers, make_up
from scail2_rt.kernels.rows.ops import quantise_columns


def held(weight: Tensor) -> Tensor:
    """A weight rounded as in an fp8 engine."""
    data, scale = quantise_columns(weight)
    return data.float() * scale[:, None]


def error(weight: Tensor) -> float:
    """The error of the weight in an fp8 engine, relative to the weight."""
    return float((held(weight) - weight).norm() / weight.norm())


def test_the_errors_of_alike_inputs_make_up_for_one_another() -> None:
    """Inputs of 64 channels that are mixtures of 8: the error of products is a tenth of that after rounding each weight
    independently."""
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(2000, 8, generator=random) @ torch.randn(8, 64, generator=random)
    inputs += 0.05 * torch.randn(2000, 64, generator=random)
    weight = torch.randn(32, 64, generator=random).bfloat16().float()
    found = make_up(weight, inputs.double().T.cov()).float()
    torch.testing.assert_close(held(found), found, rtol=1e-6, atol=0)
    largest = weight.abs() == weight.abs().amax(1, keepdim=True)
    assert torch.equal(found[largest], weight[largest])

    def left(other: Tensor) -> float:
        return float((inputs @ (other - weight).T).square().mean())

    assert left(found) < 0.1 * left(held(weight))


def test_moments_are_those_of_rows_in_fp8() -> None:
    random = torch.Generator().manual_seed(2)
    parts = [torch.randn(2, 5, 16, generator=random) + 3 for _ in range(2)]
    moments = Moments(16)
    for part in parts:
        moments.add(torch.nn.Identity(), (part,))
    rows = held(torch.cat(parts).flatten(0, 1)).double()  # one scale per row, of weights and of tokens
    mean, covariance = moments.mean_and_covariance()
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_the_shipped_weights_are_what_fp8_engines_hold() -> None:
    """But for the rounding of the file's bf16."""
    weights = weights_of(CHECKPOINT)["dit"]
    layers = fp8_layers(make_dit())
    assert len(layers) == 8 * DIT.layers
    for name in layers:
        assert error(weights[f"{name}.weight"]) < 0.003, name


@pytest.mark.slow
@pytest.mark.usefixtures("small_set")
def test_the_command_rounds_fp8_layers_alone(tmp_path: Path) -> None:
    dit, vae = (dict(network.state_dict()) for network in (make_dit(), make_vae()))
    write_checkpoint(tmp_path / "before", dit, vae)
    words = [str(tmp_path / "before"), str(tmp_path / "after"), "--frames", "5", "--cases", "8"]
    assert CliRunner().invoke(module.main, words, catch_exceptions=False).exit_code == 0
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "after")
    layers = fp8_layers(make_dit())
    for part, tensors in before.items():
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            assert torch.equal(after[part][name], tensor) != (part == "dit" and layer in layers), name
            if part == "dit" and layer in layers and kind == "weight":
                assert error(after[part][name]) < 0.003 < 0.01 < error(tensor), name


@pytest.mark.parametrize(
    ("checkpoint", "words", "says"),
    [
        (CHECKPOINT, (), "exists"),
        (Path(__file__).parent, (), "is not a SCAIL-2 checkpoint"),
        (CHECKPOINT, ("--cases", "0"), "0 is not in the range"),
    ],
)
def test_mistakes_are_said_before_the_work(checkpoint: Path, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    output = tmp_path if says == "exists" else tmp_path / "new"
    result = CliRunner().invoke(module.main, [str(checkpoint), str(output), *words])
    assert result.exit_code == 2
    assert says in result.output
    assert not list(tmp_path.iterdir())
