"""The golden pipeline fixtures, shared by processes over gloo."""

from pathlib import Path

import pytest
import torch

from scail2_rt.runtime.distributed.gpus import working
from tests.parity.fixtures import Golden
from tests.parity.pipeline import check_pipeline


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_pass_every_pipeline_fixture(golden: Path, processes: int) -> None:
    """Two ranks: shared rows, or one pass each with guidance. Four: both combined; without guidance there are too few
    heads."""
    checked = 0
    with torch.no_grad(), Golden(golden, gpus=processes) as fixtures:
        for path in sorted((golden / "pipeline").glob("*.safetensors")):
            fixture = fixtures.load(path.relative_to(golden))
            passes = 2 if fixture.metadata["case"]["guide"] > 1 else 1
            if processes not in working(2, passes):
                continue
            rows = list(check_pipeline(fixtures, fixture))
            assert [str(row) for row in rows if not row.passed] == []
            checked += len(rows)
    assert checked > 30
