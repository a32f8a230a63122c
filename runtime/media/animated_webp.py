"""Animated WebP as a video.

FFmpeg decodes still WebP images only, so Pillow reads the frames. They are stored losslessly, with their presentation
times, in a Matroska file in memory, which the rest of `media` reads like any other video. Such files are short: they
come from chats and sticker sets.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from scail2_rt.kernels.errors import InputError

_MILLISECOND = Fraction(1, 1000)
_ANIMATED = 0x02  # flag of the VP8X chunk (WebP container specification, "Extended File Format")


def is_animated_webp(path: Path) -> bool:
    """Whether a file is a WebP container with the animation flag."""
    with path.open("rb") as file:
        head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & _ANIMATED)


def as_matroska(path: Path) -> io.BytesIO:
    """The animation as Matroska with lossless video, including alpha. Raises InputError if the file is damaged."""
    from PIL import Image, ImageSequence

    memory = io.BytesIO()
    try:
        with Image.open(path) as animation, av.open(memory, "w", format="matroska") as out:
            stream = out.add_stream("ffv1", rate=Fraction(1000))
            stream.width, stream.height, stream.pix_fmt = *animation.size, "bgra"
            stream.time_base = stream.codec_context.time_base = _MILLISECOND
            shown_ms = 0
            for image in ImageSequence.Iterator(animation):
                pixels = np.asarray(image.convert("RGBA"))
                picture = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="bgra")
                picture.pts, picture.time_base = shown_ms, _MILLISECOND
                out.mux(stream.encode(picture))
                shown_ms += max(1, image.info.get("duration", 0))
            out.mux(stream.encode(None))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is a damaged animation ({error}): export it again as mp4.") from error
    memory.seek(0)
    return memory
