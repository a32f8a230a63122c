"""How the frames of an output video are encoded: the codecs, and the format of one video."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import av

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.containers import DEFAULT_CRF


@dataclass(frozen=True, slots=True)
class Codec:
    """An FFmpeg encoder, its largest crf, and its other options, which exclude B frames."""

    encoder: str
    max_crf: int
    options: tuple[tuple[str, str], ...] = ()


CODECS: Final = {
    # x264 is not deterministic with its macroblock tree: up to one in twelve small clips differs in some bits
    "h264": Codec("libx264", 51, (("x264-params", "mbtree=0"),)),
    "hevc": Codec("libx265", 51, (("x265-params", "bframes=0:log-level=error"),)),
    "av1": Codec("libsvtav1", 63, (("preset", "8"),)),
    "vp9": Codec("libvpx-vp9", 63, (("b", "0"), ("row-mt", "1"))),
}
LOSSLESS = Codec("libx264rgb", 0, (("x264-params", "mbtree=0"), ("preset", "veryfast")))


def check_codec(name: str, crf: int) -> Codec:
    """Return the codec with this name. Raises InputError if this installation cannot encode it at this crf."""
    if name not in CODECS:
        raise InputError(f"The codec {name!r} is not supported: use one of {', '.join(CODECS)}.")
    codec = CODECS[name]
    if codec.encoder not in av.codecs_available:
        raise InputError(f"This installation of PyAV has no {codec.encoder} encoder: use --codec h264.")
    if not 0 <= crf <= codec.max_crf:
        raise InputError(f"--crf must be 0 to {codec.max_crf} for {name}, not {crf}: use 18 for nearly lossless video.")
    return codec


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Encoding of a video's frames.

    width, height   in pixels
    frame_rate      frames per second
    codec           a name of `CODECS`; None: lossless, for an output that is made from the partial file
    crf             constant rate factor, smaller is better; None without a codec

    Raises InputError for odd sides, and for a codec or crf that this installation cannot encode."""

    width: int
    height: int
    frame_rate: Fraction
    codec: str | None = "h264"
    crf: int | None = DEFAULT_CRF

    @property
    def encoder(self) -> Codec:
        return LOSSLESS if self.codec is None else CODECS[self.codec]

    def __post_init__(self) -> None:
        if self.codec is None:
            return
        if self.width % 2 or self.height % 2:
            raise InputError(
                f"A video of {self.width}×{self.height} pixels cannot be stored as 4:2:0: both sides must be even."
            )
        check_codec(self.codec, DEFAULT_CRF if self.crf is None else self.crf)
