"""Videos wherever they are: a file, or frames in memory, read in the same way.

`probe` tells what a video is and `open_video` reads its frames; both take a path or a `Clip`. Equal frames in a file
and in memory give equal results. A clip whose frames can be read once only is written to a temporary file first
(`rereadable`), in H.264 RGB at crf 0, which comes back to the bit.
"""

import contextlib
import hashlib
import itertools
import os
import tempfile
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import Clip, ClipSource
from scail2_rt.runtime.media.images import as_pixels
from scail2_rt.runtime.media.lossless import write_video
from scail2_rt.runtime.media.video_reader import VideoInfo, VideoReader, probe_video

HASHED_AT_ONCE = 8  # frames


class FrameReader(Protocol):
    """Frames of a video in order. position: number of the next frame; name: what messages call the video."""

    name: str
    position: int

    def read(self, count: int) -> np.ndarray:
        """The next `count` frames, RGB uint8 [n, H, W, 3]; n < count only at the end, where it may be 0."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> "FrameReader": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def open_video(source: ClipSource, start: int = 0, tell: Tell = untold) -> FrameReader:
    """Open a file or a clip at frame `start`; `tell` is called with the share of a file that is read. Raises InputError
    if it cannot be read or ends before `start`."""
    return ClipReader(source, start) if isinstance(source, Clip) else VideoReader(Path(source), start, tell)


def probe(source: ClipSource, tell: Tell = untold) -> VideoInfo:
    """What reading a video from end to end shows. Raises InputError if it is no usable video."""
    return probe_clip(source) if isinstance(source, Clip) else probe_video(Path(source), tell)


class ClipReader:
    """Frames of a clip in memory. Of what can be sliced only the slices that are read are made."""

    def __init__(self, clip: Clip, start: int = 0) -> None:
        self.name, self.position = clip.name, start
        frames: Any = clip.frames
        self._slices = frames if sliceable(frames) else None
        self._frames = _checked_frames(clip)
        if self._slices is None:
            skipped = sum(1 for _ in itertools.islice(self._frames, start))
        else:
            skipped = min(start, len(self._slices))
        if skipped < start:
            raise InputError(f"{self.name} has {skipped} frames, so it cannot start at frame {start}: start earlier.")

    def read(self, count: int) -> np.ndarray:
        """The next `count` frames, RGB uint8 [n, H, W, 3]; n < count only at the end, where it may be 0."""
        if self._slices is None:
            frames = list(itertools.islice(self._frames, count))
        else:
            part = self._slices[self.position : self.position + count]
            frames = [as_pixels(frame, f"A frame of the {self.name}") for frame in part]
        self.position += len(frames)
        return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)

    def close(self) -> None:
        self._frames.close()

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sliceable(frames: Any) -> bool:
    """An array of frames, or what has the shape of one and gives arrays when it is sliced."""
    return len(getattr(frames, "shape", ())) == 4


def _checked_frames(clip: Clip) -> Generator[np.ndarray, None, None]:
    """A generator of the clip's frames as arrays. InputError for a frame of another type or size than the first."""
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(clip.frames):
        pixels = as_pixels(frame, f"Frame {number} of the {clip.name}")
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise InputError(
                f"Frame {number} of the {clip.name} is {pixels.shape[0]}x{pixels.shape[1]}, but its first frame is "
                f"{shape[0]}x{shape[1]} (height x width): give frames of one size."
            )
        yield pixels


def probe_clip(clip: Clip) -> VideoInfo:
    """What a clip in memory is; every frame is looked at. InputError when it holds none, or a wrong one."""
    frames: Any = clip.frames
    if isinstance(frames, np.ndarray) and frames.ndim != 4:
        raise InputError(
            f"The {clip.name} has the shape {list(frames.shape)}: give frames, uint8 [frames, height, width, 3]."
        )
    if sliceable(frames):
        first = None if not len(frames) else as_pixels(frames[0], f"Frame 0 of the {clip.name}")
        count = len(frames)
    else:
        read = _checked_frames(clip)
        first = next(read, None)
        count = (first is not None) + sum(1 for _ in read)
    if first is None:
        raise InputError(f"The {clip.name} holds no frame: give at least one.")
    height, width = first.shape[:2]
    return VideoInfo(clip.name, width, height, count, clip.rate, False, None, 0, ())


def rereadable(source: ClipSource, name: str) -> ClipSource:
    """The source, under this name in messages; frames that can be read once only (a generator) are kept in a temporary
    file, without loss, for as long as the result is."""
    if not isinstance(source, Clip):
        return source
    clip = replace(source, name=name) if source.name == "clip" else source
    frames = clip.frames
    if not isinstance(frames, Iterable):
        raise InputError(f"The {clip.name} holds {type(frames).__name__}, not frames: give an array or an iterable.")
    if isinstance(frames, Iterator):
        return replace(clip, frames=_Spooled(clip))
    return clip


class _Spooled:
    """Frames that were read once, in a temporary file that goes with this object."""

    def __init__(self, clip: Clip) -> None:
        handle, path = tempfile.mkstemp(prefix="scail2-rt-", suffix=".mp4")
        os.close(handle)
        self._path = Path(path)
        weakref.finalize(self, _remove, path)
        frames = _checked_frames(clip)
        first = next(frames, None)
        if first is None:
            raise InputError(f"The {clip.name} holds no frame: give at least one.")
        try:
            write_video(self._path, itertools.chain([first], frames), clip.rate)
        except OSError as error:
            raise Scail2Error(
                f"The {clip.name} could not be kept in the temporary file {path} ({error}): free space there, or give "
                "frames that can be read twice."
            ) from error

    def __iter__(self) -> Iterator[np.ndarray]:
        with VideoReader(self._path) as reader:
            while len(frames := reader.read(HASHED_AT_ONCE)):
                yield from frames


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def clip_hash(clip: Clip) -> str:
    """SHA-256 of rate, size and frames."""
    digest = hashlib.sha256(str(clip.rate).encode())
    with ClipReader(clip) as reader:
        while len(frames := reader.read(HASHED_AT_ONCE)):
            digest.update(repr(frames.shape[1:]).encode())
            digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()
