"""The table of GPU memory: computed without a GPU, and what the GPU guide shows."""

from pathlib import Path

import pytest

from scail2_rt.benchmarks.speed.gpu_memory import row
from scail2_rt.benchmarks.speed.models import STANDARD

GUIDE = Path(__file__).parents[3] / "docs" / "gpus.md"


@pytest.mark.parametrize(
    ("passes", "limit", "placed", "shown"),
    [
        (1, None, "resident  40 of 40   25.0", "| fp8 | 512×896 | 1 | 25.0 | 20.6 | 16.0 (32) | 11.8 (17) |"),
        (1, 12, "streamed  17 of 40   11.8", "12 GB (RTX 4070) | `--precision fp8` | 17 of 40 blocks stay | 11.8 GiB"),
        (2, 16, "streamed  24 of 40   15.7", "| fp8 | 512×896 | 2 | 27.0 | 21.2 | 15.7 (24) | 11.8 (10) |"),
        (1, 8, "needs at least", "| 8 GB |"),
    ],
)
def test_the_guide_shows_what_the_model_computes(passes: int, limit: int | None, placed: str, shown: str) -> None:
    assert placed in row("fp8", STANDARD[0], passes, 81, limit)
    assert shown in GUIDE.read_text()
