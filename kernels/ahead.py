"""Compile kernels before their first use, in parallel processes that need neither a GPU nor PyTorch.

A list per compute capability (`recorded/sm90.jsonl`) has one line per kernel of a generation: everything that its
machine code depends on. Compilation begins in the order of the lines, which is that of first use; CUDA C++ kernels,
which take longest, are first. `start_early` runs this module in a separate process before the command imports PyTorch;
`start` does so when the torch backend opens a folder, for callers without a command line. The process finds the GPUs
and compiles the list into the cache folders of Triton and NVRTC. Meanwhile the command goes on and compiles what it
needs itself. A marker in the cache folder then says that the list is done, and nothing is started the next time.
`Recorder` and `cuda_lines` make the lists (`python -m scail2_rt.benchmarks.speed.record_kernels`).
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scail2_rt.kernels.cache_folder import kernel_directory, use_kernel_cache
from scail2_rt.kernels.cuda.nvrtc import Kernel, compile_cubin

Capability = tuple[int, int]
WARP = 32
# Values of --backend with which a session may launch these kernels. The registry is not asked: it imports PyTorch.
LAUNCHING = ("auto", "torch")
HERE = Path(__file__).parent
LISTS = HERE / "recorded"
PROCESSES = 16  # at most
DRIVER = "libcuda.so.1"
PR_SET_PDEATHSIG = 1  # of Linux's prctl
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def start_early(engines: Path, backend: str) -> None:
    """Call `start` for the GPUs of this machine, with the cache folders that a session with this engine folder uses.

    Does nothing if the backend is not torch, if `engines` is not an engine folder, or without NVIDIA's driver."""
    with contextlib.suppress(OSError):  # of the driver, and of a folder that may not be read
        if backend not in LAUNCHING or not (engines / "manifest.json").is_file():
            return
        ctypes.CDLL(DRIVER)
        use_kernel_cache(engines.absolute() / "kernels")
        start()


def start(capability: Capability | None = None) -> subprocess.Popen[bytes] | None:
    """Start compiling the kernels of this compute capability (None: of the GPUs of this machine) in a separate process.

    Returns None if there is nothing to do (no list for this capability, or everything is compiled already) or if no
    process can be started. The process ends by itself; its output is in `ahead.log` in the cache folder."""
    words = [sys.executable, "-m", "scail2_rt.kernels.ahead", *map(str, capability or ())]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        markers = [_marker(file) for file in ([list_of(capability)] if capability else LISTS.glob("*.jsonl"))]
        if any(marker is not None and not marker.exists() for marker in markers):
            _started.append(subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet))
            return _started[-1]
    return None


_started: list[subprocess.Popen[bytes]] = []  # kept, because Python warns when it drops a process that still runs


def list_of(capability: Capability) -> Path:
    """Return the path of the list for this compute capability. It may not exist."""
    return LISTS / f"sm{capability[0]}{capability[1]}.jsonl"


def _marker(file: Path) -> Path | None:
    """Return the path of a list's marker; its name depends on all that is compiled. None without a list or Triton."""
    try:
        parts = [version("triton").encode(), file.read_bytes()]
    except (PackageNotFoundError, OSError):
        return None
    with contextlib.suppress(PackageNotFoundError):
        parts.append(version("cuda-bindings").encode())
    parts += [source.read_bytes() for ending in ("py", "cu") for source in sorted(HERE.rglob(f"*.{ending}"))]
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
            "attributes": [
                [list(path), value] for path, value in compile["configs"][0].items() if path not in compile["constants"]
            ],
            "options": {name: compile[name] for name in ("num_warps", "num_stages")},
        }
        line = json.dumps(entry)
        if line not in self.lines:
            self.lines.append(line)


def cuda_lines() -> tuple[list[str], list[str]]:
    """Return the lines of the CUDA C++ kernels (for Hopper): those of an fp8 generation, and those of a bf16 one."""
    from scail2_rt.kernels.attention import hopper_attention, hopper_attention_16bit
    from scail2_rt.kernels.conv.hopper_conv import NARROW, WIDE, WIDE_SMALL

    def line(kernel: Kernel) -> str:
        return json.dumps({"kernel": str(kernel.source_file.relative_to(HERE)), "defines": dict(kernel.defines)})

    eight_bit = [*(tile.kernel() for tile in (NARROW, WIDE, WIDE_SMALL)), hopper_attention.DEFAULT]
    return [*map(line, eight_bit)], [*map(line, hopper_attention_16bit.KERNELS.values())]


def compile_line(line: str, capability: Capability) -> None:
    """Compile one line of a list into the cache of Triton or NVRTC. Raises what Triton raises, and Scail2Error."""
    entry = json.loads(line)
    if "defines" in entry:
        compile_cubin(Kernel(HERE / entry["kernel"], 0, 0, tuple(entry["defines"].items())))  # is not launched
        return
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, _, name = entry["kernel"].partition(":")
    constants = {tuple(path): value for path, value in entry["constants"]}
    attributes = {tuple(path): value for path, value in entry["attributes"]}
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):  # its cache keys list constants here too
        attributes = dict(sorted(({path: [] for path in constants} | attributes).items()))
    source = ASTSource(getattr(importlib.import_module(module), name), entry["signature"], constants, attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], WARP)
    _compile_launcher(source, compile(source, target=target, options=entry["options"]).metadata)


def _compile_launcher(source: Any, metadata: Any) -> None:
    """Compile the launcher in C that Triton has for every signature up to version 3.6. Needs NVIDIA's driver."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(AssertionError):  # Triton's sign that there is no driver
            driver.CudaLauncher(source, metadata)


def _compile_utilities() -> None:
    """Compile the C functions with which Triton loads kernels. Needs NVIDIA's driver."""
    from triton.backends.nvidia import driver

    with contextlib.suppress(Exception):  # no driver, C compiler or Python.h: the command itself says so
        driver.CudaUtils()


def compile_all(capability: Capability, lines: Sequence[str], processes: int) -> list[str]:
    """Compile `lines`. Returns the problems, one per kernel that does not compile. Raises OSError, MemoryError or
    BrokenProcessPool if the next attempt may succeed: the disk or the memory is full, or a process was killed."""
    for line in lines:  # imports every kernel's module before the processes are forked
        module, _, name = json.loads(line)["kernel"].partition(":")
        if name:
            importlib.import_module(module)
    with _forked(processes) as pool:
        utilities = pool.submit(_compile_utilities)
        problems = [problem for problem in pool.map(partial(_compiled, capability), lines) if problem]
        utilities.result()
    return problems


def _forked(processes: int) -> Any:
    """Return a pool. Unlike `multiprocessing.Pool`, it does not wait for ever for a process that was killed."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(processes, get_context("fork"), _end_with_parent)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _compiled(capability: Capability, line: str) -> str:
    """Compile one kernel in a forked process. Returns the problem, or an empty text."""
    try:
        compile_line(line, capability)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a kernel that is not compiled here is compiled at its first use
        return f"{json.loads(line)['kernel']}: {type(error).__name__}: {error}"
    return ""


def capabilities() -> list[Capability]:
    """Return the compute capabilities of the visible GPUs; none without NVIDIA's driver. PyTorch is not imported."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return []
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []

    def attribute(number: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    found = set()
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        found.add((attribute(MAJOR), attribute(MINOR)))
    return sorted(found)


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


def compile_list(file: Path, capability: Capability) -> None:
    """Compile a list unless that is done, or another process does it. The marker holds the problems, so that a kernel
    which does not compile is tried once. From here on, this process writes to `ahead.log`."""
    marker = _marker(file)
    if marker is None or marker.exists():
        return
    marker.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(marker.with_suffix(".lock")) as alone:
        if not alone or marker.exists():
            return
        with (marker.parent / "ahead.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        processes = max(1, min(PROCESSES, len(os.sched_getaffinity(0)) - 2))
        problems = "\n".join(compile_all(capability, file.read_text().splitlines(), processes))
        print(problems)
        marker.write_text(problems)


def main() -> None:
    """`python -m scail2_rt.kernels.ahead [MAJOR MINOR]`; without a compute capability, for the visible GPUs."""
    if sys.argv[1:]:
        found = [(int(sys.argv[1]), int(sys.argv[2]))]
    else:
        with _forked(1) as pool:  # the driver starts threads, and a process with threads must not be forked
            found = pool.submit(capabilities).result()
    for capability in found:
        compile_list(list_of(capability), capability)


if __name__ == "__main__":
    main()
