"""Output formats: the ending that selects each, and the codecs and audio that it can hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scail2_rt.kernels.errors import InputError


@dataclass(frozen=True, slots=True)
class Container:
    """An output format.

    what     its name in messages
    muxer    FFmpeg's name of the format; "" for a folder of PNG files
    codecs   video codecs it can hold, the default first; empty if the format has only one codec
    audio    whether it can hold audio"""

    what: str
    muxer: str
    codecs: tuple[str, ...] = ()
    audio: bool = True


_MP4 = Container("A .mp4 file", "mp4", ("h264", "hevc", "av1", "vp9"))
_FOLDER = Container("A folder of PNG files", "", audio=False)
CONTAINERS: Final = {
    ".mp4": _MP4,
    ".m4v": _MP4,
    ".mov": Container("A .mov file", "mov", ("h264", "hevc")),
    ".mkv": Container("An .mkv file", "matroska", ("h264", "hevc", "av1", "vp9")),
    ".webm": Container("A .webm file", "webm", ("vp9", "av1")),
    ".gif": Container("A .gif file", "gif", audio=False),
    "": _FOLDER,
}
MP4_ENDINGS: Final = (".mp4", ".m4v", ".mov")  # formats that the service and the `masks` commands write
DEFAULT_CRF: Final = 18


def container_of(output: Path) -> Container:
    """The format of an output; a name without an ending is a folder of PNG files. Raises InputError for other
    endings."""
    ending = output.suffix.lower()
    if ending in CONTAINERS and output.name.strip(".") and output.name.lower() not in CONTAINERS:
        return CONTAINERS[ending]
    known = [name for name in CONTAINERS if name]
    raise InputError(
        f"The output {output} must end in {', '.join(known[:-1])} or {known[-1]}, "
        "or be a name without an ending for a folder of PNG files."
    )


def resolve_encoding(output: Path, codec: str | None, crf: int | None) -> tuple[str | None, int | None]:
    """Codec and crf of an output with defaults filled in; (None, None) if its format has no choice of codec. Raises
    InputError if the format cannot hold the codec, or has no choice of codec or crf."""
    container = container_of(output)
    if not container.codecs:
        if codec is not None or crf is not None:
            option = "--crf" if codec is None else "--codec"
            raise InputError(f"{container.what} has no choice of {option}: leave it out, or name the output .mp4.")
        return None, None
    codec = container.codecs[0] if codec is None else codec
    if codec not in container.codecs and codec in _MP4.codecs:
        raise InputError(
            f"{container.what} cannot hold {codec} video: "
            f"use --codec {' or '.join(container.codecs)}, or name the output .mp4."
        )
    return codec, DEFAULT_CRF if crf is None else crf
