"""Who drives whom, in which colour: figures of the clip and of the reference image, the authors' rules first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.figures import Character, nearest_pairs, overlap_pairs
from scail2_rt.runtime.masks.make.options import AUTHORS_ORDER, MaskOptions, parse_pairs


class Pairing:
    """References have numbers from 0 in their order, figures of the clip from 1. colours: those that were asked for, ""
    for none."""

    def __init__(self, options: MaskOptions, references: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        self._options, self._references = options, list(references)
        self._wanted = parse_pairs(options.pairs)
        if beyond := [r for r in self._wanted.values() if r >= len(references)]:
            raise InputError(
                f"--pairs names reference figure {beyond[0] + 1}, and the reference image has {len(references)}."
            )
        free = iter(colour for colour in AUTHORS_ORDER if colour not in colours)
        self._colours = [colour or next(free) for colour in colours]
        self._asked = [bool(colour) for colour in colours]
        self._ready = options.driving_from is not None
        self.reference_of: dict[int, int] = {}
        self._first = 0  # how many figures the first frame shows
        self.notes: list[str] = []

    @property
    def count(self) -> int:
        """Figures of the reference image."""
        return len(self._references)

    def begin(self, drivers: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        """The figures of the first frame that shows any, as masks, in their order, with the colours asked for."""
        self._first = len(drivers)
        later = sum(place.frame >= 0 for place in self._options.places)  # may show somebody new
        possible = max(len(drivers), len(self._references), self._options.max_characters if self._ready else 0) + later
        if beyond := [d for d in self._wanted if d >= possible]:
            raise InputError(
                f"--pairs names the driving video's figure {beyond[0] + 1}, and its first frame shows {len(drivers)}."
            )
        pairs = {d: self._colours.index(c) for d, c in enumerate(colours) if c in self._colours and self._is_asked(c)}
        pairs |= {d: r for d, r in self._wanted.items() if d not in pairs and r not in pairs.values()}
        left_drivers = [d for d in range(len(drivers)) if d not in pairs]
        left = [r for r in range(len(self._references)) if r not in pairs.values()]
        if left and left_drivers:
            pairs |= self._by_rule(drivers, left_drivers, left)
        for driver, reference in pairs.items():
            asked = colours[driver] if driver < len(colours) else ""
            if asked and asked != self._colours[reference]:
                self._recolour(reference, asked)
            self.reference_of[driver + 1] = reference
        if dropped := [d + 1 for d in range(len(drivers)) if d not in pairs]:
            self.notes.append(
                f"The clip's first frame shows {len(drivers)} figures and the reference image {len(self._references)}: "
                f"{_figures(dropped)} of the clip, in their order, drive{'s' if len(dropped) == 1 else ''} nobody."
            )

    def colour_of(self, character: Character) -> str | None:
        """The colour of a figure of the clip; one that comes late takes the first reference that is left. None for one
        that drives nobody."""
        number = character.number
        if number not in self.reference_of and number > self._first:
            left = [r for r in range(len(self._references)) if r not in self.reference_of.values()]
            same = [r for r in left if character.colour and self._colours[r] == character.colour]
            if same or left:
                self.reference_of[number] = (same or left)[0]
                if character.colour and not same:
                    self._recolour(self.reference_of[number], character.colour)
        reference = self.reference_of.get(number)
        return None if reference is None else self._colours[reference]

    def references(self) -> list[tuple[np.ndarray, str]]:
        """Mask and colour of every reference figure that somebody drives; a note for each of the others."""
        driven = set(self.reference_of.values())
        if idle := [r + 1 for r in range(len(self._references)) if r not in driven]:
            self.notes.append(
                f"Nobody in the clip drives {_figures(idle)} of the reference image: left without a colour."
            )
        return [(self._references[r], self._colours[r]) for r in sorted(driven)]

    def _by_rule(self, drivers: Sequence[np.ndarray], left_drivers: list[int], left: list[int]) -> dict[int, int]:
        masks, references = [drivers[d] for d in left_drivers], [self._references[r] for r in left]
        if self._options.one_to_many:
            found = overlap_pairs(references, masks)
        elif len(left) < len(left_drivers):
            found = nearest_pairs(references, masks)
        else:
            found = {i: i for i in range(len(left_drivers))}
        return {left_drivers[d]: left[r] for d, r in found.items()}

    def _is_asked(self, colour: str) -> bool:
        return self._asked[self._colours.index(colour)]

    def _recolour(self, reference: int, colour: str) -> None:
        """Give a reference the colour; whoever has it takes the one that becomes free."""
        if colour in self._colours:
            self._colours[self._colours.index(colour)] = self._colours[reference]
        self._colours[reference] = colour


def _figures(numbers: Sequence[int]) -> str:
    return f"figure{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
