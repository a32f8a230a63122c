"""Train the small SAM 2 that segments drawn figures, for tests and for the demo.

    python -m scail2_rt.benchmarks.sprites.training.train_segmenter OUTPUT --work DIR
    torchrun --nproc-per-node 2 -m scail2_rt.benchmarks.sprites.training.train_segmenter …

It runs on one GPU or two, for a number of minutes or steps. OUTPUT becomes a folder for `--segmenter-weights`. It is
updated at each evaluation on held-out clips, whose mean IoU is printed. An interrupted run resumes.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.training.fitting import Budget, Muon, Training, Workers, adam, fit
from scail2_rt.benchmarks.sprites.training.segmenter_clips import SegmenterClips, box_prompt
from scail2_rt.benchmarks.sprites.training.segmenter_model import (
    IMAGE,
    Unrolled,
    attention_in_pieces,
    kept_codes,
    make_segmenter,
    save_segmenter,
    unroll,
)
from scail2_rt.benchmarks.sprites.world.cases import make_scene
from scail2_rt.benchmarks.sprites.world.crossings import MOST, make_crossing
from scail2_rt.benchmarks.sprites.world.raster import Picture

MATRIX_RATE, RATE = 1e-2, 1e-3
CLIP_FRAMES, STILL_FRAMES = 8, 2
STILLS = 3  # factor of the batch size for short clips, which have points instead of boxes
LOOK_EVERY_S = 45.0
SEEN_PIXELS = 8  # minimum number of pixels of a visible figure
HELD_OUT = ("two", "three", "animal", "crossing")
CASES = ("animate", "pose", "mesh", "animal", "replace", "two", "three")  # tasks whose pictures are used for training


def training_picture(number: int, frames: int) -> Picture:
    """A picture of the training set: half are crossings, half are driving clips and outputs of the sprite cases."""
    if number % 2 == 0:
        return make_crossing(number // 2, "train", frames)
    scene = make_scene(CASES[number // 2 % len(CASES)], number, "train", frames)
    return scene.driving.picture if number // 2 % 3 else scene.truth


def held_out_picture(group: str, number: int, frames: int) -> Picture:
    """A picture of a held-out group, which training does not use."""
    if group == "crossing":
        return make_crossing(number, "test", frames)
    return make_scene(group, number, "test", frames).driving.picture


def make_pictures(numbers: range, frames: int, processes: int) -> list[Picture]:
    """The pictures of the training set with these numbers, made by `processes` processes."""
    context = get_context("forkserver")
    context.set_forkserver_preload([make_scene.__module__, make_crossing.__module__])
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(partial(training_picture, frames=frames), numbers, chunksize=32))


def segmenter_loss(out: Unrolled, target: Tensor) -> Tensor:
    """The training loss: cross entropy and dice of the masks in frames that show the figure, cross entropy of its
    presence, and absolute error of the predicted IoU. target: bool [B, T, h, w]."""
    wanted = target.transpose(0, 1).float()
    there = (wanted.sum((2, 3)) >= SEEN_PIXELS).float()
    logits = out.masks.float().clamp(-30, 30)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((2, 3))
    share = logits.sigmoid()
    both, either = (share * wanted).sum((2, 3)), (share + wanted).sum((2, 3))
    dice = 1 - (2 * both + 1) / (either + 1)
    masks = ((8 * entropy + dice) * there).sum() / there.sum().clamp(min=1)
    hard = (logits > 0).float()
    overlap = (hard * wanted).sum((2, 3)) / ((hard + wanted) > 0).sum((2, 3)).clamp(min=1)
    expected = ((out.iou.float() - overlap).abs() * there).sum() / there.sum().clamp(min=1)
    return masks + F.binary_cross_entropy_with_logits(out.seen.float(), there) + 0.2 * expected


def clip_loss(model: Any, clips: SegmenterClips, size: int, frames: int, boxes: bool, draw: torch.Generator) -> Tensor:
    """The loss on a random batch. draw: the random generator."""
    batch = clips.batch(size, frames, boxes, draw)
    with torch.autocast(draw.device.type, torch.bfloat16, enabled=draw.device.type == "cuda"):
        out = unroll(model, batch.frames, batch.points, batch.labels)
    return segmenter_loss(out, batch.target)


@torch.no_grad()
def held_out_iou(model: Any, clips: SegmenterClips, at_once: int) -> dict[str, float]:
    """Track every figure of the first frame from its box there.

    iou         mean IoU over the frames that show the figure
    exchanged   share of these frames in which the mask covers another figure more
    absent      share of the other frames in which the mask is empty"""
    jobs = [
        (clip, figure)
        for clip in range(len(clips.image))
        for figure in range(1, MOST + 1)
        if int((clips.labels[clip, 0] == figure).sum()) >= SEEN_PIXELS
    ]
    overlaps, exchanged, absent = [], [], []
    for start in range(0, len(jobs), at_once):
        some = jobs[start : start + at_once]
        chosen, figure = (torch.tensor(x, device=clips.image.device) for x in zip(*some, strict=True))
        image, labels = clips.image[chosen], clips.labels[chosen]
        frames = F.interpolate(clips.normalised(image).flatten(0, 1), (IMAGE, IMAGE), mode="bilinear", antialias=True)
        target = labels == figure[:, None, None, None]
        points = box_prompt(target[:, 0])
        kinds = clips.box_labels.expand(len(some), 1, 2)
        with torch.autocast(points.device.type, torch.bfloat16, enabled=points.is_cuda):
            out = unroll(model, frames.unflatten(0, image.shape[:2]), points, kinds)
        made = F.interpolate(out.masks.float(), image.shape[-2:], mode="bilinear").transpose(0, 1) > 0
        there = target.sum((2, 3)) >= SEEN_PIXELS
        both = (made & target).sum((2, 3))
        other = (made & (labels > 0) & ~target).sum((2, 3))
        overlaps.append((both / (made | target).sum((2, 3)).clamp(min=1))[there])
        exchanged.append((other > both)[there].float())
        absent.append((made.sum((2, 3)) < SEEN_PIXELS)[~there].float())
    iou, swaps, gone = (torch.cat(each) for each in (overlaps, exchanged, absent))
    return {
        "iou": round(float(iou.mean()), 4),
        "exchanged": round(float(swaps.mean()), 4),
        "absent": round(float(gone.mean()), 4) if len(gone) else 1.0,
    }


@dataclass(slots=True)
class Watch:
    """Evaluates the model on the held-out clips every `LOOK_EVERY_S` seconds, and saves it."""

    model: Any
    groups: dict[str, SegmenterClips]
    output: Path
    at_once: int
    last: float

    def __call__(self, step: int) -> None:
        if time.monotonic() - self.last >= LOOK_EVERY_S:
            self.look(step)
            self.last = time.monotonic()

    def look(self, step: int) -> dict[str, dict[str, float]]:
        """Evaluate all groups, print the result and save the model."""
        found = {name: held_out_iou(self.model, clips, self.at_once) for name, clips in self.groups.items()}
        print(json.dumps({"step": step, "held out": found}), flush=True)
        save_segmenter(self.model, self.output)
        return found


def train_segmenter(
    clips: SegmenterClips, groups: dict[str, SegmenterClips], training: Training, output: Path, batch: int
) -> dict[str, dict[str, float]]:
    """Train the model and save it to `output`. Returns the final `held_out_iou` per group; empty in ranks other
    than 0."""
    device = training.workers.device
    model = make_segmenter().to(device)
    matrices = [p for name, p in model.named_parameters() if _is_matrix(name, p)]
    chosen = set(matrices)
    optimisers = [Muon(matrices, MATRIX_RATE), adam((p for p in model.parameters() if p not in chosen), RATE)]
    losses = [
        partial(clip_loss, model, clips, batch, CLIP_FRAMES, True),
        partial(clip_loss, model, clips, STILLS * batch, STILL_FRAMES, False),
    ]
    watch = Watch(model, groups, output, batch, time.monotonic())
    with kept_codes(), attention_in_pieces():
        weights = fit(model, losses, lambda step: int(step % 3 == 2), optimisers, training, watch)
        model.load_state_dict(model.state_dict() | {name: tensor.to(device) for name, tensor in weights.items()})
        return watch.look(-1) if training.workers.rank == 0 else {}


def _is_matrix(name: str, parameter: Tensor) -> bool:
    inside = ("vision_encoder.backbone.blocks", "memory_attention.layers", "mask_decoder.transformer", "memory_fuser")
    return parameter.ndim == 2 and any(part in name for part in inside)


@dataclass(frozen=True, slots=True)
class SegmenterOptions:
    """The command's argument and options."""

    output: Path
    work: Path
    minutes: float
    steps: int
    clips: int
    frames: int
    held_out: int
    batch: int
    recorded: bool


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the state and the log.")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=2.8, show_default=True, help="Training time."
)
@click.option("--steps", default=0, help="Number of steps, instead of --minutes.")
@click.option("--clips", default=4000, show_default=True, help="Training clips.")
@click.option("--frames", default=33, show_default=True, help="Frames per clip.")
@click.option("--held-out", default=8, show_default=True, help="Clips per held-out group.")
@click.option("--batch", default=16, show_default=True, help="Clips per step and process.")
@click.option("--recorded/--eager", default=True, help="Enable or disable CUDA graphs on a GPU.")
def main(**given: Any) -> None:
    """Train a small SAM 2 on drawn figures and write it to OUTPUT."""
    options = SegmenterOptions(**given)
    frames, batch = options.frames, options.batch
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    workers, began = Workers.here(), time.monotonic()
    processes = max((cpu_count() or 1) // workers.count, 1)
    own = make_pictures(workers.part(range(options.clips)), frames, processes)
    learnt = SegmenterClips(own, workers.device)
    groups = {
        name: SegmenterClips(
            [held_out_picture(name, number, frames) for number in range(options.held_out)], workers.device
        )
        for name in HELD_OUT
        if workers.rank == 0
    }
    print(f"{len(learnt.image)} clip(s) drawn in {time.monotonic() - began:.0f} s", flush=True)
    identity = f"{options.clips} clips of {frames} frames, {batch} a step and process"
    budget = Budget(options.minutes, options.steps)
    training = Training(budget, workers, options.work, "segmenter", identity, options.recorded)
    found = train_segmenter(learnt, groups, training, options.output, batch)
    if workers.rank == 0:
        (options.output / "held_out.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({"output": str(options.output), "held out": found}), flush=True)
    workers.wait()


if __name__ == "__main__":
    main()
