"""Plans of many cases at once, drawn on the training device: planning in processes, drawing in large batches."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.cases import FRAMES, SIZE, CasePlan, Colours, plan_case
from scail2_rt.benchmarks.sprites.figures import FIELDS, RA, RB
from scail2_rt.benchmarks.sprites.raster import Picture, draw

DRAWN_AT_ONCE = 256  # frames
PLANS_A_JOB = 16


def _plan_some(task: str, seeds: range, split: str, frames: int) -> list[CasePlan]:
    return [plan_case(task, seed, split, frames) for seed in seeds]


def plan_many(requests: Sequence[tuple[str, range]], split: str = "train", frames: int = FRAMES) -> Iterator[CasePlan]:
    """Plans of every (task, seeds), in order."""
    jobs = [
        (task, seeds[start : start + PLANS_A_JOB])
        for task, seeds in requests
        for start in range(0, len(seeds), PLANS_A_JOB)
    ]
    workers = max((os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1)), 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        tasks, seeds = zip(*jobs, strict=True)
        for plans in pool.map(_plan_some, tasks, seeds, itertools.repeat(split), itertools.repeat(frames)):
            yield from plans


def draw_pictures(pictures: Sequence[Picture], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures of the same number of frames → image uint8 [N, T, 3, H, W], labels uint8 [N, T, H, W] on `device`."""
    most = max(picture.parts.shape[1] for picture in pictures)
    parts = torch.from_numpy(np.stack([_padded(picture.parts, most) for picture in pictures])).to(device)
    background = np.stack([picture.background for picture in pictures]).astype(np.float32)
    backgrounds = torch.from_numpy(background).to(device)
    count, frames = parts.shape[:2]
    drawn = [
        draw(*pair, *SIZE)
        for pair in zip(
            parts.flatten(0, 1).split(DRAWN_AT_ONCE), backgrounds.flatten(0, 1).split(DRAWN_AT_ONCE), strict=True
        )
    ]
    image, labels = (torch.cat(tensors).unflatten(0, (count, frames)) for tensors in zip(*drawn, strict=True))
    return image, labels


def _padded(parts: np.ndarray, most: int) -> np.ndarray:
    """With parts of negative radius, which cover nothing, up to `most`."""
    padding = np.zeros((len(parts), most - parts.shape[1], FIELDS), np.float32)
    padding[..., RA] = padding[..., RB] = -10
    return np.concatenate([padding, parts.astype(np.float32)], axis=1)


def paint(labels: Tensor, colours: Sequence[Colours]) -> Tensor:
    """Labels [N, T, H, W] → mask images uint8 [N, T, 3, H, W]."""
    table = torch.zeros(len(colours), max(map(len, colours)), 3, dtype=torch.uint8, device=labels.device)
    for row, colour in zip(table, colours, strict=True):
        row[: len(colour)] = torch.tensor(colour, dtype=torch.uint8)
    rows = torch.arange(len(labels), device=labels.device)[:, None, None, None]
    return table[rows, labels.long()].permute(0, 1, 4, 2, 3)
