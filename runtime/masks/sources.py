"""Converts the output of other tools to masks: an alpha channel, a grey matte, or label numbers.

Each function converts a source to mask frames that show a character in its colour on a background. Sources without
alpha, without pixels above the threshold, with colours instead of labels, or with labels that `--order` does not name
are refused. The colour of a label depends on its number and not on the labels that occur, so a character keeps its
colour if another one is missing.
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
_COLOURFUL = 24  # difference of a pixel's channels above which it is not grey, even after lossy coding
_COLOUR_SHARE = 0.01  # share of such pixels above which a frame is in colour
_LOSSY = 8  # levels by which lossy coding may change a label


@dataclass(frozen=True, slots=True)
class Matte:
    """How a matte becomes a mask: pixels with an 8-bit level of at least `threshold` (below it with `invert`) get the
    mask colour `colour`, the others get the RGB `background`."""

    colour: str
    background: RGB
    threshold: int = 128
    invert: bool = False


def masks_from_alpha(source: Source, matte: Matte, tell: Tell = untold) -> Iterator[np.ndarray]:
    """Yield mask frames, uint8 [H, W, 3], of an image, a video or a folder of images with transparency. The character
    is where it is opaque. Raises InputError if there is no alpha, or if all pixels or none are the character's."""
    return _matted(source, frames_of(source, _alpha, tell, alpha=True), matte)


def _alpha(path: Path) -> np.ndarray:
    alpha = load_alpha(path)
    if alpha is None:
        raise InputError(
            f"{path} has no alpha channel: "
            "save it as PNG with transparency, or make a mask from a grey matte with `scail2-rt masks from-grey`."
        )
    return alpha


def masks_from_grey(source: Source, matte: Matte, tell: Tell = untold) -> Iterator[np.ndarray]:
    """Yield mask frames, uint8 [H, W, 3], of a grey image, video or folder of images. The character is where it is
    bright (dark with `invert`). Raises InputError if it is in colour, or if all pixels or none are the character's."""
    return _matted(source, (grey_levels(frame, source.path) for frame in frames_of(source, load_image, tell)), matte)


def grey_levels(frame: np.ndarray, path: Path) -> np.ndarray:
    """The levels, uint8 [H, W], of a grey frame, uint8 [H, W, 3]: the median of the channels. Raises InputError, which
    mentions `path`, if the frame is in colour."""
    r, g, b = (frame[..., i] for i in range(3))  # ten times faster than reductions over an axis of three
    low, high = np.minimum(r, g), np.maximum(r, g)
    spread = np.maximum(high, b) - np.minimum(low, b)
    if np.count_nonzero(spread > _COLOURFUL) > _COLOUR_SHARE * spread.size:
        raise InputError(
            f"{path} is in colour, and a matte is grey: if its colours mean characters, use `scail2-rt masks clean` "
            "with --map R,G,B=COLOUR; if it has an alpha channel, use `scail2-rt masks from-alpha`."
        )
    median: np.ndarray = np.maximum(low, np.minimum(high, b))
    return median


def _matted(source: Source, levels: Iterator[np.ndarray], matte: Matte) -> Iterator[np.ndarray]:
    """Yield the mask frames, uint8 [H, W, 3], of levels uint8 [H, W]."""
    brightest, darkest = 0, 255
    inside_seen = outside_seen = False
    colours = np.array((matte.background, PALETTE[matte.colour]), np.uint8)
    for frame in levels:
        inside = (frame >= matte.threshold) != matte.invert
        inside_seen, outside_seen = inside_seen or bool(inside.any()), outside_seen or not inside.all()
        brightest, darkest = max(brightest, int(frame.max())), min(darkest, int(frame.min()))
        yield np.take(colours, inside.view(np.uint8), axis=0)
    if not (inside_seen and outside_seen):
        raise InputError(
            f"{source.path} has levels from {darkest} to {brightest}, so with --threshold {matte.threshold} the "
            f"character is {'everywhere' if inside_seen else 'nowhere'}: use another threshold, or another file."
        )


def parse_order(text: str) -> dict[int, str]:
    """Parse `red,green` (labels 1 and 2) or `128=red,255=background` to label → colour or `background`. Raises
    InputError for other text, and for a label or colour that occurs twice."""
    order: dict[int, str] = {}
    for position, part in enumerate(text.split(","), 1):
        number, equals, name = part.strip().rpartition("=")
        if equals and not number.strip().isdigit():
            raise InputError(f"--order {text!r}: {number!r} is not a label number: write it as in 1=red,2=green.")
        label = int(number) if equals else position
        if name not in (*CHARACTERS, BACKGROUND):
            raise InputError(
                f"--order {text!r}: {name!r} is not a mask colour: use {', '.join((*CHARACTERS, BACKGROUND))}."
            )
        if label in order:
            raise InputError(f"--order {text!r} gives the label {label} two colours: name it once.")
        if name != BACKGROUND and name in order.values():
            raise InputError(
                f"--order {text!r} gives two labels the colour {name}: give each character its own colour."
            )
        order[label] = name
    return {0: BACKGROUND, **order}


def masks_from_labels(
    source: Source, order: Mapping[int, str], background: RGB, tell: Tell = untold
) -> Iterator[np.ndarray]:
    """Yield mask frames, uint8 [H, W, 3], of an indexed or grey image, a folder of them, or a grey video, whose pixels
    are label numbers. order: label → colour or `background`.

    Lossy coding blurs edges between labels, and an edge between 0 and 255 passes through the label 128. Therefore, in a
    video, an area that is nowhere three pixels thick gets a label of its surroundings. Raises InputError for labels
    that are not in `order`, and if the source holds background only."""
    known = np.array(sorted(order), np.int64)
    ground = next(name for name in ("white", "black") if PALETTE[name] == background)
    names = [ground if order[int(label)] == BACKGROUND else order[int(label)] for label in known]
    meaning = np.array([list(PALETTE).index(name) for name in names], np.uint8)  # palette label of each known label
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
            f"{source.path} holds background only, and none of the labels {_order_text(order)}: "
            "name its labels with --order."
        )


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct numbers int64 [n], index of each value in them), so that later work is per number instead of per
    pixel."""
    if values.dtype.kind != "u":
        values = values.astype(np.int64)
    if values.min() >= 0 and values.max() < 1 << 16:
        return np.arange(int(values.max()) + 1), values
    numbers, at = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), at.reshape(values.shape)


def _label_distances(
    values: np.ndarray, known: np.ndarray, meaning: np.ndarray, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Distances of the values at the n pixels (y, x) to the nearest label of each colour of the palette, [n, 8]."""
    distances = np.full((len(y), len(PALETTE)), np.inf)
    for label, colour in zip(known, meaning, strict=True):
        distances[:, colour] = np.minimum(distances[:, colour], np.abs(values[y, x] - label))
    return distances


def _labels(path: Path) -> np.ndarray:
    labels = load_labels(path)
    if labels is None:
        raise InputError(
            f"{path} is in colour, and labels are numbers in an indexed or grey image: if its colours mean characters, "
            "use `scail2-rt masks clean` with --map R,G,B=COLOUR."
        )
    return labels


def _refuse_unknown(
    values: np.ndarray, unknown: np.ndarray, source: Source, number: int, order: Mapping[int, str]
) -> None:
    """Raise InputError for unknown labels. In a video, lossy coding makes unknown labels at edges, so only flat areas
    count."""
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
        f"{_order_text(order)}: name all labels, as in --order {shown[0]}=red or {shown[0]}=background."
    )


def _order_text(order: Mapping[int, str]) -> str:
    return ", ".join(f"{label}={name}" for label, name in order.items())
