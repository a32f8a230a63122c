"""Figures as pixels: how large they are, where, what they look like, and which of another picture they are.

Masks are bool [H, W]. Appearance is a histogram of the colours inside a mask, compared by how much two of them share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

LEAST_AREA = 0.01  # of the first frame: what is smaller is no figure (the authors' rule)
SEEN_AREA = 0.0002  # of a frame: a figure with less is not seen
BINS = 6  # of a histogram, for each channel
EXCHANGED = 0.2  # how much better two figures must look like each other than like themselves
ALIKE = 0.5  # share of two histograms from which on a figure may be one that was seen before
KEEP = 0.8  # weight of what a figure looked like before
HISTOGRAM_PIXELS = 20_000


@dataclass(slots=True)
class Character:
    """A figure of the clip. number: its label, from 1; look: histogram; centre (x, y) in 0…1, where it was seen last;
    colour: what --point or --box ask for."""

    number: int
    look: np.ndarray | None = None
    centre: tuple[float, float] = (0.5, 0.5)
    last_seen: int = -1
    colour: str = ""


def area(mask: np.ndarray) -> float:
    """Share of the picture."""
    return float(mask.mean())


def centre(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of its pixels, in 0…1 of the picture."""
    rows, columns = mask.sum(1), mask.sum(0)
    total = max(int(rows.sum()), 1)
    x = float((columns * (np.arange(len(columns)) + 0.5)).sum() / total / len(columns))
    return x, float((rows * (np.arange(len(rows)) + 0.5)).sum() / total / len(rows))


def look(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Histogram of the colours of `frame`, levels 0…255 [H, W, 3], inside the mask; its sum is 1."""
    pixels = frame[mask]
    pixels = pixels[:: max(len(pixels) // HISTOGRAM_PIXELS, 1)].astype(np.int64) * BINS // 256
    counts = np.bincount((pixels @ np.array([BINS * BINS, BINS, 1])), minlength=BINS**3)
    return counts / max(counts.sum(), 1)


def alike(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """What two histograms share, 0…1."""
    return 0.0 if a is None or b is None else float(np.minimum(a, b).sum())


def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


def box_iou(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Of two boxes x0, y0, x1, y1."""
    first, second = np.asarray(a), np.asarray(b)
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    both = float(np.clip(high - low, 0, None).prod())
    either = float((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod()) - both
    return both / either if either > 0 else 0.0


def inside(a: np.ndarray, b: np.ndarray) -> float:
    """Share of a that lies in b."""
    return int((a & b).sum()) / max(int(a.sum()), 1)


def ordered(masks: Sequence[np.ndarray], sort: str) -> list[int]:
    """Numbers of the masks, first to last: left to right, or the largest first."""
    if sort == "area":
        return sorted(range(len(masks)), key=lambda i: -area(masks[i]))
    return sorted(range(len(masks)), key=lambda i: centre(masks[i])[0])


def nearest_pairs(references: Sequence[np.ndarray], drivers: Sequence[np.ndarray]) -> dict[int, int]:
    """driver → reference, each with the nearest by their centres in 0…1, the closest pair first."""
    return _greedy(len(drivers), len(references), lambda d, r: -distance(centre(drivers[d]), centre(references[r])))


def overlap_pairs(references: Sequence[np.ndarray], drivers: Sequence[np.ndarray]) -> dict[int, int]:
    """driver → reference, each reference with the driver that its mask overlaps most (IoU), the pictures stretched onto
    each other."""
    shape = drivers[0].shape
    laid = [stretched(mask, shape) for mask in references]
    return _greedy(len(drivers), len(references), lambda d, r: iou(drivers[d], laid[r]))


def _greedy(drivers: int, references: int, score: Callable[[int, int], float]) -> dict[int, int]:
    ranked = sorted(product(range(drivers), range(references)), key=lambda pair: -score(*pair))
    pairs: dict[int, int] = {}
    for driver, reference in ranked:
        if driver not in pairs and reference not in pairs.values():
            pairs[driver] = reference
    return pairs


def stretched(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Masks or labels [h, w] at another size, hard-edged."""
    rows = ((np.arange(shape[0]) + 0.5) * mask.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * mask.shape[1] / shape[1]).astype(int)
    return mask[rows[:, None], columns]


@dataclass(slots=True)
class Cast:
    """The characters of a clip, what they look like, and what is to be said of them."""

    characters: dict[int, Character] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    told: set[tuple[int, int]] = field(default_factory=set)

    def enter(self, frame_number: int, frame: np.ndarray, mask: np.ndarray, colour: str = "") -> Character:
        made = Character(len(self.characters) + 1, look(frame, mask), centre(mask), frame_number, colour)
        self.characters[made.number] = made
        return made

    def absent(self, present: Mapping[int, np.ndarray]) -> list[Character]:
        return [each for number, each in self.characters.items() if number not in present]

    def returning(self, frame: np.ndarray, mask: np.ndarray, among: Sequence[Character]) -> Character | None:
        """Who of those that are not there a found figure is: who looks most like it, or of several that look about as
        much like it the nearest. None where it looks like none of them."""
        if not among:
            return None
        seen = look(frame, mask)
        shared = {each.number: alike(each.look, seen) for each in among}
        best = max(shared.values())
        if best < ALIKE:
            return None
        close = [each for each in among if shared[each.number] >= best - 0.1]
        return min(close, key=lambda each: distance(each.centre, centre(mask)))

    def likeness(self, frame: np.ndarray, labels: np.ndarray, numbers: Iterable[int]) -> float:
        """How much these characters look like themselves where the labels say that they are."""
        return sum(alike(self.characters[n].look, look(frame, labels == n)) for n in numbers)

    def mistaken(
        self, frame: np.ndarray, present: Mapping[int, np.ndarray], found: Sequence[np.ndarray]
    ) -> dict[int, int]:
        """Characters whose mask the tracker has put onto another figure → the number of the found one that they are:
        far from that mask, and much more like them than what it covers."""
        looks = [look(frame, mask) for mask in found]
        ranked = sorted(
            product(self.characters, range(len(found))),
            key=lambda pair: -alike(self.characters[pair[0]].look, looks[pair[1]]),
        )
        chosen: dict[int, int] = {}
        for number, i in ranked:
            if number not in chosen and i not in chosen.values():
                chosen[number] = i
        wrong = {}
        for number, i in chosen.items():
            mask, known = present.get(number), self.characters[number].look
            if mask is None or max(iou(mask, found[i]), inside(found[i], mask)) > ALIKE:
                continue
            if alike(known, looks[i]) > max(alike(known, look(frame, mask)) + EXCHANGED, ALIKE):
                wrong[number] = i
        return wrong

    def watch(self, frame_number: int, frame: np.ndarray, present: Mapping[int, np.ndarray]) -> None:
        """Keep where figures are and what they look like; note two that seem to have changed places."""
        looks = {number: look(frame, mask) for number, mask in present.items()}
        exchanged = {number for pair in self._exchanges(frame_number, looks) for number in pair}
        for number, mask in present.items():
            known = self.characters[number]
            known.centre, known.last_seen = centre(mask), frame_number
            if number not in exchanged:
                known.look = looks[number] if known.look is None else KEEP * known.look + (1 - KEEP) * looks[number]

    def _exchanges(self, frame_number: int, looks: Mapping[int, np.ndarray]) -> list[tuple[int, int]]:
        found = []
        for a, b in ((a, b) for a in looks for b in looks if a < b):
            before = self.characters[a].look, self.characters[b].look
            straight = alike(before[0], looks[a]) + alike(before[1], looks[b])
            crossed = alike(before[0], looks[b]) + alike(before[1], looks[a])
            if crossed > straight + 2 * EXCHANGED:
                found.append((a, b))
                if (a, b) not in self.told:
                    self.told.add((a, b))
                    self.notes.append(
                        f"From frame {frame_number} on, figures {a} and {b} of the clip look as if they had changed "
                        f"places: look at the preview, and set them right with --point {frame_number}:x,y:colour."
                    )
        return found
