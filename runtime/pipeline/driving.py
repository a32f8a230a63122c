"""The driving clip and its mask, read one segment at a time.

Only the frames of the current segment are in memory and, if the sources are files, those of the next one, which
threads read meanwhile, one per source. The overlap with the previous segment is kept, so that every frame is decoded
once. The last segment is padded by repeating its last frame.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.palette import mask_latents
from scail2_rt.runtime.media.clips import open_video
from scail2_rt.runtime.media.video_reader import FrameReader
from scail2_rt.runtime.pipeline.observe import observe
from scail2_rt.runtime.pipeline.preprocess import half_resolution, normalise_video, through_window
from scail2_rt.runtime.pipeline.vae import encode, frame_groups

FRAMES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class DrivingClip:
    """Frames and masks of one segment: uint8 [T, 3, H, W] each, T = segment.padded_frames, at the output size."""

    segment: Segment
    frames: Tensor
    mask: Tensor


Calls = Sequence[Callable[[], Any]]


def _in_turn(calls: Calls) -> list[Any]:
    return [call() for call in calls]


@contextmanager
def open_clips(plan: Plan, first: int = 0) -> Iterator[Iterator[DrivingClip]]:
    """Give the segments of `read_clips`. If both sources are files, threads start to read the first segment at once and
    each further one while the preceding one is used. Frames passed by the caller are read in the caller's thread."""
    if not all(isinstance(source, Path) for source in (plan.request.driving, plan.request.mask_video)):
        with closing(read_clips(plan, first)) as clips:
            yield clips
        return
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as threads:

        def together(calls: Calls) -> list[Any]:
            coming = [threads.submit(copy_context().run, call) for call in calls]
            wait(coming)  # if one fails, the files must not be closed while the other is read
            return [part.result() for part in coming]

        with closing(read_clips(plan, first, together)) as clips, _read_ahead(clips) as ahead:
            yield ahead


@contextmanager
def _read_ahead(clips: Iterator[DrivingClip]) -> Iterator[Iterator[DrivingClip]]:
    """Give the same clips, each read in a thread while the preceding one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:

        def read() -> DrivingClip | None:
            return next(clips, None)

        coming = thread.submit(copy_context().run, read)

        def ahead() -> Iterator[DrivingClip]:
            nonlocal coming
            while (clip := coming.result()) is not None:
                coming = thread.submit(copy_context().run, read)
                yield clip

        try:
            yield ahead()
        finally:
            coming.cancel()


def read_clips(
    plan: Plan, first: int = 0, run: Callable[[Calls], list[Any]] = _in_turn
) -> Generator[DrivingClip, None, None]:
    """Yield the plan's segments from number `first` on, in order; none if `first` is past the last.

    run: calls two functions, which read the clip and its mask, and returns their results; by default one after the
    other. Raises Scail2Error if a video ends early."""
    segments = plan.segments[first:]
    if not segments:
        return
    start = segments[0].start + (plan.request.start if plan.chosen is None else 0)
    sources = plan.request.driving, plan.request.mask_video
    with open_video(sources[0], start, plan.chosen) as driving, open_video(sources[1], start, plan.chosen) as masks:
        clip, mask = (_Source(reader, plan.driving_window, segments[0].start) for reader in (driving, masks))
        for segment in segments:
            yield DrivingClip(segment, *run([partial(source.part, segment) for source in (clip, mask)]))


@dataclass(slots=True)
class _Source:
    """One of the two videos. read_to: number of frames read; tail: the frames of the previous segment."""

    reader: FrameReader
    window: Window
    read_to: int
    tail: Tensor | None = None

    def part(self, segment: Segment) -> Tensor:
        """Read the frames of the next segment, those that overlap the previous one included, and pad them."""
        fresh = _read(self.reader, segment.valid_end - self.read_to, self.window)
        valid = fresh if self.tail is None else torch.cat([self.tail[-segment.overlap :], fresh])
        self.read_to, self.tail = segment.valid_end, valid
        return torch.cat([valid, valid[-1:].expand(segment.padded_frames - len(valid), -1, -1, -1)])


def _half(frames: Tensor) -> Tensor:
    return half_resolution(normalise_video(frames))


def _read(reader: FrameReader, count: int, window: Window) -> Tensor:
    """Read the next `count` frames, placed in the frame; only a few are in memory at the video's original size."""
    parts = []
    for wanted in range(count, 0, -FRAMES_AT_ONCE):
        frames = reader.read(min(wanted, FRAMES_AT_ONCE))
        if len(frames) < min(wanted, FRAMES_AT_ONCE):
            end = reader.position + wanted - len(frames)
            raise Scail2Error(
                f"{reader.name} ended at frame {reader.position} instead of {end}: it "
                "changed or cannot be decoded to its end. Re-encode it and try again."
            )
        parts.append(through_window(torch.from_numpy(frames).permute(0, 3, 1, 2), window))
    return torch.cat(parts)


def encode_driving(engines: EngineSet, clip: DrivingClip) -> tuple[Tensor, Tensor]:
    """Encode a clip → half-resolution latent [16, F, h/2, w/2] and its mask latent [28, F, h/2, w/2]."""
    frames, masks = clip.frames.to(engines.device), clip.mask.to(engines.device)
    channels = mask_latents(torch.cat([_half(part) for part in masks.split(FRAMES_AT_ONCE)]))
    del masks
    latent = encode(engines, (_half(frames[group]).transpose(0, 1) for group in frame_groups(len(frames))))
    observe("driving", latent)
    observe("driving_mask", channels)
    return latent, channels
