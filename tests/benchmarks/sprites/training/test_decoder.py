"""Training the decoder with the transformer's outputs: its inputs, the weights it changes, and its command."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.benchmarks.sprites.training import train_decoder as module
from scail2_rt.benchmarks.sprites.training.fitting import Budget, Workers
from scail2_rt.benchmarks.sprites.training.model import make_vae, weights_of
from scail2_rt.benchmarks.sprites.training.train_decoder import WINDOW, Answers, train_decoder
from tests.benchmarks.sprites.training.test_training import last_line

ALONE = Workers(0, 1, torch.device("cpu"))


def numbered_answers() -> Answers:
    """Two cases of 16×16 latents whose every value says where it is, in latents and in pixels; true ones are negative;
    a character is where row + column of a latent is even."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    place = (16 * rows + columns).float()
    case = 256 * torch.arange(2).view(2, 1, 1, 1, 1)
    latent = (case + place).expand(2, 16, 1, 16, 16)
    number = place.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, 1, 3, 128, 128).to(torch.uint8)
    inside = ((rows + columns) % 2 < 1).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, 1, 128, 128)
    return Answers(latent, -1 - latent, number, inside)


def test_windows_show_the_same_place_in_latents_and_pixels() -> None:
    latent, video, inside = numbered_answers().windows(64, torch.Generator().manual_seed(1))
    assert latent.shape == (64, 16, 1, *WINDOW)
    assert video.shape == (64, 3, 1, 8 * WINDOW[0], 8 * WINDOW[1])
    true = latent < 0
    assert 0 < true.float().mean() < 0.4
    place = torch.where(true, -1 - latent, latent)[:, :1] % 256
    pixels = (127.5 * (video[:, :1] + 1)).round()
    every = place.repeat_interleave(8, 3).repeat_interleave(8, 4)
    torch.testing.assert_close(pixels, every)
    torch.testing.assert_close(inside, ((every // 16 + every % 16) % 2 < 1).float())
    assert len(place.flatten(1).min(1).values.unique()) > 8  # they are of many places


def test_the_decoder_learns_what_answers_mean_and_the_encoder_stays(tmp_path: Path) -> None:
    """Latents that are all shifted by the same vector: the decoder learns to compensate the shift."""
    start = weights_of(CHECKPOINT)["vae"]
    vae = make_vae(start).requires_grad_(False)
    random = torch.Generator().manual_seed(3)
    true = torch.randn(4, 16, 1, 16, 16, generator=random)
    video = (127.5 * (vae.decode_clip(true).clamp(-1, 1) + 1)).byte().transpose(1, 2)
    answers = Answers(true + 0.8, true, video, torch.ones(4, 1, 128, 128, dtype=torch.bool))

    def error(weights: dict[str, torch.Tensor]) -> float:
        latent, truth, _ = answers.windows(16, torch.Generator().manual_seed(4))
        with torch.no_grad():
            return float((make_vae(weights).decode_clip(latent) - truth).square().mean())

    learnt = train_decoder([(answers, 2)], start, Budget(steps=40), ALONE, tmp_path, "shifted")
    assert error(learnt) < 0.6 * error(start)
    assert learnt.keys() == start.keys()
    for name, tensor in start.items():
        changes = name.startswith(("decoder.", "conv2."))
        assert torch.equal(learnt[name], tensor) != changes, name


@pytest.mark.slow
@pytest.mark.usefixtures("small_set")
def test_the_command_changes_the_decoder_alone_and_goes_on(tmp_path: Path) -> None:
    def trained(output: str, steps: int) -> int:
        sizes = ("--cases", "8", "--short-cases", "8", "--frames", "5", "--batch", "1")
        words = [str(CHECKPOINT), str(tmp_path / output), "--work", str(tmp_path / "work"), *sizes]
        return CliRunner().invoke(module.main, [*words, "--steps", str(steps)], catch_exceptions=False).exit_code

    assert trained("first", 2) == 0
    assert trained("second", 4) == 0
    assert last_line(tmp_path / "work" / "decoder.jsonl")["step"] == 4
    before, after = weights_of(CHECKPOINT), weights_of(tmp_path / "second")
    for name, tensor in before["dit"].items():
        assert torch.equal(after["dit"][name], tensor), name
    changed = {name.split(".")[0] for name, tensor in before["vae"].items() if not tensor.equal(after["vae"][name])}
    assert "decoder" in changed
    assert changed <= {"decoder", "conv2"}


@pytest.mark.parametrize(
    ("checkpoint", "words", "says"),
    [
        (CHECKPOINT, (), "exists"),
        (Path(__file__).parent, (), "is not a SCAIL-2 checkpoint"),
        (CHECKPOINT, ("--cases", "0"), "0 is not in the range"),
    ],
)
def test_mistakes_are_said_before_the_training(
    checkpoint: Path, words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    output = tmp_path if says == "exists" else tmp_path / "new"
    call = [str(checkpoint), str(output), "--work", str(tmp_path / "work"), *words]
    result = CliRunner().invoke(module.main, call)
    assert result.exit_code == 2
    assert says in result.output
    assert not (tmp_path / "work").exists()
