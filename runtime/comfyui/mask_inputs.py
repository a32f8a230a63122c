"""Converts mask inputs of a graph to frames of a colour mask, a few frames at a time when they are read.

    IMAGE, VIDEO     already colour-coded: used unchanged, except for the background if requested
    MASK             a matte of one character, 1 inside and 0 outside
    SAM3_TRACK_DATA  SAM 3's characters, one bit per pixel; they get colours in the palette's order
    SCAIL2_MASK      output of the Masks node

A track is a dict: `packed_masks` uint8 [T, N, h, w/8] (bit i of a byte is the i-th of its eight pixels; None if no
character was found), `orig_size` (H, W) and `n_frames`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.comfyui.clip_inputs import file_of
from scail2_rt.runtime.comfyui.frames import TensorFrames, one_by_one, to_levels
from scail2_rt.runtime.masks.make.options import AUTHORS_ORDER as ORDER
from scail2_rt.runtime.masks.make.ready import ON, unpacked
from scail2_rt.runtime.masks.palette import MODEL_LABEL, OFF_BELOW, PALETTE, RGB, Mode, background_of, codes
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video

SORTS = ("left-to-right", "area", "none")


@dataclass(frozen=True, slots=True, eq=False)
class MaskFrames:
    """Colour masks that are computed when they are read. They can be the frames of a `Clip`.

    shape       (T, H, W, 3)
    make        (first, last) → uint8 [last - first, H, W, 3]
    described   description of their source, for messages"""

    shape: tuple[int, int, int, int]
    make: Callable[[int, int], np.ndarray]
    described: str

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, int):
            return self.make(range(len(self))[index], range(len(self))[index] + 1)[0]
        first, last, _ = index.indices(len(self))
        return self.make(first, max(first, last))

    def __iter__(self) -> Iterator[np.ndarray]:
        return one_by_one(self)


@dataclass(frozen=True, slots=True)
class MaskStyle:
    """Options for the conversion.

    background   RGB of the background
    repaint      also replace the background of colour-coded images
    colour       colour of the character in a matte
    sort         order in which the characters of a track get colours, one of `SORTS`
    figures      indices, in that order, of the characters to use; empty: all"""

    background: RGB = PALETTE["black"]
    repaint: bool = False
    colour: str = ORDER[0]
    sort: str = SORTS[0]
    figures: tuple[int, ...] = ()

    @classmethod
    def pair(cls, mode: str, **others: Any) -> "tuple[MaskStyle, MaskStyle]":
        """The styles of reference mask and driving mask, with the backgrounds of the mode (`auto` means animate)."""
        resolved: Mode = "replace" if mode == "replace" else "animate"
        return cls(background_of(resolved, "reference"), **others), cls(background_of(resolved, "driving"), **others)


def mask_frames(source: Any, style: MaskStyle, name: str) -> MaskFrames:
    """The colour masks of a connected input. Raises InputError that mentions `name` for an unsupported type."""
    if isinstance(source, MaskFrames):
        return source
    if isinstance(source, dict):
        return _of_track(source, style, name)
    if hasattr(source, "get_components"):
        path = file_of(source)
        return _of_picture(source.get_components().images, style, name) if path is None else frames_of_file(path, style)
    if not hasattr(source, "ndim"):
        raise InputError(f"The {name} is a {type(source).__name__}. Connect IMAGE, VIDEO, MASK or SAM3_TRACK_DATA.")
    return _of_matte(source, style, name) if source.ndim in (2, 3) else _of_picture(source, style, name)


def _of_picture(images: Any, style: MaskStyle, name: str) -> MaskFrames:
    frames = TensorFrames(images, name)
    return MaskFrames(frames.shape, lambda first, last: _styled(frames[first:last], style), "colour-coded images")


def frames_of_file(path: Path, style: MaskStyle) -> MaskFrames:
    """The colour masks of a video file. Consecutive reads continue; other reads open the file again. Raises InputError
    if it is not a video."""
    info = probe_video(path)
    reader = VideoReader(path)

    def make(first: int, last: int) -> np.ndarray:
        nonlocal reader
        if reader.position != first:
            reader.close()
            reader = VideoReader(path, first)
        return _styled(reader.read(last - first), style)

    return MaskFrames((info.frames, info.height, info.width, 3), make, f"colour-coded frames of {path.name}")


def _styled(masks: np.ndarray, style: MaskStyle) -> np.ndarray:
    return _repainted(masks, style.background) if style.repaint else masks


def _repainted(masks: np.ndarray, background: RGB) -> np.ndarray:
    """Replace white and black pixels by the background; keep characters and pixels of no class. uint8 [n, H, W, 3]."""
    around = (MODEL_LABEL[codes(masks)] == 0) | (masks <= OFF_BELOW).all(-1)
    return np.where(around[..., None], np.array(background, np.uint8), masks)


def _of_matte(matte: Any, style: MaskStyle, name: str) -> MaskFrames:
    matte = matte[None] if matte.ndim == 2 else matte
    if 0 in matte.shape:
        raise InputError(f"The {name} has the shape {list(matte.shape)}. Connect a MASK, [frames, H, W].")
    colour, background = _colours(style)

    def make(first: int, last: int) -> np.ndarray:
        inside = to_levels(matte[first:last]).numpy() >= ON
        return np.where(inside[..., None], colour[ORDER.index(style.colour)], background)

    return MaskFrames((*matte.shape, 3), make, f"a matte of one character ({style.colour})")


def _colours(style: MaskStyle) -> tuple[np.ndarray, np.ndarray]:
    """uint8 colours: [6, 3] of the characters and [3] of the background."""
    return np.array([PALETTE[name] for name in ORDER], np.uint8), np.array(style.background, np.uint8)


def _of_track(track: dict[str, Any], style: MaskStyle, name: str) -> MaskFrames:
    packed: Any = track.get("packed_masks")
    bits = np.asarray(packed.cpu() if hasattr(packed, "cpu") else packed)
    if packed is None or (bits.ndim == 4 and not bits.shape[1]):
        raise InputError(f"The {name} is a track without a character. Change SAM 3's prompt or threshold.")
    if bits.dtype != np.uint8 or bits.ndim != 4 or not bits.size:
        raise InputError(f"packed_masks of the {name} must be uint8 [T, N, h, w], not {bits.dtype} {list(bits.shape)}.")
    try:
        height, width = size = tuple(int(side) for side in track.get("orig_size", _own_size(bits)))
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise InputError(f"The orig_size of the {name} must be (H, W) of its frames, not {track['orig_size']}.")
    order = _chosen(bits, style, name)
    rows, columns = (np.arange(side) * own // side for side, own in zip(size, _own_size(bits), strict=True))
    colours, background = _colours(style)

    def make(first: int, last: int) -> np.ndarray:
        made = np.empty((last - first, *size, 3), np.uint8)
        for frame, out in zip(bits[first:last], made, strict=True):
            masks = unpacked(frame)[order][:, rows][:, :, columns]
            covered: np.ndarray = np.logical_or.reduce(masks)
            out[:] = np.where(covered[..., None], colours[masks.argmax(0)], background)
        return made

    return MaskFrames((len(bits), *size, 3), make, f"a track of {counted(len(order), 'character')}")  # type: ignore[arg-type]


def _own_size(bits: np.ndarray) -> tuple[int, int]:
    return bits.shape[2], 8 * bits.shape[3]


def _chosen(bits: np.ndarray, style: MaskStyle, name: str) -> list[int]:
    """The indices of the track's characters in the order of their colours. Raises InputError for an unknown index and
    for more than six characters."""
    first = unpacked(bits[0])
    order = sorted(range(len(first)), key=_key(first, style.sort))
    unknown = [figure for figure in style.figures if figure >= len(order)]
    if unknown:
        raise InputError(f"figures contains {unknown[0]}; the {name} has 0 to {len(order) - 1}. Leave it out.")
    chosen = [order[figure] for figure in style.figures] if style.figures else order
    if len(chosen) > len(ORDER):
        raise InputError(
            f"The {name} has {len(chosen)} characters, but there are six colours. Set figures to those to use, as in "
            "0,1, or track fewer."
        )
    return chosen


def _key(masks: np.ndarray, sort: str) -> Callable[[int], float]:
    """The sort key of a character: its mean column in the first frame (characters that appear later come last), or its
    negative area there. masks: bool [N, h, w] of the first frame."""
    if sort == "none":
        return float
    if sort == "area":
        return lambda i: -float(masks[i].sum())
    columns = np.arange(masks.shape[-1])
    return lambda i: float((masks[i] * columns).sum() / total) if (total := masks[i].sum()) else float("inf")


def parse_figures(text: str) -> tuple[int, ...]:
    """`0,2` → (0, 2); an empty text → (). Raises InputError for anything that is not a number."""
    parts: Sequence[str] = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise InputError(f"figures must be a list of numbers such as 0,2; {wrong[0]!r} is not a number.")
    return tuple(int(part) for part in parts)
