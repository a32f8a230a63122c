"""Figures of one flat colour each, and a segmenter that recognises them by colour, for tests of rules without
networks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from scail2_rt.runtime.masks.make.segmenters import Found, phrases
from scail2_rt.runtime.masks.make.tracker import Followed, Given

GREY = (90, 90, 90)
ANN, BEN, CLEO, REX = (200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 180, 20)  # Rex is a dog
KINDS = {"human": (ANN, BEN, CLEO), "character": (), "person": (ANN, BEN, CLEO), "dog": (REX,)}
SIZE = (60, 100)
Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def picture(
    figures: dict[tuple[int, int, int], Box], size: tuple[int, int] = SIZE, ground: tuple[int, ...] = GREY
) -> np.ndarray:
    """A picture, uint8 [H, W, 3]; later figures are in front of earlier ones."""
    drawn = np.full((*size, 3), ground, np.uint8)
    for colour, (x0, y0, x1, y1) in figures.items():
        drawn[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = colour
    return drawn


def mask_of(frame: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    return (frame == np.array(colour, np.uint8)).all(-1)


@dataclass(slots=True)
class FlatTracker:
    """Tracks figures by colour. forgets: a lost figure is not found again by memory."""

    forgets: bool = False
    known: dict[int, tuple[int, ...]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    frame: np.ndarray | None = None

    def follow(self, frame: np.ndarray) -> dict[int, Followed]:
        self.frame = frame
        return self._all()

    def add(self, figures: dict[int, Given], remember: bool = True) -> dict[int, Followed]:
        assert self.frame is not None
        for number, given in figures.items():
            if given.mask is not None:
                self.known[number] = tuple(self.frame[given.mask][0])
            else:
                assert given.points is not None
                x, y = given.points[:2].mean(0) if len(given.points) > 1 else given.points[0]
                self.known[number] = tuple(self.frame[int(y), int(x)])
            self.lost.discard(number)
        return self._all()

    def _all(self) -> dict[int, Followed]:
        assert self.frame is not None
        found = {}
        for number, colour in self.known.items():
            mask = mask_of(self.frame, colour)
            if not mask.any() and self.forgets:
                self.lost.add(number)
            if number in self.lost:
                mask = np.zeros_like(mask)
            found[number] = Followed(torch.from_numpy(mask.astype(np.float32) * 20 - 10), 10.0 if mask.any() else -10.0)
        return found


@dataclass(slots=True)
class FlatSegmenter:
    """asked: the prompts it got; trackers: the trackers it made."""

    forgets: bool = False
    name: str = "sam2"
    asked: list[str] = field(default_factory=list)
    trackers: list[FlatTracker] = field(default_factory=list)
    closed: bool = False

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        self.asked.append(prompt)
        found = []
        for phrase in phrases(prompt):
            for colour in KINDS[phrase]:
                mask = mask_of(frame, colour)
                if mask.any():
                    found.append(Found(Given(mask=mask), 0.5 + float(mask.mean())))
        return sorted(found, key=lambda each: -each.score)

    def tracker(self, size: tuple[int, int]) -> FlatTracker:
        self.trackers.append(FlatTracker(self.forgets))
        return self.trackers[-1]

    def close(self) -> None:
        self.closed = True


def flat_folder(folder: Path, detector: bool = True) -> Path:
    """A folder that looks like SAM 2 with Grounding DINO."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "sam2_video", "image_size": 64}')
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    if detector:
        (folder / "detector").mkdir(exist_ok=True)
        (folder / "detector" / "config.json").write_text('{"model_type": "grounding-dino"}')
    return folder
