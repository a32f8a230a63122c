"""Fixtures that the tests of the training commands share."""

from collections.abc import Iterator

import pytest
import torch

from scail2_rt.benchmarks.sprites.training import dataset, train_vae


@pytest.fixture
def small_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one task per layout instead of up to four, and statistics of two clips instead of 28, which take most of the
    time of a command with few steps. Restores the matmul precision that a command sets."""
    for group, task in (("single", "animate"), ("several", "two")):
        monkeypatch.setitem(dataset.GROUPS, group, {task: sum(dataset.GROUPS[group].values())})
    monkeypatch.setattr(train_vae, "SEGMENT_FRAMES", 10)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
