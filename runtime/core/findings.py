"""What the mask check found and measured, as records: findings, the characters' heights, how a reference is scaled."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

RGB = tuple[int, int, int]
Ranges = tuple[tuple[int, int], ...]
Severity = Literal["error", "warning", "note"]
TOLERANCE = 1.25  # ratio of the characters' heights from which the difference is worth a warning


@dataclass(frozen=True, slots=True)
class Finding:
    """`rule` names the check, `frames` are (first, last) pairs counted in the video file from 0."""

    severity: Severity
    rule: str
    file: str
    says: str
    remedy: str = ""
    frames: Ranges = ()

    @property
    def sentence(self) -> str:
        return f"{self.says} {self.remedy}".strip()


@dataclass(frozen=True, slots=True)
class Framing:
    """Height of each character relative to the frame's, in the reference and (median over frames) in the driving
    video."""

    reference: Mapping[str, float]
    driving: Mapping[str, float]

    @property
    def ratio(self) -> float | None:
        """How many times taller the reference's characters are, the median over those that both show."""
        ratios = [self.reference[name] / self.driving[name] for name in self.reference if name in self.driving]
        return median(ratios) if ratios else None

    @property
    def described(self) -> dict[str, Any]:
        """For JSON."""
        return {"reference": dict(self.reference), "driving": dict(self.driving), "ratio": self.ratio}

    @property
    def differs(self) -> bool:
        return self.ratio is not None and max(self.ratio, 1 / self.ratio) > TOLERANCE


@dataclass(frozen=True, slots=True)
class ReferenceFit:
    """Where the scaled reference goes: its size, its place in the frame (negative: cut off there), the margin's colour.

    scale: relative to the size that covers the frame, which is what a reference has without a fit."""

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
