"""Files of an unfinished run next to its output: the partial video, and the state to resume from.

`NAME.partial.mp4` grows by one *part* per finished segment: a movie fragment (moof and mdat box), appended in one
write. The first part also contains the header. `NAME.resume-K.safetensors` (`runtime.session.resume`) holds the state
after part K. It is written before part K is appended and removed after part K+1, so at any time the state that matches
the partial file exists. This module does not import PyTorch, because the command line looks for unfinished runs before
it loads anything.
"""

import struct
from pathlib import Path


def is_there(output: Path) -> bool:
    """Whether the output exists: as a file, or as a folder that is not empty."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


def partial_path(output: Path) -> Path:
    """The file with the finished segments of an unfinished run, such as `out/demo.partial.mp4`."""
    return output.with_name(f"{output.stem}.partial.mp4")


def sidecar_path(output: Path, part: int) -> Path:
    """The file with the state after part `part` (from 1), such as `out/demo.resume-3.safetensors`."""
    return output.with_name(f"{output.stem}.resume-{part}.safetensors")


def resumable(output: Path) -> int:
    """The number of finished parts of a run that can be resumed; 0 if there is none."""
    partial = partial_path(output)
    parts = len(part_ends(partial)) if partial.is_file() else 0
    return parts if parts and sidecar_path(output, parts).is_file() else 0


def clear_sidecars(output: Path) -> None:
    """Remove the saved states of earlier runs."""
    for path in output.parent.glob("*.safetensors"):
        number = path.name.removeprefix(f"{output.stem}.resume-").removesuffix(".safetensors")
        if number.isdecimal() and path == sidecar_path(output, int(number)):
            path.unlink(missing_ok=True)


def part_ends(partial: Path) -> list[int]:
    """The byte offsets at which the complete parts of a partial video end. Bytes after the last are an incomplete
    part."""
    ends, position, fragment = [], 0, False
    size = partial.stat().st_size
    with partial.open("rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1 and position + 16 <= size:  # a 64-bit length follows
                (length,) = struct.unpack(">Q", file.read(8))
            if length < 8 or position + length > size:
                break
            position += length
            if kind == b"mdat" and fragment:
                ends.append(position)
            fragment = kind == b"moof"
    return ends


def split_fragment(data: bytes, first_tick: int) -> tuple[bytes, bytes]:
    """Split the file of one segment into header (ftyp, moov) and fragment, and set the start time of the fragment.

    A muxer starts every file at time 0, so `first_tick` is added to the decode time of the track fragment (`tfdt`,
    ISO/IEC 14496-12 §8.8.12, version 1: 64 bits).
    """
    position, start = 0, None
    patched = bytearray(data)
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"moof":
            start = position if start is None else start
            box = data.index(b"tfdt", position, position + size) + 8
            (time,) = struct.unpack_from(">Q", data, box)
            struct.pack_into(">Q", patched, box, time + first_tick)
        position += size
    start = len(data) if start is None else start
    return bytes(patched[:start]), bytes(patched[start:])
