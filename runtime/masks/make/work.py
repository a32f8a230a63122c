"""Makes the masks: segments the reference image, tracks the driving clip frame by frame, and writes the files."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.progress import Cancelled, Listener, Progress
from scail2_rt.runtime.core.request import ClipSource
from scail2_rt.runtime.masks.make.figures import Cast, stretched
from scail2_rt.runtime.masks.make.folders import SegmenterFolder
from scail2_rt.runtime.masks.make.follow import ClipFollower, Figure, Looking, figures_in, not_found, present_in
from scail2_rt.runtime.masks.make.options import FIRST, IMAGE, MaskOptions
from scail2_rt.runtime.masks.make.pairs import Pairing
from scail2_rt.runtime.masks.make.ready import ready_labels, ready_masks
from scail2_rt.runtime.masks.make.segmenters import Segmenter, open_segmenter
from scail2_rt.runtime.masks.palette import PALETTE, Mode, background_of
from scail2_rt.runtime.masks.preview import Still, chosen_frames, contact_sheet
from scail2_rt.runtime.media.clips import open_video
from scail2_rt.runtime.media.lossless import write_image, write_video
from scail2_rt.runtime.media.video_reader import VideoInfo

IMAGE_NAME, SHEET_NAME = "ref_mask.png", "masks.png"
VIDEO_NAMES: dict[Mode, str] = {"animate": "rendered_mask_v2.mp4", "replace": "replace_mask.mp4"}
SHEET_FRAMES = 11
READ_AT_ONCE = 4
PHASE = "masks"


@dataclass(frozen=True, slots=True)
class Made:
    """Mask colours of the characters, and notes for the user."""

    characters: tuple[str, ...]
    notes: list[str]


class Work:
    """One run of making masks.

    picture    the reference image, uint8 [H, W, 3]
    video      properties of the driving clip
    listener   called with progress events
    cancel     once it is set, the next event raises `Cancelled`"""

    def __init__(
        self,
        picture: np.ndarray,
        driving: ClipSource,
        video: VideoInfo,
        options: MaskOptions,
        listener: Listener | None,
        cancel: threading.Event | None,
    ) -> None:
        self.picture, self.driving, self.video, self.options = picture, driving, video, options
        self.mode: Mode = options.resolved_mode
        self.used = options.used_of(video.frames)
        self._listener, self._cancel, self._began = listener, cancel, time.perf_counter()
        self.cast = Cast()

    def run(self, folder: SegmenterFolder | None, device: str, vram_limit: int | None, into: Path) -> Made:
        """Write the masks and the sheet into a folder. folder: the segmenter, None if both masks come from files.
        vram_limit: bytes. Raises InputError if no character is found or the device is unusable."""
        notes: list[str] = []
        segmenter = None
        self.tell(0)
        try:
            if folder is not None:
                segmenter = open_segmenter(folder, chosen_device(folder, device, vram_limit, notes))
            masks, colours = self._references(segmenter)
            pairing = Pairing(self.options, masks, colours)
            stills = self._clip(segmenter, pairing, into / VIDEO_NAMES[self.mode])
        finally:
            if segmenter is not None:
                segmenter.close()
            del segmenter
            free_memory()
        drawn = np.empty_like(self.picture)
        drawn[:] = background_of(self.mode, "reference")
        painted = pairing.references()
        for mask, colour in painted:
            drawn[mask] = PALETTE[colour]
        write_image(into / IMAGE_NAME, drawn)
        write_image(into / SHEET_NAME, contact_sheet([Still("reference", self.picture, drawn), *stills]))
        self.tell(self.used + 1)
        return Made(tuple(colour for _, colour in painted), [*notes, *pairing.notes, *self.cast.notes])

    def _references(self, segmenter: Segmenter | None) -> tuple[list[np.ndarray], list[str]]:
        """Masks, bool [H, W], of the characters of the reference image, and their requested colours."""
        options, size = self.options, self.picture.shape[:2]
        if options.image_from is not None:
            ready = ready_masks(options.image_from, options.max_characters, options.sort)
            masks = [stretched(mask, size) for mask in ready]
            if not masks:
                raise InputError(
                    f"{options.image_from} shows no character of at least 1 % of the image: give another file."
                )
            return masks, [""] * len(masks)
        assert segmenter is not None
        looking = self.looking(image=True)
        found = figures_in(self.picture, segmenter, looking, looking.places)
        if not found:
            raise InputError(not_found(looking))
        return _apart([figure.mask for figure in found]), [figure.colour for figure in found]

    def looking(self, image: bool) -> Looking:
        """What to look for in the reference image or the driving clip."""
        options = self.options
        places = tuple(place for place in options.places if (place.frame == IMAGE) == image)
        if not image:
            places = tuple(replace(place, frame=options.start) if place.frame == FIRST else place for place in places)
        where = "the reference image" if image else "the driving clip"
        return Looking(options.text_for(image), places, options.max_characters, options.sort, where)

    def _clip(self, segmenter: Segmenter | None, pairing: Pairing, output: Path) -> list[Still]:
        """Write the mask video. Returns the frames for the sheet. Unused frames show background only."""
        video, wanted = self.video, set(chosen_frames(self.used, SHEET_FRAMES, frozenset()))
        background = background_of(self.mode, "driving")
        empty = np.full((video.height, video.width, 3), background, np.uint8)
        stills: list[Still] = []

        def coloured() -> Iterator[np.ndarray]:
            yield from repeat(empty, self.options.start)
            for number, (picture, labels) in enumerate(self._labelled(segmenter, pairing)):
                table = np.tile(np.array(background, np.uint8), (256, 1))
                for character in self.cast.characters.values():
                    if (colour := pairing.colour_of(character)) is not None:
                        table[character.number] = PALETTE[colour]
                mask = table[labels]
                if number in wanted:
                    stills.append(Still(f"frame {self.options.start + number}", picture, mask))
                self.tell(number + 1)
                yield mask
            yield from repeat(empty, video.frames - self.options.start - self.used)

        write_video(output, coloured(), video.frame_rate, timestamps=video.timestamps or None)
        return stills

    def _labelled(self, segmenter: Segmenter | None, pairing: Pairing) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the used frames, uint8 [H, W, 3], and their labels, uint8 [H, W]."""
        options, size = self.options, (self.video.height, self.video.width)
        if options.driving_from is not None:
            for labels, picture in zip(self._ready(options.driving_from, pairing, size), self._frames(), strict=True):
                yield picture, labels
            return
        assert segmenter is not None

        def begun(figures: list[Figure]) -> None:
            pairing.begin(_apart([figure.mask for figure in figures]), [figure.colour for figure in figures])
            for character in self.cast.characters.values():
                character.colour = pairing.colour_of(character) or ""

        follower = ClipFollower(segmenter, self.looking(image=False), pairing.count, self.cast, begun, options.start)
        yield from follower.labelled(self._frames())

    def _ready(self, path: Path, pairing: Pairing, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the labels, uint8 [H, W], of the used frames from a file of another tool. Raises InputError unless the
        file covers the complete clip, or ends with the last used frame, and shows a character in the used frames."""
        count = 0
        options = self.options
        made = ready_labels(path, options.max_characters, options.sort)
        for number, labels in enumerate(made):
            if not options.start <= number < options.start + self.used:
                count += 1
                continue
            labels, count = stretched(labels, size), count + 1
            present = present_in(labels)
            if present and not self.cast.characters:
                self._enter(number, max(present))
                pairing.begin([labels == each for each in range(1, max(present) + 1)], [""] * max(present))
            self._enter(number, max(present, default=0))
            yield labels
        if count not in (self.video.frames, options.start + self.used):
            raise InputError(
                f"{path} has {counted(count, 'frame')} and the driving clip {self.video.frames}: "
                "make the masks from this clip."
            )
        if not self.cast.characters:
            raise InputError(f"{path} shows no character in the used frames: choose other frames, or another file.")

    def _enter(self, frame: int, last: int) -> None:
        """Add characters up to the number `last`. Their appearance is not used."""
        for _ in range(len(self.cast.characters), last):
            self.cast.enter(frame, self.picture[:1, :1], np.ones((1, 1), bool))

    def _frames(self) -> Iterator[np.ndarray]:
        """The used frames of the driving clip."""
        remaining = self.used
        with open_video(self.driving, self.options.start) as reader:
            while remaining and len(frames := reader.read(min(READ_AT_ONCE, remaining))):
                remaining -= len(frames)
                yield from frames

    def tell(self, done: int) -> None:
        """Report the number of finished frames. Raises Cancelled once `cancel` is set."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("Making masks was cancelled.")
        if self._listener is not None:
            share = min(done / (self.used + 1), 1.0)
            seconds = time.perf_counter() - self._began
            self._listener(
                Progress(PHASE, fraction=share, seconds_left=seconds / share * (1 - share) if done else None)
            )


def chosen_device(folder: SegmenterFolder, device: str, vram_limit: int | None, notes: list[str]) -> str:
    """ "cuda" or "cpu" for the requested device: cpu, cuda, or auto, which uses the GPU if the segmenter fits into
    `vram_limit` (bytes). Raises InputError if the GPU is requested and cannot be used."""
    import torch

    fits = vram_limit is None or folder.memory_bytes <= vram_limit
    needs = f"{folder.name} needs about {folder.memory_bytes / 2**30:.1f} GiB"
    if device == "auto":
        if torch.cuda.is_available() and not fits:
            notes.append(f"{needs}, more than --vram-limit: masks were made on the CPU.")
        return "cuda" if torch.cuda.is_available() and fits else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("There is no GPU for --segmenter-device cuda: leave it out to make masks on the CPU.")
    if device == "cuda" and not fits:
        raise InputError(f"{needs}, more than --vram-limit: raise it, or use --segmenter-device cpu.")
    return device


def free_memory() -> None:
    """Release unreferenced objects, and cached GPU memory of PyTorch."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _apart(masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Remove overlaps of masks. A pixel in several masks stays in the smallest, which is in front of the larger
    ones."""
    order = sorted(range(len(masks)), key=lambda i: int(masks[i].sum()))
    taken = np.zeros_like(masks[0])
    found = list(masks)
    for i in order:
        found[i] = masks[i] & ~taken
        taken |= masks[i]
    return found
