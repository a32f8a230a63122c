"""Schedulers: golden schedules and trajectories, and properties that follow from the mathematics alone."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.pipeline.schedulers import SCHEDULERS, make_scheduler

GOLDEN_FILES = {"unipc": "unipc", "dpm++": "dpmpp", "euler": "euler"}


def run(name: str, steps: int, shift: float, x: Tensor, velocity: Callable[[Tensor, float, float], Tensor]) -> Tensor:
    """Integrate with a velocity that is a function of (x, sigma, timestep)."""
    scheduler = make_scheduler(name, steps, shift)
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, sigma, t), x)
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_golden_schedules_and_trajectories(golden: Path, name: str) -> None:
    with safe_open(golden / "solvers" / f"{GOLDEN_FILES[name]}.safetensors", "pt") as file:
        metadata = file.metadata()
        k = float(metadata["k"])
        for case in json.loads(metadata["cases"]):
            expected = {part: file.get_tensor(f"{case['key']}.{part}") for part in ("sigmas", "timesteps", "traj")}
            scheduler = make_scheduler(name, case["steps"], case["shift"])
            torch.testing.assert_close(torch.tensor(scheduler.sigmas), expected["sigmas"], rtol=0, atol=1e-7)
            assert list(scheduler.timesteps) == expected["timesteps"].tolist()
            x = file.get_tensor("x_init")[0]
            for t, after in zip(scheduler.timesteps, expected["traj"], strict=True):
                x = scheduler.step(torch.sin(k * x + t / 1000), x)
                torch.testing.assert_close(x, after, rtol=0, atol=5e-5)


def test_first_step_of_the_golden_pipelines(golden: Path) -> None:
    for path in sorted((golden / "pipeline").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            case, names = json.loads(file.metadata()["case"]), set(file.keys())
            for segment in ("seg0", "seg1"):
                if f"{segment}.noise" not in names:
                    continue
                scheduler = make_scheduler(case["solver"], case["steps"], case["shift"])
                assert list(scheduler.timesteps) == file.get_tensor(f"{segment}.timesteps").tolist()
                assert scheduler.sigmas == tuple(file.get_tensor(f"{segment}.sigmas").tolist())
                x, velocity = file.get_tensor(f"{segment}.noise"), file.get_tensor(f"{segment}.step0.v_cond")
                if case["guide"] > 1:
                    without = file.get_tensor(f"{segment}.step0.v_uncond")
                    velocity = without + case["guide"] * (velocity - without)
                after = file.get_tensor(f"{segment}.latents_per_step")[0]
                start = 0 if segment == "seg0" else file.get_tensor(f"{segment}.history_latent").shape[1]
                torch.testing.assert_close(scheduler.step(velocity, x)[:, start:], after[:, start:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 40, 1000])
@pytest.mark.parametrize("shift", [0.01, 1.0, 3.0, 5.0, 1e4])
def test_schedule_and_finiteness(name: str, steps: int, shift: float) -> None:
    scheduler = make_scheduler(name, steps, shift)
    sigmas = scheduler.sigmas
    assert len(sigmas) == steps + 1
    assert len(scheduler.timesteps) == steps
    assert sigmas[-1] == 0
    assert all(high > low for high, low in pairwise(sigmas))
    assert all(abs(t - 1000 * sigma) < 1.001 for t, sigma in zip(scheduler.timesteps, sigmas, strict=False))
    assert all(isinstance(t, float if name == "euler" else int) for t in scheduler.timesteps)
    x = torch.ones(3)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.cos(x + t), x)
        assert x.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
def test_exact_for_a_constant_prediction(name: str, steps: int) -> None:
    """If the model always sees the same clean latent, x stays on the straight line from it to the noise."""
    clean, noise = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    scheduler = make_scheduler(name, steps, 3.0)
    x = (1 - scheduler.sigmas[0]) * clean + scheduler.sigmas[0] * noise
    for sigma, after in pairwise(scheduler.sigmas):
        x = scheduler.step((x - clean) / sigma, x)
        torch.testing.assert_close(x, (1 - after) * clean + after * noise, rtol=0, atol=2e-6)
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-6)


def test_euler_is_the_product_of_its_factors_on_a_linear_equation() -> None:
    scheduler = make_scheduler("euler", 7, 5.0)
    expected = math.prod(1 + 0.8 * (low - high) for high, low in pairwise(scheduler.sigmas))
    x = run("euler", 7, 5.0, torch.tensor([1.0, -2.0]), lambda x, sigma, t: 0.8 * x)
    torch.testing.assert_close(x, expected * torch.tensor([1.0, -2.0]), rtol=1e-6, atol=0)


def gaussian_error(name: str, steps: int) -> float:
    """Distance from the exact flow of data ~ N(0, 1/4), where x(σ) is proportional to its standard deviation, one step
    before σ = 0 (the last step is of first order by design)."""
    scheduler, variance = make_scheduler(name, steps, 1.0), 0.25

    def deviation(sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * variance + sigma**2)

    x = torch.tensor([deviation(scheduler.sigmas[0])])
    for sigma in scheduler.sigmas[:-2]:
        clean = x * ((1 - sigma) * variance / deviation(sigma) ** 2)
        x = scheduler.step((x - clean) / sigma, x)
    return abs(x.item() - deviation(scheduler.sigmas[-2]))


def test_order_of_convergence() -> None:
    for name, order in (("euler", 1), ("dpm++", 2), ("unipc", 2)):
        rate = math.log2(gaussian_error(name, 64) / gaussian_error(name, 128))
        assert rate > order - 0.4, f"{name} converges with order {rate:.2f}"
    assert gaussian_error("unipc", 64) < gaussian_error("dpm++", 64) < gaussian_error("euler", 64)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_linear_in_latent_and_velocity(name: str) -> None:
    def field(x: Tensor, sigma: float, t: float) -> Tensor:
        return (0.7 - sigma) * x

    a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    parts = 2 * run(name, 9, 3.0, a, field) - 3 * run(name, 9, 3.0, b, field)
    torch.testing.assert_close(run(name, 9, 3.0, 2 * a - 3 * b, field), parts, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_arguments_stay_untouched_and_may_be_overwritten_afterwards(name: str) -> None:
    def trajectory(overwrite: bool) -> Tensor:
        scheduler, x = make_scheduler(name, 5, 3.0), torch.linspace(-1, 1, 6)
        for _ in scheduler.timesteps:
            velocity, given = torch.sin(x), x.clone()
            following = scheduler.step(velocity, x)
            assert torch.equal(x, given)
            assert torch.equal(velocity, torch.sin(given))
            if overwrite:
                x.fill_(math.nan)
                velocity.fill_(math.nan)
            x = following.clone()
            if overwrite:
                following.fill_(math.nan)
        return x

    assert torch.equal(trajectory(overwrite=True), trajectory(overwrite=False))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_state_is_fp32_and_no_value_is_read_on_the_host(name: str) -> None:
    scheduler, reference = make_scheduler(name, 4, 3.0), make_scheduler(name, 4, 3.0)
    x, meta = torch.linspace(-1, 1, 6), torch.empty(6, device="meta")  # reading a meta tensor's value raises
    for _ in scheduler.timesteps:
        velocity = torch.sin(x).bfloat16()
        meta = reference.step(velocity.to("meta"), meta)
        x = scheduler.step(velocity, x)
        assert x.dtype == meta.dtype == torch.float32
        assert meta.shape == x.shape


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_trajectory_ends(name: str) -> None:
    scheduler = make_scheduler(name, 2, 1.0)
    x = torch.ones(1)
    for _ in range(2):
        x = scheduler.step(x, x)
    with pytest.raises(Scail2Error, match="ended after 2 steps"):
        scheduler.step(x, x)


@pytest.mark.parametrize(
    ("name", "steps", "shift", "words"),
    [
        ("heun", 4, 3.0, "unipc, dpm\\+\\+, euler"),
        ("UniPC", 4, 3.0, "'UniPC'"),
        ("unipc", 0, 3.0, "between 1 and 1000, not 0"),
        ("euler", -2, 3.0, "not -2"),
        ("euler", 1001, 3.0, "not 1001"),
        ("dpm++", 4, 0.0, "above 0"),
        ("dpm++", 4, -1.0, "above 0"),
        ("unipc", 4, math.nan, "above 0"),
        ("unipc", 4, math.inf, "above 0"),
        ("unipc", 4, 1e12, "coincide"),
        ("dpm++", 4, 1e-60, "too small"),
    ],
)
def test_bad_settings(name: str, steps: int, shift: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_scheduler(name, steps, shift)
