"""Numbers that are not numbers end a run where they appear; a picture of one colour is worth a warning.

The device reduces what is watched to its smallest and largest values, which are NaN or infinite if anything is. These
few numbers travel to the CPU behind the work itself and are read when that has been waited for anyway: a step's one
step late, a decoded group's with its frames. So nothing stalls, and a pass over the latent is all that it costs.
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

FLAT = 2 / 255  # of pixels in -1..1: one step of 8 bits


class NotFinite(Scail2Error):
    """A latent or a picture has NaN or infinite values."""


def value_range(x: Tensor) -> Tensor:
    """The smallest and the largest value, fp32 [2]; NaN if any is."""
    return torch.stack(x.aminmax()).float()


def colour_range(pixels: Tensor) -> Tensor:
    """The same for each channel of pixels [3, n, H, W] → fp32 [2, 3]."""
    return torch.stack(pixels.flatten(1).aminmax(dim=1)).float()


def check_latent(seen: Tensor, step: int, engines: EngineSet, at: Progress) -> None:
    """NotFinite when a range that was taken after `step`, counted from 0, is not of numbers."""
    if not seen.isfinite().all():
        raise _not_finite("The latent", f"after step {step + 1} of {at.steps} of {_segment(at)}", engines)


def check_pixels(seen: Tensor, first: int, count: int, engines: EngineSet, at: Progress) -> None:
    """NotFinite when the range of `count` decoded frames from number `first` on is not of numbers."""
    if not seen.isfinite().all():
        frames = f"frame {first}" if count == 1 else f"frames {first} to {first + count - 1}"
        raise _not_finite("The decoded picture", f"in {frames} of {_segment(at)}", engines)


def warn_if_flat(ranges: Sequence[Tensor], at: Progress) -> None:
    """Warn of a segment whose frames, of these ranges, are all of one colour."""
    seen = torch.stack(list(ranges)).clamp(-1, 1)
    low, high = seen[:, 0].amin(0), seen[:, 1].amax(0)
    if bool((high - low > FLAT).any()):
        return
    colour = ", ".join(str(int(level)) for level in (low + 1) * 127.5)
    name = _segment(at)
    warn(
        f"{name[0].upper()}{name[1:]} is one flat colour from its first frame to its last (red, green, blue {colour}): "
        "a LoRA strength that is too large, or a damaged engine folder, makes such pictures."
    )


def _segment(at: Progress) -> str:
    return f"segment {at.segment}" + (f" of {at.segments}" if at.segments else "")


def _not_finite(what: str, where: str, engines: EngineSet) -> NotFinite:
    """The sentence for the user: where, and the usual causes with what is known of them."""
    manifest = engines.manifest
    loras = ", ".join(f"{Path(lora.file.path).name} at strength {lora.strength:g}" for lora in manifest.loras)
    fused = f"these engines hold {loras}: build them with less" if loras else "none is fused into these engines"
    fp16 = "build with --precision bf16 or fp8" if manifest.precision == "fp16" else f"these are {manifest.precision}"
    verify = ["scail2-rt", "verify", str(engines.directory.absolute()), "--checkpoint", manifest.checkpoint]
    return NotFinite(
        f"{what} has NaN or infinite values {where}, so the run ends there. Usual causes: a LoRA strength that is too "
        f"large ({fused}); engines in fp16, which overflow ({fp16}); a damaged engine folder, which this "
        f"command finds: {shlex.join(verify)}"
    )
