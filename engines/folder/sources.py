"""Hashes of the files that a build reads, to detect whether an engine folder still matches them.

A real checkpoint has 80 GB, so each file is hashed once. The hash is kept with path, size and modification time in the
journal of an unfinished build and in the manifest of a finished one, and is valid while all three agree. Sources
without a file (fixtures in memory) are hashed by content.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scail2_rt.engines.folder.manifest import SourceFile
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.kernels.errors import InputError

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.tensors import TensorSource

BLOCK = 1 << 24
TOKENIZER_PART, LORA_PART = "tokenizer", "lora"

Group = tuple[str, tuple[Path, ...]]  # component, its files


def hash_file(path: Path, advance: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 of a file as hex digits; `advance` is called with the bytes done so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            done += len(block)
            advance(done)
    return digest.hexdigest()


def hash_tensors(source: "TensorSource") -> str:
    """Return the SHA-256 over names, types, shapes and values of a source."""
    digest = hashlib.sha256()
    for name in sorted(source.keys()):
        tensor = source.get(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_groups(
    sources: Mapping[str, "TensorSource"], tokenizer: Path | None, loras: Iterable[tuple[Path, ...]]
) -> list[Group]:
    """Return (component, its files) in a fixed order: the checkpoint's components, the tokenizer, and each LoRA with
    its configuration file."""
    groups: list[Group] = [(name, tuple(sources[name].files)) for name in sorted(sources)]
    if tokenizer is not None:
        groups.append((TOKENIZER_PART, (tokenizer,)))
    return [*groups, *((LORA_PART, paths) for paths in loras)]


def hash_sources(
    groups: list[Group],
    sources: Mapping[str, "TensorSource"],
    known: Iterable[SourceFile],
    observer: BuildObserver,
    remember: Callable[[SourceFile], None],
) -> list[SourceFile]:
    """Return a record of every file, in the order of `groups`. Records in `known` of unchanged files are reused; each
    new record is passed to `remember`. Raises InputError for a file that cannot be read."""
    hashes = {(file.path, file.size, file.mtime_ns): file.sha256 for file in known}
    keys = {path: _state(path) for _, paths in groups for path in paths}
    phase = Phase(observer, "hash", {key[0]: key[1] for key in keys.values() if key not in hashes})
    records = []
    for component, paths in groups:
        if not paths:
            records.append(SourceFile(component, "memory", 0, 0, hash_tensors(sources[component])))
        for path in paths:
            key = keys[path]
            if key in hashes:
                records.append(SourceFile(component, *key, hashes[key]))
                continue
            step = phase.start(key[0])
            try:
                hashes[key] = hash_file(path, partial(observer.advanced, step))
            except OSError as error:
                raise _unreadable(path, error) from error
            records.append(SourceFile(component, *key, hashes[key]))
            remember(records[-1])
            phase.finish(step)
    return records


def _state(path: Path) -> tuple[str, int, int]:
    path = path.resolve()
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return str(path), state.st_size, state.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}. Check that it exists and that you may read it.")
