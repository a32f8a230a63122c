"""Reads the sources of masks frame by frame, and writes masks losslessly.

A source is an image, a video or a folder of images: the frames of a clip, as segmentation tools write them, sorted by
the numbers in their names. `media.lossless` writes the files. A file is renamed to its final name when it is complete.
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
from scail2_rt.runtime.media.images import images_in, is_image
from scail2_rt.runtime.media.lossless import write_image, write_video
from scail2_rt.runtime.media.output_path import check_place, check_writable
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video

_FRAMES_AT_ONCE = 8
_SAMPLED = 256  # rows or columns of a mask that are sampled for the shares of its colours


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a mask. `timestamps` are presentation times in seconds if the rate of a video varies, else None."""

    path: Path
    kind: Literal["image", "video", "folder"]
    frame_rate: Fraction = Fraction(25)
    timestamps: tuple[Fraction, ...] | None = None


@dataclass(frozen=True, slots=True)
class WrittenMask:
    """A mask that was written. `shares`: mean share, 0 to 1, of each colour that occurs."""

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
    """Open a source. `frame_rate`: of a folder of images, None: 25. Raises InputError if the source cannot be read, or
    if `frame_rate` is given for a file."""
    if path.is_dir():
        if not images_in(path):
            raise InputError(f"The folder {path} holds no image: give an image, a video, or a folder of frames.")
        return Source(path, "folder", frame_rate or Fraction(25))
    if frame_rate is not None:
        raise InputError(f"--fps is for a folder of images, and {path} is a file: leave it out.")
    if is_image(path):
        return Source(path, "image")
    video = probe_video(path, tell)
    return Source(path, "video", video.frame_rate, video.timestamps)


def frames_of(
    source: Source, load: Callable[[Path], np.ndarray], tell: Tell = untold, alpha: bool = False
) -> Iterator[np.ndarray]:
    """The frames of a source in order. A video gives RGB uint8 [H, W, 3], or with `alpha` its alpha channel uint8 [H,
    W]. For images, `load` reads each file. `tell` is called with the finished share. Raises InputError if a file cannot
    be read."""
    if source.kind == "image":
        yield load(source.path)
    elif source.kind == "folder":
        files = images_in(source.path)
        for number, file in enumerate(files, 1):
            yield load(file)
            tell(number / len(files))
    else:
        with VideoReader(source.path, tell=tell, alpha=alpha) as reader:
            while len(frames := reader.read(_FRAMES_AT_ONCE)):
                yield from frames


def check_output(output: Path, source: Source, overwrite: bool) -> None:
    """Raise InputError unless a mask made from the source can be written at `output`."""
    if output.exists() and output.resolve() == source.path.resolve():
        raise InputError(f"The output {output} is the input: choose another name with -o.")
    check_new(output, ".png" if source.kind == "image" else ".mp4", overwrite)


def check_new(output: Path, ending: str, overwrite: bool) -> None:
    """Raise InputError unless a file with this ending, `.png` or `.mp4`, can be written at `output`."""
    if ending == ".png":
        if output.suffix.lower() != ending:
            raise InputError(f"The output {output} must end in .png: mask images are stored losslessly.")
        check_place(output)
    else:
        check_writable(output, endings=MP4_ENDINGS)
    if output.exists() and not overwrite:
        raise InputError(f"The output {output} exists: choose another name with -o, or use --overwrite to replace it.")


def write_mask(output: Path, source: Source, masks: Iterable[np.ndarray]) -> WrittenMask:
    """Write mask frames (mask colours, uint8 [H, W, 3]) as an image if the source is one, else as a video.

    Raises InputError if the frames differ in size, and Scail2Error if the file cannot be written. No file remains after
    an error, including one raised by `masks`."""
    totals = np.zeros(len(PALETTE))
    frames, shape = 0, (0, 0)

    def checked() -> Iterator[np.ndarray]:
        nonlocal totals, frames, shape
        for mask in masks:
            if frames and mask.shape[:2] != shape:
                raise InputError(
                    f"Frame {frames} of {source.path} is {mask.shape[0]}x{mask.shape[1]}, but the frames before it are "
                    f"{shape[0]}x{shape[1]} (height x width): make all frames one size."
                )
            shape = mask.shape[:2]
            step = max(1, min(shape) // _SAMPLED)
            seen = np.bincount(CLEAR_LABEL[codes(mask[::step, ::step])].ravel(), minlength=len(PALETTE))
            totals = totals + seen / seen.sum()
            frames += 1
            yield mask

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".masks") as folder:
        unfinished = Path(folder) / output.name
        try:
            if source.kind == "image":
                (picture,) = checked()  # reads to the end, where sources raise their errors
                write_image(unfinished, picture)
            else:
                write_video(unfinished, checked(), source.frame_rate, timestamps=source.timestamps)
            os.replace(unfinished, output)
        except (OSError, av.FFmpegError) as error:
            raise Scail2Error(
                f"{output} could not be written ({error.strerror or error}): choose another output with -o."
            ) from error
    shares = {name: share for name, share in zip(PALETTE, (totals / frames).tolist(), strict=True) if share}
    return WrittenMask(output, frames, *shape, shares)
