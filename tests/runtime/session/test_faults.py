"""Faults during a generation: kills, full disks, damaged files, out of memory. Finished segments are kept, the output
is complete or absent, and the user gets one line.

Faults in the complete command are injected by a `sitecustomize` module. A full disk is simulated by a limit on the size
of files, which interrupts a write in the same way.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.media.lossless import write_video
from scail2_rt.runtime.media.unfinished import part_ends, partial_path, sidecar_path
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.clips import number_of
from tests.support.command import SMALL, Run, error_of, read_video, sabotage, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]
TRIALS, PARTS, PART_FRAMES = 60, 5, 5

# A process with all imports done forks one writer per trial. It lets the writer start a number of parts (the last one
# is the result), kills it after a random time, and prints the parts that the writer reported as finished. `save` writes
# one file per part, as the sidecar does.
KILLED_WRITERS = """
import json, os, random, signal, sys, time
from fractions import Fraction
from pathlib import Path
import numpy as np
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_writer import VideoWriter
from scail2_rt.runtime.media.unfinished import sidecar_path
folder, trials, parts, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
frames = np.stack([np.full((48, 64, 3), 8 * (i + 1), np.uint8) for i in range(parts * count)])

def write(output, said, allowed):
    with VideoWriter(output, VideoFormat(64, 48, Fraction(25))) as writer:
        for k in range(parts):
            os.read(allowed, 1)
            writer.write(frames[k * count : (k + 1) * count])
            writer.segment_done(wait=True, save=lambda part: sidecar_path(output, part).write_text(str(part)))
            os.write(said, b"p")
        os.read(allowed, 1)
        writer.finish()
    os.write(said, b"f")

def trial(number, begun, seconds):
    output = folder / str(number) / "out.mp4"
    output.parent.mkdir()
    (heard, said), (allowed, allow) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            write(output, said, allowed)
        finally:
            os._exit(0)
    os.close(said)
    started, words = time.monotonic(), b""
    for k in range(begun):
        os.write(allow, b".")
        if k + 1 < begun:
            words += os.read(heard, 1)
    if seconds is None:
        os.waitpid(child, 0)
        took = time.monotonic() - started
    else:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        took = seconds
    words += os.read(heard, 100)
    for end in (heard, allowed, allow):
        os.close(end)
    return words.decode(), took

part_s = min(trial(f"whole{i}", parts + 1, None)[1] for i in range(2)) / (parts + 1)
random.seed(0)
chance = [(1 + number % (parts + 1), random.uniform(0, 1.5 * part_s)) for number in range(trials)]
print(json.dumps([trial(number, *each)[0] for number, each in enumerate(chance)]))
"""


def test_a_killed_writer_never_loses_a_finished_segment(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITERS, str(tmp_path), *map(str, (TRIALS, PARTS, PART_FRAMES))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    finished = json.loads(done.stdout)
    assert len(finished) == TRIALS >= 50
    assert len(set(finished)) >= 3, finished  # killed at different points
    for number, said in enumerate(finished):
        output = tmp_path / str(number) / "out.mp4"
        partial = partial_path(output)
        if output.exists():  # renamed into place, perhaps before the process could report it
            assert said.startswith("p" * PARTS)
            assert numbers(output) == list(range(PARTS * PART_FRAMES))
        else:
            assert "f" not in said
            parts = len(part_ends(partial)) if partial.exists() else 0
            assert parts >= len(said)
            assert not parts or numbers(partial)[: parts * PART_FRAMES] == list(range(parts * PART_FRAMES))
            assert not parts or sidecar_path(output, parts).read_text() == str(parts)


def numbers(path: Path) -> list[int]:
    with VideoReader(path) as reader:
        return [number_of(frame) for frame in reader.read(1000)]


# Frames of noise, so that a segment is larger than any buffer; the limit comes after `limited` segments.
FULL_DISK = """
import resource, signal, sys
from fractions import Fraction
from pathlib import Path
import numpy as np
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.media.video_format import VideoFormat
from scail2_rt.runtime.media.video_writer import VideoWriter
output, limited, room = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
noise = np.random.default_rng(0)
writer = VideoWriter(output, VideoFormat(64, 48, Fraction(25)))
try:
    for k in range(4):
        if k == limited:
            size = writer.partial.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, -1))
        writer.write(noise.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8))
        writer.segment_done(wait=True)
    if limited == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.partial.stat().st_size + room, -1))
    writer.finish()
except Scail2Error as error:
    print(error)
    print(writer.abort())
"""


@pytest.mark.parametrize("limited", [1, 3])
def test_a_disk_that_fills_in_the_middle_of_a_write(tmp_path: Path, limited: int) -> None:
    output = tmp_path / "out.mp4"
    done = full_disk(output, limited, 1500)
    error, kept = done.stdout.strip().splitlines()
    partial = partial_path(output)
    assert "File too large" in error
    assert f"finished segments are in {partial}" in error
    assert kept == str(partial)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert part_ends(partial)[-1] == partial.stat().st_size  # the incomplete part was truncated
    assert read_video(partial).frames == 9 * limited


def test_a_disk_that_fills_while_the_result_is_made(tmp_path: Path) -> None:
    """The file that the audio is added to; the encoded video is complete."""
    output = tmp_path / "out.mp4"
    done = full_disk(output, 4, -8000)
    assert "could not be written (File too large): use the video without audio in" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [partial_path(output).name]
    assert read_video(partial_path(output)).frames == 36


def full_disk(output: Path, limited: int, room: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", FULL_DISK, str(output), str(limited), str(room)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=unmeasured())
    assert done.returncode == 0, done.stderr
    return done


# the complete command


AT_SEGMENT = """
from scail2_rt.runtime.core import progress
begin = progress.RunProgress.segment
def segment(self, index):
    if index == 1:
        fault()
    begin(self, index)
progress.RunProgress.segment = segment
"""


def test_a_full_disk_ends_the_command_and_keeps_what_was_finished(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    """The report cannot be written either; the error sentence is about the first fault."""
    code = (
        "import resource\n"
        "def fault():\n"
        "    from pathlib import Path\n"
        "    import time\n"
        "    from scail2_rt.runtime.media.unfinished import resumable\n"
        f"    while not resumable(Path({str(tmp_path / 'a.mp4')!r})):\n"
        "        time.sleep(0.01)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
    )
    words = ("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL)
    message = error_of(scail2(*words, measured=False, **sabotage(tmp_path, code + AT_SEGMENT)), code=1)
    assert "File too large" in message
    assert "finished segments are in" in message
    assert read_video(tmp_path / "a.partial.mp4").frames == 13
    assert not (tmp_path / "a.mp4").exists()
    result = scail2(*words, "--resume")
    assert result.returncode == 0, result.stderr
    assert "resuming after 1 of 2 segments" in result.stderr
    assert read_video(tmp_path / "a.mp4").frames == 21


def test_a_driving_file_that_is_cut_off_while_it_is_read(
    scail2: Run, engines: Path, case: Path, tmp_path: Path
) -> None:
    """The file was intact when it was checked."""
    copy = tmp_path / "case"
    copy.mkdir()
    for file in case.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    pixels = np.random.default_rng(0).integers(0, 255, (21, 64, 96, 3), dtype=np.uint8)
    driving = copy / "rendered_v2.mp4"
    write_video(driving, iter(pixels), Fraction(16))
    half = driving.stat().st_size // 2
    code = f"import os\ndef fault():\n    os.truncate({str(driving)!r}, {half})\n"
    words = ("generate", engines, "--case", copy, "-o", tmp_path / "a.mp4", *SMALL, "--segment-length", "5")
    at_first = AT_SEGMENT.replace("index == 1", "index == 0")
    result = scail2(*words, "--segment-overlap", "1", **sabotage(tmp_path, code + at_first))
    message = error_of(result, code=result.returncode)
    assert result.returncode in (1, 2)
    assert "rendered_v2.mp4" in message
    assert "frame" in message
    assert "e-encode it" in message
    kept = read_video(tmp_path / "a.partial.mp4").frames
    assert kept >= 5
    assert kept % 4 == 1
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["status"] == "partial"


OUT_OF_MEMORY = """
import torch
from scail2_rt.engines import engine_set
run = engine_set.EngineSet.run
def greedy(self, name, *inputs, **more):
    if name == "dit.blocks.1.mid":
        torch.empty(2**50)
    return run(self, name, *inputs, **more)
engine_set.EngineSet.run = greedy
"""


def test_out_of_memory_in_a_stage(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--steps", "1")
    message = error_of(scail2(*words, **sabotage(tmp_path, OUT_OF_MEMORY)), code=1)
    assert message.startswith("Host memory ran out in the phase denoise, which requested another 4194304.00")
    assert "GiB: use a smaller --size, --segment-length or --max-rows" in message
    assert not (tmp_path / "a.mp4").exists()


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.40 GiB. GPU 0 has a total capacity of ...")


def no_onnxruntime_memory() -> None:
    raise RuntimeError("Failed to allocate memory for requested buffer of size 3221225472")


@pytest.mark.parametrize(
    ("allocate", "phase", "says"),
    [
        (lambda: np.empty(2**56), "read", ("Host memory", "phase read", "512. PiB", "smaller --segment-len")),
        (lambda: bytearray(2**62), "decode", ("Host memory", "phase decode:", "use a smaller --size")),
        (no_cuda_memory, "reference", ("GPU memory", "another 1.40 GiB", "--vram-limit", "--size")),
        (no_onnxruntime_memory, "denoise", ("Host memory", "another 3.00 GiB", "--max-rows")),
    ],
)
def test_out_of_memory_names_the_phase_the_need_and_the_remedy(
    allocate: Callable[[], object], phase: str, says: tuple[str, ...]
) -> None:
    with pytest.raises(Scail2Error) as caught, RunProgress().phase(phase):
        allocate()
    assert [part for part in says if part not in str(caught.value)] == [], str(caught.value)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="buffer of size 3"), RunProgress().phase("denoise"):
        raise RuntimeError("a buffer of size 3 is not one of size 4")
    with pytest.raises(InputError, match="Unable to allocate 3 GiB"), RunProgress().phase("denoise"):
        raise InputError("Unable to allocate 3 GiB: as it was told")


def test_a_signal_that_limits_send_is_not_the_end() -> None:
    """Python ignores SIGXFSZ, so a limit on files raises an error like a full disk; the tests above rely on this."""
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
