"""Compile kernels before their first use, in parallel processes that need no GPU.

A list per compute capability (`recorded/sm90.jsonl`) has one line per Triton kernel of a generation, in the order of
first use: everything that its machine code depends on. `start` runs this module in a separate process, which compiles
the list, and the CUDA C++ kernels, into the cache folders of Triton and NVRTC. Meanwhile this process goes on and
compiles what it needs itself. When the list is complete, a marker in the cache folder says so, and nothing is started
the next time. `Recorder` makes the lists (`python -m scail2_rt.benchmarks.speed.record_kernels`).
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scail2_rt.kernels.cuda.nvrtc import HOPPER, Kernel, compile_cubin, kernel_directory
from scail2_rt.kernels.errors import Scail2Error

Capability = tuple[int, int]
WARP = 32
LISTS = Path(__file__).with_name("recorded")
PROCESSES = 16  # at most
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start(capability: Capability) -> subprocess.Popen[bytes] | None:
    """Start compiling the kernels of this compute capability in a separate process.

    Returns None if there is nothing to do: no list for this capability, everything is compiled already, or the cache
    folder cannot be written. The process ends by itself; its output is in `ahead.log` in the cache folder."""
    marker = _marker(capability)
    if marker is None or marker.exists():
        return None
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        with (marker.parent / "ahead.log").open("wb") as log:
            words = [sys.executable, "-m", "scail2_rt.kernels.ahead", *map(str, capability)]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            _started.append(process)
            return process
    return None


_started: list[subprocess.Popen[bytes]] = []  # kept, because Python warns when it drops a process that still runs


def list_of(capability: Capability) -> Path:
    """Return the path of the list for this compute capability. It may not exist."""
    return LISTS / f"sm{capability[0]}{capability[1]}.jsonl"


def _marker(capability: Capability) -> Path | None:
    """Return the marker's path; its name depends on everything that is compiled. None without a list or Triton."""
    try:
        parts = [version("triton").encode(), list_of(capability).read_bytes()]
    except (PackageNotFoundError, OSError):
        return None
    sources = sorted(Path(__file__).parent.rglob("*.py")) + sorted(Path(__file__).parent.rglob("*.cu"))
    parts += [source.read_bytes() for source in sources]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    return kernel_directory() / f"ahead-{digest[:20]}"


class Recorder:
    """A context manager that collects the Triton kernels which are compiled, or loaded from a cache, inside it."""

    def __init__(self) -> None:
        self.lines: list[str] = []  # of a list, in the order of first use

    def __enter__(self) -> "Recorder":
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = self._add
        return self

    def __exit__(self, *exception: object) -> None:
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = None

    def _add(self, *, fn: Any, compile: dict[str, Any], **_: object) -> None:
        entry = {
            "kernel": f"{fn.module}:{fn.name.rpartition('.')[2]}",
            "signature": compile["signature"],
            "constants": [[list(path), value] for path, value in compile["constants"].items()],
            "attributes": [[list(path), value] for path, value in compile["configs"][0].items()],
            "options": {name: compile[name] for name in ("num_warps", "num_stages")},
        }
        line = json.dumps(entry)
        if line not in self.lines:
            self.lines.append(line)


def compile_line(line: str, capability: Capability) -> None:
    """Compile one line of a list into Triton's cache. Raises what Triton raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    entry = json.loads(line)
    module, _, name = entry["kernel"].partition(":")
    constants = {tuple(path): value for path, value in entry["constants"]}
    attributes = {tuple(path): value for path, value in entry["attributes"]}
    source = ASTSource(getattr(importlib.import_module(module), name), entry["signature"], constants, attributes)
    compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], WARP), options=entry["options"])


def cuda_kernels(capability: Capability) -> list[Kernel]:
    """Return the CUDA C++ kernels for this compute capability, in the order of first use; none without cuda-python."""
    if capability != HOPPER or find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return []
    from scail2_rt.kernels.attention import hopper_attention, hopper_attention_16bit
    from scail2_rt.kernels.conv.hopper_conv import NARROW, WIDE, WIDE_SMALL

    convolutions = [tile.kernel() for tile in (NARROW, WIDE, WIDE_SMALL)]
    return [*convolutions, hopper_attention.DEFAULT, *hopper_attention_16bit.KERNELS.values()]


def compile_all(capability: Capability, lines: Sequence[str], processes: int) -> list[str]:
    """Compile the CUDA C++ kernels and `lines`. Returns the problems, one per kernel that could not be compiled."""
    work: list[Kernel | str] = [*cuda_kernels(capability), *lines]
    for line in lines:  # imports every kernel's module before the processes are forked
        importlib.import_module(json.loads(line)["kernel"].partition(":")[0])
    problems = []
    try:  # unlike `multiprocessing.Pool`, it does not wait for ever for a process that was killed
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _end_with_parent) as pool:
            problems += [problem for problem in pool.map(partial(_compiled, capability), work) if problem]
    except BrokenProcessPool:
        problems.append("A process was killed, perhaps because memory ran out. The next start compiles the rest.")
    return problems


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _compiled(capability: Capability, item: Kernel | str) -> str:
    """Compile one kernel in a forked process. Returns the problem, or an empty text."""
    try:
        if isinstance(item, Kernel):
            compile_cubin(item)
        else:
            compile_line(item, capability)
    except Exception as error:  # a kernel that is not compiled here is compiled at its first use
        name = item.name if isinstance(item, Kernel) else json.loads(item)["kernel"]
        return f"{name}: {type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[bool]:
    """Hold a lock file; yields whether this process is the only one that compiles into this folder."""
    import fcntl

    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def main() -> int:
    capability = int(sys.argv[1]), int(sys.argv[2])
    marker = _marker(capability)
    if marker is None:
        raise Scail2Error(f"There is no list of kernels for compute capability {capability[0]}.{capability[1]}.")
    marker.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(marker.with_suffix(".lock")) as alone:
        if not alone or marker.exists():
            return 0
        lines = list_of(capability).read_text().splitlines()
        processes = max(1, min(PROCESSES, len(os.sched_getaffinity(0)) - 2))
        problems = compile_all(capability, lines, processes)
        print("\n".join(problems))
        if not problems:
            marker.touch()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
