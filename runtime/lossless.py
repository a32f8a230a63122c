"""Images and videos without loss, as the programs that draw cases write them: PNG, and H.264 of RGB frames.

A mask must keep its colours to the last bit, and a drawn clip is compared with what was made of it; so nothing here
goes through 4:2:0. The sound of a clip is given as samples.
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SAMPLE_RATE = 48_000


def write_image(path: Path, pixels: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_video(
    path: Path, frames: Iterable[np.ndarray], frame_rate: Fraction, sound: np.ndarray | None = None
) -> None:
    """H.264 at crf 0 of uint8 frames [H, W, 3]; `sound`, mono samples in -1..1 at `SAMPLE_RATE`, as AAC."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264rgb", rate=frame_rate, options={"crf": "0", "preset": "fast"})
        video.pix_fmt = "rgb24"
        track = None if sound is None else container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for number, pixels in enumerate(frames):
            if not number:
                video.height, video.width = pixels.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        if track is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            heard.sample_rate, heard.pts = SAMPLE_RATE, 0
            container.mux(track.encode(heard))
            container.mux(track.encode(None))
