"""What `verify` prints for others to read: one block about plans on a card, to be pasted into a report.

Nobody who works on this project has an RTX card, so what a run there shows must fit into one message: card, driver and
versions, what passed and what failed, the milliseconds of every kind of stage beside the torch executor's on the same
card, a whole denoising step in both, and the memory that it takes. Stages of one family are one line.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.engines.folder.manifest import read_manifest
from scail2_rt.engines.registry import backend
from scail2_rt.engines.tensorrt_backend.targets import target_of
from scail2_rt.engines.verify.verify import StageResult, VerifyReport
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.jobs.doctor import gpus_of_driver
from scail2_rt.runtime.pipeline.cuda_graph import GraphPool
from scail2_rt.runtime.pipeline.transformer import References, Schedule, Transformer, context_kv

STEP_SIZES = ((81, 512, 896), (33, 512, 896))  # frames, height, width: the first that fits
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StepTime:
    """A denoising step of one pass. seconds: the median, None when it could not be run (`fault` says why); peak_gib: of
    PyTorch's allocator; device_gib: in use on the GPU in all (a library's own memory is in it alone)."""

    backend: str
    size: str
    seconds: float | None
    peak_gib: float = 0.0
    device_gib: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.backend} failed at {self.size}: {self.fault}"
        memory = f", peak {self.peak_gib:.1f} GiB, on the device {self.device_gib:.1f} GiB" if self.device_gib else ""
        return f"{self.backend} {self.seconds * 1e3:.4g} ms at {self.size}{memory}"


def step_time(
    directory: Path, name: str, sizes: Sequence[tuple[int, int, int]] = STEP_SIZES, repeats: int = 5
) -> StepTime:
    """Time a step on random inputs, in a CUDA graph where the engines record one; the next size when one fails."""
    found: StepTime | None = None
    for frames, height, width in sizes:
        size = f"{height}x{width}x{frames}"
        try:
            return _timed(directory, name, Layout.of(frames, height, width), size, repeats)
        except (Scail2Error, RuntimeError) as error:  # PyTorch's OutOfMemoryError is a RuntimeError
            found = StepTime(name, size, None, fault=" ".join(str(error).split())[:300])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    assert found is not None
    return found


def _timed(directory: Path, name: str, layout: Layout, size: str, repeats: int) -> StepTime:
    with torch.inference_mode(), open_engines(directory, name, Execution()) as engines:
        on_gpu = engines.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step = _step(engines, layout)
        seconds = []
        for run in range(repeats + 3):  # loads and compiles; is recorded; is replayed for the first time
            started = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if run >= 3:
                seconds.append(time.perf_counter() - started)
        peak = device = 0.0
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            peak, device = torch.cuda.max_memory_allocated() / GIB, (total - free) / GIB
        return StepTime(name, size, statistics.median(seconds), peak, device)


def _step(engines: EngineSet, layout: Layout) -> Callable[[], object]:
    """A step of one pass on random inputs, everything that is constant over the steps done."""
    config = engines.config.dit
    assert config is not None
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(engines.device)

    f, h, w, masks = layout.frames, layout.height, layout.width, config.mask_channels
    contexts = context_kv(engines, [normal(40, config.text_dim)], normal(257, config.clip_dim))
    transformer = Transformer(engines, layout, contexts, GraphPool())
    shown = normal(16, 1, h, w), normal(masks, 1, h, w), normal(16, 0, h, w), normal(masks, 0, h, w)
    transformer.show_references(References(*shown))
    transformer.show_driving(normal(16, f, h // 2, w // 2), normal(masks, f, h // 2, w // 2))
    noise = normal(16, f, h, w)
    history, schedule = noise.new_zeros(4, f, h, w), Schedule.of(engines, [900.0])
    return lambda: transformer.velocities(noise, history, schedule, 0)


def block_for_report(report: VerifyReport) -> str | None:
    """The block, with steps timed, where plans were tested on a card; else None: there is nothing to learn."""
    tested = list(dict.fromkeys(result.backend for result in report.stages))
    if not torch.cuda.is_available() or not any(backend(name).needs_gpu for name in tested):
        return None
    steps = [step_time(Path(report.directory), name) for name in tested]
    versions = {"scail2-rt": version("scail2-rt"), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    return card_block(report, steps, versions)


def card_block(report: VerifyReport, steps: Sequence[StepTime], versions: Mapping[str, str]) -> str:
    """The block. versions: of libraries, beside those that the manifest names."""
    manifest = read_manifest(Path(report.directory))
    cards = [
        f"{gpu.name}, {target_of(gpu.capability)}, {gpu.total_gib:.1f} GiB, driver {gpu.driver}"
        for gpu in gpus_of_driver()
    ]
    named = {**versions, **{k: v for record in manifest.executors for k, v in record.versions.items()}}
    lines = [
        "```",
        f"scail2-rt verify: {'PASS' if report.passed else 'FAIL'} ({report.precision})",
        f"card: {'; '.join(cards) or 'none'}",
        f"system: {platform.platform(terse=True)}, Python {platform.python_version()}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in sorted(named.items())),
        *(str(check) for check in report.checks),
        *family_rows(report),
        *(f"step: {step}" for step in steps),
        *(f"FAIL {result.stage}: {result}" for result in report.stages if not result.passed),
        "```",
    ]
    return "\n".join(lines)


def family_rows(report: VerifyReport) -> list[str]:
    """One line per family of stages, as `_row`."""
    config = read_manifest(Path(report.directory)).config
    families = {name: d.family or name for name, d in stage_definitions(config).items()}
    groups: dict[str, list[StageResult]] = {}
    for result in report.stages:
        groups.setdefault(families[result.stage], []).append(result)
    return [_row(family, results) for family, results in groups.items()]


def _row(family: str, results: Sequence[StageResult]) -> str:
    """One family: how many stages passed, the worst error, and the median milliseconds of each executor."""
    parts = []
    for name in dict.fromkeys(result.backend for result in results):
        group = [result for result in results if result.backend == name]
        passed, error = sum(result.passed for result in group), max(result.error or 0.0 for result in group)
        milliseconds = statistics.median(result.median_s for result in group) * 1e3
        parts.append(f"{name} {passed}/{len(group)} error {error:.2g} {milliseconds:.3g} ms")
    return f"{'PASS' if all(result.passed for result in results) else 'FAIL'} {family}: {' | '.join(parts)}"
