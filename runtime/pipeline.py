"""One generation, top to bottom: conditions, then for each segment noise, denoising, decoding, writing.

`generate` is what the command line calls. `animate` is the part between encoded conditions and finished frames, which
the parity tests drive with recorded inputs. Everything that needs no weights was checked before (`runtime.request`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.engines.executors import EngineSet
from scail2_rt.runtime.conditioning import (
    Conditions,
    clip_features,
    encode_prompts,
    encode_references,
    load_reference,
)
from scail2_rt.runtime.driving import DrivingClip, encode_driving, read_clips
from scail2_rt.runtime.geometry import Layout
from scail2_rt.runtime.leaving import Leaving, leave
from scail2_rt.runtime.media import VideoWriter
from scail2_rt.runtime.memory import MemoryPlan, resident_stages
from scail2_rt.runtime.preprocess import quantise_frames
from scail2_rt.runtime.progress import Progress
from scail2_rt.runtime.request import JobPlan
from scail2_rt.runtime.solvers import make_solver
from scail2_rt.runtime.text import PromptCache
from scail2_rt.runtime.transformer import BlockKV, SegmentInputs, Transformer, context_kv
from scail2_rt.runtime.vae import decode, encode_clip

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the denoising runs: solver name, number of steps, sigma shift, guidance scale (≤ 1: one pass)."""

    solver: str
    steps: int
    shift: float
    guidance: float


@dataclass(frozen=True, slots=True)
class Frames:
    """Finished frames, uint8 [n, H, W, 3] on the CPU; `ends_segment` on the last of a segment."""

    pixels: Tensor
    ends_segment: bool


@dataclass(frozen=True, slots=True)
class Result:
    output: Path
    frames: int


def generate(
    plan: JobPlan,
    engines: EngineSet,
    progress: Progress,
    cache: PromptCache | None = None,
    memory: MemoryPlan | None = None,
) -> Result:
    """Animate the plan's character and write the video. A failure or Ctrl-C keeps the finished segments."""
    request = plan.request
    made = animate_plan(plan, engines, progress, cache, memory)
    writer = VideoWriter(
        request.output,
        plan.width,
        plan.height,
        plan.frame_rate,
        request.codec,
        request.crf,
        request.driving if plan.audio else None,
        plan.start_s,
        plan.timestamps,
    )
    written = 0
    try:
        for frames in made:
            writer.write(frames.pixels.numpy())
            written += len(frames.pixels)
            if frames.ends_segment:
                writer.segment_done()
        with progress.phase("finish"):
            writer.finish()
    except BaseException:
        writer.abort()
        raise
    return Result(request.output, written)


def animate_plan(
    plan: JobPlan,
    engines: EngineSet,
    progress: Progress,
    cache: PromptCache | None = None,
    memory: MemoryPlan | None = None,
) -> Iterator[Frames]:
    """The plan's frames as `generate` writes them. Conditions are encoded at once, frames are made as they are asked
    for."""
    request = plan.request
    sampling = Sampling(request.solver, request.steps, request.shift, request.guidance)
    conditions = encode_conditions(plan, engines, progress, cache)
    noise = torch.Generator(request.noise_device).manual_seed(request.seed)

    def draw_noise(layout: Layout) -> Tensor:
        shape = (16, layout.frames, layout.height, layout.width)
        return torch.randn(shape, generator=noise, device=request.noise_device).to(engines.device)

    progress.begin(len(plan.segments), request.steps)
    overlap = request.segment_overlap
    return animate(
        engines, conditions, read_clips(plan), sampling, plan.mode, draw_noise, progress, overlap, memory=memory
    )


def encode_conditions(
    plan: JobPlan, engines: EngineSet, progress: Progress, cache: PromptCache | None = None
) -> Conditions:
    """Prompts, CLIP features and references of a request."""
    request = plan.request
    prompts = [request.prompt, request.negative_prompt] if request.guidance > 1 else [request.prompt]
    with progress.phase("text"):
        contexts = encode_prompts(engines, prompts, cache)
    with progress.phase("reference"):
        files = ((request.image, request.mask_image), *request.extra_refs)
        references = [load_reference(*pair, plan.height, plan.width) for pair in files]
        encoded = encode_references(engines, references)
    with progress.phase("clip"):
        clip = clip_features(engines, references[0][0])
    return Conditions(contexts, clip, *encoded)


def animate(
    engines: EngineSet,
    conditions: Conditions,
    clips: Iterable[DrivingClip],
    sampling: Sampling,
    mode: str,
    draw_noise: Callable[[Layout], Tensor],
    progress: Progress,
    overlap: int = 5,
    history: Tensor | None = None,
    observe: Observer = lambda name, value: None,
    memory: MemoryPlan | None = None,
) -> Iterator[Frames]:
    """Frames of the driving clips in order, every driving frame once.

    `overlap`: how many last frames of a segment the next one starts from.
    `history`: the last decoded frames [3, O, H, W] of the segment before the first clip, when it is not the video's
    first. `observe` is told intermediate tensors by name (parity tests)."""
    passes = len(conditions.contexts) if sampling.guidance > 1 else 1
    with progress.phase("context"):
        contexts = context_kv(engines, conditions.contexts[:passes], conditions.clip)
    stages = resident_stages(memory) if memory else []
    for index, clip in enumerate(clips):
        progress.segment(index)
        segment = clip.segment
        engines.prefetch(stages)  # on their way while the driving clip is encoded
        with progress.phase("driving"):
            driving, driving_mask = encode_driving(engines, clip)
            observe("driving", driving)
            observe("driving_mask", driving_mask)
            clean = None
            if segment.overlap and history is not None:
                history = history.to(torch.bfloat16).float()
                clean = encode_clip(engines, history)
                observe("history", history)
                observe("history_latent", clean)
        frames, _, height, width = clip.frames.shape
        extra = conditions.additional_refs.shape[1]
        layout = Layout.of(frames, height, width, additional_refs=extra, replace=mode == "replace")
        inputs = SegmentInputs(
            conditions.reference,
            conditions.reference_mask,
            driving,
            driving_mask,
            conditions.additional_refs,
            conditions.additional_masks,
        )
        with progress.phase("denoise"):
            latent = denoise(engines, layout, inputs, contexts, sampling, draw_noise(layout), clean, progress, observe)
        observe("final_latent", latent)
        if memory and memory.drops_blocks:
            engines.release("dit.blocks.")
        if engines.device.type == "cuda":
            torch.cuda.empty_cache()  # what denoising held, the graph's memory too, goes to the VAE
        history = None
        for start, pixels, levels in decoded_frames(engines, latent, progress):
            end = start + pixels.shape[1]
            history = pixels if history is None else torch.cat([history, pixels], dim=1)
            history = history[:, -overlap:]
            observe("pixels", pixels)
            new = levels[max(segment.overlap - start, 0) : segment.valid_frames - start]
            if len(new):
                yield Frames(new, ends_segment=end >= segment.valid_frames)


def denoise(
    engines: EngineSet,
    layout: Layout,
    inputs: SegmentInputs,
    contexts: list[BlockKV],
    sampling: Sampling,
    x: Tensor,
    clean: Tensor | None,
    progress: Progress,
    observe: Observer = lambda name, value: None,
) -> Tensor:
    """From noise x fp32 [16, F, h, w] to a clean latent. `clean` [16, Th, h, w] holds the history latents: they
    overwrite the first Th frames before every model call and after every step, where the history mask is 1."""
    solver = make_solver(sampling.solver, sampling.steps, sampling.shift)
    transformer = Transformer(engines, layout, inputs, contexts, solver.timesteps)
    frozen = 0 if clean is None else clean.shape[1]
    history_mask = x.new_zeros(4, *x.shape[1:])
    history_mask[:, :frozen] = 1

    x = overwrite_history(x, clean)
    for step in range(sampling.steps):
        velocity, *unguided = transformer.velocities(x, history_mask, step)
        observe("velocity", velocity)
        if unguided:
            observe("velocity_unguided", unguided[0])
            velocity = unguided[0] + sampling.guidance * (velocity - unguided[0])
        x = overwrite_history(solver.step(velocity, x), clean)
        observe("latent", x)
        progress.step(step)
    return x


def overwrite_history(x: Tensor, clean: Tensor | None) -> Tensor:
    """x [16, F, h, w] with its first frames replaced by the history latents [16, Th, h, w], if there are any."""
    return x if clean is None else torch.cat([clean, x[:, clean.shape[1] :]], dim=1)


def decoded_frames(engines: EngineSet, latent: Tensor, progress: Progress) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the first frame, pixels [3, 1 or 4, H, W], the same as uint8 [1 or 4, H, W, 3] on the CPU) in order.

    On a GPU a group of frames leaves while the next is decoded: it is handed out when the next has been queued."""
    start, chunks = 0, decode(engines, latent)
    waiting: tuple[int, Tensor, Leaving] | None = None
    while True:
        with progress.phase("decode", wait=False):
            pixels = next(chunks, None)
            upcoming = None if pixels is None else (start, pixels, leave(quantise_frames(pixels)))
            if waiting is not None:
                arrived = waiting[2].arrive()
        if waiting is not None:
            yield waiting[0], waiting[1], arrived
        if upcoming is None:
            return
        waiting, start = upcoming, start + upcoming[1].shape[1]
