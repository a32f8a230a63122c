"""Reads videos with PyAV (images: `images.py`).

Frames are returned as viewers show them: 8-bit RGB, with display rotation applied, non-square pixels stretched to
square ones (the width changes), grey converted to RGB, and transparent pixels black. The conversion is FFmpeg's
default, with the matrix and range of the stream (BT.601 and limited range if the file states none, as FFmpeg assumes
when it writes such files). 10-bit and HDR video is converted to 8 bits without tone mapping. Interlaced frames are not
deinterlaced.

The header of a container is not trusted: frames are counted by decoding. A frame rate must match the presentation times
of the frames; if no constant rate does, the times are returned. A truncated file ends, with a warning, at its last
frame; damage before that is an error. The writer is in `video_writer.py`.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.media.animated_webp import as_matroska, is_animated_webp
from scail2_rt.runtime.media.images import check_file

_REPAIR = "re-encode it to H.264, or give another file"
_HDR_TRANSFERS = (16, 18)  # PQ and HLG in the numbering of ITU-T H.273
_DEFAULT_RATE = Fraction(25)
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders ignore the alpha plane
_ALPHA_SIDE_DATA = "matroska_block_additional"
_UPRIGHT = (1, 0, 0, 1)  # display matrix


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video, found by reading all of it.

    name              its name in messages; for a file, the path
    width, height     of the frames that `VideoReader` returns, in pixels
    frames            number of frames that can be decoded
    frame_rate        frames per second; the mean if the rate varies
    audio             whether it has an audio track that can be decoded
    timestamps        presentation times in seconds from the first frame if the rate varies, else None
    declared_frames   number of frames that the header states, 0 if it states none
    warnings          sentences for the user"""

    name: str
    width: int
    height: int
    frames: int
    frame_rate: Fraction
    audio: bool
    timestamps: tuple[Fraction, ...] | None
    declared_frames: int
    warnings: tuple[str, ...]

    @property
    def variable_frame_rate(self) -> bool:
        return self.timestamps is not None


def probe_video(path: Path, tell: Tell = untold) -> VideoInfo:
    """Decode a file to its end without converting pixels. `tell` is called with the share of the file that has been
    read. Raises InputError if the file holds no usable video."""
    with _open(path) as (container, stream):
        pts: list[int | None] = []
        size, hdr, interlaced, damaged, matrix = (0, 0), False, False, [], _UPRIGHT
        for number, frame in enumerate(_decode(container, stream, path, tell)):
            if not pts:
                matrix = _display_matrix(frame)
                size, hdr = _upright_size(frame, stream, matrix), int(frame.color_trc) in _HDR_TRANSFERS
            elif _upright_size(frame, stream, matrix) != size:
                raise _size_changes(path, number)
            interlaced |= frame.interlaced_frame
            if frame.is_corrupt:
                damaged.append(number)
            pts.append(frame.pts)
        if not pts:
            raise InputError(f"{path} has a video stream, but none of its frames can be decoded: {_REPAIR}.")
        times = _relative_times(pts, stream.time_base)
        rate, constant = _frame_rate(stream, times)
        warnings = _length_warnings(path, stream, len(pts), times)
        if damaged:
            warnings.append(
                f"{path} is damaged: the decoder repairs {counted(len(damaged), 'frame')}, the first of which is frame "
                f"{damaged[0]}. Check them, or copy the file again."
            )
        if hdr:
            warnings.append(
                f"{path} is HDR and will look flat, because no tone mapping is applied: convert it to SDR first."
            )
        if interlaced:
            warnings.append(
                f"{path} is interlaced, so moving edges are jagged: deinterlace it first (ffmpeg -vf bwdif)."
            )
        readable = [track.codec_context is not None for track in container.streams.audio]
        for number, known in enumerate(readable, 1):
            if not known:
                warnings.append(f"Audio track {number} of {path} cannot be decoded, so the output will not contain it.")
        return VideoInfo(
            name=str(path),
            width=size[0],
            height=size[1],
            frames=len(pts),
            frame_rate=rate,
            audio=any(readable),
            timestamps=None if constant or times is None else times,
            declared_frames=stream.frames,
            warnings=tuple(warnings),
        )


def _length_warnings(path: Path, stream: Any, frames: int, times: tuple[Fraction, ...] | None) -> list[str]:
    """Warn if the file holds fewer or more frames than its header states. Frames hidden by an edit list (a clip trimmed
    on a phone) are in the header's count but not in its duration."""
    declared_s = _declared_s(stream)
    ends_early = False
    if declared_s is not None and times is not None:
        longest = max((b - a for a, b in itertools.pairwise(times)), default=0)  # the last frame may last this long
        ends_early = times[-1] + 2 * longest < declared_s
    if stream.frames > frames and (ends_early or declared_s is None or times is None):
        return [
            f"The header of {path} states {counted(stream.frames, 'frame')}, but {frames} can be decoded: "
            "it may be damaged or cut short."
        ]
    if 0 < stream.frames < frames:
        return [
            f"The header of {path} states {counted(stream.frames, 'frame')}, but it has {frames}: all of them are used."
        ]
    if not stream.frames and frames > 1 and ends_early and declared_s is not None and times is not None:
        return [
            f"The header of {path} states {float(declared_s):.2f} s, but the last frame ({frames - 1}) is at "
            f"{float(times[-1]):.2f} s: it may be damaged or cut short."
        ]
    return []


def _declared_s(stream: Any) -> Fraction | None:
    """Duration of the video stream that the header states, in seconds from the first frame; in Matroska it is a tag.
    None if it is not stated."""
    if stream.duration is not None:
        return stream.duration * stream.time_base
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    start_s = (stream.start_time or 0) * stream.time_base
    return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3]) - start_s


R = TypeVar("R", bound="FrameReader")


class FrameReader(Protocol):
    """Reads the frames of a video in order. As a context manager it closes itself.

    name       of the video, in messages
    position   number of the next frame"""

    name: str
    position: int

    def read(self, count: int) -> np.ndarray:
        """The next `count` frames, RGB uint8 [n, H, W, 3]; n < count only at the end, where it may be 0."""
        ...

    def skip(self, count: int) -> None:
        """Skip frames, at most to the end."""
        ...

    def close(self) -> None: ...

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoAlphaError(InputError):
    """Raised if the alpha channel of a video without one is read."""


class VideoReader(FrameReader):
    """Reads the frames of a video file in order. The first `start` frames are decoded and discarded, so that the
    position is exact."""

    def __init__(self, path: Path, start: int = 0, tell: Tell = untold, alpha: bool = False) -> None:
        """Open a file. `tell` is called with the share of the file that has been read. With `alpha`, `read` returns the
        alpha channel, uint8 [n, H, W], 255 for opaque. Raises InputError if the file is not a video or ends before
        `start`."""
        self.path, self.name = path, str(path)
        self.position = 0  # number of the next frame
        self.timestamps: list[Fraction] = []  # of the frames read so far, in seconds from the file's first frame
        self._opened = _open(path)
        container, self._stream = self._opened.__enter__()
        self._alpha = alpha
        self._frames = _decode(container, self._stream, path, tell)
        self._reformatter = VideoReformatter()
        self._first_pts: int | None = None
        self._size: tuple[int, int] | None = None
        try:
            self.skip(start)
            if self.position < start:
                raise InputError(
                    f"{self.path} has {counted(self.position, 'frame')}, so it cannot start at frame {start}: "
                    "start earlier."
                )
        except InputError:
            self.close()
            raise

    def skip(self, count: int) -> None:
        """Skip frames without converting their pixels, at most to the end."""
        for _ in range(count):
            if self._next() is None:
                return

    def _next(self) -> av.VideoFrame | None:
        frame = next(self._frames, None)
        if frame is None:
            return None
        if self._size is None:
            self._size, self._first_pts = _upright_size(frame, self._stream, _display_matrix(frame)), frame.pts
        self.position += 1
        return frame

    def read(self, count: int) -> np.ndarray:
        """The next `count` frames as RGB uint8 [n, H, W, 3]; n < count only at the end, where it may be 0. Raises
        InputError for a damaged frame or a change of size, and NoAlphaError with `alpha` if there is no alpha
        channel."""
        batch: np.ndarray | None = None
        n = 0
        while n < count and (frame := self._next()) is not None:
            pixels = self._pixels(frame)
            if batch is None:
                batch = np.empty((count, *pixels.shape), np.uint8)
            batch[n] = pixels
            self.timestamps.append(self._time(frame))
            n += 1
        if batch is None:
            width, height = self._size or (0, 0)
            return np.empty((0, height, width) if self._alpha else (0, height, width, 3), np.uint8)
        return batch[:n]

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = _square_size(frame, self._stream)
        alpha = any(component.is_alpha for component in frame.format.components)
        if self._alpha and not alpha:
            raise NoAlphaError(
                f"{self.path} has no alpha channel: export it with one (ProRes 4444, PNG or QuickTime Animation in "
                ".mov, VP9 in .webm), or make a mask from a black and white matte with `scail2-rt masks from-grey`."
            )
        layout = "rgba" if alpha else "rgb24"
        rgb = self._reformatter.reformat(frame, width, height, layout, interpolation=Interpolation.BICUBIC).to_ndarray()
        shown = rgb[..., 3] if self._alpha else _on_black(rgb) if alpha else rgb
        pixels = _upright(shown, _display_matrix(frame))
        if pixels.shape[1::-1] != self._size:
            raise _size_changes(self.path, self.position - 1)
        return pixels

    def _time(self, frame: av.VideoFrame) -> Fraction:
        if frame.pts is None or self._first_pts is None or self._stream.time_base is None:
            rate = _sane_rate(self._stream.average_rate) or _DEFAULT_RATE
            return (self.position - 1) / rate
        return (frame.pts - self._first_pts) * self._stream.time_base

    def close(self) -> None:
        self._frames.close()
        self._opened.__exit__(None, None, None)


def has_transparency(path: Path) -> bool:
    """Whether the first frame of a video has transparent pixels. Raises InputError if it is not a video."""
    with VideoReader(path, alpha=True) as reader:
        try:
            return bool(reader.read(1).min(initial=255) < 255)
        except NoAlphaError:
            return False


def _on_black(rgba: np.ndarray) -> np.ndarray:
    """Blend RGBA uint8 [H, W, 4] (straight alpha) with black, as players do; in a mask, black is no class."""
    if rgba[..., 3].min() == 255:
        return rgba[..., :3]
    levels, opacity = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((levels * opacity + 127) // 255).astype(np.uint8)


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file: its container and its best video stream (a video rather than a cover image). Raises InputError if it
    cannot be opened or has no video stream that can be decoded.

    Decoding uses slice threads only. With frame threads, FFmpeg reports damage late, or not at all near the end, so the
    result would depend on the number of cores."""
    check_file(path)
    try:  # absolute path: FFmpeg reads the text before a colon, as in `12:30.mp4`, as a protocol
        container = av.open(as_matroska(path) if is_animated_webp(path) else str(path.absolute()))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened as a video ({_reason(error)}). It is damaged, cut short or no video: {_REPAIR}."
        ) from error
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise InputError(f"{path} has no video stream: give a video file.")
        if stream.codec_context is None:
            raise InputError(f"{path} uses a video codec that cannot be decoded here: {_REPAIR}.")
        stream.thread_type = "SLICE"
        yield container, stream


def _decode(container: Any, stream: Any, path: Path, tell: Tell) -> Generator[Any, None, None]:
    """Yield the frames of the stream. Packets that cannot be decoded end it if no decodable packet follows (a truncated
    file); otherwise raises InputError, which names the frame."""
    count, failure, decode = 0, None, None
    try:
        for packet in container.demux(stream):
            decode = decode or _decoder(stream, packet, path)
            if packet.pos and container.size > 0:
                tell(packet.pos / container.size)
            try:
                frames = decode(packet)
            except (av.FFmpegError, OSError, ValueError) as error:
                failure = failure or (count, error)
                continue
            if failure is not None and packet.size:
                raise _damaged(path, *failure)
            for frame in frames:
                yield frame
                count += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(path, count, error) from error


def _decoder(stream: Any, first: Any, path: Path) -> Callable[[Any], list[Any]]:
    """The function that decodes packets of the stream. `first` is its first packet. In WebM, VP8 and VP9 store the
    alpha plane as side data of each packet. Raises InputError if only a missing decoder could read it."""
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    tagged = any(key.lower() == "alpha_mode" and value != "0" for key, value in stream.metadata.items())
    if name is None or not (tagged or any(side.data_type == _ALPHA_SIDE_DATA for side in first.iter_sidedata())):
        return stream.decode
    try:
        context: Any = av.CodecContext.create(name, "r")
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"{path} has transparency, which only FFmpeg's decoder {name} reads, and PyAV lacks it here: {_REPAIR}."
        ) from error
    context.thread_type = "SLICE"
    return context.decode


def _damaged(path: Path, number: int, error: BaseException) -> InputError:
    return InputError(f"{path} cannot be decoded at frame {number} ({_reason(error)}): {_REPAIR}.")


def _size_changes(path: Path, number: int) -> InputError:
    return InputError(f"{path} changes its size at frame {number}: {_REPAIR}.")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """The 2×2 part (a, b, c, d) of the display matrix: a pixel at (x, y) is shown at (ax + cy, bx + dy), y downwards.

    A frame and its side data refer to each other, so reading side data keeps the frame in memory until the garbage
    collector runs (2.3 GiB for 81 frames of ProRes 4444 in 2560x1440). `probe_video` therefore reads that of the first
    frame only. The reader reads that of all frames, because FFmpeg repairs a damaged frame with the content of a reused
    buffer."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _UPRIGHT
    matrix = struct.unpack("9i", bytes(side))
    return matrix[0], matrix[1], matrix[3], matrix[4]


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Rotate by multiples of 90° and mirror [H, W, ...] as the display matrix says; other angles, which cameras do not
    write, are ignored."""
    a, b, c, d = matrix
    if a == d == 0 and b and c:
        pixels, horizontal, vertical = pixels.swapaxes(0, 1), c, b
    elif b == c == 0 and a and d:
        horizontal, vertical = a, d
    else:
        return pixels
    return pixels[:: 1 if vertical > 0 else -1, :: 1 if horizontal > 0 else -1]


def _square_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(width, height) of the coded frame with square pixels, before rotation."""
    ratio = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 4) <= ratio <= 4:
        ratio = Fraction(1)
    return max(1, round(frame.width * ratio)), frame.height


def _upright_size(frame: Any, stream: Any, matrix: tuple[int, int, int, int]) -> tuple[int, int]:
    """(width, height) of the frame as shown: with square pixels and rotated."""
    width, height = _square_size(frame, stream)
    a, b, c, d = matrix
    return (height, width) if a == d == 0 and b and c else (width, height)


def _relative_times(pts: list[int | None], time_base: Fraction | None) -> tuple[Fraction, ...] | None:
    """Seconds from the first frame; None if the times are unusable (missing, equal or decreasing)."""
    known = [value for value in pts if value is not None]
    if time_base is None or len(known) != len(pts) or any(b <= a for a, b in itertools.pairwise(known)):
        return None
    return tuple((value - known[0]) * time_base for value in known)


def _sane_rate(rate: Any) -> Fraction | None:
    return Fraction(rate) if rate and 0 < rate <= 1000 else None


def _frame_rate(stream: Any, times: tuple[Fraction, ...] | None) -> tuple[Fraction, bool]:
    """(frame rate, whether it is constant).

    The rate is the first of the container's rates, and of the rate of evenly spaced times, that matches all
    presentation times to within one tick of the time base, the rounding error. If none does, it is the mean rate and
    not constant; the average that the container states may be the rate of its first frames.
    """
    rates = [_sane_rate(rate) for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate)]
    candidates = [rate for rate in rates if rate]
    if times is None or len(times) == 1:
        return (candidates or [_DEFAULT_RATE])[0], True
    tick = stream.time_base
    steps = {b - a for a, b in itertools.pairwise(times)}
    own = _sane_rate(1 / min(steps))
    if len(steps) == 1 and own:
        candidates.append(own)
    for rate in candidates:
        tolerance = tick if tick * rate < Fraction(1, 4) else 0
        if all(abs(time - i / rate) <= tolerance for i, time in enumerate(times)):
            return rate, True
    mean = (len(times) - 1) / times[-1]
    return _sane_rate(mean.limit_denominator(1001)) or (candidates or [_DEFAULT_RATE])[0], False
