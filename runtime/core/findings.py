"""Results of the mask check, as records: findings, the framing of each input, how much of each character stays visible,
the characters' heights, and how the reference is scaled."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from scail2_rt.runtime.core.window import Fit, Window

RGB = tuple[int, int, int]
Ranges = tuple[tuple[int, int], ...]
Severity = Literal["error", "warning", "note"]
TOLERANCE = 1.25  # ratio of the characters' heights above which the check warns


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. `rule` names the check; `frames` are (first, last) pairs, counted from 0 in the video
    file."""

    severity: Severity
    rule: str
    file: str
    says: str
    remedy: str = ""
    frames: Ranges = ()

    @property
    def sentence(self) -> str:
        return f"{self.says} {self.remedy}".strip()


def ranges(frames: Iterable[int], start: int = 0) -> Ranges:
    """Merge frame numbers into sorted (first, last) pairs, after adding `start` to each."""
    found: list[tuple[int, int]] = []
    for frame in sorted({int(frame) + start for frame in frames}):
        if found and found[-1][1] == frame - 1:
            found[-1] = (found[-1][0], frame)
        else:
            found.append((frame, frame))
    return tuple(found)


def ranges_text(frames: Ranges, most: int = 6) -> str:
    """Describe ranges as `frames 3-5, 9`, with an ellipsis after `most` ranges."""
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in frames[:most]]
    single = len(frames) == 1 and frames[0][0] == frames[0][1]
    return f"frame{'' if single else 's'} {', '.join(texts)}{', …' if frames[most:] else ''}"


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of a character stays visible through a window.

    share   visible share of its pixels over the clip, 0 to 1
    least   the same in the frame that loses most
    cut     frames, counted from the first one used, that lose more than a tenth of it"""

    share: float
    least: float
    cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Framed:
    """The framing of one input.

    name       the input in messages
    kept       character → how much of it stays visible through `window`
    official   character → the share, over the clip, that the official centre crop would keep"""

    name: str
    window: Window
    kept: Mapping[str, Kept]
    official: Mapping[str, float]

    @property
    def text(self) -> str:
        """`driving clip: whole, with margins left and right (the middle crop keeps 35 % of red)`."""
        losses = ", ".join(f"{percent(share)} of {name}" for name, share in self.official.items() if share < 0.995)
        window = self.window
        (top, bottom, left, right), (height, width) = window.part, window.source
        if (bottom - top) * (right - left) > 0.995:
            done = "whole" + (f", with black margins {window.margins}" if window.margins else "")
        elif window.way == "official":
            return f"{self.name}: middle crop{f', which keeps {losses}' if losses else ''}"
        else:
            rows, columns = (round(top * height), round(bottom * height)), (round(left * width), round(right * width))
            kind, (first, last), side = ("rows", rows, height) if right - left == 1 else ("columns", columns, width)
            done = f"cropped to {kind} {first} to {last} of {side}"
        return f"{self.name}: {done}{f' (the middle crop keeps {losses})' if losses else ''}"

    @property
    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            **self.window.described,
            "kept": {name: round(kept.share, 4) for name, kept in self.kept.items()},
            "kept_least": {name: round(kept.least, 4) for name, kept in self.kept.items()},
            "official_keeps": {name: round(share, 4) for name, share in self.official.items()},
        }


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True, slots=True)
class Framing:
    """How the inputs are placed in the frame.

    reference, driving   height of each character relative to the frame, in the reference and (median) in the driving
                         clip
    fit                  the requested `Fit`
    inputs               the driving clip, the reference and the additional references, each with its window
    scene_padded         whether replace mode shows a driving scene with margins"""

    reference: Mapping[str, float]
    driving: Mapping[str, float]
    fit: Fit = "auto"
    inputs: tuple[Framed, ...] = ()
    scene_padded: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times taller characters are in the reference than in the driving clip: the median over those that
        both show; None if there are none."""
        ratios = [self.reference[name] / self.driving[name] for name in self.reference if name in self.driving]
        return median(ratios) if ratios else None

    @property
    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference": dict(self.reference),
            "driving": dict(self.driving),
            "ratio": self.ratio,
            "fit": self.fit,
            "line": self.line,
            "inputs": [framed.described for framed in self.inputs],
        }

    @property
    def line(self) -> str:
        """One line that describes the framing; "" if there are no inputs."""
        if not self.inputs:
            return ""
        texts = "; ".join(framed.text for framed in self.inputs)
        padded = "; the video shows the scene with these margins" if self.scene_padded else ""
        return f"framing ({self.fit}): {texts}{padded}"

    @property
    def differs(self) -> bool:
        return self.ratio is not None and max(self.ratio, 1 / self.ratio) > TOLERANCE


@dataclass(frozen=True, slots=True)
class ReferenceFit:
    """How the reference is scaled and placed.

    scale           relative to the size in its window without this scaling
    height, width   the scaled size in pixels
    top, left       position of its corner in the frame, in pixels; negative if it is cut off there
    margin          colour of the frame outside it"""

    scale: float
    height: int
    width: int
    top: int
    left: int
    margin: RGB

    @property
    def text(self) -> str:
        return (
            f"the reference is scaled to {100 * self.scale:.0f} %, so that its character is as tall as the driving one"
        )
