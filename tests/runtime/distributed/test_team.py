"""Groups of processes over gloo: their results, and how they end."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scail2_rt.benchmarks.speed.forward import random_inputs
from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import DEFAULT_EXECUTION, EngineSet, Execution, open_engines
from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.distributed.leading import LeadingConstants
from scail2_rt.runtime.distributed.opening import open_on
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.vae import decode_unclamped
from scail2_rt.runtime.session.session import Session
from tests.support.small import random_tensors

pytest_plugins = ["tests.support.runtime_fixtures"]
TWENTY = DiTConfig(dim=640, heads=20, layers=3, ffn_dim=96, freq_dim=16, text_dim=24, clip_dim=20)
ENDS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def twenty_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of a transformer of 20 heads, 32 wide."""
    folder = tmp_path_factory.mktemp("twenty") / "engines"
    tensors = random_tensors(dit_shapes(TWENTY), seed=5)
    checkpoint = Checkpoint(Path("twenty"), ModelConfig(dit=TWENTY), {"dit": MappingSource(tensors)}, None)
    build(BuildRequest(Path("twenty"), folder, ("torch",), "fp32"), checkpoint)
    return folder


def velocities(engines: EngineSet, constants: Constants, layout: Layout, passes: int) -> list[Tensor]:
    """The velocities of one step, twice; the second time with other references and a history, with the same
    transformer."""
    inputs = random_inputs(TWENTY, layout, engines.device)
    contexts = constants.contexts([inputs.text, inputs.text.flip(0)[:7]][:passes], inputs.clip)
    transformer = constants.transformer(layout, contexts)
    schedule = constants.schedule([900.0, 300.0])
    found = []
    for step, history in enumerate((0.0, 1.0)):
        transformer.show_references(random_inputs(TWENTY, layout, engines.device).references)
        transformer.show_driving(*(part * (step + 1) for part in inputs.driving))
        mask = inputs.noise.new_zeros(4, *inputs.noise.shape[1:])
        mask[:, :1] = history
        found += transformer.velocities(inputs.noise, mask, schedule, step)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "attention", "bound"), [(4, "auto", 1e-5), (4, "8bit", 2e-2), (5, "auto", 1e-5)])
def test_processes_compute_the_velocities_of_one(
    processes: int, attention: str, bound: float, twenty_heads: Path
) -> None:
    """Four ranks: rows in four parts, or with guidance two pairs; five ranks: rows of both passes in five parts. The
    numbers of tokens are not divisible by the numbers of ranks; one layout has fewer 8-bit tiles than ranks."""
    execution = Execution(attention=attention, max_rows=50)
    layouts = [Layout(3, 12, 8), Layout(2, 4, 8), Layout(1, 8, 4, replace=True)]
    with torch.no_grad(), open_engines(twenty_heads, "torch", execution, "cpu") as engines:
        team = Team(processes, engines.device, partial(open_on, twenty_heads, "torch", execution))
        try:
            alone, shared = Constants(engines), LeadingConstants(engines, team)
            for layout in layouts:
                for passes in (1, 2):
                    ours = velocities(engines, shared, layout, passes)
                    theirs = velocities(engines, alone, layout, passes)
                    assert len(ours) == 2 * passes
                    for a, b in zip(ours, theirs, strict=True):
                        assert (a - b).norm() <= bound * b.norm()
        finally:
            team.close()


def velocities_for_ever(engines: EngineSet, constants: Constants, layout: Layout, passes: int) -> None:
    while True:
        velocities(engines, constants, layout, passes)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("passes", [1, 2])
def test_two_gpus_compute_the_velocities_of_one(passes: int, twenty_heads: Path) -> None:
    """Eager, recorded and replayed calls; then a rank is killed, and the next group gives the same results."""
    layout = Layout(3, 12, 8)
    with torch.no_grad(), open_engines(twenty_heads, "torch", DEFAULT_EXECUTION, "cuda") as engines:
        team = Team(2, engines.device, partial(open_on, twenty_heads, "torch", DEFAULT_EXECUTION))
        theirs = velocities(engines, Constants(engines), layout, passes)
        shared = LeadingConstants(engines, team)
        for number in range(4):
            for a, b in zip(velocities(engines, shared, layout, passes), theirs, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()
            if number == 2:
                os.kill(team.processes[0], signal.SIGKILL)
                with pytest.raises(Scail2Error, match="ended by signal 9"):
                    velocities_for_ever(engines, shared, layout, passes)
                team.end()
        team.close()


@pytest.fixture
def session(engines: Path, cache: Path) -> Iterator[Session]:
    with Session.open(engines, backend="torch", device="cpu", gpus=2, prompt_cache=cache) as opened:
        yield opened


RequestOf = Callable[..., Request]


def frames(session: Session, request: Request, listener: Callable[[Progress], object] | None = None) -> np.ndarray:
    return np.concatenate(list(session.animate(session.check(request), listener)))


def test_a_cancelled_run_leaves_the_same_processes_ready(session: Session, request_of: RequestOf) -> None:
    request = request_of(steps=3, scheduler="euler", guidance=2.0, frames=9)
    expected = frames(session, request)
    assert session.team is not None
    before = session.team.processes
    cancel = threading.Event()

    def cancel_at_second(event: Progress) -> None:
        if event.step == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        list(session.animate(session.check(request), cancel_at_second, cancel))
    stopped = iter(session.animate(session.check(request)))
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the listener's"):
        list(session.animate(session.check(request), lambda event: raise_at(event, 1)))
    assert np.array_equal(frames(session, request), expected)
    assert session.team.processes != ()
    assert len(set(session.team.processes) | set(before)) <= 2


def raise_at(event: Progress, step: int) -> None:
    if event.step == step:
        raise RuntimeError("the listener's own")


def end_somehow(session: Session, request: Request, after_s: float, how: str) -> float:
    """Run the request and cancel it after a delay. Returns the seconds from the cancellation to the end of the run; 0
    if the run had ended before."""
    plan, cancel, ended = session.check(request), threading.Event(), [0.0]
    assert session.team is not None
    session.team.start()
    victims = session.team.processes

    def act() -> None:
        ended[0] = time.monotonic()
        if how == "cancel":
            cancel.set()
        else:
            os.kill(victims[0], signal.SIGKILL)

    timer = threading.Timer(after_s, act)
    timer.start()
    said: Scail2Error | None = None
    try:
        list(session.animate(plan, None, cancel))
    except Scail2Error as error:
        said = error
    finally:
        timer.cancel()
        timer.join()
    if how == "cancel":
        assert said is None or isinstance(said, Cancelled)
    else:
        assert said is None or "ended by signal 9" in str(said)
        while ended[0] and victims == session.team.processes and not session.team.broken:
            time.sleep(0.01)  # too late for this run; the message is still on its way
    return time.monotonic() - ended[0] if ended[0] else 0.0


def test_killed_three_times_it_says_so_and_goes_on(session: Session, request_of: RequestOf) -> None:
    """Kill a rank while ranks start, while they compute, and between runs, when no error is expected."""
    request = request_of(steps=30, scheduler="euler", guidance=1.0, frames=9)
    assert end_somehow(session, request, 0.3, "kill") <= ENDS_WITHIN_S
    expected = frames(session, request)
    started = time.monotonic()
    list(session.animate(session.check(request)))
    assert end_somehow(session, request, 0.3 * (time.monotonic() - started), "kill") <= ENDS_WITHIN_S
    list(session.animate(session.check(request)))
    assert session.team is not None
    os.kill(session.team.processes[0], signal.SIGKILL)
    while not session.team.broken:
        time.sleep(0.01)
    assert np.array_equal(frames(session, request), expected)


@pytest.mark.soak
def test_killed_and_cancelled_a_hundred_times_at_random_moments(session: Session, request_of: RequestOf) -> None:
    request = request_of(steps=30, scheduler="euler", guidance=1.0, frames=9)
    expected = frames(session, request)
    started = time.monotonic()
    list(session.animate(session.check(request)))
    usual_s = time.monotonic() - started
    chance, slowest = random.Random(0), 0.0
    for number in range(100):
        how = chance.choice(["kill", "kill", "cancel"])
        fresh = session.team is None or session.team.processes == ()
        slowest = max(slowest, end_somehow(session, request, chance.uniform(0, usual_s + 3 * fresh), how))
        assert slowest <= ENDS_WITHIN_S, f"number {number}, {how}"
    assert np.array_equal(frames(session, request), expected)
    print(f"a hundred ends: the slowest took {slowest:.1f} s")


def splitting(folder: Path, device: torch.device) -> EngineSet:
    """Engines that decode parts of pictures, as they do on a GPU."""
    engines = open_on(folder, "torch", DEFAULT_EXECUTION, device)
    engines.executor.splits_pictures = True
    return engines


def test_processes_decode_parts_of_every_picture(engines: Path) -> None:
    """13 rows of cells in parts of 7 and 6; after a clip that is cancelled in the middle, the next one works."""
    latent = torch.randn(16, 3, 13, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), splitting(engines, torch.device("cpu")) as opened:
        team = Team(2, opened.device, partial(splitting, engines))
        try:
            shared = LeadingConstants(opened, team)
            given_up = shared.decode(latent + 1)
            next(given_up)
            given_up.close()
            ours = torch.cat(list(shared.decode(latent)), dim=1)
            theirs = torch.cat(list(decode_unclamped(opened, latent)), dim=1)
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-3
        finally:
            team.close()


def refuse(folder: Path, device: torch.device) -> EngineSet:
    raise InputError("there is nothing to open.")


def test_a_process_that_cannot_open_its_engines_says_why(engines: Path) -> None:
    team = Team(2, torch.device("cpu"), partial(refuse, engines))
    with (
        pytest.raises(Scail2Error, match="Rank 1 of 2 failed: there is nothing to open; all ranks of this run"),
        team.together("place", None),
    ):
        pass
    team.end()
