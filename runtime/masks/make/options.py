"""Options for making masks: the segmenter, the characters, and which driving character moves which reference
character."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.masks.palette import CHARACTERS

AUTHORS_PROMPT = "human. character."
AUTHORS_ORDER = ("blue", "red", "green", "magenta", "cyan", "yellow")  # mask colours in the order of the official code
MODES = ("auto", "animate", "replace")
SORTS = ("left-to-right", "area")
SEGMENTERS = ("auto", "sam2", "sam3")
IMAGE = -1  # the frame of a point or box that belongs to the reference image
FIRST = -2  # the frame of a point or box without a frame number: the first one used


@dataclass(frozen=True, slots=True)
class Place:
    """A point or box that marks a character.

    numbers   (x, y) or (x0, y0, x1, y1) in pixels
    frame     of the driving clip; `FIRST`: the first one used; `IMAGE`: the reference image
    colour    requested mask colour of the character; "" for any"""

    numbers: tuple[float, ...]
    frame: int = FIRST
    colour: str = ""

    @classmethod
    def parse(cls, text: str, option: str) -> Place:
        """Parse `[frame:]x,y[:colour]` or `[frame:]x0,y0,x1,y1[:colour]`, with `image:` for the reference image.
        option: `--point` or `--box`. Raises InputError for other text."""
        wanted = {"--point": 2, "--box": 4}[option]
        parts = [part.strip() for part in text.split(":")]
        middle = [number for number, part in enumerate(parts) if "," in part]
        if len(middle) != 1 or len(parts) > 3 or middle[0] > 1 or len(parts) - middle[0] > 2:
            raise InputError(f"{option} {text!r} is not [frame:]{_form(wanted)}[:colour].")
        frame = IMAGE if parts[0] == "image" else FIRST
        if middle[0] and frame == FIRST:
            if not parts[0].isdecimal():
                raise InputError(f"{option} {text!r}: {parts[0]!r} is neither a frame number nor `image`.")
            frame = int(parts[0])
        try:
            numbers = tuple(float(number) for number in parts[middle[0]].split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != wanted:
            raise InputError(f"{option} {text!r} is not [frame:]{_form(wanted)}[:colour].")
        colour = parts[middle[0] + 1] if len(parts) > middle[0] + 1 else ""
        if colour and colour not in CHARACTERS:
            raise InputError(f"{option} {text!r}: {colour!r} is not a mask colour: use {', '.join(CHARACTERS)}.")
        if wanted == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
            raise InputError(f"{option} {text!r} is not a box: x0 must be less than x1, and y0 less than y1.")
        return cls(numbers, frame, colour)

    def check_inside(self, size: tuple[int, int], picture: str) -> None:
        """Raise InputError if the place is outside an image of (H, W), called `picture` in the message."""
        xs, ys = self.numbers[::2], self.numbers[1::2]
        if not (min(xs) >= 0 and max(xs) <= size[1] and min(ys) >= 0 and max(ys) <= size[0]):
            kind, what = ("--box", "box") if len(self.numbers) == 4 else ("--point", "point")
            at = ",".join(f"{number:g}" for number in self.numbers)
            raise InputError(
                f"The {what} {at} ({kind}) is outside {picture}, which is {size[1]} wide and {size[0]} high: "
                "give it in pixels of that image."
            )


def _form(numbers: int) -> str:
    return "x,y" if numbers == 2 else "x0,y0,x1,y1"


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """Options for making masks.

    mode            animate or replace; auto means animate
    segmenter       sam2, sam3, or auto: SAM 3 if it is in the cache, else SAM 2
    weights         folder of a segmenter, instead of the cache
    prompt          text prompt, phrases separated by full stops; None: the official "human. character.", but no text
                    detection in an image whose characters are marked by points or boxes
    max_characters  largest number of characters; those with the highest scores are kept
    sort            order of the characters: left-to-right, or area (largest first)
    points, boxes   `[frame:]x,y[:colour]` and `[frame:]x0,y0,x1,y1[:colour]`; `image:` is the reference image
    pairs           "1=2,2=1": driving character 1 moves reference character 2, and 2 moves 1
    one_to_many     pair each reference character with the driving character that its mask overlaps most
    image_from, driving_from
                    a matte, an image or video with alpha, or SAM3_TRACK_DATA to use instead of a segmenter
    start, frames   first frame and number of frames of the driving clip to use; None: to the end

    Raises InputError for values out of range and for options that contradict each other."""

    mode: Literal["auto", "animate", "replace"] = "auto"
    segmenter: str = "auto"
    weights: Path | None = None
    prompt: str | None = None
    max_characters: int = 2
    sort: str = "left-to-right"
    points: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    pairs: str = ""
    one_to_many: bool = False
    image_from: Path | None = None
    driving_from: Path | None = None
    start: int = 0
    frames: int | None = None
    places: tuple[Place, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        for name in ("weights", "image_from", "driving_from"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))
        for name in ("points", "boxes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.mode not in MODES:
            raise InputError(f"--mode must be one of {', '.join(MODES)}, not {self.mode}.")
        if self.segmenter not in SEGMENTERS:
            raise InputError(f"--segmenter must be one of {', '.join(SEGMENTERS)}, not {self.segmenter}.")
        if self.sort not in SORTS:
            raise InputError(f"--sort must be one of {', '.join(SORTS)}, not {self.sort}.")
        if not 1 <= self.max_characters <= len(CHARACTERS):
            raise InputError(
                f"--max-characters must be 1 to {len(CHARACTERS)}, one for each mask colour, not {self.max_characters}."
            )
        if self.prompt is not None and not self.prompt.strip(" ."):
            raise InputError('--mask-prompt is empty: describe the characters, as in "person. dog.".')
        places = [Place.parse(text, "--point") for text in self.points]
        places += [Place.parse(text, "--box") for text in self.boxes]
        object.__setattr__(self, "places", tuple(places))
        self._check_places()
        parse_pairs(self.pairs)
        if self.start < 0:
            raise InputError(f"--start must be 0 or more, not {self.start}.")
        if self.frames is not None and self.frames < 1:
            raise InputError(f"--frames must be 1 or more, not {self.frames}.")

    def _check_places(self) -> None:
        """Raise InputError for two boxes of one character, for more characters in one image than `max_characters`, and
        for places in an image whose masks come from a file."""
        for name, ready in (("--image-from", self.image_from), ("--driving-from", self.driving_from)):
            if ready is not None and any((place.frame == IMAGE) == (ready is self.image_from) for place in self.places):
                raise InputError(
                    f"A --point or --box is in the image whose characters {name} gives: leave out one of the options."
                )
        for frame in {place.frame for place in self.places}:
            here = [place for place in self.places if place.frame == frame]
            boxes = [place.colour for place in here if place.colour and len(place.numbers) == 4]
            if twice := [colour for colour in boxes if boxes.count(colour) > 1]:
                raise InputError(
                    f"Two --box of one image are {twice[0]}: use one box per character, and points in addition."
                )
            figures = len({place.colour for place in here} - {""}) + sum(not place.colour for place in here)
            if figures > self.max_characters:
                raise InputError(
                    f"--point and --box mark {counted(figures, 'character')} in one image, but --max-characters is "
                    f"{self.max_characters}: raise it, or give points and boxes of one character the same colour."
                )

    @property
    def resolved_mode(self) -> Literal["animate", "replace"]:
        return "replace" if self.mode == "replace" else "animate"

    def used_of(self, frames: int) -> int:
        """Number of frames that are used of a clip with `frames` frames."""
        available = max(frames - self.start, 0)
        return available if self.frames is None else min(self.frames, available)

    def text_for(self, image: bool) -> str | None:
        """Text prompt for the reference image or the driving clip; None if its characters are marked."""
        if self.prompt is not None:
            return self.prompt
        given = any((place.frame == IMAGE) == image for place in self.places)
        return None if given else AUTHORS_PROMPT


def parse_pairs(text: str) -> dict[int, int]:
    """Parse `1=2,2=1` to driving character → reference character, both from 0. Raises InputError for other text, and
    for a character that occurs twice on one side."""
    pairs: dict[int, int] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        left, equals, right = (each.strip() for each in part.partition("="))
        if not (equals and left.isdecimal() and right.isdecimal() and int(left) and int(right)):
            raise InputError(f"--pairs {text!r}: {part!r} is not DRIVING=REFERENCE, as in 1=2,2=1.")
        if int(left) - 1 in pairs or int(right) - 1 in pairs.values():
            raise InputError(f"--pairs {text!r} names a character twice: pair each character once.")
        pairs[int(left) - 1] = int(right) - 1
    return pairs
