"""Prompt cleaning, the tokenizer's end token and limits, and the encoding cache with disk errors."""

import json
import logging
import os
from pathlib import Path

import pytest
import tokenizers
import torch

from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.pipeline.text import PromptCache, Tokenizer, clean_prompt

VOCABULARY = ["<pad>", "</s>", "<unk>", "a", "man", "dances", "ein", "Mädchen", "一个女孩"]
END = VOCABULARY.index("</s>")
PROMPTS = ["", "a man dances", "一个女孩 在跳舞", "🕺🏽 naïve — ÄÖÜ", "עברית", "e\u0301"]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A word tokenizer that, like the real file, has a template appending the end token, and padding switched on."""
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    made.enable_padding(length=16, pad_token="<pad>")
    made.enable_truncation(max_length=16)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_golden_cleaning(golden: Path) -> None:
    for row in json.loads((golden / "t5" / "text_clean.json").read_text(encoding="utf-8"))["rows"]:
        assert clean_prompt(row["raw"]) == row["clean"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\t man \n\n dances\u3000now ", "a man dances now"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("x&nbsp;y", "x y"),
        ("Ã¤hnlich", "ähnlich"),
        (" \r\n ", ""),
        ("🕺🏽 跳舞", "🕺🏽 跳舞"),
        ("broken \udcff argument", "broken \ufffd argument"),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_one_end_token(tokenizer_folder: Path) -> None:
    for path in (tokenizer_folder, tokenizer_folder / "tokenizer.json", str(tokenizer_folder)):
        tokenizer = Tokenizer(path, vocab=len(VOCABULARY))
        assert tokenizer.encode("a man dances") == [3, 4, 5, END]
        assert tokenizer.encode("") == [END]
        assert tokenizer.encode("一个女孩 Mädchen zebra") == [8, 7, 2, END]


def test_at_most_512_tokens_and_the_last_is_the_end(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    for words in (17, 510, 511, 512, 2000):
        assert tokenizer.encode("man " * words) == [4] * min(words, 511) + [END]


def test_a_tokenizer_of_another_encoder_is_refused(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder, vocab=5)
    assert tokenizer.encode("a man") == [3, 4, END]
    with pytest.raises(InputError, match="gives token 8, but the text encoder has 5 tokens"):
        tokenizer.encode("一个女孩")


def test_missing_and_damaged_tokenizers(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in (other, other / "tokenizer.json", other / "nowhere"):
        with pytest.raises(InputError, match="There is no tokenizer at"):
            Tokenizer(path)
    whole = (tokenizer_folder / "tokenizer.json").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b'{"a": 1}', b"\xff\xfe\x00"):
        (other / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            Tokenizer(other)
    no_end = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    no_end.save(str(other / "tokenizer.json"))
    with pytest.raises(InputError, match="no end token"):
        Tokenizer(other)
    no_unknown = tokenizers.Tokenizer(tokenizers.models.Unigram([("</s>", 0.0), ("a", 0.0)]))
    no_unknown.save(str(other / "tokenizer.json"))
    assert Tokenizer(other).encode("a") == [1, 0]
    with pytest.raises(InputError, match="cannot encode the prompt"):
        Tokenizer(other).encode("zebra")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_returns_what_was_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = PromptCache(tmp_path / "new" / "folder", "hash")
    encodings = {text: torch.randn(8, 3 + len(text)).to(dtype).T for text in PROMPTS}
    for text, encoding in encodings.items():
        assert cache.load(text) is None
        cache.store(text, encoding)
    for text, encoding in encodings.items():
        loaded = PromptCache(tmp_path / "new" / "folder", "hash").load(text)
        assert loaded is not None
        assert loaded.dtype == dtype
        assert torch.equal(loaded, encoding)
    assert PromptCache(tmp_path / "new" / "folder", "another encoder").load(PROMPTS[1]) is None
    files = list((tmp_path / "new" / "folder" / "prompts").iterdir())
    assert len(files) == len(PROMPTS), "one file a prompt, nothing temporary left"


def test_keys_do_not_run_together(tmp_path: Path) -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")]
    assert len({PromptCache(tmp_path, encoder).path(text) for encoder, text in pairs}) == len(pairs)


def test_a_damaged_entry_is_reported_and_rewritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save

    cache, encoding = PromptCache(tmp_path, "hash"), torch.randn(4, 6)
    cache.store("text", encoding)
    path = cache.path("text")
    whole = path.read_bytes()
    wrong = [
        {"other": encoding},
        {"encoding": encoding[0]},
        {"encoding": encoding[:0]},
        {"encoding": torch.zeros(513, 2)},
        {"encoding": torch.full((2, 2), torch.nan)},
        {"encoding": torch.ones(2, 2, dtype=torch.int64)},
    ]
    for damaged in (b"", whole[:-3], whole[:20], b"\xff" * 200, *map(save, wrong)):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cache.load("text") is None
        assert "damaged" in caplog.text
        assert str(path) in caplog.text
        cache.store("text", encoding)
        loaded = cache.load("text")
        assert loaded is not None
        assert torch.equal(loaded, encoding)


def test_a_place_that_cannot_be_used_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = PromptCache(tmp_path / "file", "hash")
    with caplog.at_level(logging.WARNING):
        blocked.store("text", torch.zeros(1, 2))
        assert blocked.load("text") is None
    assert "could not be cached" in caplog.text
    assert "cannot be read" in caplog.text


def test_an_interrupted_write_leaves_the_old_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, encoding = PromptCache(tmp_path, "hash"), torch.randn(4, 6)
    cache.store("text", encoding)

    def disk_full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    cache.store("text", torch.zeros(2, 6))
    assert "No space left" in caplog.text
    loaded = cache.load("text")
    assert loaded is not None
    assert torch.equal(loaded, encoding)
    assert [path.suffix for path in cache.directory.iterdir()] == [".safetensors"]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SCAIL2_RT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "scail2-rt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "scail2-rt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "scail2-rt"
    monkeypatch.setenv("SCAIL2_RT_CACHE", os.fspath(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    assert PromptCache(None, "hash").directory == tmp_path / "own" / "prompts"


def test_a_user_without_a_home_still_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SCAIL2_RT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_directory().name == "scail2-rt"
    assert cache_directory().parent.is_dir()
