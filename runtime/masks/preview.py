"""`scail2-rt masks preview`: a contact sheet and a video of masks drawn over their images.

A character is tinted in its colour and outlined. Visible background (white) is unchanged; hidden background (black) is
dimmed and hatched. Pixels in no class that are not black are orange, which is no mask colour. The sheet shows the
references, and then numbered frames spread evenly over the clip, up to half of them with findings. The video shows all
frames. A mask without an image is drawn over grey. For a case, the border of the output frame is drawn too: the image
outside it is faded, and margins look like hidden background.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Tell, untold
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.make.figures import stretched
from scail2_rt.runtime.masks.palette import (
    BLACK,
    CHARACTERS,
    CLEAR_LABEL,
    COLOURS,
    MODEL_LABEL,
    PALETTE_RGB,
    RGB,
    SPECK,
    UNCLEAR,
    class_shares,
    codes,
)
from scail2_rt.runtime.media.images import is_image, load_image, load_mask_image
from scail2_rt.runtime.media.lossless import write_image
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video
from scail2_rt.runtime.media.video_writer import VideoWriter

if TYPE_CHECKING:
    from PIL.Image import Image

    from scail2_rt.runtime.core.case_folder import CaseFiles
    from scail2_rt.runtime.masks.check import CheckResult

ORANGE: RGB = (255, 120, 0)
_PAPER, _INK, _ALARM = (250, 250, 248), (30, 30, 30), (205, 0, 0)
_TINT, _DIM, _STRIPE, _FADE = 0.5, 0.35, 0.22, 0.35
_FADED = (_FADE * np.arange(256) + (1 - _FADE) * _PAPER[0]).astype(np.uint8)
_LARGEST = 1280  # pixels, longer side of the video; at 2K, reading, drawing and encoding take six times as long
_BARE = 150  # grey level behind a mask without an image
_CELL, _GAP, _LINE, _FONT, _ENTRY = 420, 14, 26, 16, 330  # pixels
_FRAMES_AT_ONCE = 8

# Kinds of drawn pixels: labels 0 to 8 (7 hidden, 8 in no class), 9 stripes on hidden pixels, 11 to 16 outlines.
_STRIPED, _OUTLINED = 9, 10
_KIND = np.where((CLEAR_LABEL == UNCLEAR) & (MODEL_LABEL == BLACK), UNCLEAR, MODEL_LABEL).astype(
    np.uint8
)  # code → kind
_FACTOR = np.array(  # kind → weight of the image, in 1/256
    [256, *[256 * (1 - _TINT)] * 6, 256 * _DIM, 0, 256 * _DIM, *[0] * 7]
).astype(np.uint16)
_TINTED = _TINT * PALETTE_RGB[1:BLACK]
_ADDED = np.array([[0] * 3, *_TINTED, [0] * 3, ORANGE, [255 * _STRIPE] * 3, [0] * 3, *PALETTE_RGB[1:BLACK]]).astype(
    np.uint16
)


@dataclass(frozen=True, slots=True)
class Still:
    """One picture of the sheet.

    picture, mask   uint8 [H, W, 3]; picture is None if only the mask is known
    marked          whether the mask check has a finding here
    window          placement of the image in the output frame, None if unknown"""

    caption: str
    picture: np.ndarray | None
    mask: np.ndarray
    marked: bool = False
    window: Window | None = None

    @property
    def drawn(self) -> np.ndarray:
        """The mask drawn over the image, with the border of the frame, uint8 [H, W, 3]."""
        laid = overlay(self.picture, self.mask)
        return laid if self.window is None else draw_window(laid, self.window)


@dataclass(frozen=True, slots=True)
class Clip:
    """A mask video, its driving clip, the numbers of frames with findings, and its placement in the output frame."""

    mask: Path
    driving: Path | None = None
    marked: frozenset[int] = frozenset()
    window: Window | None = None


def overlay(picture: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """Draw a mask over an image, both uint8 [H, W, 3]. The image is stretched to the size of the mask; `masks.lint`
    compares their aspect ratios."""
    base = np.full(mask.shape, _BARE, np.uint8) if picture is None else _resized(picture, mask.shape[:2])
    kinds = np.take(_KIND, codes(mask))
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    period = max(6, mask.shape[0] // 32)
    stripes = (y + x) % period < max(1, period // 6)
    kinds[stripes & (kinds == BLACK)] = _STRIPED
    edge = np.zeros(kinds.shape, bool)
    width = max(1, mask.shape[0] // 256)
    areas = np.where(kinds == _STRIPED, np.uint8(BLACK), kinds)
    for part, other in ((areas, edge), (areas.T, edge.T)):
        different = part[width:] != part[:-width]
        other[width:] |= different
        other[:-width] |= different
    edge &= (kinds > 0) & (kinds < BLACK)
    kinds[edge] += _OUTLINED
    shown = base.astype(np.uint16)
    shown *= np.take(_FACTOR, kinds)[..., None]
    shown >>= 8
    shown += np.take(_ADDED, kinds, axis=0)
    return shown.astype(np.uint8)


def draw_window(laid: np.ndarray, window: Window) -> np.ndarray:
    """Draw the border of the output frame on an image, uint8 [H, W, 3], which is enlarged if the frame has margins."""
    height, width = laid.shape[:2]
    own = Window.official((height, width), window.frame) if window.way == "official" else window
    row_scale, column_scale = height / own.height, width / own.width
    top, left = round(-own.top * row_scale), round(-own.left * column_scale)  # corner of the frame, in pixels of `laid`
    bottom = round((own.frame[0] - own.top) * row_scale)
    right = round((own.frame[1] - own.left) * column_scale)
    above, beside = max(0, -top), max(0, -left)
    size = (above + max(height, bottom), beside + max(width, right))
    hidden = _hidden(size).copy()
    hidden[above : above + height, beside : beside + width] = laid
    rows, columns = slice(top + above, bottom + above), slice(left + beside, right + beside)
    picture = hidden
    if (bottom - top, right - left) != size:
        picture = np.take(_FADED, hidden)
        picture[rows, columns] = hidden[rows, columns]
    thick = max(1, min(height, width) // 150)
    for inset, colour in ((0, _INK), (thick, _PAPER)):
        box = picture[rows.start + inset : rows.stop - inset, columns.start + inset : columns.stop - inset]
        for side in (box[:thick], box[-thick:], box[:, :thick], box[:, -thick:]):
            side[:] = colour
    return picture


@lru_cache(maxsize=2)
def _hidden(size: tuple[int, int]) -> np.ndarray:
    """The drawing of hidden background, uint8 [H, W, 3]. It is cached for all frames of a clip and must not be
    changed."""
    return overlay(None, np.zeros((*size, 3), np.uint8))


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


def reference_stills(
    files: Sequence[Path], case: CaseFiles | None, extra_refs: Sequence[tuple[Path, Path]], result: CheckResult
) -> list[Still]:
    """The references of a case with their masks; without a case, the masks in `files` that are images. Raises
    InputError if a file cannot be read."""
    marked = {finding.file for finding in result.findings if finding.severity != "note" and finding.rule != "framing"}
    if case is None:
        images = [path for path in files if is_image(path)]
        return [Still(path.name, None, load_mask_image(path), str(path) in marked) for path in images]
    pairs = ((case.image, case.mask_image), *extra_refs)
    windows = [framed.window for framed in result.framing.inputs[1:]] if result.framing else [None] * len(pairs)
    return [
        Still(f"reference {mask.name}", load_image(image), load_mask_image(mask), str(mask) in marked, window)
        for (image, mask), window in zip(pairs, windows, strict=True)
    ]


def clip_of(files: Sequence[Path], case: CaseFiles | None, result: CheckResult) -> Clip | None:
    """The mask video of a case, or the video among `files`, if any. Raises InputError if `files` holds two videos."""
    videos = [path for path in files if not is_image(path)] if case is None else [case.mask_video]
    if len(videos) > 1:
        raise InputError(f"{videos[0]} and {videos[1]} are both videos: preview one at a time.")
    if not videos:
        return None
    spans = [
        span
        for finding in result.findings
        if finding.severity != "note" and finding.file == str(videos[0])
        for span in finding.frames
    ]
    marked = frozenset(frame for first, last in spans for frame in range(first, last + 1))
    window = result.framing.inputs[0].window if result.framing else None
    return Clip(videos[0], case.driving if case else None, marked, window)


def write_preview(
    folder: Path, references: Sequence[Still], clip: Clip | None, count: int, tell: Tell = untold
) -> tuple[Path, Path | None]:
    """Write the sheet `masks.png` with the references and `count` frames of the clip, and the video `masks.mp4` if
    there is a clip. Returns both paths. Raises InputError if there is nothing to show or a file cannot be read."""
    folder.mkdir(parents=True, exist_ok=True)
    stills, video = list(references), None
    if clip is not None:
        video = folder / "masks.mp4"
        stills += _write_overlay_video(video, clip, count, tell)
    sheet = folder / "masks.png"
    write_image(sheet, contact_sheet(stills))
    return sheet, video


def chosen_frames(total: int, count: int, marked: frozenset[int]) -> list[int]:
    """Choose `count` of `total` frames, spread evenly. Up to half of them are marked frames, also spread evenly."""
    reported = [frame for frame in sorted(marked) if frame < total]
    some = [reported[i] for i in _spread(len(reported), count // 2)]
    rest = [frame for frame in range(total) if frame not in some]
    return sorted({*some, *(rest[i] for i in _spread(len(rest), count - len(some)))})


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` numbers below `total`, spread evenly from first to last."""
    if count >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})


def _write_overlay_video(output: Path, clip: Clip, count: int, tell: Tell) -> list[Still]:
    """Write all frames of the clip with the mask drawn over them. Return the frames for the sheet."""
    info = probe_video(clip.mask)
    wanted = set(chosen_frames(info.frames, count, clip.marked))
    stills: list[Still] = []
    size = _fitting(info.height, info.width)
    empty = Still("", None, np.zeros((*size, 3), np.uint8), window=clip.window)
    height, width = (max(2, side // 2 * 2) for side in empty.drawn.shape[:2])  # 4:2:0 needs even sides
    video = VideoFormat(width, height, info.frame_rate or Fraction(25))
    with VideoWriter(output, video, timestamps=info.timestamps) as writer:
        for number, (picture, full) in enumerate(_pairs(clip)):
            mask = stretched(full, size)
            still = Still(f"frame {number}", picture, mask, number in clip.marked, clip.window)
            if number in wanted:
                stills.append(still)
            writer.write(_resized(still.drawn, (height, width))[None])
            tell((number + 1) / info.frames)
        writer.segment_done()
        writer.finish()
    return stills


def _fitting(height: int, width: int) -> tuple[int, int]:
    """The size (H, W) at which a mask is drawn: its own, reduced if a side exceeds `_LARGEST`."""
    scale = min(1.0, _LARGEST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _pairs(clip: Clip) -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
    """Yield (driving frame, mask frame). The driving frame is None after the end of the driving clip, or without
    one."""
    driving = chain(_frames(clip.driving), repeat(None)) if clip.driving else repeat(None)
    yield from ((picture, mask) for mask, picture in zip(_frames(clip.mask), driving, strict=False))


def _frames(path: Path) -> Iterator[np.ndarray]:
    with VideoReader(path) as reader:
        while len(frames := reader.read(_FRAMES_AT_ONCE)):
            yield from frames


def contact_sheet(stills: Sequence[Still]) -> np.ndarray:
    """Arrange stills with captions on one sheet with a legend at the bottom, uint8 [H, W, 3]. Raises InputError if
    there are none."""
    from PIL import Image, ImageDraw, ImageFont

    if not stills:
        raise InputError("There is no mask to show: give a case or mask files.")
    font = ImageFont.load_default(_FONT)
    pictures = [_thumbnail(still.drawn) for still in stills]
    tallest = max(picture.height for picture in pictures)
    columns = min(len(stills), max(2, round(math.sqrt(len(stills) * tallest / _CELL * 16 / 10))))
    tops, foot = [], _GAP  # top of each row, and of the legend
    for first in range(0, len(pictures), columns):
        tops.append(foot)
        foot += max(picture.height for picture in pictures[first : first + columns]) + _LINE + _GAP
    legend = _legend(stills)
    width = max(_GAP + columns * (_CELL + _GAP), 2 * (_CELL + _GAP) + _GAP)
    per_line = max(1, width // _ENTRY)
    sheet = Image.new("RGB", (width, foot + -(-len(legend) // per_line) * _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (still, picture) in enumerate(zip(stills, pictures, strict=True)):
        left, top = _GAP + i % columns * (_CELL + _GAP), tops[i // columns]
        draw.text((left, top), _caption(still), _INK if not still.marked else _ALARM, font)
        sheet.paste(picture, (left, top + _LINE))
        if still.marked:
            box = (left - 3, top + _LINE - 3, left + picture.width + 2, top + _LINE + picture.height + 2)
            draw.rectangle(box, outline=_ALARM, width=3)
    for i, (swatch, text) in enumerate(legend):
        left, top = _GAP + i % per_line * _ENTRY, foot + i // per_line * _LINE
        sheet.paste(_thumbnail(swatch, 22, 18), (left, top))
        draw.rectangle((left, top, left + 22, top + 18), outline=_INK)
        draw.text((left + 30, top - 1), text, _INK, font)
    return np.asarray(sheet)


def _caption(still: Still) -> str:
    covered = [f"{name} {100 * share:.1f} %" for name, share in _shares(still.mask).items()]
    text = f"{still.caption}: {', '.join(covered) or 'no mask colour'}"
    return text if len(text) <= 52 else f"{text[:51]}…"


def _shares(mask: np.ndarray) -> dict[str, float]:
    """Colour → share of the mask, for colours that cover at least `SPECK` of it."""
    shares = dict(zip(COLOURS, class_shares(mask, clean=True).tolist(), strict=True))
    return {name: share for name, share in shares.items() if share >= SPECK}


def _legend(stills: Sequence[Still]) -> list[tuple[np.ndarray, str]]:
    """(swatch, text) of the entries that these stills need."""

    def swatch(rgb: RGB) -> np.ndarray:
        return overlay(None, np.full((18, 22, 3), rgb, np.uint8))

    seen = {name for still in stills for name in _shares(still.mask)}
    entries = [(swatch(COLOURS[name]), f"{name} character") for name in CHARACTERS if name in seen]
    entries += [
        (swatch(COLOURS["white"]), "unchanged: visible (white)"),
        (swatch((0, 0, 0)), "dark, hatched: hidden (black)"),
        (swatch((128, 128, 128)), "orange: no class (soft, grey)"),
    ]
    if any(still.window is not None for still in stills):
        entries.append(
            (np.pad(np.full((12, 16, 3), 110, np.uint8), ((3, 3), (3, 3), (0, 0))), "border: the output frame")
        )
    if any(still.marked for still in stills):
        entries.append((np.full((18, 22, 3), _ALARM, np.uint8), "red box: see `masks check`"))
    return entries


def _thumbnail(pixels: np.ndarray, width: int = _CELL, height: int = _CELL) -> Image:
    """Scale to fit into width × height. Small masks are enlarged with sharp pixels."""
    from PIL import Image as Images

    picture = Images.fromarray(pixels)
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Images.Resampling.NEAREST if scale > 1 else Images.Resampling.LANCZOS)
