"""Drawn cases as files: the official case folder, which `scail2-rt generate --case` reads, and its request.

Besides the official files, a folder contains the prompt and additional references. All files are lossless, so the model
gets exactly the drawn pixels. The driving clip has a tone whose pitch follows the height of the figure's joints, so
that audio and motion can be compared by ear.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.benchmarks.sprites.world.cases import SpriteCase, make_scene, render_case
from scail2_rt.benchmarks.sprites.world.motions import FRAMES_PER_SECOND
from scail2_rt.benchmarks.sprites.world.raster import UNITS
from scail2_rt.runtime.core.case_folder import read_case
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.media.lossless import SAMPLE_RATE, write_image, write_video

FRAME_RATE = Fraction(FRAMES_PER_SECOND)
SOME_SEED = 214  # in both modes: red masks, and figures of about the same height
LOWEST_HZ, OCTAVES, LOUDNESS = 220.0, 3.0, 0.2
MASKS = {"animate": "rendered_mask_v2.mp4", "replace": "replace_mask.mp4"}


def write_case(case: SpriteCase, directory: Path, sound: bool = True, masks: bool = True) -> None:
    """Write a case to a folder, replacing files of an earlier case. masks: False writes only the reference image, the
    driving clip and the prompt."""
    directory.mkdir(parents=True, exist_ok=True)
    images = {"ref": case.reference, "ref_mask": case.reference_mask} if masks else {"ref": case.reference}
    for number, (image, mask) in enumerate(case.extras, 1):
        images |= {f"extra_{number}": image, f"extra_{number}_mask": mask}
    for name, pixels in images.items():
        write_image(directory / f"{name}.png", pixels)
    samples = motion_sound(case.scene.joints) if sound else None
    write_video(directory / "rendered_v2.mp4", case.driving, FRAME_RATE, samples)
    if masks:
        write_video(directory / MASKS[case.scene.mode], case.driving_mask, FRAME_RATE)
    (directory / "prompt.txt").write_text(case.scene.prompt, encoding="utf-8")


def draw_case(
    directory: Path,
    frames: int = 21,
    height: int = 64,
    width: int = 96,
    replace_mode: bool = False,
    audio: bool = True,
) -> None:
    """Write a case of any size to a folder, for uses in which the content does not matter."""
    scene = make_scene("replace" if replace_mode else "animate", SOME_SEED, frames=frames)
    write_case(render_case(scene, (height, width)), directory, audio)


def case_request(directory: Path, **options: Any) -> Request:
    """The request for a folder of `write_case`, with all additional references. options: fields of `Request` other than
    files."""
    files = read_case(directory)
    with_masks = sorted(directory.glob("extra_*_mask.png"))
    extras = tuple((mask.with_name(mask.name.replace("_mask", "")), mask) for mask in with_masks)
    prompt = (directory / "prompt.txt").read_text(encoding="utf-8")
    given = {"prompt": prompt, "extra_refs": extras, "mode": files.mode, **options}
    return Request(files.image, files.mask_image, files.driving, files.mask_video, **given)


def motion_sound(joints: np.ndarray) -> np.ndarray:
    """joints [T, J, 2] (x, y in units) → mono samples for T frames. The pitch rises with the mean height of the
    joints."""
    frames = len(joints)
    height = np.clip(1 - joints[..., 1].mean(1) / UNITS, 0, 1)
    seconds = np.arange(SAMPLE_RATE * frames // FRAMES_PER_SECOND) / SAMPLE_RATE
    pitch = LOWEST_HZ * 2 ** (OCTAVES * np.interp(seconds * FRAMES_PER_SECOND, np.arange(frames), height))
    return LOUDNESS * np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE)
