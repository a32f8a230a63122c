"""`generate --gpus` through the installed command: the same video as one process, errors, all kinds of ends,
torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scail2_rt.runtime.media.clips import open_video
from tests.support.command import SCAIL2_RT, Run, command_environment, error_of

pytest_plugins = ["tests.support.runtime_fixtures"]
FEW = ("--size", "64x96", "--preset", "fast", "--frames", 9, "--backend", "torch")


def frames_of(path: Path) -> np.ndarray:
    with open_video(path) as video:
        return video.read(100)


def others(leader: int) -> list[int]:
    """The processes that rank 0 has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == leader and b"distributed.worker" in words:
            found.append(int(stat.parent.name))
    return found


def ended(pids: list[int], within_s: float = 10.0) -> bool:
    limit = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def alone(engines: Path, case: Path, scail2: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "alone.mp4"
    result = scail2("generate", engines, "--case", case, "-o", output, *FEW)
    assert result.returncode == 0, result.stderr
    return output


def test_two_processes_make_the_video_of_one(
    engines: Path, case: Path, alone: Path, scail2: Run, tmp_path: Path
) -> None:
    output = tmp_path / "shared.mp4"
    result = scail2("generate", engines, "--case", case, "-o", output, *FEW, "--gpus", 2, "--json")
    assert result.returncode == 0, result.stderr
    assert "shared by 2 processes" in result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "complete"
    assert report["device"]["gpus"] == 2
    difference = np.abs(frames_of(output).astype(int) - frames_of(alone).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ("3", "2 attention heads cannot be divided among 3 GPUs. Use --gpus 1, 2, with guidance also 4."),
        ("4", "cannot be divided among 4 GPUs without guidance. Use --gpus 1, 2, with guidance also 4."),
        ("none", "'none' is not a number of GPUs. Write a number, or all"),
    ],
)
def test_numbers_that_do_not_divide_the_heads_are_refused(
    gpus: str, said: str, engines: Path, case: Path, scail2: Run, tmp_path: Path
) -> None:
    result = scail2("generate", engines, "--case", case, "-o", tmp_path / "out.mp4", *FEW, "--gpus", gpus)
    assert result.returncode == 2
    assert said in error_of(result)
    assert list(tmp_path.iterdir()) == []


def started(engines: Path, case: Path, output: Path, cache: Path) -> "subprocess.Popen[str]":
    """A long run of three segments; returns when the second has begun."""
    words = ["generate", engines, "--case", case, "-o", output, "--size", "64x96", "--backend", "torch", "--gpus", 2]
    words += ["--preset", "fast", "--steps", 40, "--segment-length", 9]
    process = subprocess.Popen(
        [str(SCAIL2_RT), *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=command_environment(cache),
    )
    partial = output.with_name(f"{output.stem}.partial.mp4")
    limit = time.monotonic() + 120
    while not partial.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a process is killed", "Ctrl-C", "the leader is killed"])
def test_all_processes_end_and_finished_segments_are_kept(
    how: str, engines: Path, case: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    process = started(engines, case, output, cache)
    workers = others(process.pid)
    assert len(workers) == 1
    begun = time.monotonic()
    if how == "a process is killed":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert ended([process.pid, *workers], within_s=10)
    took_s = time.monotonic() - begun
    assert took_s < 60
    if how == "a process is killed":
        assert process.returncode == 1
        assert "error: Rank 1 of 2 was ended by signal 9" in said
    if how == "Ctrl-C":
        assert process.returncode == 130
    if how != "the leader is killed":
        assert "the finished segments are in" in said
    assert (tmp_path / "out.partial.mp4").stat().st_size > 0


LEFT_OPEN = """
import sys
from scail2_rt.runtime import Session
session = Session.open(sys.argv[1], backend="torch", device="cpu", gpus=2)
if sys.argv[2] == "used":
    session.constants.place(None)
print(*session.team.processes, flush=True)
"""


@pytest.mark.parametrize("state", ["starting", "used"])
def test_a_program_may_end_with_its_session_open(state: str, engines: Path, cache: Path) -> None:
    words = [sys.executable, "-c", LEFT_OPEN, str(engines), state]
    result = subprocess.run(words, capture_output=True, text=True, env=command_environment(cache), check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert ended([int(pid) for pid in result.stdout.split()])


@pytest.mark.slow
def test_two_nodes_of_two_processes_under_torchrun(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """Guidance on two halves, rows shared within each, on two "nodes" of one host."""
    output, expected = tmp_path / "nodes.mp4", tmp_path / "alone.mp4"
    words = ["generate", engines, "--case", case, "--size", "64x96", "--frames", 9, "--backend", "torch"]
    words += ["--steps", 2, "--guidance", 2]
    environment = command_environment(cache)
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"),
                *("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("-m", "scail2_rt.runtime.cli.main", *map(str, words), "-o", str(output), "--gpus", "all"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "shared by 4 processes" in said[0]
    result = subprocess.run(
        [str(SCAIL2_RT), *map(str, words), "-o", str(expected)], env=environment, capture_output=True, check=False
    )
    assert result.returncode == 0
    assert np.abs(frames_of(output).astype(int) - frames_of(expected).astype(int)).max() <= 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
