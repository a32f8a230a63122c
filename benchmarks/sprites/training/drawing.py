"""Makes scenes of many cases in parallel processes, and draws them in large batches on the training device."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.world.cases import FRAMES, SIZE, Colours, Scene, make_scene
from scail2_rt.benchmarks.sprites.world.figures import FIELDS, RA, RB
from scail2_rt.benchmarks.sprites.world.raster import Picture, draw

DRAWN_AT_ONCE = {"cpu": 256, "cuda": 2112}  # frames
SCENES_PER_JOB = 16


def training_scene(task: str, seed: int, frames: int = FRAMES) -> Scene:
    """The scene number `seed` of the training set. Cases with several characters come in pairs that differ only in the
    colours of the driving mask and the correct output. Otherwise the model would memorise outputs instead of learning
    the meaning of the colours."""
    if task in ("two", "three"):
        return make_scene(task, seed // 2, "train", frames, swapped=seed % 2 == 1)
    return make_scene(task, seed, "train", frames)


def _make_some(task: str, seeds: range, frames: int) -> list[Scene]:
    return [training_scene(task, seed, frames) for seed in seeds]


def make_scenes(requests: Sequence[tuple[str, range]], frames: int = FRAMES) -> Iterator[Scene]:
    """The scenes of all (task, seeds) of the training set, in order."""
    jobs = [
        (task, seeds[start : start + SCENES_PER_JOB])
        for task, seeds in requests
        for start in range(0, len(seeds), SCENES_PER_JOB)
    ]
    workers = max((os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1)), 1)
    context = get_context("forkserver")
    context.set_forkserver_preload([make_scene.__module__])  # imported once instead of in every process
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        tasks, seeds = zip(*jobs, strict=True)
        for scenes in pool.map(_make_some, tasks, seeds, itertools.repeat(frames)):
            yield from scenes


def draw_pictures(pictures: Sequence[Picture], device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw pictures with equal numbers of frames → image uint8 [N, T, 3, H, W], labels uint8 [N, T, H, W], on
    `device`."""
    most = max(picture.parts.shape[1] for picture in pictures)
    parts = torch.from_numpy(np.stack([_padded(picture.parts, most) for picture in pictures])).to(device)
    background = np.stack([picture.background for picture in pictures]).astype(np.float32)
    backgrounds = torch.from_numpy(background).to(device)
    count, frames = parts.shape[:2]
    at_once = DRAWN_AT_ONCE[device.type]
    pairs = zip(parts.flatten(0, 1).split(at_once), backgrounds.flatten(0, 1).split(at_once), strict=True)
    drawn = [draw(*pair, *SIZE) for pair in pairs]
    image, labels = (torch.cat(tensors).unflatten(0, (count, frames)) for tensors in zip(*drawn, strict=True))
    return image, labels


def _padded(parts: np.ndarray, most: int) -> np.ndarray:
    """Parts [T, P, FIELDS], padded to `most` parts with parts of negative radius, which cover nothing."""
    padding = np.zeros((len(parts), most - parts.shape[1], FIELDS), np.float32)
    padding[..., RA] = padding[..., RB] = -10
    return np.concatenate([padding, parts.astype(np.float32)], axis=1)


def paint(labels: Tensor, colours: Sequence[Colours]) -> Tensor:
    """Labels [N, T, H, W] → mask images uint8 [N, T, 3, H, W]. colours: per case, by label."""
    table = torch.zeros(len(colours), max(map(len, colours)), 3, dtype=torch.uint8, device=labels.device)
    for row, colour in zip(table, colours, strict=True):
        row[: len(colour)] = torch.tensor(colour, dtype=torch.uint8)
    rows = torch.arange(len(labels), device=labels.device)[:, None, None, None]
    return table[rows, labels.long()].permute(0, 1, 4, 2, 3)
