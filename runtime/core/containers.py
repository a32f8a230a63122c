"""The kinds of output, told apart by the ending of the name, and what each can hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scail2_rt.kernels.errors import InputError


@dataclass(frozen=True, slots=True)
class Container:
    """One kind of output.

    what     what messages call it
    muxer    FFmpeg's name of the format; "" for a folder of PNG files
    codecs   the video codecs that it holds, the default first; none where frames are stored without a choice of codec
    audio    whether it holds audio"""

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
MP4_ENDINGS: Final = (".mp4", ".m4v", ".mov")  # what the service and the commands of `masks` write
DEFAULT_CRF: Final = 18


def container_of(output: Path) -> Container:
    """The kind of an output; a name without an ending is a folder of PNG files. Raises InputError for other endings."""
    ending = output.suffix.lower()
    if ending in CONTAINERS and output.name.strip(".") and output.name.lower() not in CONTAINERS:
        return CONTAINERS[ending]
    known = [name for name in CONTAINERS if name]
    raise InputError(
        f"The output {output} must end in {', '.join(known[:-1])} or {known[-1]}, or be a name without an ending for a "
        "folder of PNG files."
    )


def resolve_encoding(output: Path, codec: str | None, crf: int | None) -> tuple[str | None, int | None]:
    """Codec and crf of an output, defaults filled in; (None, None) where its kind has no such choice. Raises InputError
    for a codec or crf that its kind cannot use."""
    kind = container_of(output)
    if not kind.codecs:
        if codec is not None or crf is not None:
            option = "--crf" if codec is None else "--codec"
            raise InputError(f"{kind.what} has no choice of {option}: leave it out, or name the output .mp4.")
        return None, None
    codec = kind.codecs[0] if codec is None else codec
    if codec not in kind.codecs and codec in _MP4.codecs:
        raise InputError(
            f"{kind.what} cannot hold {codec} video: use --codec {' or '.join(kind.codecs)}, or name the output .mp4."
        )
    return codec, DEFAULT_CRF if crf is None else crf
