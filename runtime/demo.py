"""`scail2-rt demo`: the whole program on any machine, without a download.

Makes a tiny checkpoint of random weights, draws a driving case in the official folder layout (a figure that waves and
walks, its colour masks, a tone as sound), builds engines and generates. Checkpoint and engines are reused the next
time. Random weights make coloured noise: what the demo shows is the way from files to a video of the right length and
with its sound.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from scail2_rt.engines.build import BuildReport, BuildRequest, build
from scail2_rt.export.checkpoint import open_checkpoint
from scail2_rt.export.errors import InputError
from scail2_rt.export.random_checkpoint import make_checkpoint
from scail2_rt.runtime import jobs, report
from scail2_rt.runtime.media import probe_video
from scail2_rt.runtime.progress import BuildLines
from scail2_rt.runtime.request import Request

HEIGHT, WIDTH, FRAMES, FRAME_RATE = 64, 96, 21, Fraction(16)
SEGMENT_LENGTH, STEPS = 13, 4
SAMPLE_RATE, TONE_HZ = 48_000, 440.0
SKIN, SHIRT, SKY, GROUND = (236, 188, 150), (40, 90, 200), (150, 200, 235), (90, 140, 80)
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def run_demo(output: Path, backend: str = "auto") -> tuple[dict[str, Any], str]:
    """Everything into the folder `output`; (JSON object, text for people)."""
    started = time.perf_counter()
    checkpoint, engines, case = output / "checkpoint", output / "engines", output / "case"
    said = [_checkpoint(checkpoint)]
    build_report = _engines(checkpoint, engines, backend)
    reused = "are there already" if build_report.up_to_date else f"took {build_report.wall_s:.1f} s"
    said.append(f"engines     {engines} ({build_report.stages} stages for {', '.join(build_report.backends)}) {reused}")
    draw_case(case)
    said.append(f"case        {case}: {FRAMES} drawn frames at {FRAME_RATE} fps, masks, a {TONE_HZ:g} Hz tone")
    job = jobs.Case(str(case), _request(case, output / "demo.mp4"))
    result, text = jobs.run_single(job, jobs.EngineChoice(engines, backend), "quality", estimate_only=False)
    video = probe_video(output / "demo.mp4")
    said += [
        f"video       {text}",
        f"            {video.frames} frames, {float(video.frame_rate):g} fps, {'with' if video.audio else 'no'} audio",
        "The weights are random, so the video is coloured noise. With a real checkpoint the same two commands animate:",
        "  scail2-rt build-engines SCAIL-2/ -o engines/",
        "  scail2-rt generate engines/ --case my_case/ -o out.mp4",
    ]
    seconds = time.perf_counter() - started
    said.append(f"The demo took {seconds:.1f} s.")
    summary = {"frames": video.frames, "frame_rate": str(video.frame_rate), "audio": video.audio, "seconds": seconds}
    return {"demo": summary, "build": report.plain(build_report), "run": result}, "\n".join(said)


def _checkpoint(directory: Path) -> str:
    if directory.is_dir():
        return f"checkpoint  {directory} is there already"
    started = time.perf_counter()
    make_checkpoint(directory, preset="tiny", seed=0)
    return f"checkpoint  {directory}: random weights, made in {time.perf_counter() - started:.1f} s"


def _engines(checkpoint: Path, engines: Path, backend: str) -> BuildReport:
    """Engines of the demo's own folder: what an older version or a half-deleted folder left there is built anew."""
    request = BuildRequest(checkpoint, engines, (backend,))
    opened = open_checkpoint(checkpoint)
    try:
        return build(request, opened, BuildLines())
    except InputError as error:
        if not engines.is_dir():
            raise
        print(f"building the engines anew: {error}", file=sys.stderr)
        return build(replace(request, rebuild=True), opened, BuildLines())


def _request(case: Path, output: Path) -> Request:
    return Request(
        case / "ref.png",
        case / "ref_mask.png",
        case / "rendered_v2.mp4",
        case / "rendered_mask_v2.mp4",
        output,
        prompt="A figure in a blue shirt waves while it walks across a meadow.",
        size=(HEIGHT, WIDTH),
        steps=STEPS,
        segment_length=SEGMENT_LENGTH,
        overwrite=True,
    )


def draw_case(
    directory: Path,
    frames: int = FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    replace_mode: bool = False,
    audio: bool = True,
) -> None:
    """A case in the official layout: the reference (the figure at rest), its mask, the driving video and its mask.

    In replace mode the driving mask's background is white and the reference mask's black; in animate mode the
    reverse."""
    directory.mkdir(parents=True, exist_ok=True)
    reference, shape = _figure(0.0, height, width)
    _write_image(directory / "ref.png", reference)
    _write_image(directory / "ref_mask.png", _mask(shape, BLACK if replace_mode else WHITE))
    poses = [_figure(index / max(frames - 1, 1), height, width) for index in range(frames)]
    write_video(directory / "rendered_v2.mp4", (image for image, _ in poses), FRAME_RATE, audio=audio)
    name = "replace_mask.mp4" if replace_mode else "rendered_mask_v2.mp4"
    write_video(directory / name, (_mask(shape, WHITE if replace_mode else BLACK) for _, shape in poses), FRAME_RATE)


def _figure(phase: float, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [H, W, 3], figure bool [H, W]) at `phase` 0…1 of a walk from left to right, one arm waving."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    unit = height / 64
    centre = width * (0.3 + 0.4 * phase)
    swing = np.sin(phase * 4 * np.pi)
    head = (x - centre) ** 2 + (y - 16 * unit) ** 2 < (7 * unit) ** 2
    body = (abs(x - centre) < 6 * unit) & (y > 22 * unit) & (y < 42 * unit)
    legs = np.zeros_like(head)
    for side in (-1, 1):
        knee = centre + side * (3 + 4 * swing * (y / unit - 42) / 18) * unit
        legs |= (abs(x - knee) < 2.5 * unit) & (y >= 42 * unit) & (y < 60 * unit)
    arm = (abs(y - (26 - 8 * swing * (x - centre) / (14 * unit)) * unit) < 2.5 * unit) & (
        abs(x - centre - 9 * unit) < 8 * unit
    )
    image = np.where((y < 46 * unit)[..., None], SKY, GROUND).astype(np.uint8)
    image[body | legs] = SHIRT
    image[head | arm] = SKIN
    return image, head | body | legs | arm


def _mask(shape: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    return np.where(shape[..., None], RED, background).astype(np.uint8)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_video(path: Path, frames: Iterator[np.ndarray], frame_rate: Fraction, audio: bool = False) -> None:
    """Lossless H.264 of uint8 frames [H, W, 3]; with a mono AAC tone of the same length."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264rgb", rate=frame_rate, options={"crf": "0", "preset": "fast"})
        video.pix_fmt = "rgb24"
        tone = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if audio else None
        count = 0
        for pixels in frames:
            if not count:
                video.height, video.width = pixels.shape[:2]
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            count += 1
        container.mux(video.encode(None))
        if tone is not None:
            t = np.arange(int(SAMPLE_RATE * count / frame_rate)) / SAMPLE_RATE
            samples = (0.2 * np.sin(2 * np.pi * TONE_HZ * t)).astype(np.float32)[None]
            sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            sound.sample_rate, sound.pts = SAMPLE_RATE, 0
            container.mux(tone.encode(sound))
            container.mux(tone.encode(None))
