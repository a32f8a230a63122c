"""What a section is given: the model, the device, the options, and a place for its rows.

A section calls `add` for every result, or measures inside `attempt`, which turns whatever goes wrong into a row that
says so: one kernel that does not run must not cost the other figures of a session on a rented GPU. Results are on disk
after every row.
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
    """`weights`: "random" or an engine folder; `attention`: one variant, or "auto" for all (attention section) or the
    default (elsewhere); `only`: shell patterns of the rows to measure, () for all; `segments`: of the clip that section
    generate makes; `gpus`: that share a pass or a generation; `clients`, `queued`: of section serve; `steps`, `limits`,
    `measure`: of section grid, as on the command line; `work`: folder for
    what is written on the way (random engines, cases, videos); `output`: where results are saved."""

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
        """The engine folder that was named, if any."""
        return None if self.weights == "random" else Path(self.weights)


@dataclass(slots=True)
class Bench:
    options: Options
    model: ModelConfig
    device: torch.device
    results: Results
    debug: bool = False
    _failures: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, options: Options, model: ModelConfig, section: str) -> "Bench":
        """Describe the run and measure the ceilings, which come first in every session."""
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
        assert self.model.dit is not None
        return self.model.dit

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What is worth measuring here: fp8 where the GPU has it; on a CPU both, for the sake of the code."""
        if self.on_gpu and torch.cuda.get_device_capability(self.device) < (8, 9):
            return ("bf16",)
        return ("fp8", "bf16")

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(self._failures)

    def wants(self, name: str) -> bool:
        """Was this row asked for?"""
        return not self.options.only or any(fnmatch(name, pattern) for pattern in self.options.only)

    def ceiling(self, name: str) -> float | None:
        """TFLOP/s of `gemm_bf16`, `gemm_fp8`; TB/s of `copy`. A CPU has one GEMM ceiling, that of fp32."""
        name = name if self.on_gpu or name == "copy" else "gemm_fp32"
        return self.results.value(f"ceiling/{name}", "tbytes_s" if name == "copy" else "tflops")

    def rate(self, timing: Timing, ceiling: str, amount: float) -> dict[str, Any]:
        """What a call that does `amount` FLOP (bytes for the ceiling `copy`) reaches, and its part of the ceiling."""
        reached, best = amount / timing.median_s / 1e12, self.ceiling(ceiling)
        unit = "tbytes_s" if ceiling == "copy" else "tflops"
        return {unit: reached, "percent_of_ceiling": 100 * reached / best if best else None}

    def add(self, name: str, timing: Timing | None = None, kind: Kind = "ours", note: str = "", **values: Any) -> None:
        """One result; values that are None are left out."""
        breakdown = values.pop("breakdown", {})
        kept = {key: float(value) for key, value in values.items() if value is not None}
        self._store(Row(name, kind, timing, kept, breakdown, note))

    def skip(self, name: str, reason: str = NEEDS_GPU, kind: Kind = "ours") -> None:
        self._store(Row(name, kind, note=reason))

    @contextmanager
    def attempt(self, name: str, kind: Kind = "ours") -> Iterator[None]:
        """What is raised inside becomes a failed row `name`; Ctrl-C is not caught."""
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
        """Give cached device memory back, so that the next measurement starts from nothing."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def peaks(self) -> Any:
        return memory_peaks(self.device)

    def finish(self) -> None:
        """Note the state of the card after the hot loops."""
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
