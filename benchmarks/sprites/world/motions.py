"""Random motions as joint angles over time, for people and for four-legged animals.

Angles are radians in the picture plane and independent of a body: any character of the species can perform them. For
people, 0 is a limb that hangs down, and positive angles open outwards. `yaw` rotates the body about its vertical axis:
0 faces the viewer (people) or right (animals). Motions of `HELD_OUT` are never trained on. Besides those of `TRAINED`,
the training set has `exercise`, which moves every joint independently through most of its range, so that its poses
include those of all other motions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

FRAMES_PER_SECOND = 16
SPEED = (0.35, 0.6)  # periods per second; with faster motions, the small VAE blends the four frames of a latent frame
# lean, head, then (shoulder, elbow, hip, knee) of the left side and of the right
HUMAN_JOINTS = 10
# body pitch, neck, tail, then (upper, lower) of front near, front far, hind near, hind far
ANIMAL_JOINTS = 11
TRAINED = {"human": ("walk", "dance", "wave", "jump", "turn"), "animal": ("walk", "wag", "jump", "turn")}
HELD_OUT = {"human": ("march", "stretch"), "animal": ("trot",)}
# Motions of the training set. Exercises are four of nine for people and four of eight for animals.
PRACTISED = {species: (*names, *("exercise",) * 4) for species, names in TRAINED.items()}
Random = np.random.Generator


@dataclass(frozen=True, slots=True)
class Motion:
    """A motion of T frames.

    angles   [T, joints], radians
    sway     [T], horizontal offset in body heights
    lift     [T], height of a jump in body heights
    yaw      [T], radians"""

    name: str
    angles: np.ndarray
    sway: np.ndarray
    lift: np.ndarray
    yaw: np.ndarray


def make_motion(species: str, name: str, frames: int, random: Random) -> Motion:
    """`frames` frames of the motion `name`; speed, phase and range are drawn from `random`."""
    seconds = np.arange(frames) / FRAMES_PER_SECOND
    phase = 2 * np.pi * (random.uniform(*SPEED) * seconds + random.uniform())
    joints = HUMAN_JOINTS if species == "human" else ANIMAL_JOINTS
    pose = _Pose(np.zeros((frames, joints)), np.zeros(frames), np.zeros(frames), np.zeros(frames))
    table = _HUMAN if species == "human" else _ANIMAL
    table[name](pose, phase, random)
    if species == "animal" and name != "turn":
        pose.yaw += np.pi * random.integers(2)
    return Motion(name, pose.angles, pose.sway, pose.lift, pose.yaw)


def rest(species: str, random: Random, yaw: float = 0.0) -> Motion:
    """One frame in a rest pose, for a reference image."""
    if species == "animal":
        angles = random.normal(0, 0.06, (1, ANIMAL_JOINTS))
        return Motion("rest", angles, np.zeros(1), np.zeros(1), np.full(1, yaw + np.pi * random.integers(2)))
    angles = np.zeros((1, HUMAN_JOINTS))
    for side in (2, 6):
        angles[0, side : side + 4] = random.uniform((0.25, 0.0, 0.08, 0.0), (0.9, 0.6, 0.25, 0.1))
    angles[0, :2] = random.normal(0, 0.04, 2)
    return Motion("rest", angles, np.zeros(1), np.zeros(1), np.full(1, yaw))


@dataclass(slots=True)
class _Pose:
    """A motion being assembled."""

    angles: np.ndarray
    sway: np.ndarray
    lift: np.ndarray
    yaw: np.ndarray


def _smooth(phase: np.ndarray, random: Random, low: float, high: float) -> np.ndarray:
    """A smooth random curve [T] between about `low` and `high`."""
    a, b = random.uniform(0, 2 * np.pi, 2)
    mix = random.uniform(0.3, 0.7)
    wave = mix * np.sin(phase * random.choice((0.5, 1.0)) + a) + (1 - mix) * np.sin(
        phase * random.choice((1.0, 1.5)) + b
    )
    return low + (high - low) * (0.5 + 0.5 * wave)


def _walk(pose: _Pose, phase: np.ndarray, random: Random, knee: float = 0.5, hip: float = 0.45) -> None:
    arm = random.uniform(0.3, 0.7)
    for side, turn in ((2, 0.0), (6, np.pi)):
        step = np.sin(phase + turn)
        pose.angles[:, side] = 0.3 + arm * 0.5 * (1 - step)
        pose.angles[:, side + 1] = 0.35
        pose.angles[:, side + 2] = 0.1 + hip * np.maximum(step, 0)
        pose.angles[:, side + 3] = -knee * 2 * np.maximum(step, 0)
    pose.angles[:, 0] = 0.05 * np.sin(phase)
    pose.sway += random.choice((-1, 1)) * random.uniform(0.05, 0.16) * np.sin(phase / 2)
    pose.lift += 0.02 * np.abs(np.sin(phase))


def _march(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    _walk(pose, phase, random, knee=0.75, hip=0.95)


def _dance(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    for side in (2, 6):
        pose.angles[:, side] = _smooth(phase, random, *np.sort(random.uniform(0.2, 2.9, 2)))
        pose.angles[:, side + 1] = _smooth(phase, random, *np.sort(random.uniform(-1.2, 1.4, 2)))
        pose.angles[:, side + 2] = _smooth(phase, random, 0.0, random.uniform(0.2, 0.9))
        pose.angles[:, side + 3] = -_smooth(phase, random, 0.0, random.uniform(0.1, 1.3))
    pose.angles[:, 0] = _smooth(phase, random, -0.2, 0.2)
    pose.angles[:, 1] = _smooth(phase, random, -0.25, 0.25)
    pose.sway += _smooth(phase, random, -0.15, 0.15)
    pose.lift += random.uniform(0, 0.06) * np.abs(np.sin(phase))


def _wave(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    pose.angles[:, (2, 6)] = random.uniform(0.2, 0.5)
    pose.angles[:, (4, 8)] = random.uniform(0.08, 0.2)
    side = random.choice((2, 6))
    pose.angles[:, side] = random.uniform(1.9, 2.5)
    pose.angles[:, side + 1] = random.uniform(0.2, 0.5) + random.uniform(0.4, 0.7) * np.sin(2 * phase)
    pose.angles[:, 1] = 0.1 * np.sin(phase)


def _jump(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    up = np.clip(np.sin(phase), 0, None)
    crouch = np.clip(-np.sin(phase), 0, None)
    for side in (2, 6):
        pose.angles[:, side] = 0.35 + random.uniform(1.2, 2.2) * up
        pose.angles[:, side + 1] = 0.2
        pose.angles[:, side + 2] = 0.12 + 0.45 * crouch + random.uniform(0, 0.3) * up
        pose.angles[:, side + 3] = -0.9 * crouch
    pose.lift += random.uniform(0.08, 0.16) * up


def _stretch(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    reach = 0.5 - 0.5 * np.cos(phase)
    pose.angles[:, (2, 6)] = (0.4 + 2.4 * reach)[:, None]
    pose.angles[:, (3, 7)] = 0.15
    pose.angles[:, (4, 8)] = (0.1 + 0.3 * reach)[:, None]
    pose.angles[:, 0] = 0.25 * np.sin(phase / 2)


def _turn(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    """Turn to both sides, so little that a reference image from the front shows everything that becomes visible."""
    _loose(pose, phase, random)
    pose.yaw += random.choice((-1, 1)) * random.uniform(0.5, 0.9) * np.sin(phase)


def _spin(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    """Turn fully, so that the back becomes visible."""
    _loose(pose, phase, random)
    _round(pose, phase, random)


def _loose(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    for side in (2, 6):
        pose.angles[:, side] = _smooth(phase, random, 0.3, random.uniform(0.5, 1.6))
        pose.angles[:, side + 1] = random.uniform(0, 0.6)
        pose.angles[:, side + 2] = random.uniform(0.08, 0.25)


def _round(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    pose.yaw += random.choice((-1, 1)) * (phase - phase[0]) * random.uniform(0.45, 0.8)


def _circle(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    _stroll(pose, phase, random)
    _round(pose, phase, random)


def _stroll(pose: _Pose, phase: np.ndarray, random: Random, stride: float = 0.45) -> None:
    for first, turn in ((3, 0.0), (5, np.pi), (7, np.pi), (9, 0.0)):
        step = phase + turn
        pose.angles[:, first] = stride * np.sin(step)
        pose.angles[:, first + 1] = 0.7 * stride * np.clip(np.cos(step), 0, None)
    pose.angles[:, 1] = 0.08 * np.sin(phase)
    pose.angles[:, 2] = random.uniform(-0.2, 0.6) + 0.25 * np.sin(phase)
    pose.sway += random.choice((-1, 1)) * random.uniform(0.05, 0.2) * np.sin(phase / 2)
    pose.lift += 0.02 * np.abs(np.sin(phase))


def _wag(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    pose.angles[:, 2] = random.uniform(0.3, 0.9) + random.uniform(0.4, 0.7) * np.sin(2 * phase)
    pose.angles[:, 1] = _smooth(phase, random, -0.5, 0.35)
    pose.angles[:, 0] = _smooth(phase, random, -0.08, 0.12)


def _leap(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    up = np.clip(np.sin(phase), 0, None)
    pose.angles[:, 0] = -0.35 * np.sin(phase + 0.6) * random.uniform(0.5, 1)
    pose.angles[:, (3, 5)] = (0.9 * up)[:, None]
    pose.angles[:, (7, 9)] = (-0.8 * up)[:, None]
    pose.angles[:, 2] = 0.4 + 0.5 * up
    pose.lift += random.uniform(0.12, 0.28) * up


def _trot(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    _stroll(pose, 1.3 * phase, random, stride=0.7)
    pose.angles[:, 1] = 0.2 * np.sin(1.3 * phase)


def _exercise(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    """A person's exercise. With probability 0.5 each, arms and legs are symmetric, and the person faces the viewer."""
    swing = partial(_wide, phase, random)
    for side in (2, 6):
        pose.angles[:, side] = swing(0.0, 3.0)
        pose.angles[:, side + 1] = swing(-1.3, 1.5)
        pose.angles[:, side + 2] = swing(0.0, 1.25)
        pose.angles[:, side + 3] = -swing(0.0, 1.7)
    for limb in (2, 4):
        if random.uniform() < 0.5:
            pose.angles[:, limb + 4 : limb + 6] = pose.angles[:, limb : limb + 2]
    pose.angles[:, 0] = swing(-0.3, 0.3)
    pose.angles[:, 1] = swing(-0.25, 0.25)
    pose.sway += swing(-0.16, 0.16)
    pose.lift += random.uniform(0, 0.16) * np.abs(np.sin(phase))
    pose.yaw += swing(-0.9, 0.9) * random.integers(2)


def _romp(pose: _Pose, phase: np.ndarray, random: Random) -> None:
    """An animal's exercise."""
    swing = partial(_wide, phase, random)
    pose.angles[:, 0] = swing(-0.35, 0.35)
    pose.angles[:, 1] = swing(-0.5, 0.35)
    pose.angles[:, 2] = swing(-0.5, 1.1)
    for first in (3, 5, 7, 9):
        pose.angles[:, first] = swing(-0.9, 0.9)
        pose.angles[:, first + 1] = swing(0.0, 0.6)
    pose.sway += swing(-0.2, 0.2)
    pose.lift += random.uniform(0, 0.28) * np.abs(np.sin(phase))


def _wide(phase: np.ndarray, random: Random, low: float, high: float) -> np.ndarray:
    """A smooth random curve [T] between a random value in the lower half of `low` to `high` and one in the upper
    half."""
    near, far = random.uniform((0.0, 0.5), (0.5, 1.0))
    return _smooth(phase, random, low + near * (high - low), low + far * (high - low))


_Make = Callable[[_Pose, np.ndarray, Random], None]
_HUMAN: dict[str, _Make] = {
    "walk": _walk, "dance": _dance, "wave": _wave, "jump": _jump, "turn": _turn, "march": _march, "stretch": _stretch,
    "spin": _spin, "exercise": _exercise,
}  # fmt: skip
_ANIMAL: dict[str, _Make] = {
    "walk": _stroll, "wag": _wag, "jump": _leap, "turn": _circle, "trot": _trot, "exercise": _romp
}  # fmt: skip
