"""`scail2-rt demo`: all steps of the program on any machine, without a download.

The demo uses small trained networks that come with the package. It draws a held-out case (a reference image, and a
driving clip with another character and a tone that follows the motion), makes the masks, builds engines and generates
the video. The true video is known, so the demo prints PSNR and writes a contact sheet that shows the result beside it.
It also prints the `generate` command that makes the same video. A second call reuses engines and masks.
"""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.benchmarks.sprites.quality.sheets import case_block, write_sheet
from scail2_rt.benchmarks.sprites.quality.trials import BASELINES, OURS, Answer, Variant, held_out_case, make_request
from scail2_rt.benchmarks.sprites.segmenting import replace_masks
from scail2_rt.benchmarks.sprites.shipped import BACKEND, make_engines, shipped_checkpoint
from scail2_rt.benchmarks.sprites.world.case_files import write_case
from scail2_rt.benchmarks.sprites.world.cases import SIZE
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.cli.progress import BuildLines, open_progress
from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.jobs.run import generate, summary
from scail2_rt.runtime.media.video_reader import VideoReader, probe_video
from scail2_rt.runtime.session.session import Session

TASK, SEED = "animate", 0


def run_demo(output: Path, backend: str = "auto") -> tuple[dict[str, Any], str]:
    """Run the demo in the folder `output`. Returns (JSON object, text). Raises the errors of the steps."""
    started = time.perf_counter()
    engines, folder = output / "engines", output / "case"
    checkpoint = shipped_checkpoint()
    backend = BACKEND if backend == "auto" else backend
    built = make_engines(checkpoint, engines, (backend,), observer=BuildLines())
    building = "reused" if built.up_to_date else f"built in {built.wall_s:.1f} s"
    case = held_out_case(TASK, SEED)
    write_case(case, folder, masks=False)
    print("masks: a small SAM 2 finds and tracks the character", file=sys.stderr)
    with open_progress() as listener:
        masks, mask_iou = replace_masks(case, folder, listener)
    making = "reused" if masks.reused else f"made in {masks.seconds:.1f} s"
    lines = [
        f"checkpoint  {checkpoint}: a small SCAIL-2, trained on drawn characters",
        f"engines     {engines}: {counted(built.stages, 'stage')} for {', '.join(built.backends)}, {building}",
        f"case        {folder}: {case.scene.prompt}; its characters and motion are held out from training",
        f"masks       {making} with a small SAM 2; mean IoU with the true masks {mask_iou['mask_iou']:.3f}",
    ]
    request = make_request(folder, SEED, Variant("demo"))
    with Session.open(engines, backend=backend) as session, open_progress() as listener:
        print(f"engines: {session.choice}", file=sys.stderr)
        result = generate(session.check(request), Output(output / "demo.mp4", overwrite=True), session, listener)
    repeat = repeat_command(request, engines, folder, backend, output / "again.mp4")
    video = probe_video(output / "demo.mp4")
    with VideoReader(output / "demo.mp4") as reader:
        made = reader.read(video.frames)
    sheet = output / "contact_sheet.png"
    with VideoReader(masks.mask_video) as reader:
        rows = {"masks made": reader.read(video.frames), OURS: made}
    write_sheet(sheet, [case_block(f"{TASK}: {case.scene.prompt}", case, rows)])
    scores, comparison = _judge(Answer.of(case), made)
    shape = f"{counted(video.frames, 'frame')}, {float(video.frame_rate):g} fps"
    lines += [
        "video       " + summary(result).replace("\n", f"\n{'':12}"),
        f"            {shape}, {'with' if video.audio else 'no'} audio",
        f"sheet       {sheet}: reference image, driving clip, masks, ours, truth",
        f"quality     {comparison}",
        "To make the same video again:",
        f"  {repeat}",
        "With a real checkpoint and a segmenter:",
        "  scail2-rt build-engines SCAIL-2/ -o engines/",
        '  scail2-rt generate engines/ --image photo.jpg --driving clip.mp4 --prompt "…" -o out.mp4',
    ]
    seconds = time.perf_counter() - started
    lines.append(f"The demo took {seconds:.1f} s.")
    facts = {
        "repeat": repeat,
        "frames": video.frames,
        "frame_rate": str(video.frame_rate),
        "audio": video.audio,
        "seconds": seconds,
    }
    document = {
        "demo": {**facts, "scores": scores, "sheet": str(sheet), "masks": mask_iou},
        "build": plain(built),
        "run": dict(result.report),
    }
    return document, "\n".join(lines)


def repeat_command(request: Request, engines: Path, case: Path, backend: str, output: Path) -> str:
    """Return the `generate` command of a request for a case folder, quoted for a shell, with absolute paths."""
    height, width = request.size or SIZE
    words = ["scail2-rt", "generate", engines.absolute(), "--case", case.absolute()]
    words += ["--prompt-file", (case / "prompt.txt").absolute(), "--size", f"{height}x{width}", "--seed", request.seed]
    words += ["--scheduler", request.scheduler, "--steps", request.steps, "--shift", f"{request.shift:g}"]
    words += ["--guidance", f"{request.guidance:g}", "--segment-length", request.segment_length]
    words += ["--segment-overlap", request.segment_overlap, "--backend", backend, "-o", output.absolute()]
    return shlex.join(map(str, words))


def _judge(answer: Answer, made: np.ndarray) -> tuple[dict[str, dict[str, float]], str]:
    """Return (method → scores, for the video and the trivial baselines; one line). made: uint8 [T, H, W, 3]."""
    videos = {OURS: made, **{who: make(answer) for who, make in BASELINES.items()}}
    scores = {who: answer.score(video) for who, video in videos.items()}
    best = max(BASELINES, key=lambda who: scores[who]["character_psnr"])
    ours, trivial = scores[OURS], scores[best]
    line = (
        f"PSNR {ours['psnr']:.1f} dB, on the character {ours['character_psnr']:.1f} dB "
        f"(best baseline without a model, {best}: {trivial['psnr']:.1f} and {trivial['character_psnr']:.1f} dB)"
    )
    return scores, line
