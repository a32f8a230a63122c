"""The context of a section: model, device, options and results.

A section calls `add` for every result. Inside `attempt`, an exception becomes a failed row, so that one failing kernel
does not end a run. The results are saved after every row.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from scail2_rt.benchmarks.report.record import Kind, Results, Row, Timing
from scail2_rt.benchmarks.report.table import line
from scail2_rt.benchmarks.speed.harness import ceilings, describe_run, gpu_state, memory_peaks, time_calls
from scail2_rt.benchmarks.speed.models import Work
from scail2_rt.export.models.config import DiTConfig, ModelConfig
from scail2_rt.export.models.precision import Precision

NEEDS_GPU = "not measured: needs a GPU"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `scail2-rt bench`.

    config            model name
    weights           "random" or the path of an engine folder
    sizes             clip sizes to measure
    runs              timed runs per row
    attention         one variant; "auto": all (section attention) or the default (other sections)
    work              folder for random engines, cases and videos
    output            result file; None: not saved
    only              shell patterns of the rows to measure; (): all
    segments          segments of the clip in section generate
    gpus              GPUs that share a forward pass or a generation
    clients, queued   polling clients and queued jobs of section serve
    steps, limits, measure
                      schedules, memory limits and largest number of steps that section grid runs"""

    config: str
    weights: str
    sizes: tuple[Work, ...]
    runs: int
    attention: str
    work: Path
    output: Path | None = None
    only: tuple[str, ...] = ()
    segments: int = 1
    gpus: int = 1
    clients: int = 200
    queued: int = 2000
    steps: str = "4,6,40:5"
    limits: str = "none,24,16,12"
    measure: int = 6

    @property
    def folder(self) -> Path | None:
        """The engine folder given by `weights`; None for random weights."""
        return None if self.weights == "random" else Path(self.weights)


@dataclass(slots=True)
class Bench:
    """A running section: its options, model, device and results so far."""

    options: Options
    model: ModelConfig
    device: torch.device
    results: Results
    debug: bool = False
    _failures: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, options: Options, model: ModelConfig, section: str) -> "Bench":
        """Describe the run and measure the ceilings, the first rows of every result."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = describe_run(device, section=section, weights=options.weights, runs=options.runs)
        bench = cls(options, model, device, Results(options.config, (run,), {}))
        for name, (call, amount) in ceilings(device).items():
            with bench.attempt(f"ceiling/{name}", "ceiling"):
                timing = time_calls({name: call}, device, options.runs)[name]
                rate = amount / timing.median_s / 1e12
                copied, computed = (rate, None) if name == "copy" else (None, rate)
                bench.add(f"ceiling/{name}", timing, "ceiling", tbytes_s=copied, tflops=computed)
        del call
        bench.free()
        return bench

    @property
    def dit(self) -> DiTConfig:
        """The transformer's configuration."""
        assert self.model.dit is not None
        return self.model.dit

    @property
    def on_gpu(self) -> bool:
        """Whether the measurements run on a GPU."""
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions to measure: bf16, and fp8 if the GPU supports it. On a CPU both, to test the code."""
        if self.on_gpu and torch.cuda.get_device_capability(self.device) < (8, 9):
            return ("bf16",)
        return ("fp8", "bf16")

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the failed rows."""
        return tuple(self._failures)

    def wants(self, name: str) -> bool:
        """Whether `options.only` selects this row."""
        return not self.options.only or any(fnmatch(name, pattern) for pattern in self.options.only)

    def ceiling(self, name: str) -> float | None:
        """The measured ceiling: TFLOP/s for `gemm_bf16` and `gemm_fp8`, TB/s for `copy`; None if not measured. On a CPU
        the fp32 ceiling stands for every GEMM."""
        name = name if self.on_gpu or name == "copy" else "gemm_fp32"
        return self.results.value(f"ceiling/{name}", "tbytes_s" if name == "copy" else "tflops")

    def rate(self, timing: Timing, ceiling: str, amount: float) -> dict[str, Any]:
        """The rate of a call and its percentage of a ceiling. amount: FLOP, or bytes for the ceiling `copy`."""
        reached, best = amount / timing.median_s / 1e12, self.ceiling(ceiling)
        unit = "tbytes_s" if ceiling == "copy" else "tflops"
        return {unit: reached, "percent_of_ceiling": 100 * reached / best if best else None}

    def add(self, name: str, timing: Timing | None = None, kind: Kind = "ours", note: str = "", **values: Any) -> None:
        """Add a row. values: further values, of which None is left out; `breakdown`: seconds by kind of work."""
        breakdown = values.pop("breakdown", {})
        kept = {key: float(value) for key, value in values.items() if value is not None}
        self._store(Row(name, kind, timing, kept, breakdown, note))

    def skip(self, name: str, reason: str = NEEDS_GPU, kind: Kind = "ours") -> None:
        """Add a row that was not measured, with the reason."""
        self._store(Row(name, kind, note=reason))

    @contextmanager
    def attempt(self, name: str, kind: Kind = "ours") -> Iterator[None]:
        """Turn an exception inside into a failed row `name`. KeyboardInterrupt is not caught."""
        try:
            yield
        except Exception as error:
            if self.debug:
                traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._failures.append(name)
            self._store(Row(name, kind, failure=text[:500]))
        self.free()

    def free(self) -> None:
        """Release cached GPU memory, so that the next measurement starts with an empty cache."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def peaks(self) -> Any:
        """`harness.memory_peaks` of this device."""
        return memory_peaks(self.device)

    def finish(self) -> None:
        """Record the GPU's state after the measurements and save the results."""
        if self.on_gpu:
            run = {**self.results.runs[0], "gpu_state_after": gpu_state()}
            self.results = Results(self.results.config, (run,), self.results.rows)
        self._save()

    def _store(self, row: Row) -> None:
        self.results = self.results.with_row(row)
        print(line(row), file=sys.stderr, flush=True)
        self._save()

    def _save(self) -> None:
        if self.options.output is not None:
            self.results.save(self.options.output)
