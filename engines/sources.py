"""Hashes of the files that a build reads, so that an engine folder knows whether it still belongs to them.

A real checkpoint has 80 GB: each file is hashed once. The hash is kept with path, size and modification time, in the
journal of an unfinished build and in the manifest of a finished one, and is trusted while those three agree.
Sources that have no file (fixtures in memory) are hashed by content.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scail2_rt.engines.manifest import SourceFile
from scail2_rt.export.errors import InputError

if TYPE_CHECKING:
    from scail2_rt.export.tensors import TensorSource

BLOCK = 1 << 24

Advance = Callable[[int], None]  # called with the bytes done so far


def hash_file(path: Path, advance: Advance = lambda done: None) -> str:
    """SHA-256 of a file, as hex digits."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            advance(done)
    return digest.hexdigest()


def hash_tensors(source: "TensorSource") -> str:
    """SHA-256 over names, types, shapes and values of a source."""
    digest = hashlib.sha256()
    for name in sorted(source.keys()):
        tensor = source.get(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Hasher:
    """Hashes files, trusting what is already known about an unchanged one."""

    def __init__(self, known: Iterable[SourceFile]) -> None:
        self._known = {(file.path, file.size, file.mtime_ns): file.sha256 for file in known}

    def is_known(self, path: Path) -> bool:
        return self._key(path) in self._known

    def record(self, component: str, path: Path, advance: Advance = lambda done: None) -> SourceFile:
        key = self._key(path)
        if key not in self._known:
            try:
                self._known[key] = hash_file(path, advance)
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror}; check the file and its rights.") from error
        return SourceFile(component, *key, self._known[key])

    @staticmethod
    def _key(path: Path) -> tuple[str, int, int]:
        path = path.resolve()
        try:
            state = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; check the path.") from error
        return str(path), state.st_size, state.st_mtime_ns


def memory_record(component: str, source: "TensorSource") -> SourceFile:
    """The record of a source that has no file."""
    return SourceFile(component, "memory", 0, 0, hash_tensors(source))


def files_by_component(
    sources: Mapping[str, "TensorSource"], tokenizer: Path | None
) -> list[tuple[str, tuple[Path, ...]]]:
    """(component, its files) in a fixed order; the tokenizer counts as a component."""
    found = [(name, tuple(sources[name].files)) for name in sorted(sources)]
    return [*found, ("tokenizer", (tokenizer,))] if tokenizer is not None else found
