"""From the frames of a clip to labels: who is where, in every frame.

The first frame decides who is there. Later, every `EVERY` frames and after a cut, text looks again: somebody whom the
tracker exchanged for another is set right by appearance; somebody new enters the cast, and is followed back to where
they came in; somebody who was away and whom the tracker's memory did not find again gets their label back by
appearance, then by place. After a cut the tracker starts again, and everybody in the new scene gets the label of whom
they look like. At most `EVERY` frames are held, whatever the clip's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

EVERY = 8  # frames between two looks for somebody new
SAME = 0.5  # IoU from which on two masks are one figure
COVERED = 0.8  # share of a mask inside another from which on it is part of that figure
GIVEN_SCORE = 2.0  # of figures that the user shows: above every score of a text


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A figure in a picture: what shows it to a tracker, its mask, how sure it is, and the colour asked for."""

    given: Given
    mask: np.ndarray
    score: float
    colour: str = ""


@dataclass(frozen=True, slots=True)
class Looking:
    """What to look for in a picture or clip. text: None to take only the places that are given; picture: what messages
    call it."""

    text: str | None
    places: tuple[Place, ...]
    most: int
    sort: str
    picture: str


def figures_in(frame: np.ndarray, segmenter: Segmenter, looking: Looking, places: Sequence[Place]) -> list[Figure]:
    """The figures of one picture, uint8 [H, W, 3], in their order: those that are given, and those that the text finds,
    the surest first until there are enough; through the video tracker, which sees small figures that a picture model
    misses. InputError where a place shows nothing."""
    size = frame.shape[:2]
    wanted = [(given, GIVEN_SCORE, colour) for given, colour in shown(places)]
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
                f"The segmenter sees no figure at a --point or --box of {looking.picture}: put it on the figure's "
                "middle, or give a box around it."
            )
        small = area(mask) < LEAST_AREA and score != GIVEN_SCORE
        if not small and not any(iou(mask, k.mask) > SAME or inside(mask, k.mask) > COVERED for k in kept):
            kept.append(Figure(given, mask, score, colour))
    kept = sorted(kept, key=lambda figure: -figure.score)[: looking.most]
    return [kept[i] for i in ordered([figure.mask for figure in kept], looking.sort)]


def shown(places: Sequence[Place]) -> list[tuple[Given, str]]:
    """What places show to a tracker, with their colours: those of one colour are one figure, else each is one."""
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
    """Masks of the picture, bool [H, W] each; they may overlap."""
    return {number: (picture_masks(each.logits[None], size)[0] > 0).cpu().numpy() for number, each in followed.items()}


def labels_of(followed: Mapping[int, Followed], size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W]: 0, or the number of the figure whose logit is the highest of those above 0."""
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
    """Follows one clip. `room`: how many characters the cast may have; `look_again`: text is there to look for more."""

    segmenter: Segmenter
    looking: Looking
    room: int
    cast: Cast = field(default_factory=Cast)
    begun: Callable[[list[Figure]], None] | None = None
    first_frame: int = 0
    _tracker: Tracker | None = None
    _held: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _strangers: bool = False

    def labelled(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each frame, uint8 [H, W, 3], with its labels, uint8 [H, W]. InputError where nobody is found."""
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
            raise InputError(nobody(self.looking))

    def _release(self) -> list[tuple[np.ndarray, np.ndarray]]:
        held, self._held = self._held, []
        return held

    def _step(self, number: int, frame: np.ndarray, cut: bool, due: bool) -> np.ndarray:
        size = (frame.shape[0], frame.shape[1])
        places = [place for place in self.looking.places if place.frame == number]
        if not self.cast.characters:
            return self._begin(number, frame, places) if due or places else np.zeros(size, np.uint8)
        if cut:
            self._new_scene(number, frame)
        assert self._tracker is not None
        finds_again = cut and self.looking.text is not None
        followed = self._find_again(number, frame) if finds_again else self._tracker.follow(frame)
        for place_given, colour in shown(places):
            followed = self._tracker.add({self._who(number, frame, place_given, colour, followed): place_given})
        if due and not cut:
            followed = self._look_again(number, frame, followed)
        labels = labels_of(followed, size)
        if due:
            self.cast.watch(number, frame, present_in(labels))
        return labels

    def _begin(self, number: int, frame: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        size = (frame.shape[0], frame.shape[1])
        figures = figures_in(frame, self.segmenter, self.looking, places)
        if not figures:
            if self.looking.text is None and not any(place.frame > number for place in self.looking.places):
                raise InputError(nobody(self.looking))
            return np.zeros(size, np.uint8)
        for figure in figures:
            self.cast.enter(number, frame, figure.mask, figure.colour)
        if self.begun is not None:
            self.begun(figures)
        self._tracker = self.segmenter.tracker(size)
        self._tracker.follow(frame)
        return labels_of(self._tracker.add({i: figure.given for i, figure in enumerate(figures, 1)}), size)

    def _new_scene(self, number: int, frame: np.ndarray) -> None:
        if self.looking.text is None:
            self.cast.notes.append(
                f"The scene changes at frame {number}, and no text says whom to look for: the tracker went on by "
                f"memory; show figures with --point {number}:x,y:colour."
            )
            return
        self._tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        self.cast.notes.append(f"The scene changes at frame {number}: the tracker started again there, colours kept.")

    def _find_again(self, number: int, frame: np.ndarray) -> dict[int, Followed]:
        """After a cut: everybody in the new scene, by their looks."""
        assert self._tracker is not None
        self._tracker.follow(frame)
        given: dict[int, Given] = {}
        for figure in figures_in(frame, self.segmenter, self.looking, ()):
            left = [each for each in self.cast.characters.values() if each.number not in given]
            known = self.cast.returning(frame, figure.mask, left)
            if known is None and self._has_room:
                known = self._enters(number, frame, figure)
            if known is not None:
                given[known.number] = figure.given
        return self._tracker.add(given) if given else {}

    def _who(self, number: int, frame: np.ndarray, given: Given, colour: str, followed: Mapping[int, Followed]) -> int:
        """Whom a place of a later frame shows: the character of its colour, else the one whose mask it lies in, else
        somebody new."""
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
        """Somebody new, or back."""
        assert self._tracker is not None
        size = (frame.shape[0], frame.shape[1])
        present = present_in(labels_of(followed, size))
        alone = len(self.cast.characters) == 1 and not self._has_room
        if self.looking.text is None or (alone and not self.cast.absent(present)):
            return followed  # nobody can be new, away or exchanged
        figures = figures_in(frame, self.segmenter, self.looking, ())
        if wrong := self.cast.mistaken(frame, present, [figure.mask for figure in figures]):
            given = {label: figures[found].given for label, found in wrong.items()}
            followed = self._tracker.add(given)
            self._set_right(frame, given)
            present = present_in(labels_of(followed, size))
            self.cast.notes.append(
                f"At frame {number}, {_figures(wrong)} of the clip had been taken for somebody else and set right by "
                f"their looks, there and in the frames before where these looks say so."
            )
        for figure in figures:
            if any(iou(figure.mask, m) > 0.3 or inside(figure.mask, m) > SAME for m in present.values()):
                continue
            absent = self.cast.absent(present)
            known = self.cast.returning(frame, figure.mask, absent)
            if known is not None:
                self.cast.notes.append(
                    f"The figure that comes in at frame {number} was taken for figure {known.number}, last seen in "
                    f"frame {known.last_seen}: the most like it, or the nearest of those alike."
                )
            elif self._has_room:
                known = self._enters(number, frame, figure)
            elif not self._strangers:
                self._strangers = True
                self.cast.notes.append(
                    f"Somebody comes in at frame {number} for whom the reference has no figure: no colour was given."
                )
            if known is not None:
                followed = self._tracker.add({known.number: figure.given})
                self._back(known.number, frame, figure)
                present[known.number] = figure.mask
        return followed

    def _enters(self, number: int, frame: np.ndarray, figure: Figure) -> Character:
        made = self.cast.enter(number, frame, figure.mask, figure.colour)
        self.cast.notes.append(f"Figure {made.number} of the clip comes in late and was found in frame {number}.")
        return made

    def _set_right(self, frame: np.ndarray, given: Mapping[int, Given]) -> None:
        """Figures that had been exchanged, in the frames that are held: backwards from where they were found, in each
        frame the labels of those two ways by which they look more like themselves."""
        tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        tracker.follow(frame)
        tracker.add(given)
        for earlier, labels in reversed(self._held):
            rest = np.where(np.isin(labels, list(given)), 0, labels)
            back = labels_of(tracker.follow(earlier), labels.shape)
            mended = np.where(rest == 0, back, rest).astype(np.uint8)
            if self.cast.likeness(earlier, mended, given) > self.cast.likeness(earlier, labels, given):
                labels[:] = mended

    def _back(self, label: int, frame: np.ndarray, figure: Figure) -> None:
        """Into the frames that are held, backwards from the one where a figure was found."""
        tracker = self.segmenter.tracker((frame.shape[0], frame.shape[1]))
        tracker.follow(frame)
        tracker.add({label: figure.given})
        for earlier, labels in reversed(self._held):
            mask = masks_of(tracker.follow(earlier), labels.shape)[label] & (labels == 0)
            if area(mask) < SEEN_AREA:
                return
            labels[mask] = label


def _figures(numbers: Iterable[int]) -> str:
    return f"figure(s) {', '.join(map(str, sorted(numbers)))}"


def present_in(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Figures that are seen → mask."""
    counts = np.bincount(labels.ravel(), minlength=2)
    return {int(n): labels == n for n in np.flatnonzero(counts >= SEEN_AREA * labels.size) if n}


def nobody(looking: Looking) -> str:
    option = "image:" if "image" in looking.picture else ""
    if looking.text is None:
        return (
            f"Nobody is shown in {looking.picture}: give --point {option}x,y or --box {option}x0,y0,x1,y1, or a "
            "--mask-prompt."
        )
    return (
        f'Nobody was found in {looking.picture} with "{looking.text}": say what to look for with --mask-prompt, or '
        f"show it with --point {option}x,y or --box {option}x0,y0,x1,y1."
    )
