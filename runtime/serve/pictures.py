"""Preview images of generated videos: one frame, or a sheet of up to sixteen frames."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, COLUMNS, ROWS = 320, 4, 4


def newest_picture(video: Path) -> bytes:
    """The last key frame of a video that may still be growing, as JPEG at most 320 pixels wide; empty without a key
    frame. Each segment begins with a key frame, so this shows the last segment."""
    frame = None
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"  # one frame per packet, without the delay of frame threading
        for packet in container.demux(stream):
            if packet.is_keyframe:
                frame = next(iter(packet.decode()), frame)
    if frame is None:
        return b""
    return _encoded(_small(frame), "JPEG")


def thumbnail(video: Path) -> bytes:
    """The middle frame, as WebP at most 320 pixels wide."""
    frames = _frames(video, 3)
    return _encoded(frames[len(frames) // 2], "WEBP")


def spritesheet(video: Path) -> bytes:
    """Up to sixteen evenly spaced frames, arranged row by row, as one WebP."""
    from PIL import Image

    frames = _frames(video, COLUMNS * ROWS)
    width, height = frames[0].size
    sheet = Image.new("RGB", (width * COLUMNS, height * -(-len(frames) // COLUMNS)))
    for i, frame in enumerate(frames):
        sheet.paste(frame, (width * (i % COLUMNS), height * (i // COLUMNS)))
    return _encoded(sheet, "WEBP")


def _frames(video: Path, count: int) -> "list[Image]":
    with av.open(str(video)) as container:
        total = sum(1 for packet in container.demux(video=0) if packet.size)
    chosen = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    with av.open(str(video)) as container:
        return [_small(frame) for i, frame in enumerate(container.decode(video=0)) if i in chosen]


def _small(frame: Any) -> "Image":
    width = min(WIDTH, frame.width)
    return frame.to_image(width=width, height=max(1, round(frame.height * width / frame.width)))


def _encoded(image: "Image", kind: str) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, quality=80)
    return written.getvalue()
