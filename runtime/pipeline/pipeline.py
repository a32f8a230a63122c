"""One generation, top to bottom: conditions, then for each segment noise, denoising, decoding, writing.

`generate` is what the command line calls. `animate` is the part between encoded conditions and finished frames, which
the parity tests drive with recorded inputs. Everything that needs no weights was checked before (`core.request`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout, latent_frames
from scail2_rt.runtime.core.progress import Progress
from scail2_rt.runtime.core.request import JobPlan
from scail2_rt.runtime.media.video_writer import VideoFormat, VideoWriter
from scail2_rt.runtime.pipeline.anchor import open_anchor
from scail2_rt.runtime.pipeline.async_copy import Leaving, leave
from scail2_rt.runtime.pipeline.conditioning import (
    Conditions,
    clip_features,
    encode_prompts,
    encode_references,
    load_reference,
)
from scail2_rt.runtime.pipeline.driving import DrivingClip, encode_driving, read_clips
from scail2_rt.runtime.pipeline.history import OFFICIAL, Carry, History, Joins, cross_fade, encode_history
from scail2_rt.runtime.pipeline.preprocess import quantise_frames
from scail2_rt.runtime.pipeline.schedulers import make_solver
from scail2_rt.runtime.pipeline.text import PromptCache
from scail2_rt.runtime.pipeline.transformer import BlockKV, SegmentInputs, Transformer, context_kv
from scail2_rt.runtime.pipeline.vae import decode
from scail2_rt.runtime.session.memory import MemoryPlan, resident_stages
from scail2_rt.runtime.session.resume import Saved, Sidecar, noise_generator

Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the denoising runs: solver name, number of steps, sigma shift, guidance scale (≤ 1: one pass), and how
    segments are joined."""

    solver: str
    steps: int
    shift: float
    guidance: float
    joins: Joins = OFFICIAL


@dataclass(frozen=True, slots=True)
class Frames:
    """Finished frames, uint8 [n, H, W, 3] on the CPU. The last of a segment (n may be 0 there) come with what the
    segment leaves to the next."""

    pixels: Tensor
    carry: Carry | None = None

    @property
    def ends_segment(self) -> bool:
        return self.carry is not None


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
    sidecar: Sidecar | None = None,
    saved: Saved | None = None,
) -> Result:
    """Animate the plan's character and write the video. A failure or Ctrl-C keeps the finished segments.

    `sidecar` keeps what it takes to go on after each; `saved` is such a state, to go on from."""
    request = plan.request
    noise = noise_generator(request.noise_device, request.seed, saved)
    carry, written = (saved.carry, saved.frames) if saved else (Carry(), 0)
    made = animate_plan(plan, engines, progress, noise, carry, cache, memory)
    audio = request.driving if plan.audio else None
    video = VideoFormat(plan.width, plan.height, plan.frame_rate, request.codec, request.crf)
    writer = VideoWriter(request.output, video, audio, plan.start_s, plan.timestamps, after=written)
    try:
        for frames in made:
            writer.write(frames.pixels.numpy())
            written += len(frames.pixels)
            if frames.carry is not None:
                now = Saved(written, frames.carry.to("cpu"), noise.get_state())
                writer.segment_done(save=partial(sidecar.write, saved=now) if sidecar else None)
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
    noise: torch.Generator,
    carry: Carry | None = None,
    cache: PromptCache | None = None,
    memory: MemoryPlan | None = None,
) -> Iterator[Frames]:
    """The plan's frames as `generate` writes them, from the segment after `carry` on. Conditions are encoded at once,
    frames are made as they are asked for."""
    request, carry = plan.request, carry or Carry()
    joins = Joins(request.history, request.overlap_blend, request.anchor_color)
    sampling = Sampling(request.solver, request.steps, request.shift, request.guidance, joins)
    conditions = encode_conditions(plan, engines, progress, cache)

    def draw_noise(layout: Layout) -> Tensor:
        shape = (16, layout.frames, layout.height, layout.width)
        return torch.randn(shape, generator=noise, device=request.noise_device).to(engines.device)

    progress.begin(len(plan.segments), request.steps, carry.finished)
    clips, overlap = read_clips(plan, carry.finished), request.segment_overlap
    return animate(engines, conditions, clips, sampling, plan.mode, draw_noise, progress, overlap, carry, memory=memory)


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
        fits = (plan.fit, *(None for _ in request.extra_refs))  # other views and close-ups keep their framing
        references = [
            load_reference(*pair, plan.height, plan.width, fit) for pair, fit in zip(files, fits, strict=True)
        ]
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
    carry: Carry | None = None,
    observe: Observer = lambda name, value: None,
    memory: MemoryPlan | None = None,
) -> Iterator[Frames]:
    """Frames of the driving clips in order, every driving frame once.

    `overlap`: how many last frames of a segment the next one starts from.
    `carry`: what the segment before the first clip left, when that is not the video's first (its history may come from
    elsewhere). `observe` is told intermediate tensors by name (parity tests)."""
    carry, joins = carry or Carry(), sampling.joins
    passes = len(conditions.contexts) if sampling.guidance > 1 else 1
    with progress.phase("context"):
        contexts = context_kv(engines, conditions.contexts[:passes], conditions.clip)
    stages = resident_stages(memory) if memory else []
    for index, clip in enumerate(timed(clips, progress), carry.finished):
        progress.segment(index)
        engines.prefetch(stages)  # on their way while the driving clip is encoded
        with progress.phase("driving"):
            driving, driving_mask = encode_driving(engines, clip)
            observe("driving", driving)
            observe("driving_mask", driving_mask)
            clean = None
            if clip.segment.overlap and carry.history is not None:
                pixels, clean = encode_history(engines, joins.history, carry.history)
                observe("history", pixels)
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
        for part in decode_segment(engines, clip, latent, joins, mode, overlap, carry, progress, observe):
            yield part
            carry = part.carry or carry
    if joins.blend and carry.history is not None:  # held back for a segment that does not come
        yield Frames(quantise_frames(carry.history.shown[:, -joins.blend :]).cpu(), Carry(carry.finished))


def timed(clips: Iterable[DrivingClip], progress: Progress) -> Iterator[DrivingClip]:
    """The clips; making each is a phase of its own."""
    made = iter(clips)
    while True:
        with progress.phase("read", wait=False):
            clip = next(made, None)
        if clip is None:
            return
        yield clip


def decode_segment(
    engines: EngineSet,
    clip: DrivingClip,
    latent: Tensor,
    joins: Joins,
    mode: str,
    overlap: int,
    carry: Carry,
    progress: Progress,
    observe: Observer = lambda name, value: None,
) -> Iterator[Frames]:
    """The frames that a segment adds, in order: colours anchored, the overlap faded in where the segment before has
    left its own version of it, as many held back at the end for the next one's fade."""
    segment, before = clip.segment, carry.history
    blend = joins.blend if before is not None else 0
    first, last = segment.overlap - min(blend, segment.overlap), segment.valid_frames - joins.blend
    anchor = open_anchor(joins.anchor_color, mode, clip, carry.anchor, engines.device)
    history: History | None = None

    def finish(start: int, pixels: Tensor) -> Tensor:
        shaded = pixels if anchor is None else anchor.shade(start, pixels)
        return cross_fade(shaded, start, before, segment.overlap, blend)

    for start, pixels, shown, levels in decoded_frames(engines, latent, finish, progress):
        observe("pixels", pixels)
        valid = slice(0, segment.valid_frames - start)
        ending = (shown[:, valid], pixels[:, valid]) if shown is not pixels else (pixels[:, valid],) * 2
        history = History(*ending) if history is None else history.after(*ending, overlap)
        new, left = levels[max(first - start, 0) : max(last - start, 0)], None
        if start + pixels.shape[1] >= segment.valid_frames:
            history = replace(history, latent=latent[:, latent.shape[1] - latent_frames(overlap) + 1 :])
            left = Carry(carry.finished + 1, history, {} if anchor is None else anchor.state())
        if len(new) or left:
            yield Frames(new, left)


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


def decoded_frames(
    engines: EngineSet, latent: Tensor, finish: Callable[[int, Tensor], Tensor], progress: Progress
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(index of the first frame, decoded pixels [3, 1 or 4, H, W], the same as `finish(index, pixels)` made them, those
    as uint8 [1 or 4, H, W, 3] on the CPU) in order.

    On a GPU a group of frames leaves while the next is decoded: it is handed out when the next has been queued."""
    start, chunks = 0, decode(engines, latent)
    waiting: tuple[int, Tensor, Tensor, Leaving] | None = None
    while True:
        with progress.phase("decode", wait=False):
            pixels = next(chunks, None)
            upcoming = None
            if pixels is not None:
                shown = finish(start, pixels)
                upcoming = (start, pixels, shown, leave(quantise_frames(shown)))
            if waiting is not None:
                arrived = waiting[3].arrive()
        if waiting is not None:
            yield *waiting[:3], arrived
        if upcoming is None:
            return
        waiting, start = upcoming, start + upcoming[1].shape[1]
