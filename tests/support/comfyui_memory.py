"""Measure the memory of the Animate node besides the graph's tensors.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tests.support.comfyui_memory ENGINES [--frames 200] [--size 704x1280]

(On Linux. Without the variable, the allocator keeps a random amount of freed memory.)

The driving clip and its mask are tensors of the graph, as large as the result. The node does everything except running
the networks: masks are checked, clips are read segment by segment as in the pipeline, and the driving frames are
returned as the result. Prints one JSON object; sizes in GiB. `above` is the peak of resident memory during the run,
minus the clip, its mask and the result."""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.pipeline.driving import read_clips
from scail2_rt.runtime.session.session import Session
from tests.support.comfyui_standins import standing_in

GIB = 2**30


def status(name: str) -> float:
    """The value, in GiB, of a line of /proc/self/status."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 2**20


def without_networks(self: Session, plan: Plan, *_: Any) -> Iterator[np.ndarray]:
    """`Session.animate`: each segment's own frames, four at a time."""
    for clip in read_clips(plan):
        own = clip.frames[clip.segment.overlap : clip.segment.valid_frames]
        for group in own.split(4):
            yield group.permute(0, 2, 3, 1).contiguous().numpy()


def pictures(frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip of noise and a mask of one walking block, IMAGE batches."""
    clip = torch.rand(frames, height, width, 3)
    mask = torch.zeros(frames, height, width, 3)
    for number in range(frames):
        left = number % (width // 2)
        mask[number, height // 4 : -height // 4, left : left + width // 4, 2] = 1
    return clip, mask


def measure(engines: Path, frames: int, height: int, width: int) -> dict[str, Any]:
    Session.animate = without_networks  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as models, standing_in(Path(models)):
        from scail2_rt.runtime.comfyui import extension

        how = {"backend": "torch", "attention": "auto", "vram_limit_gib": 0.0}
        (chosen,) = extension.ChooseEngines.execute(folder="the path below", path=str(engines), **how).args
        clip, mask = pictures(frames, height, width)
        reference = mask[:1].clone()
        reference[(reference == 0).all(-1)] = 1
        schema = extension.Animate.define_schema()
        inputs = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
        inputs |= {"engines": chosen, "image": clip[:1].clone(), "driving": clip, "driving_mask": mask}
        inputs |= {"reference_mask": reference, "width": width, "height": height, "guidance": 1.0}
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        images = extension.Animate.execute(**inputs).args[0]
        above = status("VmHWM") - before - images.nbytes / GIB
    sizes = {"clip_gib": clip.nbytes / GIB, "mask_gib": mask.nbytes / GIB, "result_gib": images.nbytes / GIB}
    return {"frames": frames, "size": [height, width], **sizes, "above_gib": above}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", type=Path)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--size", default="704x1280")
    given = parser.parse_args()
    print(json.dumps(measure(given.engines, given.frames, *map(int, given.size.split("x")))))
