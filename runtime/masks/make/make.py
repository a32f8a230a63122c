"""`make_masks`: makes the masks of a reference image and a driving clip, and a contact sheet of them.

First, everything is checked that needs no network. Then the segmenter is opened, the reference image is segmented by
the video tracker as a clip of one frame, the driving clip is tracked frame by frame while its mask is written, and the
segmenter is released. At the end all files are renamed to their final names, together with a record of their inputs.
The same request reuses them.
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
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import ClipSource, ImageSource, as_path
from scail2_rt.runtime.masks.make.folders import SegmenterFolder, find_segmenter
from scail2_rt.runtime.masks.make.options import FIRST, IMAGE, MaskOptions
from scail2_rt.runtime.masks.make.record import RECORD, fingerprint, recorded
from scail2_rt.runtime.masks.make.segmenters import import_networks
from scail2_rt.runtime.masks.make.work import IMAGE_NAME, SHEET_NAME, VIDEO_NAMES, Work
from scail2_rt.runtime.masks.palette import Mode
from scail2_rt.runtime.media.clips import check_start, probe, rereadable
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.video_reader import VideoInfo


@dataclass(frozen=True, slots=True)
class Masks:
    """Masks that were made.

    characters   mask colours of the characters
    notes        sentences for the user about decisions
    segmenter    name of the segmenter
    reused       the files already existed, from the same inputs and options
    seconds      duration"""

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
        """One line about the masks."""
        who = ", ".join(self.characters)
        how = "made before" if self.reused else f"made in {self.seconds:.1f} s with {self.segmenter}"
        return (
            f"masks for {self.mode}: {counted(len(self.characters), 'character')}, {who}; {how}; look at {self.sheet}"
        )


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
    """Make masks for an image and a clip, given as in `Request`, and write them into `directory`.

    device        cpu, cuda, or auto: the GPU if there is one and the segmenter fits into `vram_limit`
    vram_limit    bytes of GPU memory
    on_progress   called with each event
    cancel        once it is set, `Cancelled` is raised

    Raises InputError for unusable inputs or options, and Scail2Error if the files cannot be written. No files remain
    after an error."""
    began, options, folder = time.perf_counter(), options or MaskOptions(), Path(directory)
    image, driving = as_path(image), rereadable(as_path(driving), "driving clip")
    plan = plan_masks(image, driving, folder, options)
    if plan.there is not None:
        return plan.there
    work = Work(load_image(image), driving, plan.video, options, on_progress, cancel)
    if plan.segmenter is not None:
        import_networks(plan.segmenter)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".masks") as unfinished:
            made = work.run(plan.segmenter, device, vram_limit, Path(unfinished))
            names = (IMAGE_NAME, VIDEO_NAMES[options.resolved_mode], SHEET_NAME)
            masks = Masks(
                mask_image=folder / names[0],
                mask_video=folder / names[1],
                sheet=folder / names[2],
                mode=options.resolved_mode,
                characters=made.characters,
                notes=tuple(made.notes),
                segmenter=plan.segmenter.name if plan.segmenter else "the files given",
                seconds=time.perf_counter() - began,
            )
            fields = {name: _plain(getattr(masks, name)) for name in Masks.__slots__}
            record = json.dumps({"identity": plan.identity, "masks": fields}, indent=1)
            (Path(unfinished) / RECORD).write_text(record + "\n", encoding="utf-8")
            (folder / RECORD).unlink(missing_ok=True)
            for name in (*names, RECORD):
                os.replace(Path(unfinished) / name, folder / name)
    except BaseException as error:
        if new:
            with contextlib.suppress(OSError):  # not empty: another process writes into it
                folder.rmdir()
        if isinstance(error, OSError):
            raise Scail2Error(
                f"Masks could not be written to {folder} ({error}): "
                "free some space, change its permissions, or choose another -o."
            ) from error
        raise
    return masks


@dataclass(frozen=True, slots=True, eq=False)
class MaskPlan:
    """What `make_masks` will do.

    segmenter   None if both masks are made from files of other tools
    frames      number of frames that are used
    identity    fingerprint of inputs and options
    there       masks that were made from the same inputs and options"""

    directory: Path
    segmenter: SegmenterFolder | None
    video: VideoInfo
    frames: int
    identity: dict[str, Any]
    there: Masks | None

    @property
    def text(self) -> str:
        frames = counted(self.frames, "frame")
        if self.there is not None:
            return f"masks: reused from {self.directory}, made from the same files and options"
        if self.segmenter is None:
            return f"masks: made from the given files, {frames}, into {self.directory}"
        memory = f"about {self.segmenter.memory_bytes / 2**30:.1f} GiB (an estimate)"
        return (
            f"masks: made first, {frames} with {self.segmenter.name} in {self.segmenter.model}, into {self.directory}; "
            f"needs {memory} of memory, released before the engines run"
        )


def plan_masks(image: ImageSource, driving: ClipSource, directory: Path, options: MaskOptions) -> MaskPlan:
    """Check everything that needs no network. Raises InputError for unusable inputs or options."""
    segmenter = segmenter_for(options)
    for ready in (options.image_from, options.driving_from):
        if ready is not None and not ready.exists():
            raise InputError(f"{ready} does not exist: give a SAM3_TRACK_DATA file, a matte or an image with alpha.")
    picture, video = load_image(image), probe(driving)
    check_start(options.start, video.frames, None)
    used = options.used_of(video.frames)
    check_places(options, picture.shape[:2], video)
    identity = fingerprint(image, driving, options, segmenter)
    fields = recorded(directory, identity)
    existing = None if fields is None or set(fields) != set(Masks.__slots__) else replace(Masks(**fields), reused=True)
    return MaskPlan(directory, segmenter, video, used, identity, existing)


def segmenter_for(options: MaskOptions) -> SegmenterFolder | None:
    """The segmenter to use; None if both masks are made from files of other tools. Raises InputError if there is none,
    or if it cannot detect characters by text and none are marked."""
    if options.image_from is not None and options.driving_from is not None:
        return None
    folder = find_segmenter(options.segmenter, options.weights)
    for image in (True, False):
        ready = options.image_from if image else options.driving_from
        asks = options.text_for(image) is not None
        if ready is None and asks and folder.name == "sam2" and folder.detector is None:
            raise InputError(
                f"{folder.model} holds SAM 2 without Grounding DINO, so characters must be marked: use --point or "
                f"--box for the {'reference image (image:x,y)' if image else 'driving clip'}, "
                "or put Grounding DINO into its subfolder `detector`."
            )
    return folder


def check_places(options: MaskOptions, size: tuple[int, int], video: VideoInfo) -> None:
    """Raise InputError for a point or box outside its image, or in a frame that is not used."""
    end = options.start + options.used_of(video.frames)
    for place in options.places:
        if place.frame == IMAGE:
            place.check_inside(size, "the reference image")
            continue
        frame = options.start if place.frame == FIRST else place.frame
        if not options.start <= frame < end:
            raise InputError(
                f"A --point or --box is in frame {frame}: use one of the frames {options.start} to {end - 1}."
            )
        place.check_inside((video.height, video.width), "the driving clip")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return value.name
    return list(value) if isinstance(value, tuple) else value
