"""Writes the output during the run.

A separate encoder encodes each segment into a fragment in memory, and `segment_done` appends the fragment to
`NAME.partial.mp4` (fragmented mp4) in one write. The partial file therefore holds finished segments only, and is
playable even if the program is killed. `finish` copies the encoded video, with the driving clip's audio, into a
temporary file in the format of the output and renames it. A GIF and a folder of PNG files are made from a lossless
partial file (H.264 in RGB). Frames are queued to an encoder thread, so the caller can continue.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.media.audio import open_audio, remux
from scail2_rt.runtime.media.fragment_encoder import Clock, FragmentEncoder, SegmentEnd
from scail2_rt.runtime.media.frame_files import remove, replace_output, write_gif, write_images
from scail2_rt.runtime.media.output_path import check_writable
from scail2_rt.runtime.media.unfinished import partial_path
from scail2_rt.runtime.media.video_format import VideoFormat

_QUEUED_FRAMES = 32
_Item = tuple[int, np.ndarray] | SegmentEnd | None  # a numbered frame, the end of a segment, the end


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
        self._clock = Clock.of(video.frame_rate, timestamps)
        self._encoder = FragmentEncoder(self.partial, video, self._clock)
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
        self._put(SegmentEnd(save))
        if wait:
            while self._queue.unfinished_tasks and self._error is None:
                self._thread.join(0.01)
            self._raise()

    def finish(self, keep_partial: bool = False) -> Path:
        """Encode the remaining frames, write the output, and remove the partial file unless `keep_partial`. Returns the
        path of the output.

        Raises Scail2Error if encoding or writing fails; the partial file then remains, and the message names it.
        """
        self._put(SegmentEnd())
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
        while items and not isinstance(items[-1], SegmentEnd):
            items.pop()
        for item in items:
            if item is not None:
                self._encoder.take(item)
