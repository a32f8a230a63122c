"""One service per test file, with the tiny engines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Served, serving


@pytest.fixture(scope="module")
def served(engines: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(engines, tmp_path_factory.mktemp("served") / "data", cache, measured=True) as service:
        yield service


@pytest.fixture(scope="module")
def body(served: Served, case: Path) -> dict[str, Any]:
    """A request for a small video of `case`, with uploaded inputs."""
    return served.case(case)
