"""Masks from what other tools write: an alpha channel, a grey matte, or numbered labels.

Each function turns a source into mask frames: the character in its colour on the background that mode and role ask for.
Nothing is guessed: a source that has no alpha, no pixel above the threshold, colours where numbers are due, or a label
that the order does not name is refused. A label is bound to its colour by its number and not by its rank among those
that occur, so that a character keeps its colour in a picture that lacks another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.masks.cleaning import settle
from scail2_rt.runtime.masks.files import Source, frames_of
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE, PALETTE_RGB, RGB, UNCLEAR
from scail2_rt.runtime.masks.stats import REGION
from scail2_rt.runtime.media.images import load_alpha, load_image, load_labels

BACKGROUND = "background"
_COLOURFUL = 24  # spread between a pixel's channels above which it is no grey, after lossy coding too
_COLOUR_SHARE = 0.01
_LOSSY = 8  # levels that lossy coding may move a label by


@dataclass(frozen=True, slots=True)
class Matte:
    """A character's colour, what lies around it, and the 8-bit level from which on a pixel is the character's."""

    colour: str
    background: RGB
    threshold: int = 128
    invert: bool = False


def masks_from_alpha(source: Source, matte: Matte, tell: Tell = untold) -> Iterator[np.ndarray]:
    """Masks of an image, a video or a folder of images with transparency: the character is where it is opaque."""
    return _matted(source, frames_of(source, _alpha, tell, alpha=True), matte)


def _alpha(path: Path) -> np.ndarray:
    alpha = load_alpha(path)
    if alpha is None:
        raise InputError(
            f"{path} has no alpha channel: save it as PNG with transparency, or make a mask from a grey matte with "
            "`scail2-rt masks from-grey`."
        )
    return alpha


def masks_from_grey(source: Source, matte: Matte, tell: Tell = untold) -> Iterator[np.ndarray]:
    """Masks of a grey image, video or folder of images: the character is where it is bright (dark with `invert`)."""
    return _matted(source, (grey_levels(frame, source.path) for frame in frames_of(source, load_image, tell)), matte)


def grey_levels(frame: np.ndarray, path: Path) -> np.ndarray:
    """Levels uint8 [H, W] of a frame that is grey but for what lossy coding does."""
    r, g, b = (frame[..., i] for i in range(3))  # reductions over an axis of three are ten times slower
    low, high = np.minimum(r, g), np.maximum(r, g)
    spread = np.maximum(high, b) - np.minimum(low, b)
    if np.count_nonzero(spread > _COLOURFUL) > _COLOUR_SHARE * spread.size:
        raise InputError(
            f"{path} is in colour, and a matte is grey: if its colours stand for characters, use "
            "`scail2-rt masks clean` with --map R,G,B=COLOUR; if it has an alpha channel, `scail2-rt masks from-alpha`."
        )
    median: np.ndarray = np.maximum(low, np.minimum(high, b))
    return median


def _matted(source: Source, levels: Iterator[np.ndarray], matte: Matte) -> Iterator[np.ndarray]:
    brightest, darkest = 0, 255
    found = whole = False
    colours = np.array((matte.background, PALETTE[matte.colour]), np.uint8)
    for frame in levels:
        inside = (frame >= matte.threshold) != matte.invert
        found, whole = found or bool(inside.any()), whole or not inside.all()
        brightest, darkest = max(brightest, int(frame.max())), min(darkest, int(frame.min()))
        yield np.take(colours, inside.view(np.uint8), axis=0)
    if not (found and whole):
        raise InputError(
            f"{source.path} has levels from {darkest} to {brightest}, so a threshold of {matte.threshold} makes "
            f"{'all' if found else 'nothing'} of it the character: choose another --threshold, or a file that tells "
            "the character apart."
        )


def parse_order(text: str) -> dict[int, str]:
    """`red,green` (labels 1 and 2) or `128=red,255=background` → label → colour or `background`."""
    order: dict[int, str] = {}
    for position, part in enumerate(text.split(","), 1):
        number, equals, name = part.strip().rpartition("=")
        if equals and not number.strip().isdigit():
            raise InputError(f"--order {text!r}: {number!r} is not a label number; write it as in 1=red,2=green.")
        label = int(number) if equals else position
        if name not in (*CHARACTERS, BACKGROUND):
            raise InputError(f"--order {text!r}: {name!r} is none of {', '.join((*CHARACTERS, BACKGROUND))}.")
        if label in order:
            raise InputError(f"--order {text!r} gives the label {label} two colours.")
        if name != BACKGROUND and name in order.values():
            raise InputError(f"--order {text!r} gives two labels the colour {name}: one colour is one character.")
        order[label] = name
    return {0: BACKGROUND, **order}


def masks_from_labels(
    source: Source, order: Mapping[int, str], background: RGB, tell: Tell = untold
) -> Iterator[np.ndarray]:
    """Masks of an indexed or grey image, a folder of them, or a grey video, whose pixels are label numbers.

    Coding blurs the labels of a lossy video, and between 0 and 255 lies the label 128: there an area that is nowhere
    three pixels thick takes a label from around it."""
    known = np.array(sorted(order), np.int64)
    behind = next(name for name in ("white", "black") if PALETTE[name] == background)
    names = [behind if order[int(label)] == BACKGROUND else order[int(label)] for label in known]
    meaning = np.array([list(PALETTE).index(name) for name in names], np.uint8)  # of each known label
    gap = int(np.diff(known).min()) if len(known) > 1 else 2 * _LOSSY
    tolerance = min(_LOSSY, (gap - 1) // 2) if source.kind == "video" else 0
    found = False
    for number, frame in enumerate(frames_of(source, _labels, tell)):
        values = grey_levels(frame, source.path) if source.kind == "video" else frame
        numbers, at = _distinct(values)
        nearest = np.abs(numbers[:, None] - known).argmin(-1)
        off = np.abs(numbers - known[nearest])
        used = np.bincount(at.ravel(), minlength=len(numbers)) > 0
        if (off[used] > tolerance).any():
            _refuse_unknown(values.astype(np.int64), np.take(off > tolerance, at), source, number, order)
        found = found or any(order[int(known[i])] != BACKGROUND for i in np.unique(nearest[used]))
        labels = np.take(np.where(off > tolerance, UNCLEAR, meaning[nearest]).astype(np.uint8), at)
        if off[used].any():
            settle(labels, partial(_label_distances, values.astype(np.int64), known, meaning))
        yield np.take(PALETTE_RGB, labels, axis=0)
    if not found:
        raise InputError(
            f"{source.path} holds background only, no label of {_order_text(order)}: give the labels that it has with "
            "--order."
        )


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, int64 [n], and the place of each value among them, so that work is done per number and not per pixel."""
    if values.dtype.kind != "u":
        values = values.astype(np.int64)
    if values.min() >= 0 and values.max() < 1 << 16:
        return np.arange(int(values.max()) + 1), values
    numbers, at = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), at.reshape(values.shape)


def _label_distances(
    values: np.ndarray, known: np.ndarray, meaning: np.ndarray, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Of the values at (y, x), [n], to the labels that stand for each colour of the palette, [n, 8]."""
    distances = np.full((len(y), len(PALETTE)), np.inf)
    for label, colour in zip(known, meaning, strict=True):
        distances[:, colour] = np.minimum(distances[:, colour], np.abs(values[y, x] - label))
    return distances


def _labels(path: Path) -> np.ndarray:
    labels = load_labels(path)
    if labels is None:
        raise InputError(
            f"{path} is a colour picture, and labels are numbers (an indexed or a grey image): if its colours stand "
            "for characters, use `scail2-rt masks clean` with --map R,G,B=COLOUR."
        )
    return labels


def _refuse_unknown(
    values: np.ndarray, unknown: np.ndarray, source: Source, number: int, order: Mapping[int, str]
) -> None:
    """In an image no pixel may be of an unknown label; in a video edges may, after lossy coding, but no flat area."""
    if source.kind == "video":
        flat = np.zeros_like(unknown)
        middle = values[2:-2, 2:-2]
        around = (values[:-4, 2:-2], values[4:, 2:-2], values[2:-2, :-4], values[2:-2, 4:])
        flat[2:-2, 2:-2] = np.all([np.abs(middle - other) <= 2 for other in around], axis=0)
        unknown = unknown & flat
        if unknown.mean() < REGION:
            return
    if not unknown.any():
        return
    labels, counts = np.unique(values[unknown], return_counts=True)
    spread = _LOSSY if source.kind == "video" else 0
    shown: list[int] = []
    for label in labels[np.argsort(-counts)].tolist():
        if all(abs(label - other) > spread for other in shown):
            shown.append(label)
    at = "" if source.kind == "image" else f" in frame {number}"
    raise InputError(
        f"{source.path} holds labels{at} that --order does not name: {', '.join(map(str, shown[:8]))}. It names "
        f"{_order_text(order)}; say which colour each has, as in --order {shown[0]}=red, or {shown[0]}=background."
    )


def _order_text(order: Mapping[int, str]) -> str:
    return ", ".join(f"{label}={name}" for label, name in order.items())
