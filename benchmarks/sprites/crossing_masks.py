"""Measure the masks that the tracker and its rules make for drawn clips with crossing figures, against the true masks.

    python -m scail2_rt.benchmarks.sprites.crossing_masks --clips 6 --json FILE

`boxes`: the boxes of the first frame are given, and the tracker runs without a detector. `looks`: the detector of drawn
figures replaces the text detector and runs every few frames, so it finds new and exchanged figures. `meeting`: two
people walk past one another. `crossing`: one to three figures of any kind and height, half of them stick figures or
nearly hidden.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import numpy as np

from scail2_rt.benchmarks.sprites.segmenting import box_of, figure_masks, shipped_segmenter
from scail2_rt.benchmarks.sprites.world.crossings import MOST, make_crossing, make_meeting
from scail2_rt.benchmarks.sprites.world.raster import Picture, draw_picture
from scail2_rt.runtime.masks.make.figures import LEAST_AREA, iou
from scail2_rt.runtime.masks.make.folders import open_folder
from scail2_rt.runtime.masks.make.follow import ClipFollower, Looking
from scail2_rt.runtime.masks.make.options import Place
from scail2_rt.runtime.masks.make.segmenters import Found, Segmenter, open_segmenter
from scail2_rt.runtime.masks.make.tracker import Given, Tracker

FRAMES = 33
CLIPS: Mapping[str, Callable[[int], Picture]] = {
    "meeting": lambda seed: make_meeting(seed, frames=FRAMES),
    "crossing": lambda seed: make_crossing(seed, frames=FRAMES),
}


class Drawn:
    """The small SAM 2 with the detector of drawn figures instead of a text detector."""

    name = "sam2"

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        masks = figure_masks(frame, self._segmenter)
        return [Found(Given.box(box_of(mask)), 1 - number / 100) for number, mask in enumerate(masks)]

    def tracker(self, size: tuple[int, int]) -> Tracker:
        return self._segmenter.tracker(size)

    def close(self) -> None:
        self._segmenter.close()


def followed(frames: np.ndarray, labels: np.ndarray, segmenter: Segmenter, looks: bool) -> tuple[np.ndarray, int]:
    """(labels uint8 [T, H, W] of the tracker, number of its notes). frames: uint8 [T, H, W, 3]; labels: the true ones,
    uint8 [T, H, W]; looks: use the detector, else the boxes of the first frame."""
    first = [number for number in range(1, MOST + 1) if (labels[0] == number).mean() >= LEAST_AREA]
    places = tuple(Place(tuple(map(float, box_of(labels[0] == number)))) for number in first)
    looking = Looking("figure" if looks else None, () if looks else places, len(first), "left-to-right", "the clip")
    follower = ClipFollower(Drawn(segmenter) if looks else segmenter, looking, len(first))
    return np.stack([made for _, made in follower.labelled(frames)]), len(follower.cast.notes)


def scores(made: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(mean IoU over the figures of the first frame and the frames that show them, share of these frames in which the
    mask covers more of another figure). A mask is assigned to the figure that it covers most in the first frame."""
    overlaps: list[float] = []
    exchanged: list[bool] = []
    for figure in range(1, MOST + 1):
        there = labels == figure
        if there[0].mean() < LEAST_AREA:
            continue
        counts = [int(((made[0] == number) & there[0]).sum()) for number in range(1, MOST + 1)]
        mine = made == 1 + int(np.argmax(counts))
        for frame in np.flatnonzero(there.mean((1, 2)) >= LEAST_AREA / 2):
            overlaps.append(iou(mine[frame], there[frame]))
            rivals = [int((mine[frame] & (labels[frame] == n)).sum()) for n in range(1, MOST + 1) if n != figure]
            exchanged.append(max(rivals) > int((mine[frame] & there[frame]).sum()))
    return float(np.mean(overlaps)), float(np.mean(exchanged))


@click.command()
@click.option("--clips", default=6, show_default=True, help="Clips per kind.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(clips: int, output: Path | None) -> None:
    """Print mean IoU and exchanges of masks for drawn clips with crossing figures."""
    segmenter = open_segmenter(open_folder(shipped_segmenter()), "cpu")
    found: dict[str, dict[str, float]] = {}
    for kind, make in CLIPS.items():
        for looks in (False, True):
            rows = []
            for seed in range(clips):
                frames, labels = draw_picture(make(seed), 128, 128)
                made, notes = followed(frames, labels, segmenter, looks)
                rows.append((*scores(made, labels), notes))
            means: list[float] = np.asarray(rows, np.float64).mean(0).round(3).tolist()
            name = f"{kind}, {'looks' if looks else 'boxes'}"
            found[name] = dict(zip(("iou", "exchanged", "notes"), means, strict=True))
            print(f"{name}: {found[name]} ({clips} clip(s))", flush=True)
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
