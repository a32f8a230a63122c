"""Helpers for tests of the mask commands: masks of blocks, cases made from them, and findings of `masks check`."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scail2_rt.runtime.masks.palette import PALETTE
from scail2_rt.runtime.media.images import load_mask_image
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.clips import write_clip
from tests.support.command import Run, one_json

HEIGHT, WIDTH, FRAMES = 64, 96, 12
LOSSLESS: dict[str, Any] = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"crf": "0"}}
ORANGE, GREY = (255, 140, 0), (128, 128, 128)


def blocks(background: str, *colours: Any) -> np.ndarray:
    """A mask with one block per colour, 40 rows high, from left to right."""
    frame = np.full((HEIGHT, WIDTH, 3), PALETTE[background], np.uint8)
    for i, colour in enumerate(colours):
        frame[12:52, 6 + 15 * i : 18 + 15 * i] = PALETTE[colour] if isinstance(colour, str) else colour
    return frame


def image(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def video(path: Path, *frames: np.ndarray, **options: Any) -> Path:
    return write_clip(path, np.stack(frames), 16, **{**LOSSLESS, **options})


def pixels_of(path: Path) -> np.ndarray:
    """As the runtime reads it: [H, W, 3] of an image, [T, H, W, 3] of a video."""
    if path.suffix == ".png":
        return load_mask_image(path)
    with VideoReader(path) as reader:
        return reader.read(1000)


def make_case(folder: Path, mode: str = "animate", **changes: Any) -> Path:
    """A good case of red and green blocks; `ref`, `driving` and `image` replace a mask, its frames, or the image."""
    folder.mkdir()
    here, there = ("white", "black") if mode == "animate" else ("black", "white")
    image(folder / "ref.png", changes.get("image", blocks("white", (90, 60, 30), (20, 90, 80))))
    image(folder / "ref_mask.png", changes.get("ref", blocks(here, "red", "green")))
    frames = changes.get("driving", [blocks(there, "red", "green")] * FRAMES)
    video(folder / "rendered_v2.mp4", *[blocks("white", (90, 60, 30))] * changes.get("frames", FRAMES))
    video(folder / ("rendered_mask_v2.mp4" if mode == "animate" else "replace_mask.mp4"), *frames)
    return folder


def findings(scail2: Run, *words: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """The findings of `masks check --json`, by rule."""
    result = scail2("masks", "check", *words, "--json")
    assert result.returncode == code, result.stderr
    reply = one_json(result)
    assert reply["usable"] == (code == 0)
    assert reply["errors"] == sum(finding["severity"] == "error" for finding in reply["findings"])
    return {finding["rule"]: finding for finding in reply["findings"]}
