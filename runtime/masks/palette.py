"""The classes of mask pixels, and the 28 mask channels that the transformer reads.

A channel of a mask pixel is on if its 8-bit value is above 225. Seven combinations are classes: white (visible
background) and six colours (characters). Every other pixel is in no class: the model cannot distinguish black, grey and
soft edges.

The mask tools distinguish five levels per channel: 0, up to 64, up to 225, up to 254, and 255. A pixel is *clear* if no
channel is between off (up to 64) and on, and *exact* if all channels are 0 or 255. `codes` converts a frame to one byte
per pixel, and the tables below classify the 125 codes. `masks.stats` counts codes, and `masks.cleaning` repairs pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["animate", "replace"]
Role = Literal["reference", "driving"]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {  # in the order of the mask channels
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
}
PALETTE: dict[str, RGB] = {**COLOURS, "black": (0, 0, 0)}  # in the order of labels
CHARACTERS = tuple(COLOURS)[1:]
PALETTE_RGB = np.array(list(PALETTE.values()), np.uint8)  # [8, 3] by label
BLACK, UNCLEAR = 7, 8  # labels; 0 to 6 are the classes in the order of `COLOURS`
ON_ABOVE = 225  # 8-bit: 225 is off, 226 is on
OFF_BELOW = 64  # up to this a channel is off; between it and on are soft edges, codec noise and wrong colours
SPECK = 0.0005  # share of a frame below which a colour counts as codec noise
PALETTE_TEXT = (
    "white (255,255,255) for visible background, black (0,0,0) for hidden background, and for the characters red "
    "(255,0,0), green (0,255,0), blue (0,0,255), yellow (255,255,0), magenta (255,0,255), cyan (0,255,255)"
)
_FRAMES_AT_ONCE = 8

_LEVELS = np.digitize(np.arange(256), (1, OFF_BELOW + 1, ON_ABOVE + 1, 255)).astype(np.uint8)  # 0 to 4
CODES = 125
_CODE_OF = [place * _LEVELS for place in (25, 5, 1)]  # by channel: 8-bit value → its part of the code
_DIGITS = np.stack(np.unravel_index(np.arange(CODES), (5, 5, 5)), axis=-1)  # [125, 3] levels of r, g, b
_LABEL_OF_ON = np.array([BLACK, 3, 2, 6, 1, 5, 4, 0], np.uint8)  # by 4r + 2g + b, channels on or off
MODEL_LABEL = _LABEL_OF_ON[(_DIGITS >= 3) @ np.array([4, 2, 1])]  # the class that the model reads; `BLACK` for none
# the same, but `UNCLEAR` for pixels that are not clear
CLEAR_LABEL = np.where((_DIGITS == 2).any(1), UNCLEAR, MODEL_LABEL).astype(np.uint8)
EXACT = np.asarray(np.isin(_DIGITS, (0, 4)).all(1))


def codes(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [H, W]: 25 r + 5 g + b of the channels' levels 0 to 4."""
    r, g, b = (np.take(table, frame[..., i]) for i, table in enumerate(_CODE_OF))
    r += g
    r += b
    return r


def background_of(mode: Mode, role: Role) -> RGB:
    """White where the background is visible: in the reference in animate mode, in the driving clip in replace mode."""
    return PALETTE["white" if (mode == "animate") == (role == "reference") else "black"]


def mask_latents(mask: Tensor) -> Tensor:
    """Mask frames [T, 3, H, W] fp32 in -1..1, T = 4n+1 → coverage of each class [28, F, h, w] fp32 in 0..1, F = n+1.

    h and w are H/8 and W/8, rounded up. The channel is (frame in the group of four) · 7 + class; the first group holds
    the first frame four times. A driving mask is halved before (`half_resolution`), a reference mask is not (MODEL §2).
    Raises ValueError if T is not 4n+1.
    """
    import torch
    from torch.nn import functional as F

    if mask.shape[0] % 4 != 1:
        raise ValueError(f"a mask clip has 4n+1 frames, not {mask.shape[0]}")
    size = [-(-side // 8) for side in mask.shape[-2:]]  # rounded up once, which equals three halvings rounded up
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
    """Share of the pixels of one frame (uint8 [H, W, 3]) in each of the seven classes, in the order of `COLOURS`.

    Classes are those of the model. With `clean` only clear pixels count, which excludes the fringes of lossy coding (a
    white pixel next to red can pass the threshold as yellow).
    """
    labels = (CLEAR_LABEL if clean else MODEL_LABEL)[codes(frame)]
    return np.bincount(labels.ravel(), minlength=UNCLEAR + 1)[:BLACK] / labels.size
