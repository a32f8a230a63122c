"""Reading videos and images, with PyAV and Pillow.

Frames come out as a viewer sees them: RGB 8-bit, display rotation applied, non-square pixels stretched to square ones
(the width changes), grey and alpha turned into plain RGB. The conversion is FFmpeg's plain one, with the stream's own
matrix and range (BT.601 and limited range where a file says nothing, which is what FFmpeg assumes when it writes such
files); 10-bit and HDR are brought to 8 bit without tone mapping. Interlaced frames are taken as they are.

What a container says about itself is not believed: frames are counted by decoding, and the frame rate must fit the
frames' own presentation times, which are kept when no constant rate does. The writer is in `video_writer.py`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from scail2_rt.export.errors import InputError
from scail2_rt.runtime.video_writer import VideoWriter, check_writable

__all__ = ["VideoInfo", "VideoReader", "VideoWriter", "check_writable", "load_image", "load_mask_image", "probe_video"]

_REPAIR = "re-encode it to H.264, or give another file"
_HDR_TRANSFERS = (16, 18)  # PQ and HLG in the numbering of ITU-T H.273
_DEFAULT_RATE = Fraction(25)
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What decoding a video from end to end shows. Width and height are those of the frames that `VideoReader` gives.

    `timestamps` are the frames' presentation times in seconds from the first frame when no constant rate describes them
    (variable frame rate), else None. `declared_frames` is the container's own count (0: it gives none).
    """

    path: Path
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


def probe_video(path: Path) -> VideoInfo:
    """Decodes the whole file without converting pixels. Raises `InputError` for a file that holds no usable video."""
    with _open(path) as (container, stream):
        pts: list[int | None] = []
        size, hdr = (0, 0), False
        for frame in _decode(container, stream, path):
            if not pts:
                size, hdr = _upright_size(frame, stream), int(frame.color_trc) in _HDR_TRANSFERS
            pts.append(frame.pts)
        if not pts:
            raise InputError(f"{path} holds a video stream but no frame of it can be decoded: {_REPAIR}.")
        times = _relative_times(pts, stream.time_base)
        rate, constant = _frame_rate(stream, times)
        warnings = []
        if stream.frames and stream.frames != len(pts):
            warnings.append(
                f"{path} says it holds {stream.frames} frames but {len(pts)} can be decoded: it may be damaged or cut "
                "short."
            )
        if hdr:
            warnings.append(
                f"{path} is HDR: it is read without tone mapping and will look flat; convert it to SDR first."
            )
        return VideoInfo(
            path=path,
            width=size[0],
            height=size[1],
            frames=len(pts),
            frame_rate=rate,
            audio=bool(container.streams.audio),
            timestamps=None if constant or times is None else times,
            declared_frames=stream.frames,
            warnings=tuple(warnings),
        )


class VideoReader:
    """Frames of a video in order, a few at a time. `start` frames are decoded and thrown away, so it is exact."""

    def __init__(self, path: Path, start: int = 0) -> None:
        """Raises `InputError` when the file is no video or ends before `start`."""
        self.path = path
        self.position = 0  # number of the next frame
        self.timestamps: list[Fraction] = []  # of the frames read so far, in seconds from the file's first frame
        self._opened = _open(path)
        container, self._stream = self._opened.__enter__()
        self._frames = _decode(container, self._stream, path)
        self._reformatter = VideoReformatter()
        self._first_pts: int | None = None
        self._size: tuple[int, int] | None = None
        try:
            self._skip(start)
        except InputError:
            self.close()
            raise

    def _skip(self, count: int) -> None:
        for _ in range(count):
            if self._next() is None:
                raise InputError(
                    f"{self.path} has {self.position} frames, so it cannot start at frame {count}: start earlier."
                )

    def _next(self) -> av.VideoFrame | None:
        frame = next(self._frames, None)
        if frame is None:
            return None
        if self._size is None:
            self._size, self._first_pts = _upright_size(frame, self._stream), frame.pts
        self.position += 1
        return frame

    def read(self, count: int) -> np.ndarray:
        """The next `count` frames as RGB uint8 [n, H, W, 3]; n < count only at the end, where it may be 0."""
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
            return np.empty((0, height, width, 3), np.uint8)
        return batch[:n]

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = _square_size(frame, self._stream)
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
        pixels = _upright(rgb.to_ndarray(), _display_matrix(frame))
        if pixels.shape[1::-1] != self._size:
            raise InputError(f"{self.path} changes its size at frame {self.position - 1}: {_REPAIR}.")
        return pixels

    def _time(self, frame: av.VideoFrame) -> Fraction:
        if frame.pts is None or self._first_pts is None or self._stream.time_base is None:
            rate = _sane_rate(self._stream.average_rate) or _DEFAULT_RATE
            return (self.position - 1) / rate
        return (frame.pts - self._first_pts) * self._stream.time_base

    def close(self) -> None:
        self._frames.close()
        self._opened.__exit__(None, None, None)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_image(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """An image file as RGB uint8 [H, W, 3]: EXIF orientation applied, grey and palette images expanded, 16 bit scaled
    to 8, transparent pixels laid over `background` (white, as image viewers do). Colour profiles are ignored, as in the
    public pipeline. Raises `InputError` for anything that is not a readable image."""
    from PIL import Image

    with _opened_image(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            return _grey_to_rgb(np.asarray(image))
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, (*background, 255)), layers)
        return np.array(image.convert("RGB"))


def load_mask_image(path: Path) -> np.ndarray:
    """`load_image` for masks: transparent pixels are black, that is, in no class."""
    return load_image(path, background=(0, 0, 0))


def load_alpha(path: Path) -> np.ndarray | None:
    """The alpha channel of an image file, uint8 [H, W], 255 where it is opaque; None when it has none."""
    with _opened_image(path) as image:
        return np.array(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None


def load_labels(path: Path) -> np.ndarray | None:
    """The numbers that an image file stores, [H, W]: the indices of a palette image (its colours do not matter), or
    grey levels of up to 32 bit. None for a colour image, whose channels are not equal."""
    with _opened_image(path) as image:
        levels = np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    if levels.ndim == 2:
        return levels.astype(np.uint8) if levels.dtype == bool else levels
    colour = levels[..., :3] if levels.shape[-1] >= 3 else levels[..., :1]
    return levels[..., 0] if (colour == colour[..., :1]).all() else None


def is_image(path: Path) -> bool:
    """By the ending of its name: an image, where a video is the other possibility."""
    return path.suffix.lower() in _IMAGE_ENDINGS


@contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    """The Pillow image, turned as its EXIF data say."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_file(path)
    try:
        with Image.open(path) as opened:
            yield ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read: give a PNG, JPEG or WebP file.") from error
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is a damaged or unusable image ({error}): save it again as PNG or JPEG.") from error


def _grey_to_rgb(levels: np.ndarray) -> np.ndarray:
    """16-bit grey (integers above 255, or a 16-bit type) and float grey to RGB uint8."""
    sixteen = levels.dtype.itemsize == 2 or levels.max(initial=0) > 255
    grey = np.clip(np.rint(levels / 257 if sixteen else levels), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file.")
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path.")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if empty:
        raise InputError(f"{path} is empty: give a file with content.")


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its best video stream (cover pictures lose against real video), decoding on all cores."""
    _check_file(path)
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be opened as a video ({_reason(error)}): it is damaged, cut short or no video; {_REPAIR}."
        ) from error
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise InputError(f"{path} holds no video stream: give a video file.")
        if stream.codec_context is None:
            raise InputError(f"{path} uses a video codec that cannot be decoded here: {_REPAIR}.")
        stream.thread_type = "AUTO"
        yield container, stream


def _decode(container: Any, stream: Any, path: Path) -> Generator[Any, None, None]:
    """All frames of the stream. A decoder error names the frame."""
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be decoded at frame {count} ({_reason(error)}): {_REPAIR}.") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """The display matrix's 2×2 part (a, b, c, d): a pixel at (x, y) is shown at (ax + cy, bx + dy), y downwards."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return 1, 0, 0, 1
    matrix = struct.unpack("9i", bytes(side))
    return matrix[0], matrix[1], matrix[3], matrix[4]


def _upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Turns and mirrors [H, W, 3] by multiples of 90°, which is all that cameras write; other angles stay."""
    a, b, c, d = matrix
    if a == d == 0 and b and c:
        pixels, horizontal, vertical = pixels.transpose(1, 0, 2), c, b
    elif b == c == 0 and a and d:
        horizontal, vertical = a, d
    else:
        return pixels
    return pixels[:: 1 if vertical > 0 else -1, :: 1 if horizontal > 0 else -1]


def _square_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(width, height) of the coded frame with square pixels."""
    ratio = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 4) <= ratio <= 4:
        ratio = Fraction(1)
    return max(1, round(frame.width * ratio)), frame.height


def _upright_size(frame: Any, stream: Any) -> tuple[int, int]:
    width, height = _square_size(frame, stream)
    a, b, c, d = _display_matrix(frame)
    return (height, width) if a == d == 0 and b and c else (width, height)


def _relative_times(pts: list[int | None], time_base: Fraction | None) -> tuple[Fraction, ...] | None:
    """Seconds from the first frame, or None when the file's times are unusable (missing, equal, running backwards)."""
    known = [value for value in pts if value is not None]
    if time_base is None or len(known) != len(pts) or any(b <= a for a, b in itertools.pairwise(known)):
        return None
    return tuple((value - known[0]) * time_base for value in known)


def _sane_rate(rate: Any) -> Fraction | None:
    return Fraction(rate) if rate and 0 < rate <= 1000 else None


def _frame_rate(stream: Any, times: tuple[Fraction, ...] | None) -> tuple[Fraction, bool]:
    """(frame rate, whether it is constant).

    The first of the container's rates that agrees with every presentation time to within one tick of the time base
    (what rounding explains), else the rate of evenly spaced times; failing that, the mean rate, not constant.
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
    return (candidates or [_sane_rate(mean) or _DEFAULT_RATE])[0], False
