"""`make-checkpoint`: official layout, reproducible, plausible values, a tokenizer for any text."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from scail2_rt.export.checkpoint import random_checkpoint
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import PRESETS, make_checkpoint, random_tensor, write_tokenizer
from scail2_rt.kernels.errors import InputError, Scail2Error


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_official_layout_and_small(tiny_checkpoint):
    files = files_of(tiny_checkpoint)
    assert set(files) == {
        "model/latest",
        "model/1/fsdp2_rank_0000_checkpoint.pt",
        "Wan2.1_VAE.pth",
        "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth",
        "umt5-xxl/tokenizer.json",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
    }
    assert files["model/latest"] == b"1"
    assert sum(map(len, files.values())) < 40_000_000
    state = torch.load(tiny_checkpoint / "model/1/fsdp2_rank_0000_checkpoint.pt", weights_only=True)["module"]
    assert state["model.diffusion_model.transformer.layers.1.attention.query_key_value.weight"].shape == (768, 256)


def test_sizes_follow_from_the_shapes_alone(tiny_checkpoint):
    config, preset = open_checkpoint(tiny_checkpoint).config, PRESETS["tiny"]
    assert (config.dit, config.vae, config.umt5, config.clip) == (preset.dit, preset.vae, preset.umt5, preset.clip)


def test_same_seed_same_bytes_other_seed_other_weights(tiny_checkpoint, tmp_path):
    make_checkpoint(tmp_path / "again", seed=0)
    assert files_of(tmp_path / "again") == files_of(tiny_checkpoint)
    make_checkpoint(tmp_path / "other", seed=1)
    differing = {name for name, data in files_of(tmp_path / "other").items() if files_of(tiny_checkpoint)[name] != data}
    assert differing == {name for name in files_of(tiny_checkpoint) if name.endswith((".pt", ".pth"))}


def test_weights_are_finite_and_scaled(tiny_checkpoint):
    for component, source in open_checkpoint(tiny_checkpoint).sources.items():
        for name in source.keys():  # noqa: SIM118
            tensor = source.get(name).float()
            assert torch.isfinite(tensor).all(), f"{component} {name}"
            if name.endswith(".gamma") or ("norm" in name and name.endswith("weight")):
                assert tensor.mean().item() == pytest.approx(1, abs=0.1), f"{component} {name}"
            if tensor.ndim == 2 and "embedding" not in name:
                gain = tensor.std().item() * tensor.shape[1] ** 0.5
                assert 0.2 < gain < 1.6, f"{component} {name} has gain {gain}"


def test_random_tensor_depends_on_name_and_seed():
    first = random_tensor("dit", "blocks.0.ffn.0.weight", (8, 8), 0)
    assert torch.equal(first, random_tensor("dit", "blocks.0.ffn.0.weight", (8, 8), 0))
    assert not torch.equal(first, random_tensor("dit", "blocks.1.ffn.0.weight", (8, 8), 0))
    assert not torch.equal(first, random_tensor("dit", "blocks.0.ffn.0.weight", (8, 8), 1))


@pytest.mark.parametrize("text", ["a woman dances", "", "日本語 🎉 naïve\n", "ﬁ ① \u200b\x00", "x" * 900])
def test_tokenizer_takes_any_text(tiny_checkpoint, text):
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "umt5-xxl/tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[-1] == tokenizer.token_to_id("</s>") == 1
    assert tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.token_to_id("<unk>") not in ids
    assert max(ids) < PRESETS["tiny"].umt5.vocab


def test_tokenizer_knows_words_and_gives_text_back(tiny_checkpoint):
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "umt5-xxl/tokenizer.json"))
    assert tokenizer.encode("a woman dances").tokens == ["▁a", "▁woman", "▁dances", "</s>"]
    assert tokenizer.decode(tokenizer.encode("a 日本 robot").ids) == "a 日本 robot"


def test_tokenizer_needs_room(tmp_path):
    with pytest.raises(ValueError, match="vocab 300 is below"):
        write_tokenizer(tmp_path / "tokenizer.json", 300)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    make_checkpoint(tmp_path / "empty")
    assert (tmp_path / "empty/model/latest").is_file()


def test_refuses_what_exists_and_unknown_presets(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        make_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not an empty folder"):
        make_checkpoint(tmp_path / "note.txt")
    with pytest.raises(InputError, match="Choose one of tiny, wide"):
        make_checkpoint(tmp_path / "new", preset="huge")
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(path: Path, vocab: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_checkpoint, "write_tokenizer", full_disk)
    with pytest.raises(Scail2Error, match="No space left") as caught:
        make_checkpoint(tmp_path / "new")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
