"""`scail2-rt masks check`: reports the content and the faults of the masks of a case, or of single mask files.

Unlike `generate`, it reports all errors. Only a file that cannot be read stops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import CaseFiles, CaseInputs, read_case
from scail2_rt.runtime.core.findings import Finding, Framing, ranges_text
from scail2_rt.runtime.core.progress import Tell, untold, within
from scail2_rt.runtime.core.window import Fit, Size
from scail2_rt.runtime.masks.lint import (
    MaskFacts,
    check_masks,
    image_findings,
    image_pair,
    video_findings,
    video_pair,
)
from scail2_rt.runtime.masks.stats import image_stats, video_stats
from scail2_rt.runtime.masks.windows import Pictures
from scail2_rt.runtime.media.clips import probe
from scail2_rt.runtime.media.images import is_image, load_image, load_mask_image

Pairs = Sequence[tuple[Path, Path]]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Facts and findings about masks. `mode` and `framing` are None for files that were checked without their case."""

    facts: tuple[MaskFacts, ...]
    findings: tuple[Finding, ...]
    mode: str | None = None
    framing: Framing | None = None

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def usable(self) -> bool:
        return not self.count("error")

    @property
    def as_json(self) -> dict[str, Any]:
        from scail2_rt.runtime.core.as_json import plain

        counts = {f"{name}s": self.count(name) for name in ("error", "warning", "note")}
        return {
            "usable": self.usable,
            "mode": self.mode,
            **counts,
            "findings": plain(self.findings),
            "files": plain(self.facts),
            "framing": self.framing and self.framing.described,
        }

    @property
    def text(self) -> str:
        lines = [_facts_text(facts) for facts in self.facts]
        if self.framing is not None and self.framing.ratio is not None:
            times = f"{self.framing.ratio:.2f} times as tall as the driving one"
            lines.append(f"mode {self.mode}; the reference character is {times}")
        elif self.mode:
            lines.append(f"mode {self.mode}")
        if self.framing is not None:
            lines.append(self.framing.line)
        for finding in self.findings:
            lines.append(f"{finding.severity} ({finding.rule}): {finding.says}")
            if finding.remedy:
                lines.append(f"    {finding.remedy}")
        verdict = "these masks can be used" if self.usable else "these masks cannot be used"
        counts = ", ".join(counted(n, name) for name in ("error", "warning", "note") if (n := self.count(name)))
        return "\n".join([*lines, f"{verdict}{f' ({counts})' if counts else ', nothing was found'}"])


def _facts_text(facts: MaskFacts) -> str:
    shares = [f"{name} {100 * share:.1f} %" for name, share in facts.shares.items() if share >= 0.0005]
    shares += [f"in no class {100 * facts.unclear:.2f} %"] if facts.unclear else []
    frames = "" if facts.frames == 1 else f", {facts.frames} frames"
    text = f"{facts.file}: {facts.height}x{facts.width}{frames}; {', '.join(shares)}"
    if facts.frames > 1:
        text += "".join(f"\n    {name} in {ranges_text(where)}" for name, where in facts.presence.items())
    return text


def case_files(inputs: CaseInputs, mode: Literal["auto", "animate", "replace"]) -> CaseFiles | None:
    """Return the files of a case folder, or the four named files; None if neither was given. For four files and `auto`,
    the mode of the result is a placeholder. Raises InputError for incomplete or contradictory inputs."""
    given = inputs.files("give --case DIR, all four files of a case, or mask files only")
    if inputs.case is not None:
        return read_case(inputs.case, None if mode == "auto" else mode)
    return CaseFiles(*given, mode="replace" if mode == "replace" else "animate") if given else None


def check_case(
    case: CaseFiles,
    extra_refs: Pairs = (),
    mode: Literal["auto", "animate", "replace"] = "auto",
    size: Size | None = None,
    fit: Fit = "auto",
    start: int = 0,
    frames: int | None = None,
    tell: Tell = untold,
) -> CheckResult:
    """Check the masks of one case. Raises InputError if a file cannot be read.

    extra_refs      (image, mask) of additional references
    size, fit       as in `Request`
    start, frames   part of the driving clip; None: to its end
    tell            called with the finished share, 0 to 1"""
    pairs = ((case.image, case.mask_image), *extra_refs)
    images = [load_image(image).shape[:2] for image, _ in pairs]
    masks = [load_mask_image(mask) for _, mask in pairs]
    findings: list[Finding] = []
    for (image, mask), image_size, pixels in zip(pairs, images, masks, strict=True):
        findings += image_pair(str(image), image_size, str(mask), pixels.shape[:2])
    driving = probe(case.driving, tell=within(tell, 0, 0.4))
    findings += video_pair(driving, probe(case.mask_video, tell=within(tell, 0.4, 0.65)))
    pictures = Pictures(images, (driving.height, driving.width), fit, size)
    references = [image_stats(pixels, str(mask)) for (_, mask), pixels in zip(pairs, masks, strict=True)]
    driving_mask = video_stats(case.mask_video, start, frames, within(tell, 0.65, 1))
    report = check_masks(references, driving_mask, mode, pictures, case.driving)
    return CheckResult(report.facts, (*findings, *report.findings), report.mode, report.framing)


def check_file(path: Path, tell: Tell = untold) -> CheckResult:
    """Check one mask file, an image or a video, without its case. Raises InputError if it cannot be read."""
    if is_image(path):
        stats = image_stats(load_mask_image(path), str(path))
        return CheckResult((MaskFacts.of(stats),), tuple(image_findings(stats)))
    stats = video_stats(path, tell=tell)
    return CheckResult((MaskFacts.of(stats),), tuple(video_findings(stats)))


def check_files(paths: Sequence[Path], tell: Tell = untold) -> CheckResult:
    """Check several mask files without their case. Raises InputError if one cannot be read."""
    count = len(paths)
    results = [check_file(path, within(tell, i / count, (i + 1) / count)) for i, path in enumerate(paths)]
    facts = tuple(fact for result in results for fact in result.facts)
    return CheckResult(facts, tuple(finding for result in results for finding in result.findings))
