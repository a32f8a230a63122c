"""Colour-coded masks: what a pixel means, and the 28 channels the transformer reads.

A channel of a mask pixel is on when its 8-bit value is above 225. Seven combinations mean something (white: background
that shows; six colours: characters), every other pixel is in no class: black, grey and soft edges are one to the model.

The tools look closer than the model does, at five levels a channel (0, up to 64, up to 225, above it, 255): a pixel is
*clear* when no channel lies between off and on, and *exact* when all are 0 or 255. A frame turns into one byte a pixel,
`codes`, and the small tables below say what each of the 125 codes is. `masks.stats` counts them, `masks.lint` judges
them, `mask_cleaning` mends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["animate", "replace"]
Role = Literal["reference", "driving"]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {  # in channel order
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}
PALETTE: dict[str, RGB] = {**COLOURS, "black": (0, 0, 0)}  # the order of labels
CHARACTERS = tuple(COLOURS)[1:]
PALETTE_RGB = np.array(list(PALETTE.values()), np.uint8)  # [8, 3] by label
BLACK, UNCLEAR = 7, 8  # labels; 0 to 6 are the classes in `COLOURS` order
ON_ABOVE = 225  # 8-bit: 225 is off, 226 is on
OFF_BELOW = 64  # a channel above this and not on is neither off nor on: soft edge, codec noise, or a wrong colour
SPECK = 0.0005  # share of a frame below which a colour is taken for codec noise
PALETTE_TEXT = (
    "white (255,255,255) for background that shows, black (0,0,0) for what is hidden, and for the characters red "
    "(255,0,0), green (0,255,0), blue (0,0,255), yellow (255,255,0), magenta (255,0,255), cyan (0,255,255)"
)
_FRAMES_AT_ONCE = 8

_LEVELS = np.digitize(np.arange(256), (1, OFF_BELOW + 1, ON_ABOVE + 1, 255)).astype(np.uint8)  # 0 to 4
CODES = 125
_CODE_OF = [place * _LEVELS for place in (25, 5, 1)]  # by channel: what an 8-bit value adds to the code
_DIGITS = np.stack(np.unravel_index(np.arange(CODES), (5, 5, 5)), axis=-1)  # [125, 3] levels of r, g, b
_LABEL_OF_ON = np.array([BLACK, 3, 2, 6, 1, 5, 4, 0], np.uint8)  # by 4r + 2g + b, channels on or off
MODEL_LABEL = _LABEL_OF_ON[(_DIGITS >= 3) @ np.array([4, 2, 1])]  # as the model reads it: what is no class is `BLACK`
CLEAR_LABEL = np.where((_DIGITS == 2).any(1), UNCLEAR, MODEL_LABEL).astype(np.uint8)
EXACT = np.asarray(np.isin(_DIGITS, (0, 4)).all(1))


def codes(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [H, W]: 25 r + 5 g + b of the channels' levels 0 to 4."""
    r, g, b = (np.take(table, frame[..., i]) for i, table in enumerate(_CODE_OF))
    r += g
    r += b
    return r


def background_of(mode: Mode, role: Role) -> RGB:
    """White where the background shows: the reference's in animate mode, the driving video's in replace mode."""
    return PALETTE["white" if (mode == "animate") == (role == "reference") else "black"]


def mask_latents(mask: Tensor) -> Tensor:
    """Mask frames [T, 3, H, W] fp32 in -1..1, T = 4n+1 → coverages [28, F, h, w] fp32 in 0..1 with F = n+1.

    h and w are H and W halved three times, rounded up each time. Channel = frame in group · 7 + colour; the first frame
    fills a group of its own. A driving mask is halved first (`half_resolution`), a reference mask is not (MODEL §2).
    """
    import torch
    from torch.nn import functional as F

    if mask.shape[0] % 4 != 1:
        raise ValueError(f"a mask clip has 4n+1 frames, not {mask.shape[0]}")
    size = [-(-side // 8) for side in mask.shape[-2:]]  # ceil thrice by 2 is ceil once by 8
    threshold = float(torch.tensor((ON_ABOVE - 127.5) / 127.5, dtype=torch.float32))
    pooled = []
    for chunk in mask.split(_FRAMES_AT_ONCE):
        on = chunk > threshold
        planes = [torch.stack([on[:, i] == bool(rgb[i]) for i in range(3)]).all(0) for rgb in COLOURS.values()]
        pooled.append(F.interpolate(torch.stack(planes, 1).float(), size=size, mode="area"))
    frames = torch.cat([pooled[0][:1].expand(3, -1, -1, -1), *pooled])  # [4F, 7, h, w]
    groups = frames.unflatten(0, (-1, 4)).permute(1, 2, 0, 3, 4)  # (f g) c h w -> g c f h w
    return groups.reshape(28, -1, *size)


def class_shares(frame: np.ndarray, clean: bool = False) -> np.ndarray:
    """Share of the pixels of one frame (uint8 [H, W, 3]) in each of the seven classes, in `COLOURS` order.

    As the model classifies them; with `clean` only clear pixels count, which leaves out the fringes that lossy coding
    makes (a white pixel beside red can pass the threshold as yellow).
    """
    labels = (CLEAR_LABEL if clean else MODEL_LABEL)[codes(frame)]
    return np.bincount(labels.ravel(), minlength=UNCLEAR + 1)[:BLACK] / labels.size
