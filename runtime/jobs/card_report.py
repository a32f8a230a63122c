"""The report block of `verify`: one block of text about TensorRT plans on a GPU, to be pasted into an issue.

The project has no RTX card to test on, so the block must hold everything needed: GPU, driver, versions, passed and
failed checks, milliseconds per stage family of each executor, and time and memory of a denoising step of each executor.
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
    """A denoising step of one guidance pass.

    size         HxWxT in pixels and frames
    seconds      median; None if the step failed (see `fault`)
    peak_gib     peak of PyTorch's allocator
    device_gib   all GPU memory in use, including libraries"""

    backend: str
    size: str
    seconds: float | None
    peak_gib: float = 0.0
    device_gib: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.backend} failed at {self.size}: {self.fault}"
        memory = f", peak {self.peak_gib:.1f} GiB, GPU in use {self.device_gib:.1f} GiB" if self.device_gib else ""
        return f"{self.backend} {self.seconds * 1e3:.4g} ms at {self.size}{memory}"


def step_time(
    directory: Path, name: str, sizes: Sequence[tuple[int, int, int]] = STEP_SIZES, repeats: int = 5
) -> StepTime:
    """Return the time of a denoising step on random inputs, with CUDA graphs if the engines record them. The first size
    (frames, height, width) that runs is used. name: of the executor; repeats: timed runs."""
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
        for run in range(repeats + 3):  # warm-up: load and compile, record, first replay
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
    """Return a function that runs one step of one pass on random inputs. Everything constant over steps is computed
    before."""
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
    """Return the block, with timed steps, if plans were tested on a GPU; else None."""
    tested = list(dict.fromkeys(result.backend for result in report.stages))
    if not torch.cuda.is_available() or not any(backend(name).needs_gpu for name in tested):
        return None
    steps = [step_time(Path(report.directory), name) for name in tested]
    versions = {"scail2-rt": version("scail2-rt"), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    return card_block(report, steps, versions)


def card_block(report: VerifyReport, steps: Sequence[StepTime], versions: Mapping[str, str]) -> str:
    """Return the block. versions: library → version, in addition to those in the manifest."""
    manifest = read_manifest(Path(report.directory))
    cards = [
        f"{gpu.name}, {target_of(gpu.capability)}, {gpu.total_gib:.1f} GiB, driver {gpu.driver}"
        for gpu in gpus_of_driver()
    ]
    named = {**versions, **{k: v for record in manifest.executors for k, v in record.versions.items()}}
    lines = [
        "```",
        f"scail2-rt verify: {'PASS' if report.passed else 'FAIL'} ({report.precision})",
        f"GPU: {'; '.join(cards) or 'none'}",
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
    """Return one line per family of stages."""
    config = read_manifest(Path(report.directory)).config
    families = {name: d.family or name for name, d in stage_definitions(config).items()}
    groups: dict[str, list[StageResult]] = {}
    for result in report.stages:
        groups.setdefault(families[result.stage], []).append(result)
    return [_row(family, results) for family, results in groups.items()]


def _row(family: str, results: Sequence[StageResult]) -> str:
    """Return the line of one family: per executor the passed stages, the worst error and the median milliseconds."""
    parts = []
    for name in dict.fromkeys(result.backend for result in results):
        group = [result for result in results if result.backend == name]
        passed, error = sum(result.passed for result in group), max(result.error or 0.0 for result in group)
        milliseconds = statistics.median(result.median_s for result in group) * 1e3
        parts.append(f"{name} {passed}/{len(group)} error {error:.2g} {milliseconds:.3g} ms")
    return f"{'PASS' if all(result.passed for result in results) else 'FAIL'} {family}: {' | '.join(parts)}"
