"""Memory does not grow with the length of a clip: measured in separate processes, at 1080p with `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_segmenters import write_grounding_dino, write_sam2

MIB = 2**20
CODE = """
import json, re, resource, sys
from pathlib import Path
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

places = [f"{x},{height // 4},{x + width // 6},{height * 3 // 4}" for x in (0, width // 3)]
boxes = [where + place for where in ("image:", "") for place in places]
options = MaskOptions(weights=folder, boxes=tuple(boxes), prompt="human.")
image = next(iter(Frames()))
held = []

def watch(event):
    held.append(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024)

seconds = make_masks(image, Clip(Frames(), Fraction(25)), out, options, device="cpu", on_progress=watch).seconds
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"held": max(held[10:]), "peak": peak, "seconds": seconds}))
"""


def measured(size: tuple[int, int], frames: int, segmenter: Path, out: Path) -> dict[str, float]:
    words = [sys.executable, "-c", CODE, *map(str, (*size, frames, segmenter, out))]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, check=True, env=env)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory through Linux's /proc")
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
    """The growth of memory between two frames, and its peak. Two characters are tracked, and text detection runs often.
    `slack` is less than the raw size of the additional frames."""
    segmenter = write_sam2(tmp_path / "sam2", image=64)
    write_grounding_dino(segmenter / "detector")
    short, long = (measured(size, count, segmenter, tmp_path / str(count)) for count in lengths)
    more = lengths[1] - lengths[0]
    for count, found in zip(lengths, (short, long), strict=True):
        held, peak = (found[name] / MIB for name in ("held", "peak"))
        print(f"{size[0]}p, {count} frames: {held:.0f} MiB between frames, peak {peak:.0f}, {found['seconds']:.0f} s")
    assert slack < more * size[0] * size[1] * 3
    assert long["held"] < short["held"] + slack
    assert long["peak"] < short["peak"] + slack
