"""Pairs the characters of the driving clip with those of the reference image, and assigns mask colours.

The rules of the official code apply unless options override them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.masks.make.figures import Character, nearest_pairs, overlap_pairs
from scail2_rt.runtime.masks.make.options import AUTHORS_ORDER, MaskOptions, parse_pairs


class Pairing:
    """Pairs of driving and reference characters. References are numbered from 0 in their order, driving characters from
    1.

    references     masks of the reference characters
    colours        their requested colours; "" for any
    reference_of   driving character → reference
    notes          sentences for the user

    Raises InputError if `--pairs` names a reference that does not exist."""

    def __init__(self, options: MaskOptions, references: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        self._options, self._references = options, list(references)
        self._wanted = parse_pairs(options.pairs)
        if beyond := [r for r in self._wanted.values() if r >= len(references)]:
            raise InputError(
                f"--pairs names reference character {beyond[0] + 1}, but the reference image has {len(references)}: "
                "name one of these."
            )
        free = iter(colour for colour in AUTHORS_ORDER if colour not in colours)
        self._colours = [colour or next(free) for colour in colours]
        self._requested = [bool(colour) for colour in colours]
        self._ready = options.driving_from is not None
        self.reference_of: dict[int, int] = {}
        self._first = 0  # number of characters in the first frame that shows any
        self.notes: list[str] = []

    @property
    def count(self) -> int:
        """Number of characters in the reference image."""
        return len(self._references)

    def begin(self, drivers: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        """Pair the characters of the first frame that shows any. drivers: their masks in order; colours: requested
        ones, "" for any. Raises InputError if `--pairs` names a driving character that cannot exist."""
        self._first = len(drivers)
        later = sum(place.frame >= 0 for place in self._options.places)  # these may mark new characters
        possible = max(len(drivers), len(self._references), self._options.max_characters if self._ready else 0) + later
        if beyond := [d for d in self._wanted if d >= possible]:
            raise InputError(
                f"--pairs names driving character {beyond[0] + 1}, but the first frame of the driving clip shows "
                f"{len(drivers)}: name one of these."
            )
        pairs = {
            d: self._colours.index(c) for d, c in enumerate(colours) if c in self._colours and self._is_requested(c)
        }
        pairs |= {d: r for d, r in self._wanted.items() if d not in pairs and r not in pairs.values()}
        free_drivers = [d for d in range(len(drivers)) if d not in pairs]
        free = [r for r in range(len(self._references)) if r not in pairs.values()]
        if free and free_drivers:
            pairs |= self._by_rule(drivers, free_drivers, free)
        for driver, reference in pairs.items():
            requested = colours[driver] if driver < len(colours) else ""
            if requested and requested != self._colours[reference]:
                self._recolour(reference, requested)
            self.reference_of[driver + 1] = reference
        if dropped := [d + 1 for d in range(len(drivers)) if d not in pairs]:
            self.notes.append(
                f"The first frame of the driving clip shows {counted(len(drivers), 'character')}, the reference image "
                f"{len(self._references)}: {_characters(dropped)} of the driving clip will be ignored."
            )

    def colour_of(self, character: Character) -> str | None:
        """The mask colour of a driving character; None if it has no reference. A character that enters late gets the
        first free reference."""
        number = character.number
        if number not in self.reference_of and number > self._first:
            free = [r for r in range(len(self._references)) if r not in self.reference_of.values()]
            same = [r for r in free if character.colour and self._colours[r] == character.colour]
            if same or free:
                self.reference_of[number] = (same or free)[0]
                if character.colour and not same:
                    self._recolour(self.reference_of[number], character.colour)
        reference = self.reference_of.get(number)
        return None if reference is None else self._colours[reference]

    def references(self) -> list[tuple[np.ndarray, str]]:
        """Mask and colour of the reference characters that have a driving character. Adds a note about the others."""
        driven = set(self.reference_of.values())
        if idle := [r + 1 for r in range(len(self._references)) if r not in driven]:
            self.notes.append(
                f"No character of the driving clip moves {_characters(idle)} of the reference image: "
                "no colour is used there."
            )
        return [(self._references[r], self._colours[r]) for r in sorted(driven)]

    def _by_rule(self, drivers: Sequence[np.ndarray], free_drivers: list[int], free: list[int]) -> dict[int, int]:
        """Pair free drivers with free references: by overlap with `one_to_many`, by distance if there are more drivers
        than references, else in order."""
        masks, references = [drivers[d] for d in free_drivers], [self._references[r] for r in free]
        if self._options.one_to_many:
            found = overlap_pairs(references, masks)
        elif len(free) < len(free_drivers):
            found = nearest_pairs(references, masks)
        else:
            found = {i: i for i in range(len(free_drivers))}
        return {free_drivers[d]: free[r] for d, r in found.items()}

    def _is_requested(self, colour: str) -> bool:
        return self._requested[self._colours.index(colour)]

    def _recolour(self, reference: int, colour: str) -> None:
        """Give a reference a colour. If another reference has it, the two swap colours."""
        if colour in self._colours:
            self._colours[self._colours.index(colour)] = self._colours[reference]
        self._colours[reference] = colour


def _characters(numbers: Sequence[int]) -> str:
    return f"character{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
