"""Types of option values, in addition to those of click. A value that cannot be converted raises click.BadParameter.

Only click is imported here. `CHARACTERS` repeats the list in `masks`; a test compares them.
"""

import re
from fractions import Fraction
from typing import Any, ClassVar

import click

CHARACTERS = ("red", "green", "blue", "yellow", "magenta", "cyan")  # masks.CHARACTERS


class SizeType(click.ParamType):
    """`512x896` → (512, 896): height, width in pixels."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)[x×X*](\d+)", value.strip())
        if not match:
            self.fail(f"{value!r} is not a size. Write height and width as in 512x896.", param, ctx)
        return int(match[1]), int(match[2])


class MemorySize(click.ParamType):
    """`12GiB`, `900MiB`, `16G` → bytes."""

    name = "SIZE"
    UNITS: ClassVar = {"M": 2**20, "G": 2**30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([MG])(?:i?B)?)", value.strip(), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a memory size. Write it as in 12GiB.", param, ctx)
        return int(float(match[1]) * self.UNITS[match[2].upper()])


class GpuCount(click.ParamType):
    """`2` → 2, `all` → "all"."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all" or isinstance(value, int):
            return value
        if not value.strip().isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is not a number of GPUs. Write a number, or all.", param, ctx)
        return int(value)


class ColourMap(click.ParamType):
    """`255,140,0=red` → ((255, 140, 0), "red")."""

    name = "R,G,B=COLOUR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, str]:
        if isinstance(value, tuple):
            return value
        numbers, _, target = value.partition("=")
        levels = [int(part) if part.strip().isdecimal() else -1 for part in numbers.split(",")]
        if len(levels) != 3 or not all(0 <= level <= 255 for level in levels):
            self.fail(f"{value!r} does not start with a colour. Write it as in 255,140,0=red.", param, ctx)
        if target.strip() not in (*CHARACTERS, "white", "black"):
            self.fail(f"{target!r} is not a mask colour. Use white, black, {', '.join(CHARACTERS)}.", param, ctx)
        return tuple(levels), target.strip()


class SeedList(click.ParamType):
    """`1,2,3` → (1, 2, 3)."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        seeds = tuple(int(part) for part in parts if part.isdecimal())
        if len(set(seeds)) < len(parts):
            self.fail(f"{value!r} is not a list of different seeds. Write it as in 1,2,3.", param, ctx)
        return seeds


class RateType(click.ParamType):
    """`25`, `23.976`, `30000/1001` → `Fraction`, frames per second."""

    name = "FPS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        try:
            rate = Fraction(value)
        except (ValueError, ZeroDivisionError):
            rate = Fraction(0)
        if not 0 < rate <= 1000:
            self.fail(f"{value!r} is not a frame rate. Write it as in 25 or 30000/1001.", param, ctx)
        return rate
