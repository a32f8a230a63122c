"""Prompt text: cleaning, tokens, and the disk cache of the encoder's results.

The pipeline calls `clean_prompt`, then `PromptCache.load` with the cleaned text. Only if there is no entry, it reads
the tokenizer, runs the encoder and stores the result. So a repeated prompt never loads umT5. The cache never causes a
failure: an unreadable entry counts as absent and is written again; a folder that cannot be written gives a warning. An
entry's name is a hash of everything the encoding depends on, so entries never become stale. ftfy, tokenizers,
safetensors and torch are imported where they are used.

Source of the cleaning and of the token rule: Wan 2.1 `wan/modules/tokenizers.py`.
"""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.warnings import warn

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOKENS = 512
END_TOKEN = "</s>"
TOKENIZER_FILE = "tokenizer.json"
CACHE_FORMAT = "1"  # part of every key: increase it when the meaning of an entry changes


def clean_prompt(text: str) -> str:
    """Repair mis-decoded Unicode (ftfy), undo HTML escapes twice, and collapse white space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """The umT5 tokenizer from a `tokenizer.json`.

    path    that file, or the folder that holds it
    vocab   rows of the encoder's embedding table, if known; `encode` raises on token ids outside it
    Raises InputError if the file is missing, cannot be read, or does not fit the encoder."""

    def __init__(self, path: str | Path, vocab: int | None = None) -> None:
        self.path = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        self._vocab = vocab
        if not self.path.is_file():
            raise InputError(
                f"There is no tokenizer at {self.path}. Give the {TOKENIZER_FILE} of the checkpoint's umt5-xxl folder."
            )
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for a file it does not understand
            raise InputError(f"The tokenizer {self.path} cannot be read ({error}). Copy it again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        end = self._tokenizer.token_to_id(END_TOKEN)
        if end is None:
            raise InputError(
                f"The tokenizer {self.path} has no end token {END_TOKEN}, so it is not umT5's. Give the "
                f"{TOKENIZER_FILE} of the checkpoint's umt5-xxl folder."
            )
        self._end = end

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a cleaned prompt: at most 512, the last of which is the end token. An empty prompt is
        the end token only. Raises InputError if the tokenizer fails or gives an id outside the encoder's table."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: MAX_TOKENS - 1]
        except Exception as error:  # as above; for example a vocabulary without an unknown token
            raise InputError(f"The tokenizer {self.path} cannot encode the prompt ({error}). Copy it again.") from error
        ids.append(self._end)
        if self._vocab is not None and max(ids) >= self._vocab:
            raise InputError(
                f"The tokenizer {self.path} gives token {max(ids)}, but the text encoder has {self._vocab} tokens. "
                f"Use the {TOKENIZER_FILE} that came with this checkpoint."
            )
        return ids


class PromptCache:
    """Encoder results on disk, one safetensors file each, in the folder `prompts` of `directory`.

    directory      None: `cache_directory()`
    encoder_hash   identifies the encoder's weights, precision and tokenizer: equal hash, equal encoding"""

    def __init__(self, directory: str | Path | None, encoder_hash: str) -> None:
        self.directory = (cache_directory() if directory is None else Path(directory)) / "prompts"
        self._encoder_hash = encoder_hash

    def path(self, text: str) -> Path:
        """Return the path of the entry of a cleaned prompt, whether or not it exists."""
        key = hashlib.sha256()
        for part in (CACHE_FORMAT, self._encoder_hash, text):
            data = part.encode("utf-8", "surrogatepass")
            key.update(len(data).to_bytes(8, "little") + data)
        return self.directory / f"{key.hexdigest()}.safetensors"

    def load(self, text: str) -> Tensor | None:
        """Return the encoding [n, text_dim] of a cleaned prompt, or None if there is no readable entry."""
        path = self.path(text)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(f"The cached prompt encoding {path} cannot be read ({error}). Encoding the prompt again.")
            return None
        encoding = _decoded(data)
        if encoding is None:
            warn(f"The cached prompt encoding {path} is damaged. Encoding the prompt again.")
        return encoding

    def store(self, text: str, encoding: Tensor) -> None:
        """Store the encoding [n, text_dim] of a cleaned prompt atomically: written to a temporary file and renamed."""
        from safetensors.torch import save

        path = self.path(text)
        data = save({"encoding": encoding.detach().cpu().contiguous()})
        part = path.with_name(f".{uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_bytes(data)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            warn(f"The prompt encoding could not be cached as {path} ({error}). Continuing without the cache.")


def _decoded(data: bytes) -> Tensor | None:
    """Return the tensor of a cache file, or None if it is not a finite [1 … 512, text_dim] encoding."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        encoding = load(data)["encoding"]
    except (SafetensorError, KeyError, ValueError):
        return None
    valid = encoding.ndim == 2 and 1 <= encoding.shape[0] <= MAX_TOKENS and encoding.is_floating_point()
    return encoding if valid and bool(encoding.isfinite().all()) else None
