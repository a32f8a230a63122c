"""Encodes frames into the fragments of the partial file (`video_writer`), each with a separate encoder.

There are no B frames, so decode order is display order, presentation times are stored unchanged, and fragments of
separate encoders can be concatenated without an edit list. Colours are converted to BT.709 limited range and tagged.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from scail2_rt.runtime.media.unfinished import part_ends, split_fragment
from scail2_rt.runtime.media.video_format import LOSSLESS, VideoFormat

_BT709 = 1  # matrix, primaries and transfer share this number (ITU-T H.273)


@dataclass(frozen=True, slots=True)
class SegmentEnd:
    """Queue item that ends a segment. `save` is called before the segment is appended to the partial file."""

    save: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Clock:
    """Presentation times in ticks. ticks: per second, chosen so that every time is a whole number of ticks if
    possible."""

    ticks: int
    frame_rate: Fraction
    timestamps: Sequence[Fraction] | None

    @staticmethod
    def of(frame_rate: Fraction, timestamps: Sequence[Fraction] | None) -> Clock:
        if not timestamps:
            return Clock(frame_rate.numerator, frame_rate, None)
        ticks = math.lcm(*(time.denominator for time in timestamps))
        return Clock(ticks if ticks < 2**31 else 90_000, frame_rate, timestamps)

    def check(self, frames: int) -> None:
        """Raise ValueError if there are fewer timestamps than frames."""
        if self.timestamps is not None and frames > len(self.timestamps):
            raise ValueError(f"{frames} frames were written but only {len(self.timestamps)} timestamps given")

    def tick(self, frame: int) -> int:
        """Presentation time of a frame in ticks from the first frame."""
        if self.timestamps is None:
            return frame * self.frame_rate.denominator
        return round((self.timestamps[frame] - self.timestamps[0]) * self.ticks)

    def end_s(self, frames: int) -> Fraction:
        """End of the display of the last of `frames` frames, in seconds."""
        if self.timestamps is None:
            return frames / self.frame_rate
        return self.timestamps[frames - 1] - self.timestamps[0] + 1 / self.frame_rate


class FragmentEncoder:
    """Encodes queue items into fragments of the partial file. Only one thread may use it at a time."""

    def __init__(self, partial: Path, video: VideoFormat, clock: Clock) -> None:
        self.video, self.segments = video, 0  # number of segments in the partial file
        self._partial, self._clock = partial, clock
        self._reformatter = VideoReformatter()
        self._memory = io.BytesIO()
        self._container: Any = None
        self._stream: Any = None
        self._first = 0  # time of the first frame of the segment, in ticks

    def append_to_partial(self) -> None:
        """Append to the parts of an interrupted run, after removing an incomplete part at the end."""
        ends = part_ends(self._partial)
        os.truncate(self._partial, ends[-1])
        self.segments = len(ends)

    def take(self, item: tuple[int, np.ndarray] | SegmentEnd) -> None:
        if isinstance(item, SegmentEnd):
            self._end_segment(item.save)
        else:
            self._encode(*item)

    def _begin_segment(self) -> None:
        self._memory = io.BytesIO()
        options = {
            "movflags": "empty_moov+default_base_moof+frag_custom+skip_trailer",
            "video_track_timescale": str(self._clock.ticks),
            "fragment_index": str(self.segments + 1),
        }
        self._container = av.open(self._memory, "w", format="mp4", options=options)
        video, codec = self.video, self.video.encoder
        stream = self._container.add_stream(
            codec.encoder, rate=video.frame_rate, options={"crf": str(video.crf or 0), **dict(codec.options)}
        )
        self._stream = stream
        context = stream.codec_context
        context.width, context.height = video.width, video.height
        context.pix_fmt = "rgb24" if codec is LOSSLESS else "yuv420p"
        context.time_base = stream.time_base = Fraction(1, self._clock.ticks)
        context.max_b_frames = 0
        if codec is LOSSLESS:
            return
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        if codec.encoder == "libx265":
            context.codec_tag = "hvc1"  # the tag that Apple's players require

    def _encode(self, number: int, frame: np.ndarray) -> None:
        tick = self._clock.tick(number)
        if self._container is None:
            self._first = tick
            self._begin_segment()
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self.video.encoder is not LOSSLESS:
            picture = self._reformatter.reformat(
                picture,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            )
            picture.color_primaries = picture.color_trc = _BT709
        picture.pts, picture.time_base = tick - self._first, Fraction(1, self._clock.ticks)
        self._container.mux(self._stream.encode(picture))

    def _end_segment(self, save: Callable[[int], None] | None) -> None:
        if self._container is None:
            return  # a segment without frames
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = self._stream = None
        header, fragment = split_fragment(self._memory.getvalue(), self._first)
        if save is not None:
            save(self.segments + 1)
        self._append(header + fragment if self.segments == 0 else fragment)
        self.segments += 1

    def _append(self, data: bytes) -> None:
        """Append a segment in one write. If the write fails it is undone, so that the file never ends with an
        incomplete segment."""
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        with self._partial.open("ab" if self.segments else "wb") as file:
            size = file.tell()
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._partial, size)
                    if not size:
                        self._partial.unlink()
                raise
