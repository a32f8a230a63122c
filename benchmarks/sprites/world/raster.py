"""Draws pictures of tapered capsules over a background, with tensors, on a CPU or a GPU.

A picture is drawn in one pass over its parts, from far to near. The distance of every pixel to a part's axis determines
a soft edge two pixels wide, a darker rim and the stripes. A pixel that a part covers at least half gets the part's
label. All frames are drawn together. Source of the distance to a capsule: I. Quilez, "Distance functions".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.world.figures import COLOUR, FIELDS, LABEL, RA, RB, SECOND, SHADE, STRIPES, Body

UNITS = 128  # height of a picture in units
BLOBS = 4
# Fields of a background: RGB at the top, RGB at the horizon, RGB of the ground; y of the horizon; horizontal pan; then
# per blob x, y, radius, RGB
HORIZON, PAN, FIRST_BLOB = 9, 10, 11
BACKGROUND = FIRST_BLOB + 6 * BLOBS
BONE_RADIUS = 2.6
EDGE = 2.0  # width of a part's soft edge in pixels
CLAY = (0.62, 0.66, 0.74)


@dataclass(frozen=True, slots=True)
class Picture:
    """The description of T frames: parts [T, P, FIELDS], from far to near, and background [T, BACKGROUND], as NumPy
    arrays."""

    parts: np.ndarray
    background: np.ndarray


def make_picture(bodies: list[Body], background: np.ndarray) -> Picture:
    """A picture of bodies over a background [T, BACKGROUND]. Later bodies are in front of earlier ones."""
    ordered = [
        np.take_along_axis(body.parts, np.argsort(body.depth, axis=1, kind="stable")[..., None], axis=1)
        for body in bodies
    ]
    empty = np.zeros((len(background), 0, FIELDS))
    return Picture(np.concatenate([*ordered, empty], axis=1), background)


def skeleton(body: Body) -> Body:
    """The body as a coloured stick figure, like the output of a pose estimator."""
    kept = body.bones >= 0
    parts = body.parts[:, kept].copy()
    parts[..., RA] = parts[..., RB] = BONE_RADIUS
    hue = body.bones[kept] / (body.bones.max() + 1)
    parts[..., COLOUR] = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] - np.array([0, 1 / 3, 2 / 3])))
    parts[..., STRIPES] = parts[..., SHADE] = 0
    return replace(body, parts=parts, depth=body.depth[:, kept], bones=body.bones[kept], details=body.details[kept])


def clay(body: Body) -> Body:
    """The body without colours and details and with strong shading, like a rendered body mesh."""
    kept = ~body.details
    parts = body.parts[:, kept].copy()
    parts[..., COLOUR], parts[..., STRIPES], parts[..., SHADE] = CLAY, 0, 0.7
    return replace(body, parts=parts, depth=body.depth[:, kept], bones=body.bones[kept], details=body.details[kept])


def black(frames: int) -> np.ndarray:
    """A black background [T, BACKGROUND]."""
    return np.zeros((frames, BACKGROUND))


def draw(parts: Tensor, background: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw N frames: parts [N, P, FIELDS], background [N, BACKGROUND] → image uint8 [N, 3, H, W], labels uint8
    [N, H, W]."""
    scale = UNITS / height
    y = (torch.arange(height, device=parts.device, dtype=parts.dtype) + 0.5)[:, None] * scale
    x = (torch.arange(width, device=parts.device, dtype=parts.dtype) + 0.5)[None] * scale
    image = _scenery(background, x, y)
    labels = torch.zeros(len(parts), height, width, dtype=torch.uint8, device=parts.device)
    add = _compiled_part() if parts.is_cuda else _part
    for part in parts.unbind(1):
        image, labels = add(part[:, :, None, None], image, labels, x, y, scale)
    return (image * 255 + 0.5).to(torch.uint8), labels


def draw_picture(picture: Picture, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a picture on the CPU → image uint8 [T, H, W, 3], labels uint8 [T, H, W]."""
    parts, background = (torch.from_numpy(x).float() for x in (picture.parts, picture.background))
    image, labels = draw(parts, background, height, width)
    return image.permute(0, 2, 3, 1).numpy(), labels.numpy()


def _part(part: Tensor, image: Tensor, labels: Tensor, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Draw one part [N, FIELDS, 1, 1] over all frames."""
    ax, ay, bx, by, ra, rb = part[:, :6].unbind(1)
    dx, dy = bx - ax, by - ay
    along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-6)).clamp(0, 1)
    distance = ((x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2).sqrt()
    radius = ra + (rb - ra) * along
    cover = ((radius - distance) / (EDGE * scale) + 0.5).clamp(0, 1)
    stripes = part[:, STRIPES]
    second = (0.5 + 3 * torch.sin(2 * torch.pi * stripes * along)).clamp(0, 1) * (stripes > 0)
    rim = 1 - part[:, SHADE] * (distance / (radius + 1e-6)).clamp(0, 1) ** 2
    colour = (part[:, COLOUR] + (part[:, SECOND] - part[:, COLOUR]) * second[:, None]) * rim[:, None]
    image = image + (colour - image) * cover[:, None]
    return image, torch.where(cover >= 0.5, part[:, LABEL].to(torch.uint8), labels)


@cache
def _compiled_part() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_part`, compiled to one kernel instead of thirty."""
    return torch.compile(_part)


def _scenery(background: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw sky, ground and soft blobs → [N, 3, H, W] in 0…1."""
    fields = background[:, :, None, None]
    sky, low, ground = fields[:, 0:3], fields[:, 3:6], fields[:, 6:9]
    horizon = fields[:, HORIZON : HORIZON + 1]
    shifted = x - fields[:, PAN]
    image = sky + (low - sky) * (y / horizon.clamp(min=1)).clamp(0, 1)
    for i in range(BLOBS):
        start = FIRST_BLOB + 6 * i
        bx, by, radius = (fields[:, start + k] for k in range(3))
        cover = ((radius - ((shifted - bx) ** 2 + (y - by) ** 2).sqrt()) / 3 + 0.5).clamp(0, 1) * (radius > 0)
        image = image + (fields[:, start + 3 : start + 6] - image) * cover[:, None]
    earth = ground * (0.85 + 0.3 * ((y - horizon) / UNITS).clamp(0, 1))
    return image + (earth - image) * ((y - horizon) / 2 + 0.5).clamp(0, 1) * (horizon > 0)
