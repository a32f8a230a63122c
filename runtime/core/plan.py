"""The plan of a checked request, which the pipeline executes, and the estimate of its cost."""

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
    """Expected cost of a run; `flop`, `memory` (bytes) and `seconds` are by phase.

    memory     peak bytes of weights and activations in each phase, without the libraries
    peak       peak bytes of the run: the largest phase plus, on a GPU, the memory of CUDA and its libraries
    placement  one line about the placement of the weights in GPU memory; "" if nothing is placed
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
        """Time of a segment outside denoising (reading, encoding, decoding), in denoising steps. steps: of a
        segment."""
        step_s = self.seconds["denoise"] / steps
        return (self.seconds["driving"] + self.seconds["decode"]) / step_s if step_s else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request that has been checked and can be executed.

    request      as given, with cleaned prompts; a clip that can be read only once is replaced by a re-readable one
    frames       T, the length of the output; segments count from its first frame
    mode, layout the resolved mode, and the token layout of the largest segment
    driving_window, reference_windows
                 placement in the frame of the driving clip, and of the reference and the additional references
    warnings     sentences for the user
    timestamps   presentation times of the output's frames in the driving clip, in seconds, if its rate varies
    audio        whether the driving clip has audio
    masks        findings of the mask check, with errors if the request allows them
    framing, fit how much of the characters the frame shows, and how the reference is scaled with `fit_reference`
    chosen       with `fps`: for each output frame, the number of the driving frame that it shows
    notes        sentences for the report about where inputs came from
    estimate     cost with the engines of the session that checked the request; None without a session"""

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
        """Time in the driving clip of the output's first frame, in seconds."""
        return self.request.start / self.frame_rate if self.timestamps is None else self.timestamps[0]

    def segment_layout(self, segment: Segment) -> Layout:
        """The token layout of one segment."""
        extra = len(self.request.extra_refs)
        return Layout.of(segment.padded_frames, self.height, self.width, extra, self.mode == "replace")
