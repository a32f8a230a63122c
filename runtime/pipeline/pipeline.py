"""One generation, top to bottom: conditions, then per segment noise, denoising, decoding.

`animate_plan` generates the frames of a checked request; the session writes them. `animate` is the part between encoded
conditions and finished frames, which the parity tests run with recorded inputs.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.pipeline.anchor import open_anchor
from scail2_rt.runtime.pipeline.async_copy import CopyToCpu, StepMarks, copy_to_cpu
from scail2_rt.runtime.pipeline.conditioning import Conditions, encode_conditions
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.driving import DrivingClip, encode_driving, open_clips
from scail2_rt.runtime.pipeline.finite import check_latent, check_pixels, colour_range, value_range, warn_if_flat
from scail2_rt.runtime.pipeline.history import Carry, cross_fade, encode_history
from scail2_rt.runtime.pipeline.observe import observe
from scail2_rt.runtime.pipeline.placement import Placement
from scail2_rt.runtime.pipeline.preprocess import quantise_frames
from scail2_rt.runtime.pipeline.schedulers import make_scheduler
from scail2_rt.runtime.pipeline.text import PromptCache
from scail2_rt.runtime.pipeline.transformer import Transformer

DrawNoise = Callable[[Layout], Tensor]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings, and how segments are joined.

    scheduler, steps, shift   name, number of steps, sigma shift
    guidance                  guidance scale; ≤ 1: one pass
    mode                      animate or replace
    overlap                   number of a segment's last frames that the next segment starts from
    blend                     number of the overlap's last frames that fade from one segment to the next
    anchor_color              off, first or previous (`pipeline.anchor`)"""

    scheduler: str
    steps: int
    shift: float
    guidance: float
    mode: Literal["animate", "replace"] = "animate"
    overlap: int = 5
    blend: int = 0
    anchor_color: str = "off"

    @classmethod
    def of(cls, plan: Plan) -> "Sampling":
        request = plan.request
        return cls(
            scheduler=request.scheduler,
            steps=request.steps,
            shift=request.shift,
            guidance=request.guidance,
            mode=plan.mode,
            overlap=request.segment_overlap,
            blend=request.overlap_blend,
            anchor_color=request.anchor_color,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """Engines, constants and progress of a generation. placement: None if weights are not placed (e.g. on a CPU)."""

    engines: EngineSet
    constants: Constants
    progress: RunProgress
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Frames:
    """Finished frames, uint8 [n, H, W, 3] on the CPU. The last frames of a segment (n may be 0) include the carry to
    the next segment."""

    pixels: Tensor
    carry: Carry | None = None

    @property
    def ends_segment(self) -> bool:
        return self.carry is not None


def animate_plan(
    plan: Plan, machine: Machine, noise: torch.Generator, carry: Carry | None = None, cache: PromptCache | None = None
) -> Generator[Frames, None, None]:
    """Generate the plan's frames from the segment after `carry` on, as the caller consumes them."""
    carry = carry or Carry()
    steps = plan.request.steps
    rest = 1.0 if plan.estimate is None else plan.estimate.rest(steps)

    def draw_noise(layout: Layout) -> Tensor:
        shape = (16, layout.frames, layout.height, layout.width)
        return torch.randn(shape, generator=noise, device=plan.request.noise_device).to(machine.engines.device)

    with open_clips(plan, carry.finished) as clips:
        then = machine.constants.stages_of_contexts(machine.placement)
        conditions = encode_conditions(plan, machine.engines, machine.progress, cache, then)
        machine.progress.begin(len(plan.segments), steps, carry.finished, rest)
        yield from animate(machine, conditions, clips, Sampling.of(plan), draw_noise, carry)


def animate(
    machine: Machine,
    conditions: Conditions,
    clips: Iterable[DrivingClip],
    sampling: Sampling,
    draw_noise: DrawNoise,
    carry: Carry | None = None,
) -> Generator[Frames, None, None]:
    """Generate the frames of the driving clips in order, every driving frame once.

    `carry`: the state after the segment before the first clip, if the first clip is not the start of the video."""
    engines, progress, carry = machine.engines, machine.progress, carry or Carry()
    passes = 2 if sampling.guidance > 1 else 1
    with progress.phase("context"):  # while the first clip is being read
        contexts = machine.constants.contexts(conditions.contexts[:passes], conditions.clip)
    for index, clip in enumerate(timed(clips, progress), carry.finished):
        progress.segment(index)
        machine.constants.begin_segment(machine.placement)
        with progress.phase("driving"):
            driving = encode_driving(engines, clip)
            clean = None
            if clip.segment.overlap and carry.history is not None:
                pixels, clean = encode_history(engines, carry.history)
                observe("history", pixels)
                observe("history_latent", clean)
        layout = layout_of(clip, conditions, sampling)
        with progress.phase("denoise"):
            transformer = machine.constants.transformer(layout, contexts)
            transformer.show_references(conditions.references)
            transformer.show_driving(*driving)
            latent = denoise(machine, transformer, sampling, draw_noise(layout), clean)
            del transformer
        observe("final_latent", latent)
        machine.constants.make_room(machine.placement)
        with closing(decode_segment(machine, clip, latent, sampling, carry)) as parts:
            for part in parts:
                yield part
                carry = part.carry or carry
    if sampling.blend and carry.history is not None:  # frames held back for a segment that does not exist
        yield Frames(quantise_frames(carry.history[:, -sampling.blend :]).cpu(), Carry(carry.finished))


def timed(clips: Iterable[DrivingClip], progress: RunProgress) -> Iterator[DrivingClip]:
    """Yield the clips; reading each is a separate progress phase."""
    made = iter(clips)
    while True:
        with progress.phase("read", wait=False):
            clip = next(made, None)
        if clip is None:
            return
        yield clip


def layout_of(clip: DrivingClip, conditions: Conditions, sampling: Sampling) -> Layout:
    """Return the token layout of a segment."""
    frames, _, height, width = clip.frames.shape
    extra = conditions.references.additional_refs.shape[1]
    return Layout.of(frames, height, width, additional_refs=extra, replace=sampling.mode == "replace")


def denoise(machine: Machine, transformer: Transformer, sampling: Sampling, x: Tensor, clean: Tensor | None) -> Tensor:
    """Denoise noise x fp32 [16, F, h, w] to a clean latent. `clean` [16, Th, h, w] holds the history latents: they
    overwrite the first Th frames before every model call and after every step; the history mask is 1 there.

    Raises NotFinite after the step that makes NaN or infinity; on a GPU once the next step has been queued."""
    scheduler = make_scheduler(sampling.scheduler, sampling.steps, sampling.shift)
    schedule = machine.constants.schedule(scheduler.timesteps)
    history_mask = x.new_zeros(4, *x.shape[1:])
    history_mask[:, : 0 if clean is None else clean.shape[1]] = 1

    def done(step: int, seen: Tensor) -> None:
        check_latent(seen, step, machine.engines, machine.progress.now)
        machine.progress.step(step)

    marks = StepMarks(done)
    x = overwrite_history(x, clean)
    for step in range(sampling.steps):
        velocity, *unguided = transformer.velocities(x, history_mask, schedule, step)
        observe("velocity", velocity)
        if unguided:
            observe("velocity_unguided", unguided[0])
            velocity = unguided[0] + sampling.guidance * (velocity - unguided[0])
        x = overwrite_history(scheduler.step(velocity, x), clean)
        observe("latent", x)
        marks.passed(step, value_range(x))
    marks.finish()
    return x


def overwrite_history(x: Tensor, clean: Tensor | None) -> Tensor:
    """Replace the first frames of x [16, F, h, w] by the history latents [16, Th, h, w], if there are any."""
    return x if clean is None else torch.cat([clean, x[:, clean.shape[1] :]], dim=1)


def decode_segment(
    machine: Machine, clip: DrivingClip, latent: Tensor, sampling: Sampling, carry: Carry
) -> Generator[Frames, None, None]:
    """Yield the frames that a segment adds, in order, with colours anchored and the overlap faded in if the previous
    segment left its version; `blend` frames are held back at the end for the next segment's fade.

    Raises NotFinite for a group with NaN or infinity. Warns if the segment has one flat colour."""
    segment, before = clip.segment, carry.history
    blend = sampling.blend if before is not None else 0
    first, last = segment.overlap - min(blend, segment.overlap), segment.valid_frames - sampling.blend
    anchor = open_anchor(sampling.anchor_color, sampling.mode, clip, carry.anchor, machine.engines.device)
    history: Tensor | None = None
    ranges: list[Tensor] = []

    def finish(start: int, pixels: Tensor) -> Tensor:
        shaded = pixels if anchor is None else anchor.shade(start, pixels)
        return cross_fade(shaded, start, before, segment.overlap, blend)

    with closing(decoded_groups(machine, latent, finish)) as groups:
        for group in groups:
            ranges.append(group.colours.arrived())
            check_pixels(ranges[-1], group.start, group.pixels.shape[1], machine.engines, machine.progress.now)
            observe("pixels", group.pixels)
            shown = group.shown[:, : max(segment.valid_frames - group.start, 0)]
            history = shown if history is None else torch.cat([history, shown], dim=1)
            history = history[:, -sampling.overlap :]
            new = group.levels.arrived()[max(first - group.start, 0) : max(last - group.start, 0)]
            left = None
            if group.start + group.pixels.shape[1] >= segment.valid_frames:
                warn_if_flat(ranges, machine.progress.now)
                left = Carry(carry.finished + 1, history, {} if anchor is None else anchor.state())
            if len(new) or left:
                yield Frames(new, left)


@dataclass(frozen=True, slots=True)
class Group:
    """Frames of one latent frame: number of the first, decoded pixels [3, 1 or 4, H, W], and the frames as shown. Being
    copied to the CPU: the shown frames as uint8 [1 or 4, H, W, 3], and the network's range per colour, fp32 [2, 3]."""

    start: int
    pixels: Tensor
    shown: Tensor
    levels: CopyToCpu
    colours: CopyToCpu


def decoded_groups(
    machine: Machine, latent: Tensor, finish: Callable[[int, Tensor], Tensor]
) -> Generator[Group, None, None]:
    """Decode a latent to groups in order, each shown as `finish(start, pixels)` returns it. On a GPU, a group is copied
    while the next is decoded: it is yielded once the next has been queued."""
    start, waiting = 0, None
    with closing(machine.constants.decode(latent)) as chunks:
        while True:
            with machine.progress.phase("decode", wait=False):
                raw = next(chunks, None)
                upcoming = None
                if raw is not None:
                    colours, pixels = copy_to_cpu(colour_range(raw)), raw.clamp(-1, 1)
                    shown = finish(start, pixels)
                    upcoming = Group(start, pixels, shown, copy_to_cpu(quantise_frames(shown)), colours)
                del raw
                if waiting is not None:
                    waiting.levels.arrived()
            if waiting is not None:
                yield waiting
            if upcoming is None:
                return
            waiting, start = upcoming, start + upcoming.pixels.shape[1]
