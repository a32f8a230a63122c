"""Characters as masks: their area, centre and appearance, and how to match those of two images.

Masks are bool [H, W]. The appearance is the colour histogram inside a mask; the similarity of two is their histogram
intersection, the sum of the smaller of each two bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

LEAST_AREA = 0.01  # share of the first frame below which a mask is ignored (rule of the official code)
SEEN_AREA = 0.0002  # share of a frame below which a character counts as absent
BINS = 6  # of a histogram, per channel
EXCHANGED = 0.2  # difference in similarity from which two characters count as exchanged
ALIKE = 0.5  # similarity from which a mask may be a character seen before
KEEP = 0.8  # weight of the previous appearance in the running mean
HISTOGRAM_PIXELS = 20_000  # about as many pixels of a mask are sampled


@dataclass(slots=True)
class Character:
    """A character of the driving clip.

    number      its label, from 1
    look        colour histogram, None if unknown
    centre      (x, y) where it was last seen, as shares of the frame's sides
    last_seen   number of that frame, -1 for none
    colour      mask colour that --point or --box asks for; "" for any"""

    number: int
    look: np.ndarray | None = None
    centre: tuple[float, float] = (0.5, 0.5)
    last_seen: int = -1
    colour: str = ""


def area(mask: np.ndarray) -> float:
    """Share of the image that a mask covers."""
    return float(mask.mean())


def centre(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the centroid of a mask, as shares of the image's sides."""
    rows, columns = mask.sum(1), mask.sum(0)
    total = max(int(rows.sum()), 1)
    x = float((columns * (np.arange(len(columns)) + 0.5)).sum() / total / len(columns))
    return x, float((rows * (np.arange(len(rows)) + 0.5)).sum() / total / len(rows))


def look(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Histogram of the colours of `frame` (levels 0 to 255, [H, W, 3]) inside a mask, [BINS³]; its sum is 1."""
    pixels = frame[mask]
    pixels = pixels[:: max(len(pixels) // HISTOGRAM_PIXELS, 1)].astype(np.int64) * BINS // 256
    counts = np.bincount((pixels @ np.array([BINS * BINS, BINS, 1])), minlength=BINS**3)
    return counts / max(counts.sum(), 1)


def alike(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """Intersection of two histograms, 0 to 1; 0 if one is None."""
    return 0.0 if a is None or b is None else float(np.minimum(a, b).sum())


def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Euclidean distance of two points."""
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; 0 if both are empty."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


def box_iou(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    first, second = np.asarray(a), np.asarray(b)
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    both = float(np.clip(high - low, 0, None).prod())
    either = float((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod()) - both
    return both / either if either > 0 else 0.0


def inside(a: np.ndarray, b: np.ndarray) -> float:
    """Share of mask `a` that is inside mask `b`."""
    return int((a & b).sum()) / max(int(a.sum()), 1)


def ordered(masks: Sequence[np.ndarray], sort: str) -> list[int]:
    """Indices of the masks, sorted from left to right, or largest first with `sort` "area"."""
    if sort == "area":
        return sorted(range(len(masks)), key=lambda i: -area(masks[i]))
    return sorted(range(len(masks)), key=lambda i: centre(masks[i])[0])


def nearest_pairs(references: Sequence[np.ndarray], drivers: Sequence[np.ndarray]) -> dict[int, int]:
    """Pair driving characters with references by the distance of their centres, the closest pair first. Returns driver
    → reference, as indices."""
    return _greedy(len(drivers), len(references), lambda d, r: -distance(centre(drivers[d]), centre(references[r])))


def overlap_pairs(references: Sequence[np.ndarray], drivers: Sequence[np.ndarray]) -> dict[int, int]:
    """Pair driving characters with references by IoU, the largest first, with the images stretched to one size. Returns
    driver → reference, as indices."""
    shape = drivers[0].shape
    masks = [stretched(mask, shape) for mask in references]
    return _greedy(len(drivers), len(references), lambda d, r: iou(drivers[d], masks[r]))


def _greedy(drivers: int, references: int, score: Callable[[int, int], float]) -> dict[int, int]:
    """Form pairs (driver, reference) in descending order of their score, each index once."""
    ranked = sorted(product(range(drivers), range(references)), key=lambda pair: -score(*pair))
    pairs: dict[int, int] = {}
    for driver, reference in ranked:
        if driver not in pairs and reference not in pairs.values():
            pairs[driver] = reference
    return pairs


def stretched(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scale a mask or labels [h, w] to (H, W) = `shape` by nearest neighbour."""
    rows = ((np.arange(shape[0]) + 0.5) * mask.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * mask.shape[1] / shape[1]).astype(int)
    return mask[rows[:, None], columns]


@dataclass(slots=True)
class Cast:
    """The characters of a driving clip by number, and notes about them for the user."""

    characters: dict[int, Character] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    noted: set[tuple[int, int]] = field(default_factory=set)  # exchanges that have a note

    def enter(self, frame_number: int, frame: np.ndarray, mask: np.ndarray, colour: str = "") -> Character:
        """Add the character that `mask` shows in this frame."""
        made = Character(len(self.characters) + 1, look(frame, mask), centre(mask), frame_number, colour)
        self.characters[made.number] = made
        return made

    def absent(self, present: Mapping[int, np.ndarray]) -> list[Character]:
        """The characters that are not in `present` (number → mask)."""
        return [each for number, each in self.characters.items() if number not in present]

    def returning(self, frame: np.ndarray, mask: np.ndarray, among: Sequence[Character]) -> Character | None:
        """The character, of those in `among`, that a mask shows: the most similar, or the nearest of those with about
        the same similarity. None if none is similar."""
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
        """Sum over characters of the similarity between their appearance and their pixels in labels [H, W]."""
        return sum(alike(self.characters[n].look, look(frame, labels == n)) for n in numbers)

    def mistaken(
        self, frame: np.ndarray, present: Mapping[int, np.ndarray], found: Sequence[np.ndarray]
    ) -> dict[int, int]:
        """Characters whose mask is on another character → index in `found` of their true mask: one that does not
        overlap their mask and is much more similar to them."""
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
        """Update position and appearance of the characters in this frame, and add a note if two seem to be
        exchanged."""
        looks = {number: look(frame, mask) for number, mask in present.items()}
        exchanged = {number for pair in self._exchanges(frame_number, looks) for number in pair}
        for number, mask in present.items():
            known = self.characters[number]
            known.centre, known.last_seen = centre(mask), frame_number
            if number not in exchanged:
                known.look = looks[number] if known.look is None else KEEP * known.look + (1 - KEEP) * looks[number]

    def _exchanges(self, frame_number: int, looks: Mapping[int, np.ndarray]) -> list[tuple[int, int]]:
        """Pairs of characters that are much more similar to each other's previous appearance than to their own."""
        found = []
        for a, b in ((a, b) for a in looks for b in looks if a < b):
            before = self.characters[a].look, self.characters[b].look
            straight = alike(before[0], looks[a]) + alike(before[1], looks[b])
            crossed = alike(before[0], looks[b]) + alike(before[1], looks[a])
            if crossed > straight + 2 * EXCHANGED:
                found.append((a, b))
                if (a, b) not in self.noted:
                    self.noted.add((a, b))
                    self.notes.append(
                        f"From frame {frame_number} on, characters {a} and {b} of the driving clip seem to be "
                        f"exchanged: look at the preview, and correct them with --point {frame_number}:x,y:colour."
                    )
        return found
