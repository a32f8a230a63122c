"""Drawn masks, their damage by video coding, and the share of it that `masks clean` repairs.

`python -m tests.support.mask_damage`.
Prints the share of the pixels that mean something else to the model than in the undamaged mask, and that are not
exactly equal to it, before and after cleaning, at 512×896."""

import tempfile
import time
from pathlib import Path

import numpy as np

from scail2_rt.runtime.masks.cleaning import Cleaning, clean_frame
from scail2_rt.runtime.masks.palette import CHARACTERS, MODEL_LABEL, PALETTE, codes
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.clips import write_clip


def figures(background: str, *colours: str, height: int = 256, width: int = 448, phase: float = 0.0) -> np.ndarray:
    """A mask with a round head, a body, two legs and an arm with fingers 3 pixels wide for each colour."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    frame = np.full((height, width, 3), PALETTE[background], np.uint8)
    unit = height / 64
    for i, colour in enumerate(colours):
        middle, centre = height / 2, width * (0.12 + 0.64 * i / max(len(colours) - 1, 1)) + 8 * np.sin(phase + i)
        shape = (x - centre) ** 2 + (y - middle + 16 * unit) ** 2 < (7 * unit) ** 2
        shape |= (abs(x - centre) < 6 * unit) & (abs(y - middle) < 12 * unit)
        for side in (-1, 1):
            knee = centre + side * (3 + 3 * np.sin(phase) * (y - middle - 12 * unit) / (18 * unit)) * unit
            shape |= (abs(x - knee) < 2.5 * unit) & (y > middle + 11 * unit) & (y < middle + 28 * unit)
        arm = y - middle + 6 * unit - np.sin(phase) * (x - centre) / 2
        shape |= (abs(arm) < 2 * unit) & (abs(x - centre - 9 * unit) < 9 * unit)
        for finger in (-1, 0, 1):
            shape |= (abs(arm - finger * 6) < 1.6) & (abs(x - centre - 19 * unit) < 2 * unit)
        frame[shape] = PALETTE[colour]
    return frame


def coded(frames: np.ndarray, path: Path, crf: int) -> np.ndarray:
    """After H.264 with half the chroma resolution, which is how mask videos come."""
    write_clip(path, frames, options={"crf": str(crf)})
    with VideoReader(path) as reader:
        return reader.read(len(frames))


def misread(damaged: np.ndarray, true: np.ndarray) -> float:
    """The share of pixels whose class changes for the model."""
    return float((MODEL_LABEL[codes(damaged)] != MODEL_LABEL[codes(true)]).mean())


def main() -> None:
    print("background  characters  crf   model reads wrongly        not equal          seconds a frame")
    for background, colours in (("black", ("red",)), ("white", ("red", "green")), ("white", CHARACTERS)):
        phases = (phase / 2 for phase in range(8))
        true = np.stack([figures(background, *colours, height=512, width=896, phase=phase) for phase in phases])
        for crf in (18, 23, 30, 35):
            with tempfile.TemporaryDirectory() as folder:
                damaged = coded(true, Path(folder) / "m.mp4", crf)
            started = time.process_time()
            clean = np.stack([clean_frame(frame, Cleaning({}), "the mask") for frame in damaged])
            seconds = (time.process_time() - started) / len(true)
            unequal = [100 * float((masks != true).any(-1).mean()) for masks in (damaged, clean)]
            wrong = [100 * misread(masks, true) for masks in (damaged, clean)]
            print(
                f"{background:<12}{len(colours):<12}{crf:<6}{wrong[0]:.3f} % -> {wrong[1]:.3f} %       "
                f"{unequal[0]:6.2f} % -> {unequal[1]:.3f} %   {seconds:.2f}"
            )


if __name__ == "__main__":
    main()
