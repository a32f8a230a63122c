"""Fixtures of the tests that run the installed command: the command, tiny engines, drawn cases.

A test module loads them with `pytest_plugins = ["tests.support.runtime_fixtures"]`."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scail2_rt.benchmarks.sprites.world.case_files import draw_case
from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.runtime.core.request import Request
from tests.support.command import SCAIL2_RT, Run, command_environment, unmeasured
from tests.support.forked import CommandServer


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the test session's own for prompts; traced graphs are the user's, since tracing takes minutes."""
    directory, graphs = tmp_path_factory.mktemp("cache"), cache_directory() / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    (directory / "graphs").symlink_to(graphs)
    return directory


@pytest.fixture(scope="session")
def installed(cache: Path) -> Run:
    """Runs the installed console script with these arguments, from its start."""

    def run(
        *arguments: object, cwd: Path | None = None, measured: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [str(SCAIL2_RT), *(str(argument) for argument in arguments)]
        env = command_environment(cache, **environment)
        env = env if measured else unmeasured(env)
        return subprocess.run(words, capture_output=True, text=True, env=env, timeout=600, cwd=cwd, check=False)

    return run


@pytest.fixture(scope="session")
def scail2(cache: Path, installed: Run) -> Iterator[Run]:
    """Like `installed`, without the time for imports (see `CommandServer`) if the environment allows it."""
    if not hasattr(os, "fork"):
        yield installed
        return
    server = CommandServer(command_environment(cache))

    def run(
        *arguments: object, cwd: Path | None = None, measured: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        if "PYTHONPATH" in environment or not measured:  # which take effect when a process starts
            return installed(*arguments, cwd=cwd, measured=measured, **environment)
        words, env = [str(argument) for argument in arguments], command_environment(cache, **environment)
        return server.run(words, env, cwd, timeout_s=600)

    yield run
    server.close()


@pytest.fixture(scope="session")
def engines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, scail2: Run) -> Path:
    """An engine folder of the tiny checkpoint for the torch executor, built by the installed command."""
    directory = tmp_path_factory.mktemp("engines") / "tiny"
    result = scail2("build-engines", tiny_checkpoint, "-o", directory, "--backend", "torch", "--precision", "fp32")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An animate case: 21 frames of 64x96 at 16 fps with a tone."""
    directory = tmp_path_factory.mktemp("cases") / "walk"
    draw_case(directory)
    return directory


@pytest.fixture(scope="session")
def replace_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replace case of 13 frames without sound."""
    directory = tmp_path_factory.mktemp("cases") / "swap"
    draw_case(directory, frames=13, replace_mode=True, audio=False)
    return directory


@pytest.fixture
def request_of(case: Path) -> Callable[..., Request]:
    """Makes the request of `case` at its own size, with these fields changed."""

    def make(**changes: object) -> Request:
        names = ("ref.png", "ref_mask.png", "rendered_v2.mp4", "rendered_mask_v2.mp4")
        return replace(Request(*(case / name for name in names), size=(64, 96)), **changes)

    return make
