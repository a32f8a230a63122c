"""The node that animates: builds a request from the graph's tensors and runs it in the open session."""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from comfy_api.latest import InputImpl, Types, io

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.clip_inputs import driving_clip, sound_of
from scail2_rt.runtime.comfyui.frames import ImageBatch
from scail2_rt.runtime.comfyui.mask_inputs import MaskStyle
from scail2_rt.runtime.comfyui.requests import Given, frame_size, request_of
from scail2_rt.runtime.comfyui.sessions import WARM
from scail2_rt.runtime.comfyui.types import (
    CATEGORY,
    Engines,
    driving_input,
    frame_inputs,
    mask_input,
    reference_input,
)
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.core.request import ANCHORS, SCHEDULERS
from scail2_rt.runtime.jobs.options import PRESETS, Preset
from scail2_rt.runtime.session.session import Session

CUSTOM = "as set below"
PREVIEW_INTERVAL_S = 0.5
REQUEST_FIELDS = (  # inputs that are passed unchanged to fields of `Request`
    *("prompt", "negative_prompt", "mode", "fit", "seed", "start", "segment_length", "segment_overlap"),
    *("overlap_blend", "anchor_color", "fit_reference", "allow_mask_problems"),
)
SAMPLING_FIELDS = ("scheduler", "steps", "shift", "guidance")


class Animate(io.ComfyNode):
    """Reference image, driving clip and masks → frames, video and run report."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="Scail2Animate",
            display_name="SCAIL-2 Animate",
            category=CATEGORY,
            description="Animates the reference character with the motion of the driving clip.",
            inputs=[
                Engines.Input("engines"),
                reference_input(),
                driving_input(),
                mask_input("reference_mask", "Reference mask, one per reference image"),
                mask_input("driving_mask", "Mask of the driving clip, one per frame"),
                io.String.Input("prompt", multiline=True, default="", tooltip="Description of the video."),
                io.Combo.Input(
                    "mode",
                    options=["auto", "animate", "replace"],
                    default="auto",
                    tooltip="animate keeps the background of the reference image, replace the scene of the driving "
                    "clip; auto: chosen by the background of the driving mask.",
                ),
                *frame_inputs(),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="fast",
                    tooltip="fast: 6 Euler steps, shift 5, no guidance, for a step-distilled LoRA; quality: 40 UniPC "
                    f"steps, shift 3, guidance 5; {CUSTOM}: the four inputs below.",
                ),
                io.Int.Input("steps", default=6, min=1, max=1000),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default="euler"),
                io.Float.Input("shift", default=5.0, min=0.01, max=100.0, step=0.1),
                io.Float.Input(
                    "guidance", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="1 or less: one guidance pass."
                ),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Float.Input(
                    "frame_rate",
                    default=16.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second of driving images. A VIDEO has its own rate.",
                ),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="First driving frame, from 0."),
                io.Int.Input("frames", default=0, min=0, max=1_000_000, tooltip="Driving frames; 0: to the end."),
                *more_inputs(),
            ],
            outputs=[
                io.Image.Output("images", display_name="images"),
                io.Video.Output("video", display_name="video"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), told():
            return io.NodeOutput(*animate(inputs))


def more_inputs() -> list[Any]:
    """Optional inputs with defaults."""
    return [
        io.String.Input("negative_prompt", multiline=True, default="", optional=True),
        io.Int.Input("segment_length", default=81, min=5, max=1001, step=4, optional=True, tooltip="4n + 1."),
        io.Int.Input("segment_overlap", default=5, min=1, max=997, step=4, optional=True, tooltip="4n + 1."),
        io.Int.Input("overlap_blend", default=0, min=0, max=997, optional=True),
        io.Combo.Input("anchor_color", options=list(ANCHORS), default="off", optional=True),
        io.Boolean.Input("fit_reference", default=False, optional=True),
        io.Boolean.Input("allow_mask_problems", default=False, optional=True),
        io.Audio.Input("audio", optional=True, tooltip="Audio of the result; default: the audio of the driving clip."),
    ]


def animate(inputs: Mapping[str, Any]) -> tuple[Any, Any, str]:
    """Run the request. Returns IMAGE float [T, H, W, 3] in 0..1, VIDEO and the run report as JSON. Raises InputError
    for inputs that do not fit together, Cancelled after ComfyUI's cancel button."""
    session = WARM.get(inputs["engines"])
    driving = driving_clip(inputs["driving"], inputs["frame_rate"], inputs.get("audio"))
    masks = inputs["reference_mask"], inputs["driving_mask"]
    given = Given(inputs["image"], driving.source, *masks, MaskStyle.pair(inputs["mode"]))
    plan = session.check(request_of(given, options_of(inputs)))
    host.show_text("\n".join(host.in_nodes_words(line) for line in lines_of(plan)))
    session = WARM.with_room(inputs["engines"], plan)
    batch = ImageBatch(plan.frames, plan.height, plan.width, host.image_dtype())
    show = Shown()
    for frames in session.animate(plan, show, host.Interruption()):
        batch.add(frames)
        show.picture(frames[-1])
    sound = sound_of(driving, plan.start_s, plan.frames / plan.frame_rate)
    parts = Types.VideoComponents(images=batch.images, audio=sound, frame_rate=plan.frame_rate)
    return batch.images, InputImpl.VideoFromComponents(parts), json.dumps(report_of(plan, session), indent=2)


def options_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Request` that are neither images nor masks."""
    preset = PRESETS.get(inputs["preset"]) or Preset(*(inputs[name] for name in SAMPLING_FIELDS))
    return {
        **{name: inputs[name] for name in REQUEST_FIELDS if name in inputs},
        "size": frame_size(inputs["width"], inputs["height"]),
        "frames": inputs["frames"] or None,
        **{name: getattr(preset, name) for name in SAMPLING_FIELDS},
    }


@contextlib.contextmanager
def told() -> Any:
    """Replace option names in errors by names of node inputs; turn `Cancelled` into ComfyUI's own exception."""
    try:
        yield
    except Cancelled:
        host.stop_if_interrupted()
        raise
    except Scail2Error as error:
        error.args = (host.in_nodes_words(str(error)),)
        raise


@dataclass(slots=True)
class Shown:
    """Shows a run's progress in its node: the bar at every event, a preview at most every `PREVIEW_INTERVAL_S` s."""

    share: float = 0.0
    last_s: float = 0.0

    def __call__(self, event: Progress) -> None:
        self.share = event.fraction
        host.show_progress(self.share)

    def picture(self, frame: np.ndarray) -> None:
        """Show a frame, uint8 [H, W, 3], as preview."""
        from PIL import Image

        now = time.monotonic()
        if now - self.last_s >= PREVIEW_INTERVAL_S:
            self.last_s = now
            host.show_progress(self.share, Image.fromarray(frame))


def lines_of(plan: Plan) -> list[str]:
    """The text that the node shows during a run: size and estimated time, framing, warnings."""
    expected = "" if plan.estimate is None else f", about {plan.estimate.total_s:.0f} s"
    frames, segments = counted(plan.frames, "frame"), counted(len(plan.segments), "segment")
    first = f"{frames} of {plan.height}x{plan.width}, {plan.mode}, {segments}{expected}"
    framing = [plan.framing.line] if plan.framing is not None and plan.framing.line else []
    return [first, *framing, *plan.warnings]


def report_of(plan: Plan, session: Session) -> dict[str, Any]:
    """The run report: settings, engines, times in seconds, memory, warnings."""
    from scail2_rt.runtime.core.as_json import plain
    from scail2_rt.runtime.session import report

    options = [name for name in (*REQUEST_FIELDS, *SAMPLING_FIELDS) if name != "mode"]
    return {
        **{name: getattr(plan.request, name) for name in options},
        "mode": plan.mode,
        "height": plan.height,
        "width": plan.width,
        "frames": plan.frames,
        "frame_rate": str(Fraction(plan.frame_rate)),
        "segments": plain(plan.segments),
        "framing": plan.framing and plan.framing.described,
        "mask_findings": plain(plan.masks),
        "engines": report.describe_engines(session.engines),
        "device": report.describe_device(session.engines),
        "versions": report.versions(),
        "timings_s": {name: round(seconds, 4) for name, seconds in session.timings.items()},
        "memory": report.memory_peaks(),
        "warnings": [*plan.warnings, *session.warnings],
    }
