"""Fixtures of this folder: the tiny checkpoint, opened, and the tensors of its transformer."""

from pathlib import Path

import pytest

from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from tests.support.repackaged import Tensors, tensors_of


@pytest.fixture(scope="session")
def opened(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def dit(opened: Checkpoint) -> Tensors:
    return tensors_of(opened.sources["dit"])
