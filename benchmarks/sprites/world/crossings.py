"""Clips with crossing figures: they pass in front of one another, enter late, leave and come back.

The segmenter is trained and tested on them, because the figures of `cases` stay in the picture and mostly apart. A clip
is determined by (split, seed). In the test split, every other clip has motions that are never trained on.
"""

import numpy as np

from scail2_rt.benchmarks.sprites.world.cases import SPLITS
from scail2_rt.benchmarks.sprites.world.figures import Body, make_character, pose_body
from scail2_rt.benchmarks.sprites.world.motions import HELD_OUT, PRACTISED, TRAINED, Random, make_motion
from scail2_rt.benchmarks.sprites.world.raster import (
    BACKGROUND,
    BLOBS,
    FIRST_BLOB,
    HORIZON,
    PAN,
    Picture,
    black,
    clay,
    make_picture,
    skeleton,
)

MOST = 3  # maximum number of figures
PATHS = ("across", "stays", "late", "returns")
OUTSIDE = 40.0  # a figure this far (in units) beyond an edge is not visible
DRESSED = 0.75  # share of clips with dressed figures; the others have stick figures or body renderings


def make_crossing(seed: int, split: str = "test", frames: int = 33, count: int | None = None) -> Picture:
    """A clip of `count` figures (None: one to three); in every fourth clip the first one is a dog. Figures with the
    path "late" enter after the first frame; the first figure never has this path."""
    random = np.random.default_rng([SPLITS.index(split), 1000, seed])
    count = int(random.integers(1, MOST + 1)) if count is None else count
    style = None if random.uniform() < DRESSED else (skeleton, clay)[random.integers(2)]
    bodies = [_figure(random, split, seed, frames, label) for label in range(1, count + 1)]
    scenery = _scenery(random, frames) if style is None or random.uniform() < 0.5 else black(frames)
    return make_picture([style(body) if style else body for body in bodies], scenery)


def make_meeting(seed: int, split: str = "test", frames: int = 33) -> Picture:
    """A clip of two dressed people who walk past one another; they do not overlap in the first and last frame."""
    random = np.random.default_rng([SPLITS.index(split), 2000, seed])
    usual = PRACTISED if split == "train" else (HELD_OUT, TRAINED)[seed % 2]
    bodies = []
    for label, (start, end) in enumerate(((28, 100), (100, 28)), 1):
        motion = make_motion("human", str(random.choice(usual["human"])), frames, random)
        character = make_character("human", random, random.uniform(50, 66))
        x = np.linspace(start, end, frames) + random.uniform(-6, 6)
        bodies.append(pose_body(character, motion, x, np.full(frames, random.uniform(104, 120)), label))
    return make_picture(bodies, _scenery(random, frames))


def _figure(random: Random, split: str, seed: int, frames: int, label: int) -> Body:
    species = "animal" if label == 1 and seed % 4 == 0 else "human"
    usual = PRACTISED if split == "train" else (HELD_OUT, TRAINED)[seed % 2]
    motion = make_motion(species, str(random.choice(usual[species])), frames, random)
    character = make_character(species, random, random.uniform(45, 100))
    path = str(random.choice(PATHS[:2] if label == 1 else PATHS))
    x = _path(path, random, np.linspace(0, 1, frames))
    return pose_body(character, motion, x, np.full(frames, random.uniform(100, 124)), label)


def _path(path: str, random: Random, time: np.ndarray) -> np.ndarray:
    """The x position, in units, over time [T] in 0…1."""
    start, end, left = random.uniform(15, 113), random.uniform(15, 113), random.uniform() < 0.5
    outside = -OUTSIDE if left else 128 + OUTSIDE
    if path == "across":
        return start + (128 - 2 * start + random.uniform(-20, 20)) * time
    if path == "stays":
        return np.full_like(time, start)
    if path == "late":
        entry = random.uniform(0.05, 0.4)
        return outside + (end - outside) * np.clip((time - entry) / (0.8 - entry), 0, 1)
    away = random.uniform(0.35, 0.6)  # the middle of the time outside
    return outside + (start - outside) * np.clip(np.abs(time - away) / 0.3 - 0.2, 0, 1)


def _scenery(random: Random, frames: int) -> np.ndarray:
    one = np.zeros(BACKGROUND)
    one[:9] = random.uniform(0.15, 0.9, 9)
    one[HORIZON] = random.uniform(70, 100) * (random.uniform() < 0.9)
    for i in range(BLOBS):
        start = FIRST_BLOB + 6 * i
        one[start : start + 2] = random.uniform((-10, 8), (138, 115))
        one[start + 2] = random.uniform(7, 24)
        one[start + 3 : start + 6] = random.uniform(0.1, 0.95, 3)
    every = np.tile(one, (frames, 1))
    every[:, PAN] = random.uniform(-20, 20) * np.linspace(-0.5, 0.5, frames)
    return every
