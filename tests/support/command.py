"""Helpers for tests of the installed command: its environment, its output, and the video that it wrote."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SCAIL2_RT = Path(sys.executable).with_name("scail2-rt")
SMALL = ("--size", "64x96", "--steps", "2", "--segment-length", "13", "--guidance", "1")  # 64x96, one pass per step
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, slots=True)
class Video:
    """A video decoded to its end."""

    frames: int
    width: int
    height: int
    frame_rate: Fraction | None
    audio_s: float
    pixels: np.ndarray


def read_video(path: Path) -> Video:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        rate = stream.average_rate
    audio_s = 0.0
    with av.open(str(path)) as container:
        if container.streams.audio:
            audio_s = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    return Video(len(pixels), pixels.shape[2], pixels.shape[1], rate, audio_s, pixels)


def command_environment(cache: Path, **changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SCAIL2_RT_CACHE": str(cache), "COLUMNS": "120", **changes}


def unmeasured(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without coverage's hook. A killed process, or one with limited file size, would leave a broken
    data file, which makes the coverage report fail."""
    return {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}


def sabotage(folder: Path, code: str) -> dict[str, str]:
    """The environment in which `code` runs before the program starts."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


# In the middle of a segment, once the ones before it are in the file: the process signals itself, so that it is the
# same moment on a machine of any speed.
_SIGNAL_AT = """
import os, time
from pathlib import Path
from scail2_rt.runtime.core import progress
segment, step, current = progress.RunProgress.segment, progress.RunProgress.step, []
def begun(self, index):
    current[:] = [index]
    segment(self, index)
def signalled(self, index):
    step(self, index)
    if (current[0], index) == ({segment}, 0):
        from scail2_rt.runtime.media.unfinished import resumable
        while resumable(Path({output!r})) < {segment}:
            time.sleep(0.01)
        os.kill(os.getpid(), {number})
progress.RunProgress.segment, progress.RunProgress.step = begun, signalled
"""


def signal_at(folder: Path, output: Path, segment: int, number: signal.Signals = signal.SIGKILL) -> dict[str, str]:
    """The environment in which `generate -o output` sends itself a signal after the first step of a segment from 1."""
    return sabotage(folder, _SIGNAL_AT.format(segment=segment, output=str(output), number=int(number)))


def one_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


def error_of(result: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The error line of a command that failed with this exit code: the last of stderr, no traceback, empty stdout."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")
