"""One interface to videos in files, folders of images and memory.

`probe` returns the properties of a video and `open_video` reads its frames; both accept a path or a `Clip`. Equal
frames in a file and in memory give equal results. A clip that can be read only once is first written to a temporary
file (`rereadable`), in H.264 RGB at crf 0, so that its frames are read back bit-identical. To change the frame rate,
`nearest_frames` selects frames and `open_video` reads only those.
"""

import contextlib
import hashlib
import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import official_files
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.request import Clip, ClipSource
from scail2_rt.runtime.media.images import as_pixels, images_in, load_image
from scail2_rt.runtime.media.kept_results import KeptResults
from scail2_rt.runtime.media.lossless import write_video
from scail2_rt.runtime.media.video_reader import FrameReader, VideoInfo, VideoReader, probe_video

_CHUNK = 8  # frames read at once
FOLDER_RATE = Fraction(16)  # frames per second of a folder of images if none is given: the rate of the model


def open_video(
    source: ClipSource, start: int = 0, chosen: Sequence[int] | None = None, tell: Tell = untold
) -> FrameReader:
    """Open a file, a folder of images or a clip. Raises InputError if it cannot be read or ends before `start`.

    start    number of the first frame, or its index in `chosen`
    chosen   numbers of the frames to read, in non-decreasing order (`nearest_frames`); None: all frames
    tell     called with the share of a file that has been read"""
    if chosen is not None:
        return _ChosenFrames(open_video(source, chosen[start]), chosen[start:])
    source = _folder_as_clip(source)
    return ClipReader(source, start) if isinstance(source, Clip) else VideoReader(Path(source), start, tell)


_PROBED = KeptResults[VideoInfo](count=16)


def probe(source: ClipSource, folder_rate: Fraction | None = None, tell: Tell = untold) -> VideoInfo:
    """Read a video to its end and return its properties. Raises InputError if it is not a usable video.

    folder_rate   frames per second of a folder of images; None: `FOLDER_RATE`
    tell          called with the share of a file that has been read"""
    source = _folder_as_clip(source, folder_rate or FOLDER_RATE)
    if isinstance(source, Clip):
        return probe_clip(source)
    path = Path(source)
    return _PROBED.get(path, None, lambda: probe_video(path, tell))


def is_folder(source: ClipSource) -> bool:
    """Whether the source is a folder of images, whose frames have no times."""
    return not isinstance(source, Clip) and Path(source).is_dir()


def _folder_as_clip(source: ClipSource, rate: Fraction = FOLDER_RATE) -> ClipSource:
    if isinstance(source, Clip) or not is_folder(source):
        return source
    return Clip(_FolderFrames(Path(source)), rate, str(source))


class _FolderFrames:
    """The images of a folder, sorted by the numbers in their names; transparent pixels are black. Raises InputError for
    a case folder, a folder without images, and images of different sizes."""

    def __init__(self, folder: Path) -> None:
        if any(path.stem.lower() in ("driving", "rendered_v2") for path in official_files(folder)):
            raise InputError(f"{folder} is a case folder: give it with --case, or one of its videos.")
        self._files = images_in(folder)
        if not self._files:
            raise InputError(f"The folder {folder} holds no image: give a video, or a folder of frames.")

    def __iter__(self) -> Iterator[np.ndarray]:
        shape: tuple[int, ...] | None = None
        for file in self._files:
            pixels = load_image(file, background=(0, 0, 0))
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise InputError(
                    f"{file} is {pixels.shape[0]}x{pixels.shape[1]}, but {self._files[0].name} is "
                    f"{shape[0]}x{shape[1]} (height x width): make all images of the folder one size."
                )
            yield pixels


def nearest_frames(video: VideoInfo, rate: Fraction) -> tuple[int, ...]:
    """For each frame of the video resampled to `rate`, the number of the original frame that is nearest in time.

    Output frame k is at k / rate seconds, for all k / rate before the end of the video. Its last frame lasts one period
    of its own rate. Of two equally near frames the earlier is used. Times are exact fractions."""
    times = video.timestamps or [number / video.frame_rate for number in range(video.frames)]
    lasts_s = times[-1] + 1 / video.frame_rate
    chosen, number = list[int](), 0
    for k in range(math.ceil(lasts_s * rate)):
        time = k / rate
        while number + 1 < len(times) and times[number + 1] - time < time - times[number]:
            number += 1
        chosen.append(number)
    return tuple(chosen)


def own_span(source: ClipSource, rate: Fraction | None, start: int, frames: int | None) -> tuple[int, int | None]:
    """Convert `start` and `frames`, counted at `rate`, to frames of the video. They are unchanged if `rate` is None, or
    for a folder of images, whose rate is `rate`. Raises InputError if `start` is beyond the end."""
    if rate is None or is_folder(source):
        return start, frames
    chosen = nearest_frames(probe(source), rate)
    check_start(start, len(chosen), rate)
    chosen = chosen[start:][:frames]
    return chosen[0], chosen[-1] - chosen[0] + 1


def check_start(start: int, total: int, rate: Fraction | None) -> None:
    """Raise InputError if a driving clip of `total` frames, counted at `rate` if given, has no frame `start`."""
    if start >= total:
        at = "" if rate is None else f" at {float(rate):.6g} fps"
        raise InputError(
            f"--start {start} is beyond the end of the driving clip, whose frames are 0 to {total - 1}{at}: "
            "start earlier."
        )


class _ChosenFrames(FrameReader):
    """Frames of another reader by their numbers; some may be skipped and others repeated."""

    def __init__(self, reader: FrameReader, chosen: Sequence[int]) -> None:
        self.name, self.position = reader.name, 0
        self._reader, self._chosen = reader, iter(chosen)
        self._frame = np.empty((0, 0, 0, 3), np.uint8)  # the last frame read, [1, H, W, 3]

    def read(self, count: int) -> np.ndarray:
        frames = list[np.ndarray]()
        for number in itertools.islice(self._chosen, count):
            if number >= self._reader.position:
                self._reader.skip(number - self._reader.position)
                self._frame = self._reader.read(1)
                if not len(self._frame):
                    break
            frames.append(self._frame)
        self.position += len(frames)
        return np.concatenate(frames) if frames else self._frame[:0]

    def skip(self, count: int) -> None:
        self.position += sum(1 for _ in itertools.islice(self._chosen, count))

    def close(self) -> None:
        self._reader.close()


class ClipReader(FrameReader):
    """Frames of a clip in memory. Only the slices that are read are computed. Raises InputError if the clip ends before
    `start`."""

    def __init__(self, clip: Clip, start: int = 0) -> None:
        self.name, self.position = clip.name, 0
        frames: Any = clip.frames
        self._slices = frames if sliceable(frames) else None
        self._frames = _checked_frames(clip)
        self.skip(start)
        if self.position < start:
            raise InputError(
                f"{self.name} has {counted(self.position, 'frame')}, so it cannot start at frame {start}: "
                "start earlier."
            )

    def skip(self, count: int) -> None:
        if self._slices is None:
            self.position += sum(1 for _ in itertools.islice(self._frames, count))
        else:
            self.position = min(self.position + count, len(self._slices))

    def read(self, count: int) -> np.ndarray:
        if self._slices is None:
            frames = list(itertools.islice(self._frames, count))
        else:
            part = self._slices[self.position : self.position + count]
            frames = [as_pixels(frame, f"A frame of the {self.name}") for frame in part]
        self.position += len(frames)
        return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)

    def close(self) -> None:
        self._frames.close()


def sliceable(frames: Any) -> bool:
    """Whether `frames` is an array of frames, or has the shape of one and gives arrays when it is sliced."""
    return len(getattr(frames, "shape", ())) == 4


def _checked_frames(clip: Clip) -> Generator[np.ndarray, None, None]:
    """The frames of a clip as uint8 arrays [H, W, 3]. Raises InputError for a frame of the wrong type, or of another
    size than the first."""
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
    """The properties of a clip in memory. Raises InputError if it holds no frame, or one of the wrong type or size;
    only the first frame of an array is checked."""
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
    """Return the source with `name` as its name in messages. Frames that can be read only once (a generator) are
    written losslessly to a temporary file, which exists as long as the result. Raises InputError for frames of a wrong
    type, and Scail2Error if the temporary file cannot be written."""
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
    """Frames of a clip in a temporary file, which is removed with this object."""

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
                f"The {clip.name} could not be kept in the temporary file {path} ({error}): "
                "free space there, or give frames that can be read twice."
            ) from error

    def __iter__(self) -> Iterator[np.ndarray]:
        with VideoReader(self._path) as reader:
            while len(frames := reader.read(_CHUNK)):
                yield from frames


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def clip_hash(clip: ClipSource) -> str:
    """SHA-256 (hexadecimal) of rate, size and frames of a clip, or of a folder of images."""
    clip = _folder_as_clip(clip)
    assert isinstance(clip, Clip)
    digest = hashlib.sha256(str(clip.rate).encode())
    with ClipReader(clip) as reader:
        while len(frames := reader.read(_CHUNK)):
            digest.update(repr(frames.shape[1:]).encode())
            digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()
