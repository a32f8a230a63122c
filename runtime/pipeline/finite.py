"""Checks for NaN and infinity, which end a run at once, and for segments of one flat colour, which give a warning.

The device reduces a watched tensor to its smallest and largest values, which are NaN or infinite if any value is. These
few numbers are copied to the CPU behind the work and are read at the next wait: those of a step one step late, those of
a decoded group with its frames. So the device never stalls, and the cost is one pass over the tensor.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.progress import Progress
from scail2_rt.runtime.core.warnings import warn

FLAT = 2 / 255  # for pixels in -1..1: one 8-bit level


class NotFinite(Scail2Error):
    """A latent or a decoded frame has NaN or infinite values."""


def value_range(x: Tensor) -> Tensor:
    """Return the smallest and the largest value, fp32 [2]; NaN if any value is NaN."""
    return torch.stack(x.aminmax()).float()


def colour_range(pixels: Tensor) -> Tensor:
    """Return the smallest and the largest value per channel of pixels [3, n, H, W]: fp32 [2, 3]."""
    return torch.stack(pixels.flatten(1).aminmax(dim=1)).float()


def check_latent(seen: Tensor, step: int, engines: EngineSet, at: Progress) -> None:
    """Raise NotFinite if `seen`, the `value_range` after step `step` (from 0), is not finite."""
    if not seen.isfinite().all():
        raise _not_finite("The latent", f"after step {step + 1} of {at.steps} of {_segment(at)}", engines)


def check_pixels(seen: Tensor, first: int, count: int, engines: EngineSet, at: Progress) -> None:
    """Raise NotFinite if `seen`, the range of `count` decoded frames from number `first` on, is not finite."""
    if not seen.isfinite().all():
        frames = f"frame {first}" if count == 1 else f"frames {first} to {first + count - 1}"
        raise _not_finite("The decoded picture", f"in {frames} of {_segment(at)}", engines)


def warn_if_flat(ranges: Sequence[Tensor], at: Progress) -> None:
    """Warn if all frames of a segment, given their `colour_range`s, have one flat colour."""
    seen = torch.stack(list(ranges)).clamp(-1, 1)
    low, high = seen[:, 0].amin(0), seen[:, 1].amax(0)
    if bool((high - low > FLAT).any()):
        return
    colour = ", ".join(str(int(level)) for level in (low + 1) * 127.5)
    name = _segment(at)
    warn(
        f"{name[0].upper()}{name[1:]} is one flat colour from its first frame to its last (red, green, blue {colour}). "
        "Usual causes: a LoRA strength that is too large, or a damaged engine folder."
    )


def _segment(at: Progress) -> str:
    return f"segment {at.segment}" + (f" of {at.segments}" if at.segments else "")


def _not_finite(what: str, where: str, engines: EngineSet) -> NotFinite:
    """Make the error for the user: where the values appeared, and the usual causes with the facts about each."""
    manifest = engines.manifest
    loras = ", ".join(f"{Path(lora.file.path).name} at strength {lora.strength:g}" for lora in manifest.loras)
    fused = "no LoRA is fused into these engines"
    if loras:
        fused = f"these engines hold {loras}: build them with a smaller strength"
    fp16 = "build with --precision bf16 or fp8" if manifest.precision == "fp16" else f"these are {manifest.precision}"
    verify = ["scail2-rt", "verify", str(engines.directory.absolute()), "--checkpoint", manifest.checkpoint]
    return NotFinite(
        f"{what} has NaN or infinite values {where}, so the run ends there. Usual causes: a LoRA strength that is too "
        f"large ({fused}); engines in fp16, which overflow ({fp16}); a damaged engine folder. Check the folder with: "
        f"{shlex.join(verify)}"
    )
