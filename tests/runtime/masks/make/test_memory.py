"""Long clips take as much memory as short ones: measured in processes of their own, at 1080p with `make soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_segmenters import write_grounding_dino, write_sam2

MIB = 2**20
CODE = """
import json, resource, sys
from fractions import Fraction
import numpy as np
from scail2_rt.runtime import Clip, MaskOptions, make_masks
height, width, count, folder, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]

class Frames:
    def __iter__(self):
        ground = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8) // 4
        for t in range(count):
            frame = ground.copy()
            for figure, colour in enumerate(((200, 40, 40), (40, 200, 40))):
                x = (width // 3 * figure + 3 * t) % (width // 2)
                frame[height // 4 : height * 3 // 4, x : x + width // 6] = colour
            yield frame

boxes = [f"{where}{x},{height // 4},{x + width // 6},{height * 3 // 4}" for where in ("image:", "") for x in (0, width // 3)]
options = MaskOptions(weights=folder, boxes=tuple(boxes), prompt="human.")
image = next(iter(Frames()))
seconds = make_masks(image, Clip(Frames(), Fraction(25)), out, options, device="cpu").seconds
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": seconds}))
"""


def measured(size: tuple[int, int], frames: int, segmenter: Path, out: Path) -> dict[str, float]:
    words = [sys.executable, "-c", CODE, *map(str, (*size, frames, segmenter, out))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("size", "lengths", "slack"),
    [
        pytest.param((270, 480), (20, 260), 40 * MIB, id="270p"),
        pytest.param((1080, 1920), (81, 1000), 100 * MIB, id="1080p", marks=pytest.mark.soak),
    ],
)
def test_memory_does_not_grow_with_the_clip(
    tmp_path: Path, size: tuple[int, int], lengths: tuple[int, int], slack: int
) -> None:
    """Two figures that are followed, and text that looks again all the time; `slack` is less than what the additional
    frames would take as they are, or as features."""
    segmenter = write_sam2(tmp_path / "sam2", image=64)
    write_grounding_dino(segmenter / "detector")
    short, long = (measured(size, count, segmenter, tmp_path / str(count)) for count in lengths)
    more = lengths[1] - lengths[0]
    print(f"{size[0]}p: {lengths[0]} frames {short['peak'] / MIB:.0f} MiB in {short['seconds']:.0f} s, "
          f"{lengths[1]} frames {long['peak'] / MIB:.0f} MiB in {long['seconds']:.0f} s")  # fmt: skip
    assert slack < more * size[0] * size[1] * 3
    assert long["peak"] < short["peak"] + slack
