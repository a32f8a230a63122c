"""Draws the inputs of the example workflows: held-out cases of the sprite world, in formats that browsers play.

python examples/comfyui/draw_inputs.py runtime/comfyui/pack"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from scail2_rt.benchmarks.sprites.world.case_files import FRAME_RATE, write_case
from scail2_rt.benchmarks.sprites.world.cases import make_scene, render_case
from scail2_rt.runtime.media.lossless import write_image
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_writer import VideoWriter

SIZE = (256, 256)  # height, width; twice the size that the workflows generate
SEED = 0


def main(pack: Path) -> None:
    """Write the inputs to `example_inputs`, and a preview image beside each workflow for ComfyUI's template list."""
    folder = pack / "example_inputs"
    folder.mkdir(parents=True, exist_ok=True)
    for task in ("animate", "replace"):
        case = render_case(make_scene(task, SEED), SIZE)
        write_image(folder / f"scail2_{task}_ref.png", case.reference)
        write_image(folder / f"scail2_{task}_ref_mask.png", case.reference_mask)
        shown = np.concatenate([case.reference, case.driving[len(case.driving) // 2]], axis=1)
        Image.fromarray(shown).save(pack / "example_workflows" / f"scail2_{task}.jpg", quality=88)
        with tempfile.TemporaryDirectory() as temporary:
            write_case(case, Path(temporary))
            write(folder / f"scail2_{task}_driving.mp4", case.driving, Path(temporary) / "rendered_v2.mp4")
            write(folder / f"scail2_{task}_driving_mask.mp4", case.driving_mask)


def write(path: Path, frames: np.ndarray, sound: Path | None = None) -> None:
    """Write a video in 4:2:0, which browsers play. frames: uint8 [T, H, W, 3]; sound: a file whose audio is copied."""
    path.unlink(missing_ok=True)
    with VideoWriter(path, VideoFormat(*SIZE, FRAME_RATE, crf=14), sound) as writer:
        writer.write(frames)
        writer.segment_done()
        writer.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
