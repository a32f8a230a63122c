"""Measure times, memory and ceilings, and describe the machine.

Times are CUDA events around back-to-back calls (a wall clock on a CPU). Compared calls alternate, sample by sample,
because the clocks of a GPU at its power limit drift by 10 % within seconds. Memory is read from the allocator (memory
of tensors) and from the driver (all memory in use on the GPU).
"""

import datetime
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from scail2_rt.benchmarks.report.record import Timing
from scail2_rt.runtime.session.report import processor_name, versions

Call = Callable[[], object]
SAMPLE_S = 0.25  # minimum duration of a sample on a GPU; short kernels are repeated
GEMM = (16_384, 5120, 13_824)  # rows, in, out: the first matrix product of the feed-forward stage, for one chunk
COPY_BYTES = 2 << 30
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def synchronise(device: torch.device) -> None:
    """Wait for all work on a GPU; no effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(calls: Mapping[str, Call], device: torch.device, runs: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time several calls alternately. On a GPU, a sample repeats the call for about `SAMPLE_S` seconds, at most 1,000
    times. runs: samples per call; warm_up: calls before the first sample."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(warm_up):
            once = time_sample(call, device)
        repeats[name] = max(1, min(int(SAMPLE_S / max(once, 1e-6)), 1000)) if device.type == "cuda" else 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            samples[name].append(time_sample(call, device, repeats[name]))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def time_call(call: Call, device: torch.device, runs: int, warm_up: int = 2) -> Timing:
    """Time one call, as `time_calls`."""
    return time_calls({"": call}, device, runs, warm_up)[""]


def time_sample(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, over `repeats` calls."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


@contextmanager
def memory_peaks(device: torch.device, interval_s: float = 0.02) -> Iterator[dict[str, float]]:
    """Yield a dictionary that is filled at the end with the peaks of GPU memory in GiB; it stays empty on a CPU.

    `driver_peak_gib` is sampled every `interval_s` seconds and counts all processes on the GPU. The allocator's cache
    is emptied first."""
    peaks: dict[str, float] = {}
    if device.type != "cuda":
        yield peaks
        return
    synchronise(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    highest, done = [0.0], threading.Event()

    def watch() -> None:
        while True:
            free, total = torch.cuda.mem_get_info(device)
            highest[0] = max(highest[0], (total - free) / 2**30)
            if done.wait(interval_s):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        synchronise(device)
        done.set()
        watcher.join()
        free, total = torch.cuda.mem_get_info(device)
        peaks["allocator_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["driver_peak_gib"] = max(highest[0], (total - free) / 2**30)


def describe_run(device: torch.device, **options: Any) -> dict[str, Any]:
    """The description of a run: command, date, device, system, versions, GPU state and `options`."""
    run: dict[str, Any] = {
        "command": " ".join(["scail2-rt", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": processor_name(),
        "system": platform.platform(),
        "versions": versions(),
        **options,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        run["device"] = properties.name
        run["capability"] = f"sm{properties.major}{properties.minor}"
        run["memory_gib"] = round(properties.total_memory / 2**30, 1)
        run["versions"] = {**run["versions"], "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        run["gpu_state"] = gpu_state()
    return run


def gpu_state() -> dict[str, str]:
    """Current clocks, power and temperature from nvidia-smi; empty if it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "-i", "0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in answer.split(",")), strict=False))


def ceilings(device: torch.device) -> dict[str, tuple[Call, float]]:
    """Name → (call, its FLOP or bytes moved). The calls measure the best rates of PyTorch's libraries here."""
    if device.type != "cuda":
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        source, target = torch.zeros(1 << 22), torch.empty(1 << 22)
        return {
            "gemm_fp32": (lambda: a @ b, 2.0 * 512**3),
            "copy": (lambda: target.copy_(source), 2.0 * source.nbytes),
        }
    rows, width, out = GEMM
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    w = torch.randn(out, width, device=device, dtype=torch.bfloat16) / width**0.5
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, tuple[Call, float]] = {
        "gemm_bf16": (lambda: x @ w.T, 2.0 * rows * width * out),
        "copy": (lambda: target.copy_(source), 2.0 * COPY_BYTES),
    }
    if torch.cuda.get_device_capability(device) >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        row_scale, column_scale = torch.ones(rows, 1, device=device), torch.ones(1, out, device=device)
        found["gemm_fp8"] = (
            lambda: torch._scaled_mm(x8, w8.T, row_scale, column_scale, out_dtype=torch.bfloat16, use_fast_accum=True),
            2.0 * rows * width * out,
        )
    return found
