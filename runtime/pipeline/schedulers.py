"""Flow-matching schedulers: noise levels, model timesteps and the update of the latent after each model call.

The forward process is x_σ = (1-σ)·x₀ + σ·noise and the model predicts v = noise - x₀. Euler integrates v. The other two
use the prediction x₀ = x - σ·v over λ = log((1-σ)/σ), and every update is a weighted sum of the latent and of earlier
predictions. All weights depend on the noise levels only, so they are computed once, in fp64 on the host. `step` is a
few scalar-times-tensor operations in fp32 on the latent's device, without host synchronisation. The weights are written
in a form that stays finite where λ is infinite: σ = 1 (the start of DPM++) and σ = 0 (the end of all three).

Sources: UniPC (arXiv 2302.04867, bh2, data prediction), DPM-Solver++ 2M (arXiv 2211.01095), and the settings that the
SCAIL-2 pipeline passes to Wan 2.1 `wan/utils/fm_solvers*.py` and the diffusers Euler scheduler.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULERS = ("unipc", "dpm++", "euler")
TRAINING_STEPS = 1000


def _fp32(value: float) -> float:
    """Round to fp32: the official schedules store levels so, and compute later values from the rounded ones."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


# UniPC starts at the highest level of its training table, 1 - 1/1000 rounded to fp32; the others at pure noise.
_START = {"unipc": _fp32(1 - 1 / TRAINING_STEPS), "dpm++": 1.0, "euler": 1.0}


@dataclass(frozen=True, slots=True)
class _Update:
    """x ← keep·x + Σ weights[j]·x₀[j], predictions newest first."""

    keep: float
    weights: tuple[float, ...]

    def __call__(self, x: Tensor, predictions: tuple[Tensor, ...]) -> Tensor:
        result = x * self.keep
        for weight, prediction in zip(self.weights, predictions, strict=False):
            result.add_(prediction, alpha=weight)
        return result


class Scheduler:
    """One trajectory from noise to latent; create a new one per segment.

    sigmas     N+1 noise levels, decreasing to 0 (values representable in fp32)
    timesteps  the model's time input at step i: truncated integers (unipc, dpm++) or floats (euler)"""

    def __init__(self, name: str, sigmas: tuple[float, ...], timesteps: tuple[int | float, ...]) -> None:
        self.name = name
        self.sigmas = sigmas
        self.timesteps = timesteps
        self._done = 0

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        """Return the latent after the next step, given v at `timesteps[i]` and the latent x it was computed for.

        Any shape, device and float type; returns a new fp32 tensor and changes neither argument. Raises Scail2Error
        after the last step."""
        if self._done == len(self.timesteps):
            raise Scail2Error(f"This {self.name} trajectory has ended after {self._done} steps. Make a new scheduler.")
        result = self._advance(self._done, velocity.float(), x.float())
        self._done += 1
        return result

    def _advance(self, i: int, velocity: Tensor, x: Tensor) -> Tensor:
        """Take the explicit Euler step x ← x + (σ_next - σ)·v."""
        return x.add(velocity, alpha=self.sigmas[i + 1] - self.sigmas[i])


class MultistepScheduler(Scheduler):
    """DPM-Solver++ 2M, and UniPC, which is the same predictor followed by a corrector once the next v is known."""

    def __init__(self, name: str, sigmas: tuple[float, ...], timesteps: tuple[int | float, ...]) -> None:
        super().__init__(name, sigmas, timesteps)
        steps = range(len(timesteps))
        self._predictors = [_predictor(sigmas, i) for i in steps]
        self._correctors = [_corrector(sigmas, i) for i in steps[1:]] if name == "unipc" else []
        self._predictions: tuple[Tensor, ...] = ()  # x₀ of the last two steps, newest first
        self._base: Tensor | None = None  # corrected latent from which the last predictor started

    def _advance(self, i: int, velocity: Tensor, x: Tensor) -> Tensor:
        prediction = x.add(velocity, alpha=-self.sigmas[i])
        if self._correctors:
            # The first x belongs to the caller, which may overwrite it in place before the next step.
            x = (
                x.clone()
                if self._base is None
                else self._correctors[i - 1](self._base, (prediction, *self._predictions))
            )
            self._base = x
        self._predictions = (prediction, *self._predictions[:1])
        return self._predictors[i](x, self._predictions)


def make_scheduler(name: str, steps: int, shift: float) -> Scheduler:
    """Create a scheduler for one trajectory of `steps` model calls: `unipc`, `dpm++` or `euler`.

    Levels decrease linearly from the start to 0 and are shifted by σ ← s·σ / (1 + (s-1)·σ). Raises InputError for an
    unknown name, steps outside 1 … 1000, a shift that is not positive, or one so extreme that two levels coincide."""
    if name not in SCHEDULERS:
        raise InputError(f"There is no scheduler called {name!r}. Use one of {', '.join(SCHEDULERS)}.")
    if not 1 <= steps <= TRAINING_STEPS:
        raise InputError(f"The number of steps must be between 1 and {TRAINING_STEPS}, not {steps}. Use, say, 40.")
    if not 0 < shift < math.inf:
        raise InputError(f"The shift must be a number above 0, not {shift}. Use, say, 1, 3 or 5.")
    if shift < 1e-6:  # not useful, and 1 + (s-1)·σ would lose its digits at σ = 1
        raise InputError(f"A shift of {shift} is too small. Use, say, 1, 3 or 5.")
    start = _START[name]
    linear = [i * (-start / steps) + start for i in range(steps)]
    shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in linear]
    sigmas = (*map(_fp32, shifted), 0.0)
    if any(low >= high for high, low in pairwise(sigmas)):
        raise InputError(f"A shift of {shift} makes noise levels of {steps} steps coincide. Use, say, 1, 3 or 5.")
    if name == "euler":
        return Scheduler(name, sigmas, tuple(_fp32(sigma * TRAINING_STEPS) for sigma in sigmas[:-1]))
    return MultistepScheduler(name, sigmas, tuple(int(sigma * TRAINING_STEPS) for sigma in shifted))


def _log_snr(sigma: float) -> float:
    """Return λ = log((1-σ)/σ), which is -∞ at pure noise. σ is above 0."""
    return -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _first_order(start: float, end: float) -> tuple[float, float]:
    """Return the weights of x and of x₀ for constant x₀ from level `start` to `end`: σ_t/σ_s and α_t(1 - e^-h).

    The latter is written as α_t - α_s·σ_t/σ_s, which needs no logarithm."""
    keep = end / start
    return keep, (1 - end) - (1 - start) * keep


def _predictor(sigmas: tuple[float, ...], i: int) -> _Update:
    """Return the DPM-Solver++ 2M update to x_{i+1}, identical to UniP-2 with B = bh2. First order at the first step (no
    earlier prediction) and at the last (λ is infinite at σ = 0)."""
    keep, weight = _first_order(sigmas[i], sigmas[i + 1])
    if i == 0 or i == len(sigmas) - 2:
        return _Update(keep, (weight,))
    before, here, after = (_log_snr(sigma) for sigma in sigmas[i - 1 : i + 2])
    slope = (after - here) / (2 * (here - before))  # 0 after a start at λ = -∞
    return _Update(keep, (weight * (1 + slope), -weight * slope))


def _corrector(sigmas: tuple[float, ...], i: int) -> _Update:
    """Return the UniC corrector with B = bh2: repeat the step from level i-1 to i, now that x₀ at i is known.

    Its order is that of the predictor it corrects: weights for x₀ at (i, i-1) after a first-order step, at
    (i, i-1, i-2) otherwise. There ρ solves ρ₁ + ρ₂ = φ₂/φ₁ and r·ρ₁ + ρ₂ = 2·φ₃/φ₁ with h = λ_i - λ_{i-1},
    r = (λ_{i-2} - λ_{i-1})/h, φ₁ = e^-h - 1 and φ_{k+1} = φ_k/(-h) - 1/k!; ρ₂ goes with x₀ at i, ρ₁/r with i-2."""
    keep, weight = _first_order(sigmas[i - 1], sigmas[i])
    if i == 1:
        return _Update(keep, (weight / 2, weight / 2))
    before, start, end = (_log_snr(sigma) for sigma in sigmas[i - 2 : i + 1])
    h = end - start
    phi_1 = math.expm1(-h)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 0.5
    r = (before - start) / h
    rho_1 = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
    rho_2 = phi_2 / phi_1 - rho_1
    return _Update(keep, (weight * rho_2, weight * (1 - rho_1 / r - rho_2), weight * rho_1 / r))
