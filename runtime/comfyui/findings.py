"""The mask check for the inputs of a node, and its contact sheet."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scail2_rt.runtime.comfyui import host
from scail2_rt.runtime.comfyui.requests import Given
from scail2_rt.runtime.core.window import Fit, Size, Window
from scail2_rt.runtime.masks.check import CheckResult
from scail2_rt.runtime.masks.lint import check_masks, image_pair, video_pair
from scail2_rt.runtime.masks.palette import Mode
from scail2_rt.runtime.masks.preview import Still, chosen_frames, contact_sheet
from scail2_rt.runtime.masks.stats import image_stats, video_stats
from scail2_rt.runtime.masks.windows import CROPPED, Pictures
from scail2_rt.runtime.media.clips import open_video, probe

FRAMES_SHOWN = 7  # of the driving clip, on a sheet


def examined(given: Given, mode: Mode | str, size: Size | None = None, fit: Fit = "auto") -> CheckResult:
    """Check the masks as `scail2-rt masks check` does. mode: may be auto; size: frame of the video, if known."""
    images, masks = given.references()
    clip = given.mask_clip()
    driving = probe(given.driving)
    names = reference_names(len(images))
    findings = [
        finding
        for number, name in enumerate(names)
        for finding in image_pair(f"reference image {number + 1}", images.size, name, (masks.shape[1], masks.shape[2]))
    ]
    findings += video_pair(driving, probe(clip))
    pictures = Pictures([images.size] * len(images), (driving.height, driving.width), fit, size)
    stats = [image_stats(masks[i], name) for i, name in enumerate(names)]
    report = check_masks(stats, video_stats(clip), mode, pictures, given.driving)  # type: ignore[arg-type]
    return CheckResult(report.facts, (*findings, *report.findings), report.mode, report.framing)


def masks_alone(result: CheckResult) -> CheckResult:
    """The result without findings that depend on the video's frame size, for a node that does not know it."""
    findings = tuple(finding for finding in result.findings if finding.rule not in (CROPPED, "framing"))
    return replace(result, findings=findings, framing=None)


def reference_names(count: int) -> list[str]:
    """The names of the reference masks in messages."""
    return [f"mask of reference {number + 1}" if count > 1 else "reference mask" for number in range(count)]


def told_text(result: CheckResult) -> str:
    """The check's text with the verdict first and option names replaced by names of node inputs."""
    *lines, verdict = host.in_nodes_words(result.text).split("\n")
    return "\n".join([verdict, *lines])


def sheet(given: Given, result: CheckResult, windows: bool) -> Tensor:
    """The contact sheet: reference images and some driving frames with their masks, an IMAGE float [1, H, W, 3] in
    0..1. windows: draw the border of the video's frame."""
    images, masks = given.references()
    marked = {finding.file for finding in result.findings if finding.severity != "note" and finding.rule != "framing"}
    shown: list[Window | None] = [None] * (1 + len(images))
    if windows and result.framing is not None:
        shown = [framed.window for framed in result.framing.inputs]
    stills = [
        Still(name.removeprefix("mask of "), images[i], masks[i], name in marked, shown[1 + i])
        for i, name in enumerate(reference_names(len(images)))
    ]
    clip = given.mask_clip()
    spans = [span for f in result.findings if f.severity != "note" and f.file == str(clip) for span in f.frames]
    complained = frozenset(frame for first, last in spans for frame in range(first, last + 1))
    total = min(len(clip.frames), probe(given.driving).frames)  # type: ignore[arg-type]
    for number in chosen_frames(total, FRAMES_SHOWN, complained):
        with open_video(given.driving, number) as driving:
            picture = driving.read(1)[0]
        stills.append(Still(f"frame {number}", picture, clip.frames[number], number in complained, shown[0]))  # type: ignore[index]
    return torch.from_numpy(np.array(contact_sheet(stills)))[None] / 255
