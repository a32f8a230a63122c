"""Contact sheets: PNG files that show inputs, outputs and correct outputs side by side.

One block per case: the title, the reference images on the left, and one row of frames each for the driving clip, the
outputs and the truth, all at the same frame numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from scail2_rt.benchmarks.sprites.world.cases import SpriteCase

SHOWN = 6  # frames per row
MARGIN, TITLE, TEXT = 8, 24, 13  # pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a sheet. references: (name, image uint8 [H, W, 3]) from top to bottom; rows: name → video uint8
    [T, H, W, 3]."""

    title: str
    references: Sequence[tuple[str, np.ndarray]]
    rows: Mapping[str, np.ndarray]


def case_block(title: str, case: SpriteCase, made: Mapping[str, np.ndarray]) -> Block:
    """The block of a case: driving clip, `made` (name → video), truth. Additional references are below the first one.
    Inputs of another shape than the truth are scaled to fit its size, with margins."""
    size = case.truth.shape[1:3]
    extras = [(f"extra reference {number}", image) for number, (image, _) in enumerate(case.extras, 1)]
    pictures = [(name, _fitted(image, size)) for name, image in (("reference", case.reference), *extras)]
    driving = case.driving
    if driving.shape[1:3] != size:
        driving = np.stack([_fitted(frame, size) for frame in driving])
    return Block(title, pictures, {"driving": driving, **made, "truth": case.truth})


def _fitted(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [H, W, 3] scaled to fit `size` (H, W), with white margins."""
    if pixels.shape[:2] == size:
        return pixels
    picture = ImageOps.contain(Image.fromarray(pixels), size[::-1])
    return np.asarray(ImageOps.pad(picture, size[::-1], color=PAPER))


def write_sheet(path: Path, blocks: Iterable[Block]) -> None:
    """Write the blocks, one below the other, as a PNG."""
    drawn = [_draw_block(block) for block in blocks]
    width = max(image.width for image in drawn)
    sheet = Image.new("RGB", (width, sum(image.height for image in drawn)), PAPER)
    top = 0
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_block(block: Block) -> Image.Image:
    frames, height, width, _ = next(iter(block.rows.values())).shape
    moments = np.linspace(0, frames - 1, min(SHOWN, frames)).round().astype(int)
    stacked = max(len(block.rows) * (height + 2), len(block.references) * (height + TITLE))
    font = ImageFont.load_default(TEXT)
    left = 3 * MARGIN + width + math.ceil(max(map(font.getlength, block.rows)))
    wide = max(left + len(moments) * (width + 2), MARGIN + math.ceil(font.getlength(block.title)))
    image = Image.new("RGB", (wide + MARGIN, 2 * TITLE + stacked + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str = "lm") -> None:
        draw.text((x, y), text, INK, font, anchor)

    write(MARGIN, TITLE / 2, block.title)
    for number, (name, pixels) in enumerate(block.references):
        top = TITLE + number * (height + TITLE)
        write(MARGIN, top + TITLE / 2, name)
        image.paste(Image.fromarray(pixels), (MARGIN, top + TITLE))
    for column, moment in enumerate(moments):
        x = left + column * (width + 2)
        write(x + width / 2, 1.5 * TITLE, f"frame {moment}", "mm")
        for row, video in enumerate(block.rows.values()):
            image.paste(Image.fromarray(video[moment]), (x, 2 * TITLE + row * (height + 2)))
    for row, name in enumerate(block.rows):
        write(left - MARGIN, 2 * TITLE + row * (height + 2) + height / 2, name, "rm")
    return image
