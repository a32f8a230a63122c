"""The files of an unfinished run beside its output: the partial video, and the state to resume from.

`NAME.partial.mp4` grows by one *part* per finished segment: a movie fragment (moof and mdat box) appended in one write.
The header comes with the first part. `NAME.resume-K.safetensors` (`runtime.session.resume`) holds the state after part
K. It is written before part K is appended and removed after part K+1: whenever a run is killed, the state that fits the
partial file is there. This module does not import PyTorch: the command line looks for unfinished runs before it loads.
"""

import struct
from pathlib import Path


def is_there(output: Path) -> bool:
    """Whether something would be replaced: a file, or a folder that is not empty."""
    return any(output.iterdir()) if output.is_dir() else output.exists()


def partial_path(output: Path) -> Path:
    """The finished segments of a run that did not end: `out/demo.partial.mp4`."""
    return output.with_name(f"{output.stem}.partial.mp4")


def sidecar_path(output: Path, part: int) -> Path:
    """The state after part `part`, from 1: `out/demo.resume-3.safetensors`."""
    return output.with_name(f"{output.stem}.resume-{part}.safetensors")


def resumable(output: Path) -> int:
    """The number of parts after which an unfinished run can be resumed; 0 if there is none."""
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
    """The byte offsets at which the complete parts of a partial video end; bytes behind the last are half a part."""
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
    """Cuts a file of one segment into its header (ftyp, moov) and its fragment, and sets the fragment's start time.

    A muxer starts every file at time 0; the decode time of a track fragment (`tfdt`, ISO/IEC 14496-12 §8.8.12,
    version 1: 64 bit) is what places it in the whole video.
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
