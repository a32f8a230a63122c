"""The Animate node keeps no copy of a clip: its memory besides the graph's tensors does not grow with the clip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import command_environment, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory, to the system


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured by what Linux tells")
def test_memory_beside_the_tensors_does_not_grow(cache: Path, engines: Path) -> None:
    def measured(frames: int) -> dict[str, float]:
        command = [sys.executable, "-m", "tests.support.comfyui_memory", str(engines), "--size", "256x448"]
        environment = unmeasured(command_environment(cache, **GIVEN_BACK))
        result = subprocess.run(
            [*command, "--frames", str(frames)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    short, long = measured(157), measured(309)  # of two and of four segments
    more = long["clip_gib"] - short["clip_gib"]
    assert long["above_gib"] - short["above_gib"] < more / 8
