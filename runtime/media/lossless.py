"""Images and videos without loss: PNG, and H.264 in RGB at crf 0 in an mp4.

A mask must keep its colours exactly, and a drawn clip is compared with the video generated from it; so nothing here
is stored as 4:2:0. The official case layout asks for `*.mp4`, every FFmpeg reads such a file, and decoding is
bit-identical; FFV1 would need another container, and browsers do not play it either. Sound is given as samples.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SAMPLE_RATE = 48_000
_TICKS = 90_000  # per second, if the frame rate varies


def write_image(path: Path, pixels: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    frame_rate: Fraction,
    sound: np.ndarray | None = None,
    timestamps: Sequence[Fraction] | None = None,
) -> None:
    """H.264 at crf 0 of uint8 frames [H, W, 3]; `sound`, mono samples in -1..1 at `SAMPLE_RATE`, as AAC. `timestamps`:
    the frames' times in seconds where the rate varies."""
    tick = 1 / frame_rate if timestamps is None else Fraction(1, _TICKS)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264rgb", rate=frame_rate, options={"crf": "0", "preset": "fast"})
        video.pix_fmt = "rgb24"
        video.codec_context.max_b_frames = 0  # presentation times are then exact without an edit list
        video.codec_context.time_base = video.time_base = tick
        track = None if sound is None else container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for number, pixels in enumerate(frames):
            if not number:
                video.height, video.width = pixels.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts = number if timestamps is None else round(timestamps[number] / tick)
            picture.time_base = tick
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if track is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            heard.sample_rate, heard.pts = SAMPLE_RATE, 0
            container.mux(track.encode(heard))
            container.mux(track.encode(None))
