"""The training data of the small SAM 2: drawn clips on the device, and batches with one figure per sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.training.drawing import draw_pictures
from scail2_rt.benchmarks.sprites.training.segmenter_model import BOX, IMAGE, NO_POINT, POINT
from scail2_rt.benchmarks.sprites.world.crossings import MOST
from scail2_rt.benchmarks.sprites.world.raster import Picture
from scail2_rt.runtime.masks.make.pixels import MEAN, STD

AT_ONCE = 64  # clips drawn together
LEAST = 24  # minimum number of pixels of a chosen figure
STRIDES = 4  # largest distance between consecutive frames of a sample
ZOOM = 0.7  # smallest crop, relative to the picture's side
JITTER = 0.06  # largest shift of a box's corner, relative to its side
INSIDE = 0.6  # share of points on a figure


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    frames   [B, T, 3, S, S], normalised
    points   [B, 1, P, 2] and labels [B, 1, P], as prompts of SAM 2
    target   bool [B, T, h, w], mask of the figure; empty if the point is on the background"""

    frames: Tensor
    points: Tensor
    labels: Tensor
    target: Tensor


class SegmenterClips:
    """Drawn clips: image uint8 [N, T, 3, H, W], labels uint8 [N, T, H, W]."""

    def __init__(self, pictures: Sequence[Picture], device: torch.device) -> None:
        parts = [draw_pictures(pictures[start : start + AT_ONCE], device) for start in range(0, len(pictures), AT_ONCE)]
        self.image, self.labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        # made here, because copies from the host are not allowed while a CUDA graph is recorded
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        self.box_labels, self.point_labels = (
            torch.tensor(labels, device=device) for labels in (BOX, (POINT, NO_POINT))
        )

    def normalised(self, image: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] → fp32 with SAM 2's normalisation."""
        return (image.float() / 255 - self.mean) / self.std

    def batch(self, size: int, frames: int, boxes: bool, generator: torch.Generator) -> Batch:
        """A random batch. boxes: prompt each figure by its box, else by a point, which may be on the background."""
        device = self.image.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(size, *shape, generator=generator, device=device)

        chosen = (uniform() * len(self.image)).long()
        stride = 1 + (uniform() * min(STRIDES, (self.image.shape[1] - 1) // max(frames - 1, 1))).long()
        first = (uniform() * (self.image.shape[1] - (frames - 1) * stride)).long()
        times = first[:, None] + stride[:, None] * torch.arange(frames, device=device)
        times = torch.where(uniform(1) < 0.5, times, times.flip(1))
        image, labels = self.image[chosen[:, None], times], self.labels[chosen[:, None], times]
        numbers = torch.arange(1, MOST + 1, device=device)
        seen = (labels[:, 0, None] == numbers[:, None, None]).sum((2, 3)) >= LEAST
        figure = numbers[(uniform(MOST) * seen).argmax(1)]
        picture, planes = _zoomed(self.normalised(image), labels, figure, uniform(2, 2), uniform(2))
        target, others = planes[:, :, 0] > 0.5, planes[:, :, 1] > 0.5
        if boxes:
            points = _box_of(target[:, 0], uniform(4))
            return Batch(picture, points, self.box_labels.expand(size, 1, 2), target)
        inside = uniform() < INSIDE
        allowed = torch.where(inside[:, None, None], target[:, 0], ~(target[:, 0] | others[:, 0]))
        place = (uniform(*allowed.shape[1:]) * allowed).flatten(1).argmax(1)
        side = allowed.shape[-1]
        at = (torch.stack([place % side, place // side], 1) + 0.5) * (IMAGE / side)
        points = torch.stack([at, torch.zeros_like(at)], 1)[:, None]
        return Batch(picture, points, self.point_labels.expand(size, 1, 2), target & inside[:, None, None, None])


def _zoomed(image: Tensor, labels: Tensor, figure: Tensor, part: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Crop, mirror and scale clips to the model's square input, in the same way for all frames of a clip. part
    [B, 2, 2], mirror [B, 2]: uniform random numbers in 0…1. Returns (frames [B, T, 3, S, S], planes [B, T, 2, h, w] in
    0…1: the figure, and other figures)."""
    size, length = image.shape[:2]
    shown = torch.where(mirror[:, :1] < 0.5, 1.0, ZOOM + (1 - ZOOM) * part[:, 0])
    middle = (1 - shown) * (2 * part[:, 1] - 1)
    theta = torch.zeros(size, 2, 3, device=image.device)
    theta[:, 0, 0] = torch.where(mirror[:, 1] < 0.5, shown[:, 0], -shown[:, 0])
    theta[:, 1, 1], theta[:, :, 2] = shown[:, 1], middle
    theta = theta[:, None].expand(-1, length, -1, -1).flatten(0, 1)

    def warp(planes: Tensor, side: int) -> Tensor:
        flat = planes.flatten(0, 1)
        grid = F.affine_grid(theta, [len(flat), 1, side, side], align_corners=False)
        return F.grid_sample(flat, grid, padding_mode="border", align_corners=False).unflatten(0, (size, length))

    own = labels == figure[:, None, None, None]
    planes = torch.stack([own, (labels > 0) & ~own], 2).float()
    return warp(image, IMAGE), warp(planes, labels.shape[-1])


def box_prompt(mask: Tensor) -> Tensor:
    """mask [B, h, w] → corners of its bounding box [B, 1, 2, 2], in pixels of the model's input; zeros for an empty
    mask."""
    side, scale = mask.shape[-1], IMAGE / mask.shape[-1]
    at = torch.arange(side, device=mask.device)
    corners = []
    for lines in (mask.any(1), mask.any(2)):
        low = torch.where(lines, at, side).amin(1)
        high = torch.where(lines, at + 1, 0).amax(1)
        corners.append(torch.stack([low.minimum(high), high], 1))
    return torch.stack(corners, 2)[:, None] * scale


def _box_of(mask: Tensor, jitter: Tensor) -> Tensor:
    """`box_prompt` with randomly shifted corners. jitter [B, 4]: uniform random numbers in 0…1."""
    box = box_prompt(mask)
    extent = box[:, :, 1:] - box[:, :, :1]
    moved = box + JITTER * extent * (2 * jitter.view(-1, 1, 2, 2) - 1)
    return moved.clamp(0, IMAGE)
