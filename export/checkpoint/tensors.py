"""Lazy, memory-mapped access to weights in any file format.

A file is mapped read-only, and tensors point into the mapping: nothing is read before it is used, nothing is copied,
and a tensor from a mapping must never be written to. Files are mapped here because `torch.load(mmap=True)` and
safetensors request a private writable mapping, which Linux refuses if a file is larger than the machine's memory. Views
rename tensors and cut fused ones, still without reading; a source that computes its values (quantised files) can
compute a few rows at a time.
"""

import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.places import Place, safetensors_places, torch_places
from scail2_rt.kernels.errors import InputError


class TensorSource(Protocol):
    """Named tensors that are read on demand. `get` returns the stored type; never write to its result.

    `rows` returns rows start to stop (dimension 0) of a tensor, without computing the others."""

    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def keys(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def shapes_of(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Return name → shape of every tensor of a source; reads no data."""
    return {name: source.shape(name) for name in source.keys()}  # noqa: SIM118  a source is not a mapping


class Whole(ABC):
    """Implements `rows` for a source whose `get` is cheap."""

    @abstractmethod
    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.get(name)[start:stop]


class FileSource(Whole):
    """Tensors of one mapped file."""

    def __init__(self, path: Path, places: Mapping[str, Place], metadata: Mapping[str, str]) -> None:
        self._places = places
        self._metadata = metadata
        self._path = path
        self._bytes = map_bytes(path)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def keys(self) -> Iterable[str]:
        return self._places.keys()

    def place(self, name: str) -> Place:
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def get(self, name: str) -> Tensor:
        return self._at(self._places[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        start, stop, _ = slice(start, stop).indices(place.shape[0])
        offset = place.offset + start * place.stride[0] * place.dtype.itemsize
        return self._at(replace(place, offset=offset, shape=(max(stop - start, 0), *place.shape[1:])))

    def _at(self, place: Place) -> Tensor:
        if place.nbytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        raw = self._bytes[place.offset : place.offset + place.nbytes]
        if place.offset % place.dtype.itemsize:
            raw = raw.clone()  # safetensors does not guarantee alignment; tensors need it
        return raw.view(place.dtype).as_strided(place.shape, place.stride)


class MappingSource(Whole):
    """Tensors in memory, for tests and for composing fixtures."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = tensors
        self._metadata = metadata or {}

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


class MergedSource:
    """Several sources as one (shards). Raises ValueError if a name occurs twice."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._owner: dict[str, TensorSource] = {}
        self._sources = tuple(sources)
        for source in self._sources:
            for name in source.keys():  # noqa: SIM118
                if name in self._owner:
                    raise ValueError(name)
                self._owner[name] = source

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: value for source in self._sources for key, value in source.metadata.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for source in self._sources for file in source.files)

    def keys(self) -> Iterable[str]:
        return self._owner.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._owner[name].dtype(name)

    def get(self, name: str) -> Tensor:
        return self._owner[name].get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._owner[name].rows(name, start, stop)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `stop` (dimension 0) of the tensor `name`; the complete tensor if `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None


class Derived(Whole):
    """Base of a source derived from another: takes its files, and its metadata unless others are given."""

    def __init__(self, source: TensorSource, metadata: Mapping[str, str] | None = None) -> None:
        self._source = source
        self.metadata: Mapping[str, str] = source.metadata if metadata is None else metadata
        self.files: tuple[Path, ...] = source.files


class View(Derived):
    """Tensors of a source under other names, some of them rows of a fused tensor."""

    def __init__(
        self, source: TensorSource, parts: Mapping[str, Rows], metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(source, metadata)
        self._parts = parts

    def keys(self) -> Iterable[str]:
        return self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts[name]
        full = self._source.shape(part.name)
        return full if part.stop is None else (part.stop - part.start, *full[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._parts[name].name)

    def get(self, name: str) -> Tensor:
        part = self._parts[name]
        if part.stop is None:
            return self._source.get(part.name)
        return self._source.rows(part.name, part.start, part.stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        part = self._parts[name]
        stop = min(stop, self.shape(name)[0])
        return self._source.rows(part.name, part.start + start, part.start + stop)


def map_bytes(path: Path) -> Tensor:
    """Map a file's bytes read-only: uint8 [size]."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping alive


def open_weights(path: Path) -> TensorSource:
    """Open one weights file by its suffix: `.safetensors`, else a `torch.save` file (`.pt`, `.pth`, `.bin`)."""
    return open_safetensors([path]) if path.suffix == ".safetensors" else open_torch(path)


def open_safetensors(paths: Sequence[Path]) -> TensorSource:
    """Map one safetensors file, or its shards. Raises InputError if unreadable, truncated, or a name occurs twice."""
    sources = [FileSource(path, *safetensors_places(path)) for path in paths]
    if len(sources) == 1:
        return sources[0]
    try:
        return MergedSource(sources)
    except ValueError as error:
        names = ", ".join(path.name for path in paths)
        raise InputError(
            f"The tensor {error} is in more than one of the shards {names}. Keep one set of shards."
        ) from None


def open_torch(path: Path) -> FileSource:
    """Map the tensors of a `torch.save` file. Raises InputError like `torch_places`."""
    return FileSource(path, torch_places(path), {})
