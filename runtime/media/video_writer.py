"""Writes the output during the run.

A separate encoder encodes each segment into a fragment in memory, and `segment_done` appends the fragment to
`NAME.partial.mp4` (fragmented mp4) in one write. The partial file therefore holds finished segments only, and is
playable even if the program is killed. `finish` copies the encoded video, with the driving clip's audio, into a
temporary file in the format of the output and renames it. A GIF and a folder of PNG files are made from a lossless
partial file (H.264 in RGB). Frames are queued to an encoder thread, so the caller can continue.

There are no B frames, so decode order is display order, presentation times are stored unchanged, and fragments of
separate encoders can be concatenated without an edit list. Colours are converted to BT.709 limited range and tagged.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.containers import CONTAINERS, DEFAULT_CRF, container_of
from scail2_rt.runtime.media.audio import open_audio, remux
from scail2_rt.runtime.media.frame_files import is_frame_folder, remove, replace_output, write_gif, write_images
from scail2_rt.runtime.media.unfinished import part_ends, partial_path, split_fragment

_BT709 = 1  # matrix, primaries and transfer share this number (ITU-T H.273)
_QUEUED_FRAMES = 32


@dataclass(frozen=True, slots=True)
class Codec:
    """An FFmpeg encoder, its largest crf, and its other options, which exclude B frames."""

    encoder: str
    max_crf: int
    options: tuple[tuple[str, str], ...] = ()


CODECS: Final = {
    # x264 is not deterministic with its macroblock tree: up to one in twelve small clips differs in some bits
    "h264": Codec("libx264", 51, (("x264-params", "mbtree=0"),)),
    "hevc": Codec("libx265", 51, (("x265-params", "bframes=0:log-level=error"),)),
    "av1": Codec("libsvtav1", 63, (("preset", "8"),)),
    "vp9": Codec("libvpx-vp9", 63, (("b", "0"), ("row-mt", "1"))),
}
_LOSSLESS = Codec("libx264rgb", 0, (("x264-params", "mbtree=0"), ("preset", "veryfast")))


def check_codec(name: str, crf: int) -> Codec:
    """Return the codec with this name. Raises InputError if this installation cannot encode it at this crf."""
    if name not in CODECS:
        raise InputError(f"The codec {name!r} is not supported: use one of {', '.join(CODECS)}.")
    codec = CODECS[name]
    if codec.encoder not in av.codecs_available:
        raise InputError(f"This installation of PyAV has no {codec.encoder} encoder: use --codec h264.")
    if not 0 <= crf <= codec.max_crf:
        raise InputError(f"--crf must be 0 to {codec.max_crf} for {name}, not {crf}: use 18 for nearly lossless video.")
    return codec


def check_writable(path: Path, expected_bytes: int = 0, endings: Collection[str] = tuple(CONTAINERS)) -> None:
    """Raise InputError unless an output with one of these endings can be written at `path` and its disk has
    `expected_bytes` free.

    The folder need not exist, and is not created; no file remains.
    """
    if path.suffix.lower() not in endings:
        *others, last = endings
        raise InputError(f"The output {path} must end in {', '.join(others)} or {last}.")
    if container_of(path).muxer:
        check_place(path, expected_bytes)
        return
    if path.exists() and not is_frame_folder(path):
        what = "holds files that are not frames" if path.is_dir() else "is a file"
        raise InputError(f"The output {path} {what}, and a folder of PNG files would replace it: choose another name.")
    _check_parent(path, expected_bytes)


def check_place(path: Path, expected_bytes: int = 0) -> None:
    """`check_writable` for a file with any ending."""
    if path.is_dir():
        raise InputError(f"The output {path} is a folder: give a file name.")
    _check_parent(path, expected_bytes)


def _check_parent(path: Path, expected_bytes: int) -> None:
    """Raise InputError unless a folder for `path` exists or can be created, is writable and has `expected_bytes`
    free."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(
            f"The output {path} cannot be written because {folder} is a file, not a folder: choose another path."
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"The folder {folder} is not writable ({error.strerror}): choose another output.") from error
    if free < expected_bytes:
        raise InputError(
            f"The disk of {folder} has {free / 2**20:.0f} MiB free and the output may need "
            f"{expected_bytes / 2**20:.0f} MiB: free some space or choose another output."
        )


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """Encoding of a video's frames.

    width, height   in pixels
    frame_rate      frames per second
    codec           a name of `CODECS`; None: lossless, for an output that is made from the partial file
    crf             constant rate factor, smaller is better; None without a codec

    Raises InputError for odd sides, and for a codec or crf that this installation cannot encode."""

    width: int
    height: int
    frame_rate: Fraction
    codec: str | None = "h264"
    crf: int | None = DEFAULT_CRF

    @property
    def encoder(self) -> Codec:
        return _LOSSLESS if self.codec is None else CODECS[self.codec]

    def __post_init__(self) -> None:
        if self.codec is None:
            return
        if self.width % 2 or self.height % 2:
            raise InputError(
                f"A video of {self.width}×{self.height} pixels cannot be stored as 4:2:0: both sides must be even."
            )
        check_codec(self.codec, DEFAULT_CRF if self.crf is None else self.crf)


class VideoWriter:
    """Encodes RGB frames to `path`. Use it as a context manager: exit without `finish` aborts.

    audio_from   a file whose audio the output contains if its format can hold audio
    start_s      the audio starts this many seconds after the first video frame of `audio_from`
    timestamps   presentation times of the output frames in seconds (increasing, at least one per frame written) if the
                 rate varies; None: the constant rate of `video`
    after        number of frames in the partial file of an interrupted run, to which new frames are appended
    comment      text stored in the output

    Raises InputError if `path` is not writable or `audio_from` cannot be opened."""

    def __init__(
        self,
        path: Path,
        video: VideoFormat,
        audio_from: Path | None = None,
        start_s: Fraction | float = 0,
        timestamps: Sequence[Fraction] | None = None,
        after: int = 0,
        comment: str | None = None,
    ) -> None:
        check_writable(path)
        self.path, self.partial, self._comment = path, partial_path(path), comment
        self.frames = after  # number of frames accepted so far
        self._audio_from, self._start_s = audio_from, Fraction(start_s).limit_denominator(10**9)
        if audio_from is not None:
            open_audio(audio_from).close()  # reports a damaged file before the run instead of after it
        self._clock = _Clock.of(video.frame_rate, timestamps)
        self._encoder = _Encoder(self.partial, video, self._clock)
        if after:
            self._encoder.append_to_partial()
        self._queue: queue.Queue[_Item] = queue.Queue(_QUEUED_FRAMES)
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="video encoder", daemon=True)
        self._thread.start()

    def write(self, frames: np.ndarray) -> None:
        """Queue uint8 frames [n, H, W, 3], which must not be changed afterwards. Blocks if the queue is full.

        Raises ValueError for frames of another type or shape, and Scail2Error if the encoder thread has failed.
        """
        expected = (self._encoder.video.height, self._encoder.video.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise ValueError(f"frames must be uint8 [n, {expected}], not {frames.dtype} {frames.shape}")
        self._clock.check(self.frames + len(frames))
        for frame in frames:
            self._put((self.frames, frame))
            self.frames += 1

    def segment_done(self, wait: bool = False, save: Callable[[int], None] | None = None) -> None:
        """Append all frames so far to the partial file as a part, as soon as they are encoded. With `wait`, return
        after that. `save` is called just before, from the encoder thread, with the number of the part (from 1). Raises
        Scail2Error if the encoder thread has failed."""
        self._put(_Segment(save))
        if wait:
            while self._queue.unfinished_tasks and self._error is None:
                self._thread.join(0.01)
            self._raise()

    def finish(self, keep_partial: bool = False) -> Path:
        """Encode the remaining frames, write the output, and remove the partial file unless `keep_partial`. Returns the
        path of the output.

        Raises Scail2Error if encoding or writing fails; the partial file then remains, and the message names it.
        """
        self._put(_Segment())
        self._put(None)
        self._thread.join()
        self._raise()
        self._closed = True
        if not self.frames:
            raise Scail2Error(f"{self.path} was not written because no frame was generated.")
        temporary = self.path.with_name(f".{self.path.stem}.tmp{self.path.suffix}")
        try:
            self._make(temporary)
            replace_output(temporary, self.path)
        except BaseException as error:
            remove(temporary)
            if isinstance(error, (OSError, av.FFmpegError)):
                reason = error.strerror or error
                raise Scail2Error(
                    f"{self.path} could not be written ({reason}): use the video without audio in {self.partial}."
                ) from error
            raise
        if not keep_partial:
            self.partial.unlink(missing_ok=True)
        return self.path

    def _make(self, target: Path) -> None:
        """Write the output from the frames in the partial file."""
        muxer, end_s = container_of(self.path).muxer, self._clock.end_s(self.frames)
        if muxer == "gif":
            write_gif(self.partial, target, end_s, self._comment)
        elif not muxer:
            write_images(self.partial, target, self._comment)
        else:
            rate, ticks = self._clock.frame_rate, self._clock.ticks
            remux(self.partial, target, rate, ticks, end_s, self._audio_from, self._start_s, self._comment)
            with target.open("rb+") as file:
                os.fsync(file.fileno())

    def abort(self) -> Path | None:
        """Stop, but keep the finished segments. Returns the partial file, or None if no segment is finished."""
        if not self._closed:
            self._closed = True
            self._stop.set()
            self._thread.join()
            if self._error is None:
                with contextlib.suppress(OSError, Scail2Error, av.FFmpegError):
                    self._drain()
        return self.partial if self._encoder.segments and self.partial.exists() else None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self.abort()

    def _put(self, item: _Item) -> None:
        if self._closed:
            raise Scail2Error(f"The video {self.path} is already closed.")
        while True:
            self._raise()
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=0.1)

    def _raise(self) -> None:
        error = self._error
        if error is None:
            return
        if isinstance(error, Scail2Error):
            raise error
        reason = getattr(error, "strerror", None) or error
        saved = f"; finished segments are in {self.partial}" if self._encoder.segments else ""
        raise Scail2Error(f"Encoding {self.path} failed ({reason}){saved}.") from error

    def _run(self) -> None:
        """The encoder thread. An error ends it; the next call of another method raises that error."""
        try:
            while not self._stop.is_set():
                with contextlib.suppress(queue.Empty):
                    item = self._queue.get(timeout=0.1)
                    if item is None:
                        return
                    self._encoder.take(item)
                    self._queue.task_done()
        except BaseException as error:
            self._error = error

    def _drain(self) -> None:
        """Encode the queued frames up to the end of the last finished segment, and discard later ones."""
        items: list[_Item] = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._queue.get_nowait())
        while items and not isinstance(items[-1], _Segment):
            items.pop()
        for item in items:
            if item is not None:
                self._encoder.take(item)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Queue item that ends a segment. `save` is called before the segment is appended to the partial file."""

    save: Callable[[int], None] | None = None


_Item = tuple[int, np.ndarray] | _Segment | None  # a numbered frame, the end of a segment, the end


@dataclass(frozen=True, slots=True)
class _Clock:
    """Presentation times in ticks. ticks: per second, chosen so that every time is a whole number of ticks if
    possible."""

    ticks: int
    frame_rate: Fraction
    timestamps: Sequence[Fraction] | None

    @staticmethod
    def of(frame_rate: Fraction, timestamps: Sequence[Fraction] | None) -> _Clock:
        if not timestamps:
            return _Clock(frame_rate.numerator, frame_rate, None)
        ticks = math.lcm(*(time.denominator for time in timestamps))
        return _Clock(ticks if ticks < 2**31 else 90_000, frame_rate, timestamps)

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


class _Encoder:
    """Encodes queue items into fragments of the partial file. Only one thread may use it at a time."""

    def __init__(self, partial: Path, video: VideoFormat, clock: _Clock) -> None:
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

    def take(self, item: tuple[int, np.ndarray] | _Segment) -> None:
        if isinstance(item, _Segment):
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
        context.pix_fmt = "rgb24" if codec is _LOSSLESS else "yuv420p"
        context.time_base = stream.time_base = Fraction(1, self._clock.ticks)
        context.max_b_frames = 0
        if codec is _LOSSLESS:
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
        if self.video.encoder is not _LOSSLESS:
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
