"""Compare resizing, normalisation and post-processing with the processors of `transformers`, on tiny real models.

    python -m tests.parity.segmenters OUT.json

Needs torchvision; uses the GPU if there is one. A failing comparison is recorded with its error and the others run. The
last line has the number of failures.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scail2_rt.benchmarks.sprites.world.crossings import make_crossing
from scail2_rt.benchmarks.sprites.world.raster import draw_picture
from scail2_rt.runtime.masks.make import segmenters
from scail2_rt.runtime.masks.make.figures import iou
from scail2_rt.runtime.masks.make.folders import open_folder
from scail2_rt.runtime.masks.make.options import AUTHORS_PROMPT
from scail2_rt.runtime.masks.make.pixels import (
    HALF,
    InputFormat,
    network_mask,
    network_picture,
    network_points,
    picture_masks,
)
from scail2_rt.runtime.masks.make.tracker import Given
from tests.support.tiny_segmenters import write_grounding_dino, write_sam2, write_sam3

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((96, 160), (540, 960), (1080, 1920))
BOX = (20.0, 10.0, 90.0, 88.0)


def compare_all(work: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    clip = draw_picture(make_crossing(2, frames=6, count=2), 96, 160)[0]
    sam2, sam3 = write_sam2(work / "sam2"), write_sam3(work / "sam3")
    write_grounding_dino(work / "sam2" / "detector")
    yield "SAM 2: pictures", lambda: _pictures(_sam2_processor().video_processor, InputFormat((128, 128)))
    yield "SAM 2: prompts", _prompts
    yield "SAM 2: masks", _masks
    yield "SAM 2: a clip", lambda: _sam2_clip(sam2, clip)
    yield (
        "SAM 3: pictures",
        lambda: _pictures(_sam3_processor(sam3).video_processor, InputFormat((112, 112), HALF, HALF)),
    )
    yield "SAM 3: words and masks", lambda: _sam3_detection(sam3, clip)
    yield "SAM 3: a clip", lambda: _sam3_clip(sam3, clip)
    yield "Grounding DINO: pictures and boxes", lambda: _dino(work / "sam2" / "detector")


def _sam2_processor() -> Any:
    from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

    size = {"height": 128, "width": 128}
    return Sam2VideoProcessor(Sam2ImageProcessor(size=size), Sam2VideoVideoProcessor(size=size), target_size=128)


def _sam3_processor(folder: Path) -> Any:
    from transformers import AutoTokenizer, Sam2VideoVideoProcessor, Sam3ImageProcessor, Sam3VideoProcessor

    size = {"height": 112, "width": 112}
    video = Sam2VideoVideoProcessor(size=size, image_mean=list(HALF), image_std=list(HALF))
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Sam3VideoProcessor(Sam3ImageProcessor(size=size), video, words, target_size=112)


def _pictures(processor: Any, form: InputFormat) -> dict[str, Any]:
    """Largest difference of a picture, in 8-bit levels, and the share of values that differ by more than a half."""
    found = {}
    for height, width in SIZES:
        frames = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
        drawn = draw_picture(make_crossing(1, frames=1), height, width)[0]
        for name, pixels in (("noise", frames), ("drawn", drawn)):
            theirs = processor(videos=[torch.from_numpy(pixels).permute(0, 3, 1, 2)], return_tensors="pt")
            ours = network_picture(pixels[0], form)
            levels = (ours - theirs["pixel_values_videos"][0, 0]).abs() * torch.tensor(form.std)[:, None, None] * 255
            found[f"{name} {height}x{width}"] = {
                "largest": round(float(levels.max()), 3), "above a half": float((levels > 0.5).float().mean()),
            }  # fmt: skip
    return found


def _prompts() -> dict[str, Any]:
    """Largest difference of points in the network's picture, and of a mask that is a prompt."""
    processor = _sam2_processor()
    session = processor.init_video_session(video=torch.zeros(1, 3, 540, 960, dtype=torch.uint8))
    processor.add_inputs_to_inference_session(session, 0, [1], input_boxes=[[list(BOX)]])
    given = session.point_inputs_per_obj[0][0]["point_coords"]
    mask = np.zeros((540, 960), bool)
    mask[100:431, 55:602] = True
    processor.add_inputs_to_inference_session(session, 0, [2], input_masks=[mask])
    masks = session.mask_inputs_per_obj[1][0]
    return {
        "box": float((network_points(Given.box(BOX).points, (540, 960), 128) - given).abs().max()),
        "mask": float((network_mask(mask, 128) - masks).abs().max()),
    }


def _masks() -> dict[str, Any]:
    logits = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = _sam2_processor().post_process_masks([logits], [[540, 960]], binarize=False)[0]
    return {"largest": float((picture_masks(logits[:, 0], (540, 960)) - theirs[:, 0]).abs().max())}


def _sam2_clip(folder: Path, clip: np.ndarray) -> dict[str, Any]:
    """Compare the processor's session for the complete clip with our tracker, frame by frame."""
    from transformers import Sam2VideoModel

    model = Sam2VideoModel.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    processor = _sam2_processor()
    session = processor.init_video_session(
        video=torch.from_numpy(clip).permute(0, 3, 1, 2), inference_device=DEVICE, dtype=torch.float32
    )
    processor.add_inputs_to_inference_session(session, 0, [1], input_boxes=[[list(BOX)]])
    ours = segmenters.Sam2(open_folder(folder), DEVICE, torch.float32).tracker(clip.shape[1:3])
    worst, known = 0.0, 0.0
    for frame, out in zip(clip, model.propagate_in_video_iterator(session, start_frame_idx=0), strict=True):
        made = ours.follow(frame) or ours.add({1: Given.box(BOX)})
        worst = max(worst, float((made[1].logits - out.pred_masks[0, 0]).abs().max()))
        known = max(known, float(out.pred_masks.abs().max()))
    return {"largest": worst, "of values up to": known}


def _sam3_detection(folder: Path, clip: np.ndarray) -> dict[str, Any]:
    """Compare the detections of `Sam3VideoModel` in the first frame, through its processor, with `Sam3.find`."""
    from transformers import Sam3VideoModel

    model = Sam3VideoModel.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    processor = _sam3_processor(folder)
    session = processor.init_video_session(
        video=torch.from_numpy(clip).permute(0, 3, 1, 2), inference_device=DEVICE, dtype=torch.float32
    )
    processor.add_text_prompt(session, segmenters.phrases(AUTHORS_PROMPT))
    model.score_threshold_detection = model.new_det_thresh = segmenters.CONFIDENCE
    out = model(inference_session=session, frame_idx=0)
    ours = segmenters.Sam3(open_folder(folder), DEVICE, torch.float32)
    ours_words = ours._prompted(AUTHORS_PROMPT)
    same = all(torch.equal(ours_words.prompt_input_ids[i], session.prompt_input_ids[i]) for i in session.prompts)
    found = ours.find(clip[0], AUTHORS_PROMPT)
    theirs = [picture_masks(mask.float(), clip.shape[1:3])[0].cpu().numpy() > 0 for mask in out.obj_id_to_mask.values()]
    apart = [1 - max((iou(each.given.mask, mask) for mask in theirs), default=0.0) for each in found]
    return {"same words": same, "theirs": len(theirs), "ours": len(found), "largest 1 - IoU": max(apart, default=0.0)}


def _sam3_clip(folder: Path, clip: np.ndarray) -> dict[str, Any]:
    """A box in the first frame, followed by SAM 3's tracker: frames and sizes."""
    segmenter = segmenters.Sam3(open_folder(folder), DEVICE, torch.float32)
    tracker = segmenter.tracker(clip.shape[1:3])
    shares = []
    for frame in clip:
        made = tracker.follow(frame) or tracker.add({1: Given.box(BOX)})
        shares.append(round(float((made[1].logits > 0).float().mean()), 4))
    return {"frames": len(shares), "shares": shares}


def _dino(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer, GroundingDinoProcessor
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    frame = draw_picture(make_crossing(3, frames=1), 240, 400)[0][0]
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil(), AutoTokenizer.from_pretrained(folder))
    theirs = processor(images=frame, text="human. character.", return_tensors="pt")
    ours = network_picture(frame, InputFormat(segmenters.dino_size(240, 400)))
    if ours.shape != theirs["pixel_values"][0].shape:
        return {"ours": list(ours.shape), "theirs": list(theirs["pixel_values"].shape)}
    difference = (ours - theirs["pixel_values"][0]).abs()
    return {"size": list(ours.shape[1:]), "largest": float(difference.max()), "mean": float(difference.mean())}


def main(output: Path) -> int:
    import transformers

    found: dict[str, Any] = {
        "torch": torch.__version__, "transformers": transformers.__version__, "device": str(DEVICE),
        "card": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none",
    }  # fmt: skip
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        for name, compare in compare_all(Path(work)):
            try:
                found[name] = compare()
            except Exception as error:
                failed += 1
                found[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
            print(f"{name}: {found[name]}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{failed} comparisons failed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
