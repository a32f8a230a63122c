"""GGUF files: tensors in llama.cpp's format, dequantised by its library a few rows at a time.

The header is parsed here. It has a few kilobytes for a transformer, but an umT5 file includes its vocabulary, for which
the library's reader creates a million small objects (10 s and 660 MiB for 256,384 pieces). Sizes of types and all
dequantisation come from the library (`gguf`, an optional extra). A row consists of complete blocks, so rows can be read
separately. Source: ggml-org/ggml, `docs/gguf.md`; umT5's names: llama.cpp, `gguf-py` (T5 encoder).
"""

import importlib.util
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.row_chunks import filled_by_rows
from scail2_rt.export.checkpoint.tensors import map_bytes
from scail2_rt.kernels.errors import InputError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_ALIGNMENT = 32  # bytes, unless the header gives another
_PLAIN = {  # types that PyTorch supports
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
LLAMA_UMT5_SIGN = re.compile(r"enc\.blk\.\d+\.attn_q\.weight")
_LLAMA_UMT5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.{i}.attn_norm": "encoder.block.{i}.layer.0.layer_norm",
    **{f"enc.blk.{{i}}.attn_{x}": f"encoder.block.{{i}}.layer.0.SelfAttention.{x}" for x in "qkvo"},
    "enc.blk.{i}.attn_rel_b": "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.{i}.ffn_norm": "encoder.block.{i}.layer.1.layer_norm",
    "enc.blk.{i}.ffn_gate": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
    "enc.blk.{i}.ffn_up": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
    "enc.blk.{i}.ffn_down": "encoder.block.{i}.layer.1.DenseReluDense.wo",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: ggml's name of its type, PyTorch shape, position and size, elements and bytes per block."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block: int
    block_bytes: int


class GGUFSource:
    """Tensors of one mapped GGUF file; quantised ones are returned in fp32, the others as stored."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self._path, self._entries = path, entries
        self.metadata = metadata
        self._bytes = map_bytes(path)
        quantised = {name: entry.kind for name, entry in entries.items() if entry.kind not in _PLAIN}
        self.formats = {name: f"GGUF {kind}" for name, kind in quantised.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _PLAIN.get(self._entries[name].kind, torch.float32)

    def stored_type(self, name: str) -> str:
        kind = self._entries[name].kind
        return str(_PLAIN[kind]).removeprefix("torch.") if kind in _PLAIN else kind

    def get(self, name: str) -> Tensor:
        entry = self._entries[name]
        if entry.kind in _PLAIN:
            return self._raw(entry).view(_PLAIN[entry.kind]).reshape(entry.shape)
        return filled_by_rows(entry.shape, lambda start, stop: self.rows(name, start, stop))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        if entry.kind in _PLAIN:
            return self.get(name)[start:stop]
        if math.prod(entry.shape[1:]) % entry.block:  # a small tensor stored in rows of another length
            blocks = self._raw(entry).reshape(-1, entry.block_bytes)
            return _dequantised(blocks, entry.kind).reshape(entry.shape)[start:stop]
        rows = self._raw(entry).reshape(entry.shape[0], -1)[start:stop]
        return _dequantised(rows, entry.kind).reshape(-1, *entry.shape[1:])

    def _raw(self, entry: Entry) -> Tensor:
        raw = self._bytes[entry.offset : entry.offset + entry.nbytes]
        plain = _PLAIN.get(entry.kind)
        return raw.clone() if plain and entry.offset % plain.itemsize else raw


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF file. Raises InputError if the library is missing, the file is damaged, or a type unsupported."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} is a GGUF file, which needs the extra `gguf`. Run: pip install 'scail2-rt[gguf]'")
    data = memoryview(map_bytes(path).numpy().data)
    try:
        header = _Header(data)
        entries = {name: _entry(path, name, *place, header) for name, place in header.tensors.items()}
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is truncated or damaged in its GGUF header ({error}). Get it again.") from error
    needed = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
    if needed > len(data):
        raise InputError(f"{path} is truncated: it has {len(data)} bytes, its header requires {needed}. Get it again.")
    return GGUFSource(path, entries, header.texts)


def llama_to_hugging_face(name: str) -> str:
    """Return Hugging Face's name of an umT5 tensor named by llama.cpp; other names are returned unchanged."""
    module, _, parameter = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = module if number is None else f"{module[: number.start(1)]}{{i}}{module[number.end(1) :]}"
    if template not in _LLAMA_UMT5:
        return name
    return f"{_LLAMA_UMT5[template].format(i=number.group(1) if number else '')}.{parameter}"


class _Header:
    """The parsed header: texts and original shapes of the key-value part, and every tensor's position."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, len(MAGIC)
        self.texts: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        alignment = _ALIGNMENT
        version = self._number("I")
        if version not in _VERSIONS:
            raise InputError(f"this GGUF file has version {version}. Get one of {' or '.join(map(str, _VERSIONS))}.")
        tensors, pairs = self._number("Q"), self._number("Q")
        for _ in range(pairs):
            key = self._text()
            kind = self._number("I")
            if kind == _STRING:
                self.texts[key] = self._text()
            elif kind == _ARRAY and key.startswith(_ORIGINAL_SHAPE):
                self.shapes[key.removeprefix(_ORIGINAL_SHAPE)] = self._numbers()
            else:
                value = self._skip(kind)
                alignment = value if key == "general.alignment" else alignment
        self.tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}  # sizes, type, offset
        for _ in range(tensors):
            name = self._text()
            dims = tuple(self._number("Q") for _ in range(self._number("I")))
            kind, offset = self._number("I"), self._number("Q")
            self.tensors[name] = (dims[::-1], kind, offset)
        self.start = -(-self._at // alignment) * alignment

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _text(self) -> str:
        size = self._number("Q")
        if self._at + size > len(self._data):
            raise IndexError("a name ends beyond the file")
        text = bytes(self._data[self._at : self._at + size]).decode()
        self._at += size
        return text

    def _numbers(self) -> tuple[int, ...]:
        kind, count = self._number("I"), self._number("Q")
        return tuple(int(self._number(_SCALARS[kind])) for _ in range(count))

    def _skip(self, kind: int) -> Any:
        """Skip a value; a single number is returned."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            size = self._number("Q")
            self._at += size
            return None
        if kind != _ARRAY:
            raise IndexError(f"unknown kind of value {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._at += count * struct.calcsize(_SCALARS[inner])
        else:
            for _ in range(count):
                self._skip(inner)
        return None


def _entry(path: Path, name: str, dims: tuple[int, ...], number: int, offset: int, header: _Header) -> Entry:
    kind, block, block_bytes = _type(path, name, number)
    shape = header.shapes.get(name) or _whole_shape(name, dims)
    row = dims[-1] if dims else 1
    if row % block or math.prod(shape) != math.prod(dims):
        raise InputError(
            f"{path}: {name} is {list(dims)} in {kind}, which does not fit its blocks of {block}. Get the file again."
        )
    return Entry(kind, shape, header.start + offset, math.prod(dims) // block * block_bytes, block, block_bytes)


def _whole_shape(name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Restore the dimensions of size 1 that ggml drops: it keeps at most four, and none of size 1 at the end."""
    if name.endswith("modulation") and len(dims) == 2:
        return (1, *dims)
    if re.search(r"patch_embedding\w*\.weight$", name) and len(dims) == 4:
        return (*dims[:2], 1, *dims[2:])
    return dims


@cache
def _readable(number: int) -> tuple[str, int, int]:
    """Return name, elements and bytes per block of a type. Raises KeyError if the library cannot dequantise it."""
    import gguf
    import numpy as np

    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in _PLAIN:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise KeyError(number) from error
    return kind.name, block, size


def _type(path: Path, name: str, number: int) -> tuple[str, int, int]:
    try:
        return _readable(number)
    except KeyError:
        raise InputError(
            f"{path}: {name} is stored in GGUF's type {number}, which the library gguf cannot dequantise. Get the "
            "Q8_0, Q6_K or Q4_K_M file of this model, or a newer gguf."
        ) from None


def _dequantised(rows: Tensor, kind: str) -> Tensor:
    """Dequantise rows of blocks, [R, bytes] uint8 → [R, elements] fp32."""
    import gguf
    import numpy as np

    data = rows.numpy()
    data.flags.writeable = False
    with np.errstate(all="ignore"):  # values that are not finite are reported where they are used
        return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
