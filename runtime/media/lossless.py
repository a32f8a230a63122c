"""Writes images and videos losslessly: PNG, and mp4 with H.264 in RGB at crf 0.

Masks must keep their exact colours, and generated test clips are compared with the video made from them, so 4:2:0 is
not used. The official case layout requires `*.mp4`, any FFmpeg decodes H.264 in RGB, and decoding is bit-identical.
FFV1 would need another container, and browsers do not play it.
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
    """Write pixels, uint8 [H, W, 3], in the format that the ending of `path` selects."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    frame_rate: Fraction,
    sound: np.ndarray | None = None,
    timestamps: Sequence[Fraction] | None = None,
) -> None:
    """Write uint8 frames [H, W, 3] as H.264 at crf 0. Raises OSError or av.FFmpegError if writing fails.

    sound        mono samples [n] in -1..1 at `SAMPLE_RATE`, stored as AAC
    timestamps   presentation times of the frames in seconds, if the rate varies"""
    tick = 1 / frame_rate if timestamps is None else Fraction(1, _TICKS)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264rgb", rate=frame_rate, options={"crf": "0", "preset": "fast"})
        video.pix_fmt = "rgb24"
        video.codec_context.max_b_frames = 0  # exact presentation times without an edit list
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
