"""What a checked request will do: the plan that the pipeline carries out, and what it is expected to cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from scail2_rt.runtime.core.findings import Finding, Framing, ReferenceFit
from scail2_rt.runtime.core.geometry import Layout, Segment
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.core.window import Window


@dataclass(frozen=True, slots=True)
class Estimate:
    """FLOP, bytes of memory and seconds by phase.

    memory     bytes that weights and activations hold at once while a phase runs, without the libraries themselves
    peak       bytes of the whole run: the largest phase and, on a GPU, what CUDA and its libraries take
    placement  how the weights are placed in GPU memory, as one line; "" where nothing is placed
    basis      where the seconds come from"""

    flop: Mapping[str, float]
    memory: Mapping[str, int]
    peak: int
    placement: str
    seconds: Mapping[str, float]
    basis: str

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def rest(self, steps: int) -> float:
        """How many denoising steps take as long as what a segment costs besides."""
        step_s = self.seconds["denoise"] / steps
        return (self.seconds["driving"] + self.seconds["decode"]) / step_s if step_s else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request that can be carried out.

    request      as given, with cleaned prompts; a clip that could be read once only is a re-readable one here
    frames       T, the length of the output; segments count from its first frame
    mode, layout the resolved mode, and the token layout of the largest segment
    driving_window, reference_windows
                 how the driving video, the reference and the additional ones lie in the frame
    warnings     sentences for the user
    timestamps   presentation times of the output's frames in the driving video, in seconds, where its rate varies
    audio        whether the driving video has any
    masks        what the mask check found, errors among it if they are allowed
    framing, fit what the frame shows of the characters, and how the reference is scaled if that was asked for
    chosen       with `fps`: for each frame of the output, the number of the driving clip's frame that it shows
    notes        sentences about where inputs came from, for the report
    estimate     what it will cost with the engines of the session that checked it; None before a session has"""

    request: Request
    height: int
    width: int
    frame_rate: Fraction
    frames: int
    segments: tuple[Segment, ...]
    mode: Literal["animate", "replace"]
    layout: Layout
    driving_window: Window
    reference_windows: tuple[Window, ...]
    warnings: tuple[str, ...]
    timestamps: tuple[Fraction, ...] | None = None
    audio: bool = False
    masks: tuple[Finding, ...] = ()
    framing: Framing | None = None
    fit: ReferenceFit | None = None
    chosen: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None

    @property
    def start_s(self) -> Fraction:
        """Seconds of the driving video before the output's first frame."""
        return self.request.start / self.frame_rate if self.timestamps is None else self.timestamps[0]

    def segment_layout(self, segment: Segment) -> Layout:
        """The token layout of one segment."""
        extra = len(self.request.extra_refs)
        return Layout.of(segment.padded_frames, self.height, self.width, extra, self.mode == "replace")
