"""`make_masks`: from a reference image and a driving clip to the two colour masks, and a sheet that shows them.

The order: everything that can be said without a network is checked; the segmenter is opened; the reference image goes
through the video tracker as a clip of one frame; the clip is followed frame by frame, its mask written as it comes; the
segmenter is dropped. The files appear together when all are done, with a record of what they were made from, and are
taken as they are when the same is asked for again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import ClipSource, ImageSource
from scail2_rt.runtime.masks.make.folders import SegmenterFolder, find_segmenter
from scail2_rt.runtime.masks.make.options import FIRST, IMAGE, MaskOptions
from scail2_rt.runtime.masks.make.record import RECORD, fingerprint, recorded
from scail2_rt.runtime.masks.make.segmenters import import_networks
from scail2_rt.runtime.masks.make.work import IMAGE_NAME, SHEET_NAME, VIDEO_NAMES, Work
from scail2_rt.runtime.masks.palette import Mode
from scail2_rt.runtime.media.clips import probe, rereadable
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.video_reader import VideoInfo


@dataclass(frozen=True, slots=True)
class Masks:
    """Masks that were made. characters: their colours; notes: sentences about what was decided; reused: they were there
    already, from the same inputs and options."""

    mask_image: Path
    mask_video: Path
    sheet: Path
    mode: Mode
    characters: tuple[str, ...]
    notes: tuple[str, ...] = ()
    segmenter: str = ""
    reused: bool = False
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """For people."""
        who = ", ".join(self.characters)
        how = "made before" if self.reused else f"made in {self.seconds:.1f} s with {self.segmenter}"
        return f"masks for {self.mode}: {len(self.characters)} character(s), {who}; {how}; look at {self.sheet}"


def make_masks(
    image: ImageSource,
    driving: ClipSource,
    directory: Path | str,
    options: MaskOptions | None = None,
    *,
    device: str = "auto",
    vram_limit: int | None = None,
    on_progress: Listener | None = None,
    cancel: threading.Event | None = None,
) -> Masks:
    """Masks for an image and a clip (as those of `Request`), written into `directory`.

    device: cpu, cuda, or auto, which takes the GPU where there is one and `vram_limit` (bytes) lets the segmenter in.
    InputError for what cannot be done, `Cancelled` once `cancel` is set; both leave nothing behind."""
    began, options, folder = time.perf_counter(), options or MaskOptions(), Path(directory)
    image, driving = _as_path(image), rereadable(_as_path(driving), "driving video")
    asked = plan_masks(image, driving, folder, options)
    if asked.there is not None:
        return asked.there
    work = Work(load_image(image), driving, asked.video, options, on_progress, cancel)
    if asked.segmenter is not None:
        import_networks(asked.segmenter)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".masks") as unfinished:
            made = work.run(asked.segmenter, device, vram_limit, Path(unfinished))
            names = (IMAGE_NAME, VIDEO_NAMES[options.resolved_mode], SHEET_NAME)
            masks = Masks(
                mask_image=folder / names[0],
                mask_video=folder / names[1],
                sheet=folder / names[2],
                mode=options.resolved_mode,
                characters=made.characters,
                notes=tuple(made.notes),
                segmenter=asked.segmenter.name if asked.segmenter else "the files given",
                seconds=time.perf_counter() - began,
            )
            fields = {name: _plain(getattr(masks, name)) for name in Masks.__slots__}
            record = json.dumps({"identity": asked.identity, "masks": fields}, indent=1)
            (Path(unfinished) / RECORD).write_text(record + "\n", encoding="utf-8")
            (folder / RECORD).unlink(missing_ok=True)
            for name in (*names, RECORD):
                os.replace(Path(unfinished) / name, folder / name)
    except BaseException as error:
        if new:
            with contextlib.suppress(OSError):  # not empty: somebody else writes there
                folder.rmdir()
        if isinstance(error, OSError):
            raise Scail2Error(
                f"Masks could not be written to {folder} ({error}): make room, give the right to write there, or "
                "choose another -o."
            ) from error
        raise
    return masks


@dataclass(frozen=True, slots=True, eq=False)
class MaskPlan:
    """What making masks would do. segmenter: None where both are cut out already; there: masks of an earlier time, made
    of the same; frames: how many are followed."""

    directory: Path
    segmenter: SegmenterFolder | None
    video: VideoInfo
    frames: int
    identity: dict[str, Any]
    there: Masks | None

    @property
    def text(self) -> str:
        if self.there is not None:
            return f"masks: those in {self.directory} are of these files and options, and are taken"
        if self.segmenter is None:
            return f"masks: made of the figures that were given, {self.frames} frames, into {self.directory}"
        memory = f"about {self.segmenter.memory_bytes / 2**30:.1f} GiB (an estimate)"
        return (
            f"masks: made first, {self.frames} frames with {self.segmenter.name} in {self.segmenter.model}, which "
            f"takes {memory} and leaves before the engines need it, into {self.directory}"
        )


def plan_masks(image: ImageSource, driving: ClipSource, directory: Path, options: MaskOptions) -> MaskPlan:
    """Everything that can be said without a network. InputError for what cannot be done."""
    segmenter = segmenter_for(options)
    for ready in (options.image_from, options.driving_from):
        if ready is not None and not ready.exists():
            raise InputError(f"{ready} does not exist: give a SAM3_TRACK_DATA file, a matte or an image with alpha.")
    picture, video = load_image(image), probe(driving)
    used = options.used_of(video.frames)
    if not used:
        raise InputError(
            f"--start {options.start} is beyond the end of the driving video, whose frames are 0 to {video.frames - 1}."
        )
    check_places(options, picture.shape[:2], video)
    identity = fingerprint(image, driving, options, segmenter)
    there = recorded(directory, identity)
    masks = None if there is None or set(there) != set(Masks.__slots__) else replace(Masks(**there), reused=True)
    return MaskPlan(directory, segmenter, video, used, identity, masks)


def segmenter_for(options: MaskOptions) -> SegmenterFolder | None:
    """The folder that will be used; None where both masks are given as files. InputError where none is there."""
    if options.image_from is not None and options.driving_from is not None:
        return None
    folder = find_segmenter(options.segmenter, options.weights)
    for image in (True, False):
        ready = options.image_from if image else options.driving_from
        asks = options.text_for(image) is not None
        if ready is None and asks and folder.name == "sam2" and folder.detector is None:
            raise InputError(
                f"{folder.model} holds SAM 2 without Grounding DINO, so figures must be shown: give --point or --box "
                f"for the {'reference image (image:x,y)' if image else 'clip'}, or put Grounding DINO into its folder "
                "`detector`."
            )
    return folder


def check_places(options: MaskOptions, size: tuple[int, int], video: VideoInfo) -> None:
    """InputError for a point or box outside its picture, or in a frame that is not used."""
    end = options.start + options.used_of(video.frames)
    for place in options.places:
        if place.frame == IMAGE:
            place.check_inside(size, "the reference image")
            continue
        frame = options.start if place.frame == FIRST else place.frame
        if not options.start <= frame < end:
            raise InputError(
                f"A --point or --box is in frame {frame}; the frames used are {options.start} to {end - 1}."
            )
        place.check_inside((video.height, video.width), "the driving video")


def _as_path(source: Any) -> Any:
    return Path(source) if isinstance(source, str | os.PathLike) else source


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return value.name
    return list(value) if isinstance(value, tuple) else value
