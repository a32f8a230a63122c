"""The training command on a CPU: a few steps make a checkpoint that opens, and a second call goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.fitting import Budget
from scail2_rt.benchmarks.sprites.model import DIT, VAE_SIZES, make_vae
from scail2_rt.benchmarks.sprites.train_vae import Clips, folded_conv3d, folded_convolutions, normalised
from scail2_rt.export import vae as layers
from scail2_rt.export.checkpoint import open_checkpoint
from tests.command import command_environment


@pytest.mark.slow
def test_ten_steps_make_a_checkpoint_and_ten_more_go_on(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "checkpoint"

    def train(steps: int) -> None:
        command = [sys.executable, "-m", "scail2_rt.benchmarks.sprites.train", output, "--work", work]
        command += ["--vae-steps", 2, "--steps", steps, "--frames", 5, "--vae-cases", 8, "--samples", 12]
        words = [str(word) for word in [*command, "--vae-batch", 1, "--batch", 2]]
        result = subprocess.run(words, capture_output=True, text=True, env=command_environment(tmp_path))
        assert result.returncode == 0, result.stderr

    train(10)
    checkpoint = open_checkpoint(output)
    assert (checkpoint.config.dit, checkpoint.config.vae) == (DIT, VAE_SIZES)
    first = last_line(work / "dit.jsonl")
    assert first["step"] == 10
    vae_lines = (work / "vae.jsonl").read_text()
    train(20)
    last = last_line(work / "dit.jsonl")
    assert last["step"] == 20
    assert last["seconds"] > first["seconds"]
    assert (work / "vae.jsonl").read_text() == vae_lines  # what is finished is not done again


def last_line(log: Path) -> dict[str, float]:
    return json.loads(log.read_text().splitlines()[-1])


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

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        vae.zero_grad()
        decoded = vae.decode(vae.encode(video))
        decoded.square().mean().backward()
        assert vae.encoder.conv1.weight.grad is not None
        return decoded.detach(), vae.encoder.conv1.weight.grad.clone()

    expected, conv3d = outcome(), layers.conv3d
    with folded_convolutions(torch.device("cuda")):
        assert layers.conv3d is folded_conv3d
        found = outcome()
    assert layers.conv3d is conv3d
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_normalised_latents_have_wans_statistics_and_decode_alike() -> None:
    clips = Clips.__new__(Clips)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 15, 8, 8, generator=generator)
    clips.image = (F.interpolate(coarse, scale_factor=4) * 255).to(torch.uint8).unflatten(1, (5, 3))
    clips.labels = torch.zeros(6, 5, 32, 32, dtype=torch.uint8)
    vae = make_vae()
    changed = make_vae(normalised(vae, clips))
    video = clips.batch(28, 5, "whole", generator)[0]
    with torch.no_grad():
        latent, before = changed.encode(video), vae.encode(video)
        torch.testing.assert_close(changed.decode(latent), vae.decode(before), rtol=1e-3, atol=1e-3)
    values = latent.transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.3
    assert 0.6 < values.std(1).min() <= values.std(1).max() < 1.4
    assert not 0.6 < before.transpose(0, 1).flatten(1).std(1).min() < 1.4  # they were elsewhere
