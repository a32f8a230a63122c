"""`verify`: the acceptance test of an engine folder against the checkpoint that it was built from.

There are four groups of checks, because each finds faults that the others miss:

* Files: hashes in the manifest, and checksums, which identify a damaged stage and its repair.
* Weights: every value of the store equals the checkpoint's value in the folder's precision, bit by bit.
* Stages: every stage of every executor agrees with the fp32 stage on random inputs. Damaged stages are run too.
* Execution: CUDA graphs give the same values as eager runs, fp8 plans multiply fp8 operands, and all are timed.

Only one stage is in memory at a time, so that a 14B folder needs the memory of its largest stage in fp32.
"""

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.engines.folder.damage import CHECK, Health, check_health
from scail2_rt.engines.folder.manifest import (
    Identity,
    Manifest,
    check_folder,
    describe_command,
    differences,
    read_manifest,
)
from scail2_rt.engines.folder.sums import DamagedError
from scail2_rt.engines.observer import BuildObserver, Phase, SilentObserver
from scail2_rt.engines.tensorrt_backend.builder import fp8_linears
from scail2_rt.engines.tensorrt_backend.layers import fault as operand_fault
from scail2_rt.engines.tensorrt_backend.layers import layers_of_json
from scail2_rt.engines.verify.against import compare, require_polygraphy
from scail2_rt.engines.verify.stage_check import (
    TOLERANCES,
    Reference,
    level,
    median_s,
    replayed,
    stage_inputs,
    worst_error,
)
from scail2_rt.engines.verify.store_check import check_files, check_sources, check_tables, check_weights
from scail2_rt.export.checkpoint.lora import LoRASpec, apply_loras
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.open import Checkpoint
    from scail2_rt.export.checkpoint.tensors import TensorSource
    from scail2_rt.export.stages.spec import StageDefinition


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to test.

    backends   executors to test; () for all in the folder
    repeats    timed runs per stage, at least 3
    rows       rows (tokens) of a token-wise stage, at least 1
    seed       seed of the random inputs
    against    executor of the folder with whose outputs the tested executors are also compared

    Raises InputError for numbers out of range."""

    directory: Path
    backends: tuple[str, ...] = ()
    repeats: int = 3
    rows: int = 64
    seed: int = 0
    against: str | None = None

    def __post_init__(self) -> None:
        if self.repeats < 3 or self.rows < 1:
            raise InputError(
                f"--repeats {self.repeats} and --rows {self.rows} were given. Use at least 3 repeats and 1 row."
            )


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the folder. passed: None if it does not apply."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{_word(self.passed)} {self.name}: {self.detail}"


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage in one executor.

    level      key of `TOLERANCES`
    error      max |actual - reference| / max |reference| of the worst output; None if nothing could be compared
    median_s   median seconds of a run
    fault      a failure other than the error, or None
    against    error against another executor, if compared"""

    stage: str
    backend: str
    level: str
    error: float | None
    tolerance: float
    median_s: float
    fault: str | None
    passed: bool
    against: float | None = None

    def __str__(self) -> str:
        if self.fault is not None or self.error is None:
            return f"{self.backend}: {self.fault}"
        other = "" if self.against is None else f"; {self.against:.2g} against the other executor"
        return f"{self.backend} {self.error:.2g} (tolerance {self.tolerance:g}{other}), {self.median_s * 1e3:.3g} ms"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`. remedy: how to repair the folder, "" if all passed; wall_s: seconds."""

    directory: str
    precision: str
    passed: bool
    checks: tuple[Check, ...]
    stages: tuple[StageResult, ...]
    wall_s: float
    remedy: str = ""
    tolerances: dict[str, float] = field(default_factory=lambda: dict(TOLERANCES))

    @property
    def text(self) -> str:
        """All lines: checks, stages with their executors side by side, and the summary."""
        lines = [str(check) for check in self.checks]
        by_stage: dict[str, list[StageResult]] = {}
        for result in self.stages:
            by_stage.setdefault(result.stage, []).append(result)
        lines += [stage_line(results) for results in by_stage.values()]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """A line per executor, the repair if something failed, and the verdict."""
        lines = []
        for key in dict.fromkeys((result.backend, result.level) for result in self.stages):
            group = [result for result in self.stages if (result.backend, result.level) == key]
            error, stage = max((result.error or 0.0, result.stage) for result in group)
            lines.append(
                f"{key[0]} in {key[1]}: {counted(len(group), 'stage')}, worst error {error:.2g} ({stage}), tolerance "
                f"{group[0].tolerance:g}, {sum(result.median_s for result in group) * 1e3:.3g} ms in all"
            )
        failed = [check.name for check in self.checks if check.passed is False]
        failed += [f"{result.stage} in {result.backend}" for result in self.stages if not result.passed]
        verdict = f"FAIL {self.directory}: {', '.join(failed)}" if failed else f"PASS {self.directory}"
        lines += [f"To repair: {self.remedy}"] if self.remedy else []
        return "\n".join([*lines, verdict])


def stage_line(results: Sequence[StageResult]) -> str:
    """Return the line of one stage, with its executors side by side."""
    return f"{_word(all(r.passed for r in results))} {results[0].stage}: {' | '.join(map(str, results))}"


def _word(passed: bool | None) -> str:
    return {True: "PASS", False: "FAIL", None: "----"}[passed]


def verify(
    request: VerifyRequest,
    checkpoint: "Checkpoint",
    progress: Callable[[str], None] = lambda line: None,
    observer: BuildObserver | None = None,
) -> VerifyReport:
    """Test the folder. Faults of its contents are in the report and are not raised.

    progress   receives each line of `VerifyReport.text`, except the summary, as soon as it is known
    observer   receives the progress of the checks of files, weights and stages

    Raises InputError if the path is not an engine folder, its store has a damaged header, the checkpoint is of another
    model, a LoRA in the manifest is missing, or an executor cannot run on this machine.
    """
    started, observer = time.monotonic(), observer or SilentObserver()
    manifest = read_manifest(request.directory)
    definitions = stage_definitions(manifest.config)
    check_folder(request.directory, manifest, definitions)
    _check_model(manifest, checkpoint)
    sources = _fused(manifest, checkpoint)
    health = check_health(request.directory, manifest, observer)
    if any(damage.kind == "header" for damage in health.damages):
        raise DamagedError(health.text)
    if request.against is not None:
        require_polygraphy()
    sets = _open(request, manifest)
    twin = None if request.against is None else open_engines(request.directory, request.against, compare=False)
    store = next(iter(sets.values())).store
    checks: list[Check] = []

    def add(name: str, passed: bool | None, detail: str) -> None:
        checks.append(Check(name, passed, detail))
        progress(str(checks[-1]))

    try:
        add("checksums", not health.damages if health.checked else None, health.text)
        add("files", *check_files(request.directory, manifest, observer))
        add("sources", *check_sources(manifest, checkpoint, observer))
        add("weights", *check_weights(manifest, definitions, sources, store, observer))
        add("tables", *check_tables(request.directory, manifest, sources.get("dit")))
        stages = []
        phase = Phase(observer, CHECK, {stage.name: stage.weight_bytes for stage in manifest.stages})
        for definition in definitions.values():
            step = phase.start(definition.name)
            results = _check_stage(definition, manifest, sources[definition.component], sets, twin, request)
            stages += results
            progress(stage_line(results))
            phase.finish(step)
        add("graph against eager", *_graph_verdict(sets.values(), stages))
        add("operand types", *_operand_verdict(sets, stages))
    finally:
        for engines in (*sets.values(), *([twin] if twin is not None else [])):
            engines.close()
    passed = all(check.passed is not False for check in checks) and all(result.passed for result in stages)
    for engines in sets.values():
        if engines.device.type == "cuda":
            engines.executor.backend.remember(request.directory, manifest, passed)
    wall_s = time.monotonic() - started
    remedy = _remedy(request.directory, manifest, checks, health) if not passed else ""
    return VerifyReport(
        str(request.directory), manifest.precision, passed, tuple(checks), tuple(stages), wall_s, remedy
    )


def _remedy(directory: Path, manifest: Manifest, checks: Sequence[Check], health: Health) -> str:
    """Return how to repair the failed checks, with the command."""
    failed = {check.name for check in checks if check.passed is False}
    rebuild = describe_command(manifest, directory)
    if "checksums" in failed:
        return health.remedy
    if "sources" in failed:
        return f"restore the files of {shlex.quote(manifest.checkpoint)}, or rebuild from the current files: {rebuild}"
    return rebuild


def open_for(directory: Path, checkpoint: Path, parts: Mapping[str, Path] | None = None) -> "Checkpoint":
    """Open the checkpoint with the components that the engine folder has.

    parts: "vae", "umt5", "clip", "tokenizer" → path. Parts that are not given are opened where the build found them, if
    they were named separately. Raises InputError if parts are missing or cannot be read."""
    from scail2_rt.export.checkpoint.open import COMPONENTS, open_checkpoint

    manifest = read_manifest(directory)
    components = [name for name in COMPONENTS if getattr(manifest.config, name) is not None]
    named = {name: Path(path) for name, path in manifest.overrides.items()}
    return open_checkpoint(checkpoint, **{**named, **(parts or {})}, components=components)


def _check_model(manifest: Manifest, checkpoint: "Checkpoint") -> None:
    """Raise InputError if the sizes of the checkpoint's networks differ from the folder's."""
    wanted = dataclasses.replace(manifest.identity, config=checkpoint.config)
    found = differences(manifest, Identity(wanted.config, wanted.precision, wanted.files, wanted.loras))
    if found:
        listed = "; ".join(map(str, found))
        raise InputError(f"{checkpoint.path} is not the model of the engine folder: {listed}. Give its checkpoint.")


def _fused(manifest: Manifest, checkpoint: "Checkpoint") -> "dict[str, TensorSource]":
    """Return component → tensors, with the LoRAs of the manifest fused. Raises InputError if a LoRA is missing."""
    sources: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    if manifest.loras:
        for lora in manifest.loras:
            if not Path(lora.file.path).is_file():
                raise InputError(
                    f"The engine folder was built with the LoRA {lora.file.path}, which does not exist. Restore it."
                )
        specs = [LoRASpec(Path(lora.file.path), lora.strength) for lora in manifest.loras]
        sources["dit"] = apply_loras(sources["dit"], specs, manifest.lora_partial)
    return sources


def _open(request: VerifyRequest, manifest: Manifest) -> dict[str, EngineSet]:
    """Open the executors to test. Raises InputError if one cannot run on this machine; the message names the others."""
    sets: dict[str, EngineSet] = {}
    try:
        for backend in request.backends or manifest.backends:
            sets[backend] = open_engines(request.directory, backend, compare=False)
    except InputError as error:
        for engines in sets.values():
            engines.close()
        others = [name for name in manifest.backends if name != backend]
        hint = f" Use --backend {' --backend '.join(others)} to test the others." if others else ""
        raise InputError(f"{error}{hint}") from error
    return sets


def _check_stage(
    definition: "StageDefinition",
    manifest: Manifest,
    source: "TensorSource",
    sets: Mapping[str, EngineSet],
    twin: EngineSet | None,
    request: VerifyRequest,
) -> list[StageResult]:
    """Compare a stage in every executor with the fp32 stage, on inputs rounded to the executor's types."""
    reference = Reference(definition, source)
    plain = stage_inputs(definition, manifest.config, request.rows, request.seed)
    results = []
    for backend, engines in sets.items():
        numerics = engines.numerics(definition.name)
        name = level(numerics)
        result = StageResult(definition.name, backend, name, None, TOLERANCES[name], 0.0, None, False)
        given = [x.to(spec.dtype) for x, spec in zip(plain, definition.io(numerics)[0], strict=True)]
        try:
            results.append(_measured(result, reference, given, engines, request.repeats))
            if twin is not None and results[-1].passed:
                results[-1] = _compared(results[-1], definition, given, engines, twin)
        except (Scail2Error, RuntimeError) as error:  # one stage that cannot run does not hide the others
            results.append(dataclasses.replace(result, fault=" ".join(str(error).split())))
        finally:
            engines.release(definition.name)
    return results


def _compared(
    result: StageResult, definition: "StageDefinition", given: Sequence[Tensor], engines: EngineSet, twin: EngineSet
) -> StageResult:
    """Return the result, completed with a comparison with another executor (`twin`) of the folder."""
    inputs, outputs = definition.io(twin.numerics(result.stage))
    theirs = [x.to(twin.device, spec.dtype) for x, spec in zip(given, inputs, strict=True)]
    try:
        expected = twin.run(result.stage, *theirs)
    finally:
        twin.release(result.stage)
    actual = engines.run(result.stage, *(tensor.to(engines.device) for tensor in given))
    tolerance = max(result.tolerance, TOLERANCES[level(twin.numerics(result.stage))])
    error, fault = compare([spec.name for spec in outputs], actual, expected, tolerance)
    return dataclasses.replace(result, fault=fault, passed=fault is None, against=error)


def _measured(
    result: StageResult,
    reference: "Reference",
    given: Sequence[Tensor],
    engines: EngineSet,
    repeats: int,
) -> StageResult:
    """Return the result with error, median time and fault."""
    name = result.stage
    expected = reference(given)
    inputs = [tensor.to(engines.device) for tensor in given]
    actual = engines.run(name, *inputs)
    error = worst_error(actual, expected)
    if error is None:
        return dataclasses.replace(result, fault="its outputs have a wrong shape, or values that are not finite")
    seconds = median_s(lambda: engines.run(name, *inputs), repeats, engines.device)
    fault = None
    if has_graphs(engines):
        difference = replayed(lambda: engines.run(name, *inputs), actual)
        fault = None if difference == 0 else f"the CUDA graph's result differs from the eager one by {difference:.2g}"
    report = engines.plan_report(name)
    if fault is None and report is not None:
        linears = fp8_linears(engines.definitions[name], engines.numerics(name))
        fault = operand_fault(layers_of_json(report), linears)
    passed = fault is None and error <= result.tolerance
    return dataclasses.replace(result, error=error, median_s=seconds, fault=fault, passed=passed)


def has_graphs(engines: EngineSet) -> bool:
    """Return whether PyTorch can record this executor in a CUDA graph. It cannot if the executor has its own stream."""
    return engines.device.type == "cuda" and engines.executor.follows_stream


def _graph_verdict(sets: Iterable[EngineSet], stages: Sequence[StageResult]) -> tuple[bool | None, str]:
    tested = {engines.backend for engines in sets if has_graphs(engines)}
    if not tested:
        return None, "not applicable: no CUDA graphs on cpu"
    count = sum(result.backend in tested for result in stages)
    failed = [result.stage for result in stages if result.fault is not None and "CUDA graph" in result.fault]
    return not failed, f"{count - len(failed)} of {counted(count, 'stage')} give the same values when replayed"


def _operand_verdict(sets: Mapping[str, EngineSet], stages: Sequence[StageResult]) -> tuple[bool | None, str]:
    planned = [name for name, engines in sets.items() if engines.executor.reports_plans]
    if not planned:
        return None, "not applicable: no TensorRT plans were tested"
    fp8 = [result for result in stages if result.backend in planned and result.level == "fp8"]
    failed = [result.stage for result in fp8 if result.fault is not None]
    return not failed, f"{len(fp8) - len(failed)} of {counted(len(fp8), 'fp8 stage')} multiply fp8 operands"
