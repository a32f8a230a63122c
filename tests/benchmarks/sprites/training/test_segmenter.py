"""The small SAM 2: its batched forward pass equals that of `transformers`, and its command makes a valid folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from scail2_rt.benchmarks.sprites.training import train_segmenter
from scail2_rt.benchmarks.sprites.training.segmenter_model import (
    BOX,
    IMAGE,
    attention_in_pieces,
    kept_codes,
    make_segmenter,
    save_segmenter,
    unroll,
)

FRAMES = 3
BOXES = torch.tensor([[[[20.0, 30], [100, 200]]], [[[60.0, 30], [160, 200]]]])


@pytest.fixture(scope="module")
def model() -> Any:
    """A model with biases and gains other than the initial ones, so that every parameter has an effect."""
    made = make_segmenter()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randn(2, FRAMES, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


def public(model: Any, forward: Any, frames: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Mask logits [T, h, w] of one clip through the model's session."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(video_height=IMAGE, video_width=IMAGE, dtype=torch.float32)
    figure = session.obj_id_to_idx(1)
    session.add_point_inputs(figure, 0, {"point_coords": box, "point_labels": torch.tensor([[BOX]])})
    session.obj_with_new_inputs = [1]
    return torch.stack([forward(model, session, frame=frame).pred_masks[0, 0] for frame in frames])


def test_the_batch_computes_what_the_public_forward_does(model: Any, frames: torch.Tensor) -> None:
    """And so does the undecorated forward, which has gradients."""
    together = unroll(model, frames, BOXES, torch.tensor(BOX).expand(2, 1, 2)).masks
    assert together.requires_grad
    for clip in range(2):
        decorated = public(model, type(model).__call__, frames[clip], BOXES[clip : clip + 1])
        torch.testing.assert_close(together[:, clip], decorated, atol=1e-3, rtol=1e-4)
    plain = type(model).forward.__wrapped__
    undecorated = public(model, plain, frames[0], BOXES[:1])
    assert undecorated.requires_grad
    torch.testing.assert_close(undecorated, public(model, type(model).__call__, frames[0], BOXES[:1]))


def test_attention_in_pieces_is_attention(model: Any, frames: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        calls.append(query.shape[0] * query.shape[1])
        return real(query, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    labels = torch.tensor(BOX).expand(2, 1, 2)
    with torch.no_grad():
        whole = unroll(model, frames[:, :1], BOXES, labels).masks
        assert max(calls) > 128
        calls.clear()
        with attention_in_pieces(128), kept_codes():
            pieces = unroll(model, frames[:, :1], BOXES, labels).masks
    assert max(calls) <= 128
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)


def test_the_folder_is_small_and_opens(model: Any, frames: torch.Tensor, tmp_path: Path) -> None:
    from transformers import Sam2VideoModel

    save_segmenter(model, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 8e6
    assert sum(parameter.numel() for parameter in model.parameters()) < 4e6
    opened = Sam2VideoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    labels = torch.tensor(BOX).expand(2, 1, 2)
    with torch.no_grad():
        ours, theirs = (unroll(each, frames[:, :1], BOXES, labels).masks for each in (model, opened))
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.abs().max())


@pytest.mark.slow
def test_the_command_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_segmenter, "CLIP_FRAMES", 2)
    monkeypatch.setattr(train_segmenter, "HELD_OUT", ("crossing",))
    monkeypatch.setattr(train_segmenter, "STILLS", 1)
    precision = torch.get_float32_matmul_precision()
    for steps in (1, 3):
        words = [tmp_path / "out", "--work", tmp_path / "work", "--steps", steps, "--clips", 4, "--frames", 3]
        words += ["--held-out", 1, "--batch", 1]
        result = CliRunner().invoke(train_segmenter.main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f"'step': {steps}," in result.output
    torch.set_float32_matmul_precision(precision)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "held_out.json"}
