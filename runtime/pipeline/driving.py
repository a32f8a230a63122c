"""The driving clip and its mask, read one segment at a time.

Only the frames of the current segment are in memory and, if the sources are files, those of the next one, which
threads read meanwhile, one per source. The overlap with the previous segment is kept, so that every frame is decoded
once. The last segment is padded by repeating its last frame.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.geometry import Segment
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.palette import mask_latents
from scail2_rt.runtime.media.clips import FrameReader, open_video
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


Sources = Callable[[Callable[[FrameReader], Tensor], tuple[FrameReader, FrameReader]], Iterable[Tensor]]


@contextmanager
def open_clips(plan: Plan, first: int = 0) -> Iterator[Iterator[DrivingClip]]:
    """Give the segments of `read_clips`. If both sources are files, threads start to read the first segment at once and
    each further one while the preceding one is used. Frames passed by the caller are read in the caller's thread."""
    if not all(isinstance(source, Path) for source in (plan.request.driving, plan.request.mask_video)):
        with closing(read_clips(plan, first)) as clips:
            yield clips
        return
    with ThreadPoolExecutor(2, thread_name_prefix="decode") as threads:

        def together(read: Callable[[FrameReader], Tensor], readers: Iterable[FrameReader]) -> list[Tensor]:
            coming = [threads.submit(copy_context().run, read, reader) for reader in readers]
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


def read_clips(plan: Plan, first: int = 0, each: Sources = map) -> Generator[DrivingClip, None, None]:
    """Yield the plan's segments from number `first` on, in order; none if `first` is past the last.

    each: applies a function to the driving clip and its mask, by default one after the other.
    Raises Scail2Error if a video ends early."""
    segments = plan.segments[first:]
    if not segments:
        return
    start = segments[0].start + (plan.request.start if plan.chosen is None else 0)
    sources = plan.request.driving, plan.request.mask_video
    with open_video(sources[0], start, plan.chosen) as driving, open_video(sources[1], start, plan.chosen) as masks:
        tails: list[Tensor | None] = [None, None]
        read_to = segments[0].start
        for segment in segments:
            parts = []
            read = partial(_read, count=segment.valid_end - read_to, window=plan.driving_window)
            for i, fresh in enumerate(each(read, (driving, masks))):
                tail = tails[i]
                valid = fresh if tail is None else torch.cat([tail[-segment.overlap :], fresh])
                tails[i] = valid
                padding = valid[-1:].expand(segment.padded_frames - len(valid), -1, -1, -1)
                parts.append(torch.cat([valid, padding]))
            read_to = segment.valid_end
            yield DrivingClip(segment, *parts)


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
    """Encode a clip → half-resolution latent [16, F, h/2, w/2] and its mask latent [28, F, h/2, w/2].

    The device prepares and encodes the frames; a thread prepares the mask meanwhile."""

    def half(frames: Tensor) -> Tensor:
        return half_resolution(normalise_video(frames))

    def masks() -> Tensor:
        return mask_latents(torch.cat([half(frames) for frames in clip.mask.split(FRAMES_AT_ONCE)]))

    with ThreadPoolExecutor(1, thread_name_prefix="mask") as thread:
        coming = thread.submit(copy_context().run, masks)
        frames = clip.frames.to(engines.device)
        groups = (half(frames[group]).transpose(0, 1) for group in frame_groups(len(frames)))
        latent = encode(engines, groups)
        channels = coming.result().to(latent.device)
    observe("driving", latent)
    observe("driving_mask", channels)
    return latent, channels
