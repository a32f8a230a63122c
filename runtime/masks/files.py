"""Masks on disk: reading what they are made from, frame by frame, and writing them without loss.

A source is an image, a video or a folder of images (the frames of a clip, as segmentation tools write them, in the
order of the numbers in their names). Images and videos are written by `lossless`; a file appears under its name only
when it is complete.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.containers import MP4_ENDINGS
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.masks.palette import CLEAR_LABEL, PALETTE, codes
from scail2_rt.runtime.media.images import images_in as _images
from scail2_rt.runtime.media.images import is_image
from scail2_rt.runtime.media.lossless import write_image, write_video
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video
from scail2_rt.runtime.media.video_writer import check_place, check_writable

_FRAMES_AT_ONCE = 8
_LOOKED_AT = 256  # rows or columns of a mask, of which the shares of its colours are taken


@dataclass(frozen=True, slots=True)
class Source:
    """What a mask is made from. `timestamps` in seconds where a video's rate varies."""

    path: Path
    kind: Literal["image", "video", "folder"]
    frame_rate: Fraction = Fraction(25)
    timestamps: tuple[Fraction, ...] | None = None


@dataclass(frozen=True, slots=True)
class WrittenMask:
    """`shares`: mean share of the pixels of each colour that occurs."""

    output: Path
    frames: int
    height: int
    width: int
    shares: dict[str, float]

    @property
    def text(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares.items())
        frames = "" if self.frames == 1 else f"{self.frames} frames of "
        return f"{self.output}: {frames}{self.height}x{self.width}, {shares}"


def open_source(path: Path, frame_rate: Fraction | None = None, tell: Tell = untold) -> Source:
    """`frame_rate` is that of a folder of images; a video has its own."""
    if path.is_dir():
        if not _images(path):
            raise InputError(f"The folder {path} holds no image: give an image, a video, or a folder of frames.")
        return Source(path, "folder", frame_rate or Fraction(25))
    if frame_rate is not None:
        raise InputError(f"--fps is for a folder of images, and {path} is a file.")
    if is_image(path):
        return Source(path, "image")
    video = probe_video(path, tell)
    return Source(path, "video", video.frame_rate, video.timestamps)


def frames_of(
    source: Source, load: Callable[[Path], np.ndarray], tell: Tell = untold, alpha: bool = False
) -> Iterator[np.ndarray]:
    """Frames in order: of a video RGB uint8 [H, W, 3], or with `alpha` its alpha channel [H, W]; of images what `load`
    makes of each file."""
    if source.kind == "image":
        yield load(source.path)
    elif source.kind == "folder":
        files = _images(source.path)
        for number, file in enumerate(files, 1):
            yield load(file)
            tell(number / len(files))
    else:
        with VideoReader(source.path, tell=tell, alpha=alpha) as reader:
            while len(frames := reader.read(_FRAMES_AT_ONCE)):
                yield from frames


def check_output(output: Path, source: Source, overwrite: bool) -> None:
    """Raises `InputError` unless a mask made from the source can be written at `output`."""
    if output.exists() and output.resolve() == source.path.resolve():
        raise InputError(f"The output {output} is the input: choose another name with -o.")
    check_new(output, ".png" if source.kind == "image" else ".mp4", overwrite)


def check_new(output: Path, ending: str, overwrite: bool) -> None:
    """Raises `InputError` unless a file of this ending, `.png` or `.mp4`, can be written at `output`."""
    if ending == ".png":
        if output.suffix.lower() != ending:
            raise InputError(f"The output {output} must end in .png: a mask image is stored without loss.")
        check_place(output)
    else:
        check_writable(output, endings=MP4_ENDINGS)
    if output.exists() and not overwrite:
        raise InputError(f"The output {output} exists: choose another name with -o, or replace it with --overwrite.")


def write_mask(output: Path, source: Source, masks: Iterable[np.ndarray]) -> WrittenMask:
    """Writes mask frames (palette colours, uint8 [H, W, 3], all of one size) as an image or a video, as the source is
    one. Whatever is raised, by `masks` too, leaves no file."""
    totals = np.zeros(len(PALETTE))
    frames, shape = 0, (0, 0)

    def counted() -> Iterator[np.ndarray]:
        nonlocal totals, frames, shape
        for mask in masks:
            if frames and mask.shape[:2] != shape:
                raise InputError(
                    f"Frame {frames} of {source.path} is {mask.shape[0]}x{mask.shape[1]}, but those before it are "
                    f"{shape[0]}x{shape[1]} (height x width): all must have one size."
                )
            shape = mask.shape[:2]
            step = max(1, min(shape) // _LOOKED_AT)
            seen = np.bincount(CLEAR_LABEL[codes(mask[::step, ::step])].ravel(), minlength=len(PALETTE))
            totals = totals + seen / seen.sum()
            frames += 1
            yield mask

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".masks") as folder:
        unfinished = Path(folder) / output.name
        try:
            if source.kind == "image":
                (picture,) = counted()  # to the end: a source is judged when all of it has been seen
                write_image(unfinished, picture)
            else:
                write_video(unfinished, counted(), source.frame_rate, timestamps=source.timestamps)
            os.replace(unfinished, output)
        except (OSError, av.FFmpegError) as error:
            raise Scail2Error(f"{output} could not be written ({error.strerror or error}).") from error
    shares = {name: share for name, share in zip(PALETTE, (totals / frames).tolist(), strict=True) if share}
    return WrittenMask(output, frames, *shape, shares)
