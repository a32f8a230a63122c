"""Resuming: the command is killed in the middle of segments, and the final video is bit-identical to that of an
uninterrupted run. Memory does not grow with the length of a clip."""

import json
import random
import shutil
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scail2_rt.benchmarks.sprites.world.case_files import draw_case
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.media.unfinished import clear_sidecars, partial_path, resumable, sidecar_path
from scail2_rt.runtime.pipeline.history import Carry
from scail2_rt.runtime.session.resume import Saved, Sidecar, first_difference, identity, noise_generator
from tests.support.command import (
    SCAIL2_RT,
    SMALL,
    Run,
    command_environment,
    error_of,
    one_json,
    read_video,
    sabotage,
    signal_at,
    unmeasured,
)

pytest_plugins = ["tests.support.runtime_fixtures"]
SEGMENTS = ("--segment-length", "9", "--segment-overlap", "5")  # 21 frames: 0..9, 4..13, 8..17, 12..21
ALL_JOINS = ("--overlap-blend", "3", "--anchor-color", "first")


def killed_in(segment: int, scail2: Run, words: tuple[object, ...], output: Path, folder: Path) -> None:
    """Run the command, which is killed in the middle of this segment (from 1)."""
    folder.mkdir(exist_ok=True)
    result = scail2(*words, measured=False, **signal_at(folder, output, segment))
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize("joins", [pytest.param((), id="official"), pytest.param(ALL_JOINS, id="all joins")])
def test_killed_again_and_again_and_the_video_is_the_same(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, joins: tuple[str, ...]
) -> None:
    words = ("--case", case, *SMALL, *SEGMENTS, *joins)
    folder, output = tmp_path / "o", tmp_path / "o" / "a.mp4"
    whole = one_json(scail2("generate", engines, *words, "-o", folder / "whole.mp4", "--json"))
    command = ("generate", engines, *words, "-o", output, "--resume")
    for segment in (1, 2, 3)[: 3 if joins else 2]:
        killed_in(segment, scail2, command, output, tmp_path / "sabotage")
        assert resumable(output) == segment
    result = scail2(*command, "--json")
    assert result.returncode == 0, result.stderr
    assert f"resuming after {segment} of 4 segments" in result.stderr
    check_same_as_whole(one_json(result), whole, output)
    assert one_json(result)["resumed_after_segments"] == segment


def test_killed_after_the_last_segment(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """With faded overlaps, the partial video has one part more than segments: the frames held back at the end."""
    words = ("--case", case, *SMALL, *SEGMENTS, *ALL_JOINS)
    folder, output = tmp_path / "o", tmp_path / "o" / "a.mp4"
    whole = one_json(scail2("generate", engines, *words, "-o", folder / "whole.mp4", "--json"))
    code = f"""
import os, signal, time
from pathlib import Path
from scail2_rt.runtime.media import video_writer
from scail2_rt.runtime.media.unfinished import resumable
def finish(self, **_):
    while resumable(Path({str(output)!r})) < 5:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
video_writer.VideoWriter.finish = finish
"""
    command = ("generate", engines, *words, "-o", output, "--resume")
    (tmp_path / "sabotage").mkdir()
    killed = scail2(*command, measured=False, **sabotage(tmp_path / "sabotage", code))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = scail2(*command, "--json")
    assert result.returncode == 0, result.stderr
    assert "resuming after 4 of 4 segments" in result.stderr
    check_same_as_whole(one_json(result), whole, output)


def check_same_as_whole(reply: dict[str, Any], whole: dict[str, Any], output: Path) -> None:
    """Check that the resumed video is bit-identical to that of the uninterrupted run, and that no other file is
    left."""
    mine, theirs = read_video(output), read_video(output.with_name("whole.mp4"))
    assert np.array_equal(mine.pixels, theirs.pixels)
    assert mine.audio_s == theirs.audio_s > 0
    assert reply["output_sha256"] == whole["output_sha256"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.json", "a.mp4", "whole.json", "whole.mp4"]


@pytest.mark.soak
@pytest.mark.parametrize("joins", [pytest.param((), id="official"), pytest.param(ALL_JOINS, id="all joins")])
def test_killed_at_random_moments_and_the_video_is_the_same(
    installed: Run, engines: Path, case: Path, cache: Path, tmp_path: Path, joins: tuple[str, ...]
) -> None:
    """Kill the command at random times: during imports, while a part is appended, the sidecar is written, or the result
    is moved. Each of six videos is killed repeatedly until a run completes."""
    words = ("--case", case, *SMALL, *SEGMENTS, *joins, "--steps", 10)
    folder, output, chance = tmp_path / "o", tmp_path / "o" / "a.mp4", random.Random(0)
    started = time.monotonic()
    whole = one_json(installed("generate", engines, *words, "-o", folder / "whole.mp4", "--json"))
    length_s = time.monotonic() - started
    command = [str(word) for word in (SCAIL2_RT, "generate", engines, *words, "-o", output, "--json")]
    killed = 0
    for _ in range(6):
        for attempt in count(1):  # later attempts get more time, so that one completes on any machine
            had = resumable(output)
            with subprocess.Popen(
                [*command, "--resume"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=unmeasured(command_environment(cache)),
            ) as process:
                try:
                    told, said = process.communicate(timeout=chance.uniform(0.2, 0.4 * attempt + 0.8) * length_s)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    killed += 1
                    if not output.exists():  # else it was killed after it had finished
                        assert resumable(output) >= had
                        continue
                    told = ""
                break
        assert process.returncode == 0 or not told, said
        if told:
            check_same_as_whole(json.loads(told), whole, output)
        for path in (output, output.with_suffix(".json")):
            path.unlink(missing_ok=True)
        clear_sidecars(output)
    print(f"killed {killed} times")
    assert killed


@pytest.fixture(scope="module")
def interrupted(scail2: Run, engines: Path, case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `a.mp4` that was killed after its first segment."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(case, folder / "case")
    command = ("generate", engines, "--case", folder / "case", "-o", folder / "a.mp4", *SMALL)
    killed_in(1, scail2, command, folder / "a.mp4", tmp_path_factory.mktemp("sabotage"))
    assert resumable(folder / "a.mp4") == 1
    return folder


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--steps", "3"), "--steps was 2 and is now 3"),
        (("--anchor-color", "first"), "--anchor-color was"),
        (("--max-rows", "64"), "engines.max_rows was 16384 and is now 64"),
    ],
)
def test_another_request_is_refused_by_naming_the_field(
    scail2: Run, engines: Path, interrupted: Path, changed: tuple[str, ...], says: str
) -> None:
    words = ("generate", engines, "--case", interrupted / "case", "-o", interrupted / "a.mp4", *SMALL, *changed)
    message = error_of(scail2(*words, "--resume"))
    assert says in message
    assert "--overwrite" in message
    assert resumable(interrupted / "a.mp4") == 1


def test_a_changed_file_is_refused_and_a_new_run_asks_first(
    scail2: Run, engines: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    words = ("generate", engines, "--case", folder / "case", "-o", folder / "a.mp4", *SMALL)
    message = error_of(scail2(*words))
    assert "1 finished segment of an interrupted run" in message
    assert "--resume" in message
    state = sidecar_path(folder / "a.mp4", 1)
    state.rename(folder / "away")
    message = error_of(scail2(*words, "--resume"))
    assert "a.resume-1.safetensors, is not beside it" in message
    assert partial_path(folder / "a.mp4").is_file()
    (folder / "away").rename(state)
    (folder / "a.mp4").write_text("an older result")
    assert "Use --overwrite with --resume" in error_of(scail2(*words, "--resume"))
    assert (folder / "a.mp4").read_text() == "an older result"
    (folder / "a.mp4").unlink()
    draw_case(folder / "case", audio=False)
    assert "the input driving has changed" in error_of(scail2(*words, "--resume"))
    assert resumable(folder / "a.mp4") == 1
    assert one_json(scail2(*words, "--overwrite", "--json"))["resumed_after_segments"] == 0
    assert not list(folder.glob("*.safetensors"))


def test_resume_of_a_batch_leaves_what_is_complete_and_begins_what_is_not(
    scail2: Run, engines: Path, replace_case: Path, case: Path, tmp_path: Path
) -> None:
    (tmp_path / "batch.txt").write_text(f"None@@{replace_case}\nNone@@{case}")
    words = ("generate", engines, "--batch", tmp_path / "batch.txt", "-o", tmp_path / "out", *SMALL, "--json")
    words += ("--frames", "5")
    first = one_json(scail2(*words, "--steps", "1"))
    assert first["failed"] == 0
    (tmp_path / "out" / f"{case.name}.mp4").unlink()
    result = scail2(*words, "--steps", "1", "--resume")
    again = one_json(result)
    assert again["failed"] == 0
    assert result.stderr.count("is complete: nothing to resume") == 1
    assert "no interrupted run" in result.stderr
    assert [c["output_sha256"] for c in again["cases"]] == [c["output_sha256"] for c in first["cases"]]
    other = one_json(scail2(*words, "--steps", "2", "--resume"))
    assert [entry["status"] for entry in other["cases"]] == ["failed", "failed"]
    assert "--steps was 1 and is now 2" in other["cases"][0]["error"]


_KILL_AT_REPORT = """
import os
from scail2_rt.runtime.session import write
complete = write._Run.complete
def killed(*arguments):
    {before}
    os.kill(os.getpid(), 9)
write._Run.complete = killed
"""


@pytest.mark.parametrize("reported", [False, True])
def test_killed_between_video_and_cleaning(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, reported: bool
) -> None:
    """The segments stay until the report says that the video is complete, so that none is made again."""
    output = tmp_path / "o" / "a.mp4"
    words = ("generate", engines, "--case", case, *SMALL, "--frames", "5", "-o", output, "--resume")
    (tmp_path / "sabotage").mkdir()
    code = _KILL_AT_REPORT.format(before="complete(*arguments)" if reported else "pass")
    killed = scail2(*words, measured=False, **sabotage(tmp_path / "sabotage", code))
    assert killed.returncode == -signal.SIGKILL
    assert resumable(output) == 1
    if not reported:
        assert "Use --overwrite with --resume" in error_of(scail2(*words))
        words = (*words, "--overwrite")
    result = scail2(*words, "--json")
    assert one_json(result)["resumed_after_segments"] == (0 if reported else 1)
    assert ("nothing to resume" in result.stderr) == reported
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.json", "a.mp4"]


# the sidecar


def saved(number: int, noise: torch.Generator) -> Saved:
    pixels = torch.randn(3, 5, 32, 32)
    return Saved(9 * number, Carry(number, pixels, {"count": torch.rand(4, 4)}), noise.get_state())


def leave_parts(output: Path, parts: int) -> None:
    box = (16).to_bytes(4, "big")
    output.with_name(f"{output.stem}.partial.mp4").write_bytes(
        (box + b"moof" + bytes(8) + box + b"mdat" + bytes(8)) * parts
    )


def test_a_sidecar_gives_back_every_bit(tmp_path: Path) -> None:
    noise, output = torch.Generator().manual_seed(3), tmp_path / "a.mp4"
    torch.randn(7, generator=noise)
    sidecar = Sidecar(output, {"options.steps": "2"})
    states = [saved(number, noise) for number in (1, 2, 3)]
    for part, state in enumerate(states, 1):
        sidecar.write(part, state)
    assert sorted(tmp_path.iterdir()) == [sidecar_path(output, 2), sidecar_path(output, 3)]
    for parts in (2, 3):  # killed before and after the third part was appended
        leave_parts(output, parts)
        found, state = sidecar.load(), states[parts - 1]
        assert found is not None
        assert found.carry.history is not None
        assert state.carry.history is not None
        assert (found.frames, found.carry.finished) == (9 * parts, parts)
        assert torch.equal(found.carry.history, state.carry.history)
        assert torch.equal(found.carry.anchor["count"], state.carry.anchor["count"])
        again = noise_generator("cpu", 0, found)
        assert torch.equal(torch.randn(5, generator=again), torch.randn(5, generator=noise.clone_state()))
    clear_sidecars(output)
    assert sidecar.load() is None


def test_a_sidecar_holds_the_overlap_and_no_more(tmp_path: Path) -> None:
    sidecar, pixels = Sidecar(tmp_path / "a.mp4", {}), torch.randn(3, 9, 64, 64)
    sidecar.write(1, Saved(9, Carry(1, pixels[:, -5:]), torch.zeros(1)))
    assert sidecar_path(tmp_path / "a.mp4", 1).stat().st_size < 1.1 * pixels[:, -5:].nbytes


def test_a_damaged_sidecar_is_told(tmp_path: Path) -> None:
    leave_parts(tmp_path / "a.mp4", 1)
    sidecar_path(tmp_path / "a.mp4", 1).write_bytes(b"half of it")
    with pytest.raises(Scail2Error, match="cannot be read"):
        Sidecar(tmp_path / "a.mp4", {}).load()


def test_a_difference_is_named(tmp_path: Path) -> None:
    assert first_difference({"a": "1"}, {"a": "1"}) is None
    assert first_difference({"options.segment_length": "81"}, {"options.segment_length": "49"}) == (
        "--segment-length was 81 and is now 49"
    )
    assert first_difference({"versions.torch": "1"}, {}) == "versions.torch was 1 and is now not set"
    sidecar = Sidecar(tmp_path / "a.mp4", {"inputs.driving": '"0"'})
    sidecar.write(1, Saved(9, Carry(1), torch.zeros(1)))
    leave_parts(tmp_path / "a.mp4", 1)
    with pytest.raises(InputError, match="the input driving has changed"):
        Sidecar(tmp_path / "a.mp4", {"inputs.driving": '"1"'}).load()


def test_what_changes_no_frame_is_no_difference() -> None:
    def run(seed: int, **changes: object) -> dict[str, str]:
        options = {"seed": seed, "overwrite": False, "allow_mask_problems": False, "image": "a.png", **changes}
        plan = {"mode": "animate", "height": 64, "width": 96, "frames": 21}
        device = {"backend": "torch", "device": "cpu", "name": "x86_64"}
        made_of = {"directory": f"engines-{len(changes)}", "precision": "fp32"}
        about = {"options": options, "inputs": {}, **plan, "engines": made_of, "device": device, "versions": {}}
        return identity(about)

    elsewhere = run(1, overwrite=True, allow_mask_problems=True, image="b.png")
    assert first_difference(run(1), elsewhere) is None
    assert first_difference(run(1), run(2)) == "--seed was 1 and is now 2"


# memory and work over the length of a clip

# Prints to stderr at the start of every segment: the peak resident memory (KiB), the bytes of all tensors and of all
# Python and NumPy allocations, the number of function calls of this thread, and its CPU seconds. At the end it prints
# the peak memory again. `getrusage` is not used, because its peak includes the parent process.
SEGMENT_METER = """
import atexit, gc, sys, time, tracemalloc
from scail2_rt.runtime.core import progress
begin, calls = progress.RunProgress.segment, [0]
def count(frame, event, argument):
    if event in ("call", "c_call"):
        calls[0] += 1
def peak():
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith("VmHWM"))
def segment(self, index):
    sys.setprofile(None)
    import torch
    gc.collect()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in gc.get_objects() if type(x) is torch.Tensor}
    held = sum(storages.values()) + (tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0)
    print("meter", peak(), held, calls[0], time.process_time(), file=sys.stderr)
    begin(self, index)
    sys.setprofile(count)
progress.RunProgress.segment = segment
atexit.register(lambda: print("end", peak(), file=sys.stderr))
"""


@dataclass(frozen=True, slots=True)
class Metered:
    """The measurements of a run at the start of each segment."""

    peak_kib: list[int]  # per segment, and at the end
    held: list[int]
    calls: list[int]  # within each segment
    cpu_s: list[float]
    report: dict[str, Any]


def metered(scail2: Run, engines: Path, folder: Path, frames: int, **environment: str) -> Metered:
    draw_case(folder / "case", frames=frames, height=64, width=64)
    words = ("--size", "64x64", "--scheduler", "euler", "--steps", "1", "--guidance", "1", "--segment-length", "21")
    environment |= sabotage(folder, SEGMENT_METER)
    output = folder / "a.mp4"
    result = scail2("generate", engines, "--case", folder / "case", "-o", output, *words, measured=False, **environment)
    assert result.returncode == 0, result.stderr
    rows = [line.split()[1:] for line in result.stderr.splitlines() if line.startswith("meter")]
    peaks, held, calls = ([int(row[column]) for row in rows] for column in range(3))
    peaks.append(int(result.stderr.splitlines()[-1].removeprefix("end ")))
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["frames"] == frames
    seconds = [float(row[3]) for row in rows]
    return Metered(peaks, held, [b - a for a, b in pairwise(calls)], [b - a for a, b in pairwise(seconds)], report)


LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")


@LINUX
def test_later_segments_hold_no_more_and_do_no_more(scail2: Run, engines: Path, tmp_path: Path) -> None:
    """160 frames would take 2 MB at 8 bits, so the bound is half of that (the interpreter's caches grow by 0.2 to 0.4
    MB). Seeking from the start of the clip would call the decoder for each earlier frame."""
    found = metered(scail2, engines, tmp_path, 229, PYTHONTRACEMALLOC="1")
    assert len(found.held) == 14
    grown = found.held[-1] - found.held[3]
    print(f"held: {found.held[3]} and {grown} more; calls in a segment: {found.calls}")
    assert grown < 1_000_000
    assert found.calls[-1] < 1.02 * found.calls[2]


@LINUX
@pytest.mark.soak
def test_a_thousand_frames_take_the_memory_of_two_hundred(scail2: Run, engines: Path, tmp_path: Path) -> None:
    """Compare, within one run, the peak after 1,000 frames (including writing the result) with the peak after 200
    frames; keeping the other 800 frames would take 10 MB at 8 bits. Also compare the work in late and early segments.
    The allocator's mmap threshold is fixed, because it adapts to freed memory and can change the peak by 100 MiB."""
    found = metered(scail2, engines, tmp_path, 1000, MALLOC_MMAP_THRESHOLD_=str(256 << 10), MALLOC_TRIM_THRESHOLD_="0")
    at_200 = next(i for i, segment in enumerate(found.report["segments"]) if segment["valid_end"] > 200)
    grown_mib = (found.peak_kib[-1] - found.peak_kib[at_200]) / 2**10
    early, late = (statistics.median(found.calls[part]) for part in (slice(2, 22), slice(-20, None)))
    seconds = [statistics.median(found.cpu_s[part]) for part in (slice(2, 22), slice(-20, None))]
    print(f"memory grew by {grown_mib:.1f} MiB; calls in a segment: {early} early, {late} late; CPU seconds: {seconds}")
    assert grown_mib < 6
    assert late < 1.02 * early
