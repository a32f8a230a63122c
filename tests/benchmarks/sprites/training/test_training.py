"""The training command on a CPU: a few steps make a checkpoint that can be opened, and a second call resumes."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.benchmarks.sprites.training import train
from scail2_rt.benchmarks.sprites.training.dataset import TEXT_ROWS
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Gradients, Muon, Training, Workers, adam, fit
from scail2_rt.benchmarks.sprites.training.model import DIT, VAE_SIZES, make_dit, make_vae, weights_of
from scail2_rt.benchmarks.sprites.training.train_dit import folded_padding
from scail2_rt.benchmarks.sprites.training.train_vae import (
    Clips,
    folded_conv3d,
    folded_convolutions,
    normalised,
    train_vae,
)
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.models import vae as layers
from scail2_rt.export.models.dit import DiTInputs
from scail2_rt.kernels.errors import InputError
from tests.support.command import command_environment

Coder = Callable[[torch.Tensor], torch.Tensor]


def trained(folder: Path, work: str, steps: int, *options: str) -> Path:
    """A checkpoint, by the command."""
    output = folder / f"{work}-{steps}"
    command = [output, "--work", folder / work, *options]
    command += ["--vae-steps", 2, "--steps", steps, "--frames", 5, "--vae-cases", 8, "--vae-batch", 1]
    words = [str(word) for word in [*command, "--samples", 8, "--short-samples", 8, "--batch", 2]]
    result = CliRunner().invoke(train.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output


@pytest.mark.parametrize("command", ["train", "train_decoder", "round_weights"])
def test_commands_start_as_modules(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"scail2_rt.benchmarks.sprites.training.{command}"
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(name, run_name="__main__")
    assert end.value.code == 0
    assert "OUTPUT" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("small_set")
def test_a_few_steps_make_a_checkpoint_and_more_go_on(tmp_path: Path) -> None:
    """Resumed in the same work folder, and from a checkpoint, whose VAE is not changed."""
    first = trained(tmp_path, "work", 4)
    checkpoint = open_checkpoint(first)
    assert (checkpoint.config.dit, checkpoint.config.vae) == (DIT, VAE_SIZES)
    begun, log = last_line(tmp_path / "work" / "dit.jsonl"), tmp_path / "work" / "vae.jsonl"
    assert begun["step"] == 4
    vae_lines = log.read_text()
    trained(tmp_path, "work", 8)
    gone_on = last_line(tmp_path / "work" / "dit.jsonl")
    assert gone_on["step"] == 8
    assert gone_on["seconds"] > begun["seconds"]
    assert log.read_text() == vae_lines  # finished parts are not trained again
    later = weights_of(trained(tmp_path, "other", 1, "--from", str(first), "--slower", "1000"))
    assert not (tmp_path / "other" / "vae.jsonl").exists()
    for part, weights in weights_of(first).items():
        for name, tensor in weights.items():
            torch.testing.assert_close(later[part][name], tensor, rtol=0.01, atol=0.01 if part == "dit" else 0)


def last_line(log: Path) -> dict[str, float]:
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "exists"),
        (("--only", "dit"), "no vae.pt"),
        (("--minutes", "0"), "0.0 is not in the range"),
        (("--vae-from", "nothing.pt"), "does not exist"),
        (("--from", str(Path(__file__).parent)), "is not a SCAIL-2 checkpoint"),
        (("--from", str(CHECKPOINT), "--only", "vae"), "Leave out --only vae"),
        (("--from", str(CHECKPOINT), "--vae-from", __file__), "and --vae-from"),
    ],
)
def test_mistakes_are_said_before_the_training(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    output = tmp_path if not words else tmp_path / "new"
    result = CliRunner().invoke(train.main, [str(output), "--work", str(tmp_path / "work"), *words])
    assert result.exit_code == 2
    assert says in result.output


def test_a_checkpoint_of_other_sizes_is_not_trained_on(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="is not a sprite checkpoint"):
        weights_of(tiny_checkpoint)


def small_fit(folder: Path, steps: int, identity: str = "") -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """→ weights, and the optimiser that made them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        return (model(torch.randn(8, 3, generator=generator)) - 1).square().mean()

    workers, optimiser = Workers(0, 1, torch.device("cpu")), adam(model.parameters(), 0.01)
    training = Training(Budget(steps=steps), workers, folder, "linear", identity)
    return fit(model, [loss], lambda _: 0, [optimiser], training), optimiser


def test_a_training_of_something_else_is_not_continued(tmp_path: Path) -> None:
    small_fit(tmp_path, 3, "vae a")
    with pytest.raises(InputError, match="vae a; this one is vae b"):
        small_fit(tmp_path, 5, "vae b")


def test_training_learns_and_a_spent_budget_is_not_spent_again(tmp_path: Path) -> None:
    first, _ = small_fit(tmp_path, 400)
    lines = [json.loads(line) for line in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, 300, 400, 400]
    assert all(line["by kind"] == [pytest.approx(line["loss"], abs=1e-4)] for line in lines[:-1])
    assert lines[3]["loss"] < lines[0]["loss"]
    assert abs(first["bias"].item() - 1) < 0.2
    again, _ = small_fit(tmp_path, 400)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_learning_rate_goes_on_falling_after_an_interruption(tmp_path: Path) -> None:
    """The learning rate of a step depends only on the used share of the budget, not on the number of runs."""
    _, alone = small_fit(tmp_path, 10)
    (tmp_path / "two").mkdir()
    small_fit(tmp_path / "two", 4)
    _, second = small_fit(tmp_path / "two", 10)
    assert second.param_groups[0]["lr"] == alone.param_groups[0]["lr"] < 0.002


def test_processes_average_gradients_and_draw_their_own_batches(tmp_path: Path) -> None:
    """Two processes through torchrun, without GPUs: equal weights afterwards, from different batches."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = command_environment(tmp_path) | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    (weight0, batch0), (weight1, batch1) = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert weight0 == weight1
    assert batch0 != batch1


def two_inputs() -> DiTInputs:
    """A batch of two; 40 rows of text are of the prompt."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    text = some(TEXT_ROWS, DIT.text_dim)
    text[:, 40:] = 0
    size, half = (2, 4, 4), (2, 2, 2)
    shapes: list[tuple[int, ...]] = [(16, *size), (16, *half), (16, 1, 4, 4), (28, 3, 4, 4), (28, *half)]
    return DiTInputs(*(some(*shape) for shape in shapes), text, some(257, DIT.clip_dim), some(4, *size))


def test_folded_padding_changes_no_velocity() -> None:
    inputs, weights = two_inputs(), weights_of(CHECKPOINT)["dit"]
    with torch.no_grad():
        whole, folded = (
            dit(inputs, torch.tensor([900.0, 300.0])) for dit in (make_dit(weights), folded_padding(weights))
        )
    torch.testing.assert_close(folded, whole, rtol=1e-4, atol=1e-4)


def test_gradients_flow_after_an_inference_of_the_same_layout() -> None:
    """The RoPE table is cached between calls and must not be an inference tensor, which gradients could not use."""
    dit, inputs, times = folded_padding(weights_of(CHECKPOINT)["dit"]), two_inputs(), torch.tensor([900.0, 300.0])
    with torch.inference_mode():
        dit(inputs, times)
    dit(inputs, times).square().mean().backward()
    gradient = dit.get_parameter("blocks.0.self_attn.q.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@torch.inference_mode()
def test_one_pass_over_a_clip_is_what_single_frames_give() -> None:
    vae, generator = make_vae(), torch.Generator().manual_seed(0)
    for frames in (1, 13):
        video = torch.rand(2, 3, frames, 24, 16, generator=generator) * 2 - 1
        latent = torch.randn(2, 16, (frames + 3) // 4, 2, 3, generator=generator)
        torch.testing.assert_close(vae.encode_clip(video), vae.encode(video), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vae.decode_clip(latent), vae.decode(latent), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_batched_muon_is_that_of_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(*shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours = Muon(mine, 0.1)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(*shape)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_recorded_gradients_are_those_of_an_eager_step() -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    model = torch.nn.Linear(3, 1, device="cuda")

    def loss(generator: torch.Generator) -> torch.Tensor:
        return (model(torch.randn(8, 3, generator=generator, device="cuda")) - 1).square().mean()

    gradients = Gradients(list(model.parameters()), [loss], generator)

    def at(seed: int, compute: Callable[[int], torch.Tensor]) -> tuple[float, torch.Tensor]:
        generator.manual_seed(seed)
        return compute(0).item(), gradients.flat.clone()

    recorded, other, eager = at(7, gradients.of), at(8, gradients.of), at(7, gradients._compute)
    assert recorded[0] == pytest.approx(eager[0])
    torch.testing.assert_close(recorded[1], eager[1])
    assert other[0] != recorded[0]  # every replay draws again


TWO_PROCESSES = """
import json
import torch
from pathlib import Path
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Training, Workers, adam, fit

workers = Workers.here()
torch.manual_seed(0)
model, seen = torch.nn.Linear(3, 1), []

def loss(generator):
    seen.append(torch.randn(8, 3, generator=generator))
    return (model(seen[-1]) - 1).square().mean()

folder = Path(__file__).parent
optimisers = [adam(model.parameters(), 0.01)]
weights = fit(model, [loss], lambda _: 0, optimisers, Training(Budget(steps=5), workers, folder, "linear"))
workers.wait()
found = [weights["weight"].sum().item(), seen[0].sum().item()]
(folder / f"rank{workers.rank}.json").write_text(json.dumps(found))
"""


def test_a_budget_is_minutes_or_steps() -> None:
    assert Budget(minutes=2).spent(60, 1000) == 0.5
    assert Budget(minutes=2, steps=10).spent(1e9, 5) == 0.5
    assert Budget(steps=10).spent(0, 11) == 1


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (1, 1, 1), (0, 1, 1)), ((1, 1, 1),) * 2 + ((0, 0, 0),), ((3, 1, 1), (2, 1, 1), (0, 0, 0))],
)
def test_folded_taps_convolve_as_three_dimensions(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> None:
    x, weight, bias = torch.randn(2, 5, 7, 6, 8), torch.randn(4, 5, *kernel), torch.randn(4)
    expected = F.conv3d(x, weight, bias, stride, padding)
    torch.testing.assert_close(folded_conv3d(x, weight, bias, stride, padding), expected, rtol=1e-4, atol=1e-4)


def test_a_vae_of_folded_convolutions_and_fused_norms_learns_the_same() -> None:
    vae, video = make_vae(), torch.rand(1, 3, 9, 16, 16) * 2 - 1

    def outcome(encode: Coder, decode: Coder) -> tuple[torch.Tensor, torch.Tensor]:
        vae.zero_grad()
        decoded = decode(encode(video))
        decoded.square().mean().backward()
        assert vae.encoder.conv1.weight.grad is not None
        return decoded.detach(), vae.encoder.conv1.weight.grad.clone()

    expected, conv3d = outcome(vae.encode, vae.decode), layers.conv3d
    with folded_convolutions(torch.device("cuda")):
        assert layers.conv3d is folded_conv3d
        ways = [outcome(vae.encode, vae.decode), outcome(vae.encode_clip, vae.decode_clip)]
    assert layers.conv3d is conv3d
    for found in ways:
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def coarse_clips(generator: torch.Generator, side: int) -> Clips:
    """Six of five frames: squares of colour."""
    clips = Clips.__new__(Clips)
    coarse = torch.rand(6, 15, side // 4, side // 4, generator=generator)
    clips.image = (F.interpolate(coarse, scale_factor=4) * 255).to(torch.uint8).unflatten(1, (5, 3))
    clips.labels = torch.zeros(6, 5, side, side, dtype=torch.uint8)
    return clips


@pytest.mark.usefixtures("small_set")
def test_a_vae_that_began_elsewhere_is_not_gone_on_with(tmp_path: Path) -> None:
    clips = coarse_clips(torch.Generator().manual_seed(0), 64)
    begun = weights_of(CHECKPOINT)["vae"]
    way = clips, Budget(steps=1), 1, Workers(0, 1, torch.device("cpu")), tmp_path
    train_vae(*way, begun)
    train_vae(*way, begun)  # spent, and the same
    with pytest.raises(InputError, match="is of another training"):
        train_vae(*way, {name: tensor + 1e-3 for name, tensor in begun.items()})


def test_normalised_latents_have_wans_statistics_and_decode_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    clips, vae = coarse_clips(generator, 32), make_vae()
    changed = make_vae(normalised(vae, clips))
    video = clips.batch(28, 5, "whole", generator)[0]
    with torch.no_grad():
        latent, before = changed.encode(video), vae.encode(video)
        torch.testing.assert_close(changed.decode(latent), vae.decode(before), rtol=1e-3, atol=1e-3)
    values = latent.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.3
    assert 0.6 < values.std(1).min() <= values.std(1).max() < 1.4
    assert not 0.6 < before.transpose(0, 1).flatten(1).std(1).min() < 1.4  # they were elsewhere
