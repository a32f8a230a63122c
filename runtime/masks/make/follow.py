"""Labels the characters in every frame of a driving clip.

The first frame determines the characters. Later, text detection runs every `EVERY` frames and after each cut. It has
three uses. Characters that the tracker has exchanged are corrected by appearance. A new character is added, and tracked
backwards to the frame in which it enters. A returning character that the tracker does not recognise gets its old label
by appearance, and then by position. After a cut, a new tracker starts, and characters of the new scene get their labels
by appearance. At most `EVERY` frames are held in memory, for a clip of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.cuts import CutFinder
from scail2_rt.runtime.masks.make.figures import LEAST_AREA, SEEN_AREA, Cast, Character, area, inside, iou, ordered
from scail2_rt.runtime.masks.make.options import Place
from scail2_rt.runtime.masks.make.pixels import picture_masks
from scail2_rt.runtime.masks.make.tracker import Followed, Given, Tracker

if TYPE_CHECKING:
    from scail2_rt.runtime.masks.make.segmenters import Segmenter

EVERY = 8  # frames between two runs of text detection
SAME = 0.5  # IoU above which two masks are one character
COVERED = 0.8  # share of a mask inside another above which it is part of that character
GIVEN_SCORE = 2.0  # score of characters marked by the user, above those of text detection


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A character in an image: its prompt for a tracker, its mask (bool [H, W]), its score, and the requested
    colour."""

    given: Given
    mask: np.ndarray
    score: float
    colour: str = ""


@dataclass(frozen=True, slots=True)
class Looking:
    """What to look for in an image or clip.

    text      prompt of text detection; None: only the characters at `places`
    places    points and boxes of the user
    most      largest number of characters
    sort      order of the characters, as in `MaskOptions`
    picture   name of the image or clip in messages"""

    text: str | None
    places: tuple[Place, ...]
    most: int
    sort: str
    picture: str


def figures_in(frame: np.ndarray, segmenter: Segmenter, looking: Looking, places: Sequence[Place]) -> list[Figure]:
    """Find the characters of one image, uint8 [H, W, 3], sorted as `looking` says: those at `places`, and then those of
    text detection with the highest scores. Masks are made by the video tracker, which finds small characters that an
    image model misses. Raises InputError if there is nothing at a place."""
    size = frame.shape[:2]
    wanted = [(given, GIVEN_SCORE, colour) for given, colour in prompts_of(places)]
    if looking.text is not None:
        wanted += [(found.given, found.score, "") for found in segmenter.find(frame, looking.text)]
    if not wanted:
        return []
    tracker = segmenter.tracker((size[0], size[1]))
    tracker.follow(frame)
    made = tracker.add({number: given for number, (given, _, _) in enumerate(wanted, 1)}, remember=False)
    masks = masks_of(made, (size[0], size[1]))
    kept: list[Figure] = []
    for number, (given, score, colour) in enumerate(wanted, 1):
        mask = masks[number]
        if score == GIVEN_SCORE and not mask.any():
            raise InputError(
                f"The segmenter finds no character at a --point or --box of {looking.picture}: "
                "move the point to its centre, or use a box around it."
            )
        small = area(mask) < LEAST_AREA and score != GIVEN_SCORE
        if not small and not any(iou(mask, k.mask) > SAME or inside(mask, k.mask) > COVERED for k in kept):
            kept.append(Figure(given, mask, score, colour))
    kept = sorted(kept, key=lambda figure: -figure.score)[: looking.most]
    return [kept[i] for i in ordered([figure.mask for figure in kept], looking.sort)]


def prompts_of(places: Sequence[Place]) -> list[tuple[Given, str]]:
    """(prompt, colour) per character. Places of one colour are one character; each place without a colour is
    another."""
    groups: list[list[Place]] = []
    for place in places:
        same = next((group for group in groups if place.colour and group[0].colour == place.colour), None)
        groups.append([place]) if same is None else same.append(place)
    found = []
    for group in groups:
        boxes, points = ([p for p in group if len(p.numbers) == n] for n in (4, 2))
        made = [Given.box(p.numbers) for p in boxes[:1]] + [Given.point(*p.numbers) for p in points]
        coordinates = np.concatenate([each.points for each in made if each.points is not None])
        labels = tuple(label for each in made for label in each.labels)
        found.append((Given(coordinates, labels), group[0].colour))
    return found


def masks_of(followed: Mapping[int, Followed], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """Character → mask, bool [H, W]. Masks may overlap."""
    return {number: (picture_masks(each.logits[None], size)[0] > 0).cpu().numpy() for number, each in followed.items()}


def labels_of(followed: Mapping[int, Followed], size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W]: the number of the character with the highest logit, or 0 if no logit is above 0."""
    import torch

    if not followed:
        return np.zeros(size, np.uint8)
    numbers = torch.tensor([0, *followed], dtype=torch.uint8)
    best = torch.zeros(size)
    chosen = torch.zeros(size, dtype=torch.long)
    for place, each in enumerate(followed.values(), 1):
        logits = picture_masks(each.logits[None], size)[0].cpu()
        higher = logits > best
        best, chosen = torch.where(higher, logits, best), torch.where(higher, place, chosen)
    return numbers[chosen].numpy()


@dataclass(slots=True)
class ClipFollower:
    """Labels one driving clip.

    room          largest number of characters
    begun         called with the characters of the first frame that shows any
    first_frame   number of the first frame that is given to `labelled`"""

    segmenter: Segmenter
    looking: Looking
    room: int
    cast: Cast = field(default_factory=Cast)
    begun: Callable[[list[Figure]], None] | None = None
    first_frame: int = 0
    _tracker: Tracker | None = None
    _held: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _newcomer_noted: bool = False  # a character that the reference lacks has a note

    def labelled(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each frame, uint8 [H, W, 3], with its labels, uint8 [H, W]. Raises InputError if no character is
        found."""
        cuts = CutFinder()
        for number, frame in enumerate(frames, self.first_frame):
            cut = cuts.cut_before(frame)
            if cut:
                yield from self._release()
            due = (number - self.first_frame) % EVERY == 0
            labels = self._step(number, frame, cut, due)
            self._held.append((frame, labels))
            if due or self.looking.text is None:
                yield from self._release()
        yield from self._release()
        if not self.cast.characters:
            raise InputError(not_found(self.looking))

    def _release(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The frames and labels that are held, which are final now."""
        held, self._held = self._held, []
        return held

    def _step(self, number: int, frame: np.ndarray, cut: bool, due: bool) -> np.ndarray:
        """Labels of a frame. cut: a scene begins with it; due: text detection runs."""
        size = (frame.shape[0], frame.shape[1])
        places = [place for place in self.looking.places if place.frame == number]
        if not self.cast.characters:
            return self._begin(number, frame, places) if due or places else np.zeros(size, np.uint8)
        if cut:
            self._new_scene(number, frame)
        assert self._tracker is not None
        finds_again = cut and self.looking.text is not None
        followed = self._find_again(number, frame) if finds_again else self._tracker.follow(frame)
        for place_given, colour in prompts_of(places):
            followed = self._tracker.add({self._who(number, frame, place_given, colour, followed): place_given})
        if due and not cut:
            followed = self._look_again(number, frame, followed)
        labels = labels_of(followed, size)
        if due:
            self.cast.watch(number, frame, present_in(labels))
        return labels

    def _begin(self, number: int, frame: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        """Labels of the first frame that shows characters; zeros if this one shows none."""
        size = (frame.shape[0], frame.shape[1])
        figures = figures_in(frame, self.segmenter, self.looking, places)
        if not figures:
            if self.looking.text is None and not any(place.frame > number for place in self.looking.places):
                raise InputError(not_found(self.looking))
            return np.zeros(size, np.uint8)
        for figure in figures:
            self.cast.enter(number, frame, figure.mask, figure.colour)
        if self.begun is not None:
            self.begun(figures)
        self._tracker = self.segmenter.tracker(size)
        self._tracker.follow(frame)
        return labels_of(self._tracker.add({i: figure.given for i, figure in enumerate(figures, 1)}), size)

    def _new_scene(self, number: int, frame: np.ndarray) -> None:
        """Start a new tracker after a cut, unless there is no text to find the characters again."""
        if self.looking.text is None:
            self.cast.notes.append(
                f"The scene changes at frame {number}. Without text detection, the tracker continued from memory: mark "
                f"characters with --point {number}:x,y:colour if they are wrong."
            )
            return
        self._tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        self.cast.notes.append(
            f"The scene changes at frame {number}: the tracker was restarted, and colours were kept."
        )

    def _find_again(self, number: int, frame: np.ndarray) -> dict[int, Followed]:
        """Detect the characters of a new scene, and identify them by appearance."""
        assert self._tracker is not None
        self._tracker.follow(frame)
        given: dict[int, Given] = {}
        for figure in figures_in(frame, self.segmenter, self.looking, ()):
            others = [each for each in self.cast.characters.values() if each.number not in given]
            known = self.cast.returning(frame, figure.mask, others)
            if known is None and self._has_room:
                known = self._enters(number, frame, figure)
            if known is not None:
                given[known.number] = figure.given
        return self._tracker.add(given) if given else {}

    def _who(self, number: int, frame: np.ndarray, given: Given, colour: str, followed: Mapping[int, Followed]) -> int:
        """The number of the character at a place in a later frame: the one with its colour, else the one whose mask
        contains it, else a new one."""
        for character in self.cast.characters.values():
            if colour and character.colour == colour:
                return character.number
        labels = labels_of(followed, (frame.shape[0], frame.shape[1]))
        assert given.points is not None
        x, y = given.points.mean(0)
        here = int(labels[min(int(y), labels.shape[0] - 1), min(int(x), labels.shape[1] - 1)])
        return here or self.cast.enter(number, frame, np.ones(labels.shape, bool), colour).number

    @property
    def _has_room(self) -> bool:
        return len(self.cast.characters) < self.room

    def _look_again(self, number: int, frame: np.ndarray, followed: dict[int, Followed]) -> dict[int, Followed]:
        """Run text detection: correct exchanged characters, and add new and returning ones."""
        assert self._tracker is not None
        size = (frame.shape[0], frame.shape[1])
        present = present_in(labels_of(followed, size))
        alone = len(self.cast.characters) == 1 and not self._has_room
        if self.looking.text is None or (alone and not self.cast.absent(present)):
            return followed  # no character can be new, returning or exchanged
        figures = figures_in(frame, self.segmenter, self.looking, ())
        if wrong := self.cast.mistaken(frame, present, [figure.mask for figure in figures]):
            given = {label: figures[found].given for label, found in wrong.items()}
            followed = self._tracker.add(given)
            self._correct(frame, given)
            present = present_in(labels_of(followed, size))
            self.cast.notes.append(
                f"At frame {number}, {_characters(wrong)} of the driving clip had been exchanged and were corrected by "
                "appearance, as in the frames before where appearance confirms it."
            )
        for figure in figures:
            if any(iou(figure.mask, m) > 0.3 or inside(figure.mask, m) > SAME for m in present.values()):
                continue
            absent = self.cast.absent(present)
            known = self.cast.returning(frame, figure.mask, absent)
            if known is not None:
                self.cast.notes.append(
                    f"The character that enters at frame {number} was identified as character {known.number}, last "
                    f"seen in frame {known.last_seen}, by appearance and position."
                )
            elif self._has_room:
                known = self._enters(number, frame, figure)
            elif not self._newcomer_noted:
                self._newcomer_noted = True
                self.cast.notes.append(
                    f"A character that the reference image lacks enters at frame {number}, and gets no colour."
                )
            if known is not None:
                followed = self._tracker.add({known.number: figure.given})
                self._label_earlier(known.number, frame, figure)
                present[known.number] = figure.mask
        return followed

    def _enters(self, number: int, frame: np.ndarray, figure: Figure) -> Character:
        """Add a character that enters late."""
        made = self.cast.enter(number, frame, figure.mask, figure.colour)
        self.cast.notes.append(
            f"Character {made.number} of the driving clip enters late, and was found in frame {number}."
        )
        return made

    def _correct(self, frame: np.ndarray, given: Mapping[int, Given]) -> None:
        """Correct exchanged characters in the held frames. They are tracked backwards, and each frame gets the new
        labels if the characters are then more similar to their appearance."""
        tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        tracker.follow(frame)
        tracker.add(given)
        for earlier, labels in reversed(self._held):
            others = np.where(np.isin(labels, list(given)), 0, labels)
            back = labels_of(tracker.follow(earlier), labels.shape)
            corrected = np.where(others == 0, back, others).astype(np.uint8)
            if self.cast.likeness(earlier, corrected, given) > self.cast.likeness(earlier, labels, given):
                labels[:] = corrected

    def _label_earlier(self, label: int, frame: np.ndarray, figure: Figure) -> None:
        """Label a character in the held frames, tracked backwards from the frame in which it was found."""
        tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        tracker.follow(frame)
        tracker.add({label: figure.given})
        for earlier, labels in reversed(self._held):
            mask = masks_of(tracker.follow(earlier), labels.shape)[label] & (labels == 0)
            if area(mask) < SEEN_AREA:
                return
            labels[mask] = label


def _characters(numbers: Collection[int]) -> str:
    return f"character{'' if len(numbers) == 1 else 's'} {', '.join(map(str, sorted(numbers)))}"


def present_in(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Character → mask, for characters that cover at least `SEEN_AREA` of labels [H, W]."""
    counts = np.bincount(labels.ravel(), minlength=2)
    return {int(n): labels == n for n in np.flatnonzero(counts >= SEEN_AREA * labels.size) if n}


def not_found(looking: Looking) -> str:
    """The error message if no character is found."""
    option = "image:" if "image" in looking.picture else ""
    if looking.text is None:
        return (
            f"No character is marked in {looking.picture}: "
            f"use --point {option}x,y, --box {option}x0,y0,x1,y1 or --mask-prompt."
        )
    return (
        f'No character was found in {looking.picture} with "{looking.text}": describe it with --mask-prompt, or '
        f"mark it with --point {option}x,y or --box {option}x0,y0,x1,y1."
    )
