"""`scail2-rt demo`: the whole program on any machine, without a download.

Takes the small trained networks that come with the package, draws a picture and a clip that training never saw (one
figure drives another, with a tone that follows the motion), makes their masks, builds engines and generates. The right
answer is known, so the demo says how close the video came, and shows it, with the masks, beside the truth on a contact
sheet. It prints the `generate` command that makes the same video again. Engines and masks are reused the next time.
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
    """Everything into the folder `output`; (JSON object, text for people)."""
    started = time.perf_counter()
    engines, folder = output / "engines", output / "case"
    checkpoint = shipped_checkpoint()
    backend = BACKEND if backend == "auto" else backend
    built = make_engines(checkpoint, engines, (backend,), observer=BuildLines())
    reused = "are there already" if built.up_to_date else f"took {built.wall_s:.1f} s"
    case = held_out_case(TASK, SEED)
    write_case(case, folder, masks=False)
    print("masks: a small SAM 2 finds and follows the figure", file=sys.stderr)
    with open_progress() as listener:
        masks, mask_iou = replace_masks(case, folder, listener)
    how = "are there already" if masks.reused else f"took {masks.seconds:.1f} s"
    said = [
        f"checkpoint  {checkpoint}: a small SCAIL-2, trained on drawn figures",
        f"engines     {engines} ({counted(built.stages, 'stage')} for {', '.join(built.backends)}) {reused}",
        f"case        {folder}: a picture and a clip; {case.scene.prompt}; held out from training, figures and motion",
        f"masks       made of these by a small SAM 2 {how}; mean IoU with the true ones {mask_iou['mask_iou']:.3f}",
    ]
    request = make_request(folder, SEED, Variant("demo"))
    with Session.open(engines, backend=backend) as session, open_progress() as listener:
        print(f"engines: {session.choice}", file=sys.stderr)
        result = generate(session.check(request), Output(output / "demo.mp4", overwrite=True), session, listener)
    again = repeat_command(request, engines, folder, backend, output / "again.mp4")
    video = probe_video(output / "demo.mp4")
    with VideoReader(output / "demo.mp4") as reader:
        made = reader.read(video.frames)
    sheet = output / "contact_sheet.png"
    with VideoReader(masks.mask_video) as reader:
        rows = {"masks made": reader.read(video.frames), OURS: made}
    write_sheet(sheet, [case_block(f"{TASK}: {case.scene.prompt}", case, rows)])
    scores, comparison = _judge(Answer.of(case), made)
    shape = f"{counted(video.frames, 'frame')}, {float(video.frame_rate):g} fps"
    said += [
        "video       " + summary(result).replace("\n", f"\n{'':12}"),
        f"            {shape}, {'with' if video.audio else 'no'} audio",
        f"sheet       {sheet}: reference, driving video, masks, ours, truth",
        f"quality     {comparison}",
        "This command makes the same video again:",
        f"  {again}",
        "With a real checkpoint and a segmenter, two commands are enough:",
        "  scail2-rt build-engines SCAIL-2/ -o engines/",
        '  scail2-rt generate engines/ --image photo.jpg --driving clip.mp4 --prompt "…" -o out.mp4',
    ]
    seconds = time.perf_counter() - started
    said.append(f"The demo took {seconds:.1f} s.")
    facts = {
        "repeat": again,
        "frames": video.frames,
        "frame_rate": str(video.frame_rate),
        "audio": video.audio,
        "seconds": seconds,
    }
    found = {
        "demo": {**facts, "scores": scores, "sheet": str(sheet), "masks": mask_iou},
        "build": plain(built),
        "run": dict(result.report),
    }
    return found, "\n".join(said)


def repeat_command(request: Request, engines: Path, case: Path, backend: str, output: Path) -> str:
    """The `generate` command of a request for a case folder, quoted for a shell and good in every folder."""
    height, width = request.size or SIZE
    words = ["scail2-rt", "generate", engines.absolute(), "--case", case.absolute()]
    words += ["--prompt-file", (case / "prompt.txt").absolute(), "--size", f"{height}x{width}", "--seed", request.seed]
    words += ["--scheduler", request.scheduler, "--steps", request.steps, "--shift", f"{request.shift:g}"]
    words += ["--guidance", f"{request.guidance:g}", "--segment-length", request.segment_length]
    words += ["--segment-overlap", request.segment_overlap, "--backend", backend, "-o", output.absolute()]
    return shlex.join(map(str, words))


def _judge(answer: Answer, made: np.ndarray) -> tuple[dict[str, dict[str, float]], str]:
    """(figures of the video and of the trivial baselines, one line)."""
    videos = {OURS: made, **{who: make(answer) for who, make in BASELINES.items()}}
    scores = {who: answer.score(video) for who, video in videos.items()}
    best = max(BASELINES, key=lambda who: scores[who]["character_psnr"])
    ours, trivial = scores[OURS], scores[best]
    line = (
        f"PSNR {ours['psnr']:.1f} dB, of the character {ours['character_psnr']:.1f} dB "
        f"(best without a model, {best}: {trivial['psnr']:.1f} and {trivial['character_psnr']:.1f} dB)"
    )
    return scores, line
