"""Positions of the tensors in a weights file, from a safetensors file's header or a `torch.save` file's pickle.

Both give a byte offset per tensor, so only names, types, shapes and offsets are read. Pickles are loaded only by
PyTorch's restricted unpickler. A complete file of another format is reported as such.
"""

import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.foreign_files import refuse_foreign
from scail2_rt.kernels.errors import InputError

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_ZIP_LOCAL_HEADER = 30  # bytes before a member's name
_STATE_KEYS = ("module", "state_dict", "model", "model_state_dict")  # where trainers put the tensors in a pickle
_TOO_SMALL = {"F4": "float4", "F6_E2M3": "float6", "F6_E3M2": "float6"}  # types of safetensors not in PyTorch


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a tensor in its file: `offset` in bytes from the start of the file, `stride` in elements."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element (more than the elements need if the tensor has gaps)."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def safetensors_places(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Return name → place, and the metadata. Raises InputError for an unreadable, truncated, damaged or other file."""
    refuse_foreign(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if header_size > min(size - 8, _HEADER_LIMIT):
                raise InputError(
                    f"{path} is not a complete safetensors file ({size} bytes): it is truncated, or its format does "
                    "not match its name. Get it again."
                )
            header = json.loads(file.read(header_size))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Check the file.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(
            f"The header of {path} is damaged, or its format does not match its name. Give an intact file."
        ) from error
    start = 8 + header_size
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    _refuse_small_floats(path, header)
    try:
        places = {name: _safetensors_place(entry, start) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"The header of {path} is damaged ({error}). Get the file again.") from error
    needed = max((place.offset + place.nbytes for place in places.values()), default=start)
    if needed > size:
        raise InputError(f"{path} is truncated: it has {size} bytes, its header requires {needed}. Get it again.")
    return places, metadata or {}


def _refuse_small_floats(path: Path, header: Any) -> None:
    """Raise InputError if tensors have a float type that PyTorch does not support."""
    entries = [entry for entry in header.values() if isinstance(entry, dict)] if isinstance(header, dict) else []
    found = [str(entry["dtype"]) for entry in entries if entry.get("dtype") in _TOO_SMALL]
    if found:
        raise InputError(
            f"{path} holds {_TOO_SMALL[found[0]]} weights (type {found[0]}; tensors: {len(found)}), which are not "
            "supported. Get the fp16, bf16, fp8_scaled, int8 or GGUF file of this model."
        )


def _safetensors_place(entry: dict[str, Any], start: int) -> Place:
    """Return the place of one header entry. Raises ValueError, KeyError or TypeError for an invalid entry."""
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"unknown type {entry['dtype']}")
    dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if begin < 0 or any(n < 0 for n in shape) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a {entry['dtype']} tensor {list(shape)}")
    return Place(start + begin, dtype, shape, _contiguous(shape))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def torch_places(path: Path) -> dict[str, Place]:
    """Return name → place in a `torch.save` file; the state dict may be under `module`, `state_dict` or `model`.

    Raises InputError for an unreadable, truncated or old non-zip file, and for a pickle that needs code execution
    (nothing is executed). Values that are not tensors (random states, step counts) are ignored.
    """
    refuse_foreign(path)
    try:
        members = _stored_members(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Check the file.") from error
    tensors = _state_dict(_restricted_load(path), path)
    places = {}
    for name, tensor in tensors.items():
        place, record = _torch_place(tensor)
        if place is None or _span(tensor, place) > members.get(record, -1):
            raise InputError(
                f"The tensor {name} of {path} cannot be memory-mapped (compressed, sparse or outside the file). "
                "Save the state dict again with torch.save."
            )
        places[name] = place
    return places


def _stored_members(path: Path) -> dict[int, int]:
    """Return data offset → size of every uncompressed member of a zip file, from the zip's headers (bytes)."""
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"PK\x03\x04":
            raise InputError(_not_a_zip(path, magic))
        try:
            with zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
            members = {}
            for info in infos:
                file.seek(info.header_offset)
                name_size, extra_size = struct.unpack("<26xHH", file.read(_ZIP_LOCAL_HEADER))
                members[info.header_offset + _ZIP_LOCAL_HEADER + name_size + extra_size] = info.file_size
        except (zipfile.BadZipFile, struct.error) as error:
            raise InputError(f"{path} is truncated or damaged ({error}). Copy or download it again.") from error
    return members


def _not_a_zip(path: Path, magic: bytes) -> str:
    if not magic:
        return f"{path} is empty (0 bytes). Copy or download it again."
    if magic[:1] in (b"\x80", b"c", b"("):
        return (
            f"{path} was refused: it is an old PyTorch file or a plain pickle, which cannot be memory-mapped or read "
            "safely. If you trust it, write it again with "
            f'torch.save(torch.load("{path.name}", weights_only=True), "new.pth") and give the new file.'
        )
    return (
        f"{path} is neither a PyTorch nor a safetensors file (it starts with {magic!r}): another format, or a "
        "truncated file. Give a complete *.safetensors, *.gguf, *.pth or *.pt file."
    )


def _restricted_load(path: Path) -> Any:
    """Load the pickled object with its tensors on the meta device. Only data can be created; no code is executed."""
    try:
        with torch.serialization.safe_globals(_inert_numpy_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a hostile or damaged pickle may raise anything; every case becomes one message
        message = str(error)
        culprit = re.search(r"GLOBAL ([\w.]+)", message)
        if culprit or "TorchScript" in message:
            needs = culprit.group(1) if culprit else "a TorchScript program"
            raise InputError(
                f"{path} was refused: reading it would execute code ({needs}), and only tensors are accepted. "
                "Get the weights as safetensors, or save only the state dict again."
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            message = "it holds more than tensors, or it is damaged"
        first_line = message.strip().split("\n")[0][:200]
        raise InputError(f"{path} was refused by the restricted reader: {first_line}") from error


def _inert_numpy_globals() -> list[Any]:
    """Return the globals of a pickled NumPy random state (official LoRA files contain one): numeric arrays only."""
    import numpy as np

    core = getattr(np, "_core" if hasattr(np, "_core") else "core")  # NumPy 2, NumPy 1
    reconstruct = core.multiarray._reconstruct
    return [
        np.ndarray,
        np.dtype,
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    ]


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a loaded pickle, under the names used by trainers. Raises InputError if there are none."""
    if isinstance(content, Mapping):
        for candidate in (*(content.get(key) for key in _STATE_KEYS), content):
            if isinstance(candidate, Mapping):
                tensors = {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
                if tensors:
                    return tensors
    raise InputError(f"{path} holds no named tensors. Give a state dict, at the top level or under 'module'.")


def _torch_place(tensor: Tensor) -> tuple[Place | None, int]:
    """Return the place of a tensor on the meta device, and the offset of its storage in the file (bytes)."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None, 0
    record = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    offset = record + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return Place(offset, tensor.dtype, tuple(tensor.shape), tensor.stride()), record


def _span(tensor: Tensor, place: Place) -> int:
    """Return the bytes that the tensor needs, from the start of its storage."""
    return 0 if place.nbytes == 0 else int(tensor.storage_offset()) * tensor.dtype.itemsize + place.nbytes
