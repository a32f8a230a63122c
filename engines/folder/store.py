"""The weight store: every tensor of every stage in one safetensors file, shared by all backends of an engine folder.

The file is written in place. All names, types and shapes are known before a weight is read (stage modules on the meta
device), so the header comes first and each tensor has its final offset; an interrupted build leaves a `.partial` file
whose finished stages remain valid. Tensors are ordered by descending element size, then by stage: this leaves no gaps
(the format forbids them) and aligns every tensor to its element size. The header is padded so that data starts on a
page. ONNX files refer to the store by absolute offset. Reading uses a read-only shared mapping: no copy and no commit
charge, so a store larger than the host memory can be opened.
"""

import json
import mmap
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_64

from scail2_rt.engines.folder.sums import PIECE, RunningSum, SumChecker
from scail2_rt.kernels.errors import InputError

STORE_NAME = "weights.safetensors"
PAGE = 4096
READ_BLOCK = 1 << 20  # bytes per read when only a checksum is needed: they stay in the processor's cache
HEADER_LIMIT = 100 << 20  # limit of the safetensors format
CHECKERS = 4

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Location(NamedTuple):
    """Location of one tensor: absolute file offset and length in bytes, element type, shape."""

    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorShape(NamedTuple):
    """Type and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class StoreLayout:
    """Tensor names and locations, in file order, and the file's header."""

    def __init__(self, locations: Mapping[str, Location], header: bytes) -> None:
        self._locations = dict(locations)
        self.header = header

    @classmethod
    def plan(cls, tensors: Mapping[str, TensorShape], metadata: Mapping[str, str] | None = None) -> "StoreLayout":
        """Lay out `tensors` (in stage order). Deterministic: equal tensors and metadata give an identical file."""
        order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: stage order within a size
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        relative: dict[str, Location] = {}
        end = 0
        for name, tensor in order:
            relative[name] = Location(end, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
            entries[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % PAGE)
        header = len(text).to_bytes(8, "little") + text
        moved = {name: place._replace(offset=place.offset + len(header)) for name, place in relative.items()}
        return cls(moved, header)

    @classmethod
    def read(cls, path: Path) -> "StoreLayout":
        """Read the layout of a file. Raises InputError if it is not a safetensors file or is truncated."""
        try:
            actual = path.stat().st_size
            header = read_header(path)
            entries = json.loads(header[8:])
            locations = {
                name: Location(
                    offset=len(header) + entry["data_offsets"][0],
                    length=entry["data_offsets"][1] - entry["data_offsets"][0],
                    dtype=_DTYPES[entry["dtype"]],
                    shape=tuple(entry["shape"]),
                )
                for name, entry in entries.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a weight store: {error}. Rebuild the engine folder.") from error
        layout = cls(dict(sorted(locations.items(), key=lambda item: item[1].offset)), header)
        if actual != layout.size:
            raise InputError(f"{path} has {actual} bytes, its header says {layout.size}. Rebuild the engine folder.")
        return layout

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._locations)

    @property
    def size(self) -> int:
        """Bytes of the complete file."""
        return max((place.offset + place.length for place in self._locations.values()), default=len(self.header))

    def location(self, name: str) -> Location:
        """Return (offset, length, dtype, shape) of a tensor. Raises InputError if the store does not have it."""
        try:
            return self._locations[name]
        except KeyError:
            raise InputError(f"the weight store has no tensor {name}. Rebuild the engine folder.") from None

    def stage_bytes(self, stage: str) -> int:
        """Return the bytes of all tensors named `<stage>.…`."""
        return sum(place.length for name, place in self._locations.items() if name.startswith(f"{stage}."))


def read_header(path: Path) -> bytes:
    """Read the header of a safetensors file, including its 8-byte length."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(min(int.from_bytes(prefix, "little"), HEADER_LIMIT))


class TensorWriter(Protocol):
    """Destination of the conversion of a checkpoint."""

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Write `data` (any shape, of the tensor's type) from element `start` of the tensor `name` on."""


class StoreWriter:
    """Writes tensors at their offsets in `<path>.partial`; `finish()` renames the file.

    A partial file with the same header is continued, any other is started again; `resumed` tells which."""

    def __init__(self, path: Path, layout: StoreLayout) -> None:
        self.path, self.layout = path, layout
        self.partial = path.with_name(path.name + ".partial")
        self.resumed = self._matches()
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        if not self.resumed:
            os.ftruncate(self._file, 0)
            os.ftruncate(self._file, layout.size)
            _write_at(self._file, memoryview(layout.header), 0)

    def _matches(self) -> bool:
        if not self.partial.is_file() or self.partial.stat().st_size != self.layout.size:
            return False
        with self.partial.open("rb") as file:
            return file.read(len(self.layout.header)) == self.layout.header

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Write `data` (any shape, of the tensor's type) from element `start` of the tensor `name` on."""
        _write_tensor(self._file, self.layout.location(name), name, data, start)

    def flush(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        os.fsync(self._file)

    def finish(self) -> None:
        self.flush()
        self.close()
        os.replace(self.partial, self.path)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StoreRepairer:
    """Overwrites tensors in place in a finished store. If a build is killed meanwhile, the unfinished tensors do not
    match their checksums, so the next check finds them."""

    def __init__(self, path: Path, layout: StoreLayout) -> None:
        self.layout = layout
        self._file = os.open(path, os.O_RDWR)

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Write as `StoreWriter.write`."""
        _write_tensor(self._file, self.layout.location(name), name, data, start)

    def write_header(self) -> None:
        _write_at(self._file, memoryview(self.layout.header), 0)

    def finish(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class SummingWriter:
    """Writes tensors through another writer and computes their checksums. The parts of a tensor must come in order;
    different tensors may come from different threads."""

    def __init__(self, writer: TensorWriter) -> None:
        self._writer = writer
        self._running: dict[str, RunningSum] = {}

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        if start == 0:
            self._running[name] = RunningSum()
        running = self._running[name]
        if running.length != start * data.dtype.itemsize:
            raise ValueError(f"{name}: element {start} was written out of order, so its checksum is not known")
        running.add(raw_bytes(data))
        self._writer.write(name, data, start)

    @property
    def sums(self) -> dict[str, str]:
        """Tensor → checksum, for everything written so far."""
        return {name: running.hex for name, running in self._running.items()}


def raw_bytes(data: Tensor) -> memoryview:
    """Return the values of a CPU tensor as bytes, without a copy if it is contiguous."""
    raw: memoryview = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw


def _write_tensor(file: int, place: Location, name: str, data: Tensor, start: int) -> None:
    first = start * place.dtype.itemsize
    if data.dtype != place.dtype or first + data.nbytes > place.length:
        raise ValueError(f"{name}: {data.dtype} {tuple(data.shape)} at element {start} does not fit {place}")
    _write_at(file, raw_bytes(data), place.offset + first)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    """Repeat pwrite until everything is written: one call writes at most 2 GiB."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class WeightStore(Protocol):
    """Source of an engine's weights."""

    layout: StoreLayout

    def get(self, name: str) -> Tensor: ...

    def stage(self, name: str, parameters: Iterable[str]) -> dict[str, Tensor]: ...

    def check(self, stage: str) -> None: ...

    def close(self) -> None: ...


class StoreReader:
    """A store mapped read-only. Tensors are views of the mapping: they must never be written to.

    checker: the folder's checksums, None to check nothing. Raises DamagedError for a damaged header."""

    def __init__(self, path: Path, checker: SumChecker | None = None) -> None:
        self.path, self.checker = path, checker
        if checker is not None:
            checker.header(read_header(path))
        self.layout = StoreLayout.read(path)
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._file = os.dup(file.fileno())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors and warns
            self._bytes: Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)

    def get(self, name: str) -> Tensor:
        """Return a tensor on the CPU, without a copy."""
        place = self.layout.location(name)
        if self._bytes is None:
            raise ValueError(f"{self.path} was closed")
        return self._bytes[place.offset : place.offset + place.length].view(place.dtype).view(place.shape)

    def stage(self, name: str, parameters: Iterable[str]) -> dict[str, Tensor]:
        """Return parameter name → tensor of one stage, which is checked on the first call."""
        self.check(name)
        return {parameter: self.get(f"{name}.{parameter}") for parameter in parameters}

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor from its byte `start` on, by reading the file: this is faster than
        touching a new mapping page by page. Raises InputError if the file has become shorter."""
        offset = self.layout.location(name).offset + start
        while target:
            count = os.preadv(self._file, [target], offset)
            if count == 0:
                raise InputError(f"{self.path} ends before the tensor {name}. Rebuild the engine folder.")
            target, offset = target[count:], offset + count

    def check(self, stage: str) -> None:
        """Raise DamagedError if a tensor of the stage does not match its checksum. Checked once per stage: reading the
        file also brings the pages of the mapping into memory."""
        if self.checker is None or stage in self.checker.whole:
            return
        for name in self.layout.names:
            if name.startswith(f"{stage}."):
                self.checker.tensor(stage, name, self.pieces(name))
        self.checker.whole.add(stage)

    def pieces(self, name: str) -> list[bytes]:
        """Return the checksums of the pieces of a tensor, in order; several are computed in parallel."""
        starts = self.starts(name)
        if len(starts) < 2:
            return [self.piece_sum(name, start) for start in starts]
        with ThreadPoolExecutor(CHECKERS) as pool:
            return list(pool.map(partial(self.piece_sum, name), starts))

    def starts(self, name: str) -> range:
        """Return the first byte of each piece of a tensor."""
        return range(0, self.layout.location(name).length, PIECE)

    def piece_sum(self, name: str, start: int) -> bytes:
        """Compute the checksum of the piece of a tensor that begins at byte `start`, by reading the file."""
        running, block = xxh3_64(), memoryview(bytearray(READ_BLOCK))
        end = min(start + PIECE, self.layout.location(name).length)
        while start < end:
            part = block[: end - start]
            self.read_into(name, start, part)
            running.update(part)
            start += len(part)
        return running.digest()

    def close(self) -> None:
        """Release the mapping; it is unmapped once no tensor taken from it exists."""
        if self._bytes is not None:
            os.close(self._file)
        self._bytes = None
