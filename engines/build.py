"""Building an engine folder: checkpoint → weight store, tables, tokenizer, executors' artefacts, manifest.

The order makes every interruption harmless: first what can be refused (backend, options, place, disk space), then
the weights stage by stage into the store, then each executor's files, and the manifest last, atomically. A journal knows
which steps are on disk, so that the same command goes on from there. With nothing to do it answers from the manifest,
without reading a weight. One folder holds one set of weights in one precision: anything else is refused by naming the
fields that differ, and replaced only with `rebuild`; another executor adds its own files and leaves the rest alone.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.engines.backends import (
    check_precision,
    choose_backend,
    default_precision,
    gpu,
    refuse_unbuildable,
    stage_numerics,
    versions,
)
from scail2_rt.engines.journal import JOURNAL, Journal
from scail2_rt.engines.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STAGES,
    TABLES,
    TOKENIZER,
    Artefact,
    ExecutorRecord,
    Identity,
    LoRARecord,
    Manifest,
    SourceFile,
    StageRecord,
    check_folder,
    describe_command,
    differences,
    read_manifest,
    write_manifest,
)
from scail2_rt.engines.observe import BuildObserver, BuildStep, Phase, SilentObserver
from scail2_rt.engines.sources import Hasher, files_by_component, hash_file, memory_record
from scail2_rt.engines.store import STORE_NAME, StoreLayout, StoreWriter
from scail2_rt.engines.weights import EMBEDDING, StageTensors, plan_store, planned_tensors, runtime_tables, write_stage
from scail2_rt.export.errors import InputError, Scail2Error
from scail2_rt.export.precision import Precision
from scail2_rt.export.spec import StageDefinition
from scail2_rt.export.stages import stage_definitions

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint import Checkpoint
    from scail2_rt.export.lora import LoRASpec
    from scail2_rt.export.tensors import TensorSource

__all__ = ["BuildObserver", "BuildReport", "BuildRequest", "BuildStep", "SilentObserver", "build", "choose_backend"]

GRAPH_BYTES = 1 << 18  # room that one ONNX graph without weights may take, for the disk check
DISK_MARGIN = 1 << 26


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build. `components`: the parts given apart, for the rebuild command ("vae", "umt5", "clip",
    "tokenizer" → path); `precision` None: the folder's, else what suits the hardware."""

    checkpoint: Path
    output: Path
    backends: tuple[str, ...] = ("auto",)
    precision: str | None = None
    loras: "tuple[LoRASpec, ...]" = ()
    lora_partial: bool = False
    rebuild: bool = False
    components: Mapping[str, Path] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class LoRAReport:
    """How many tensors of a LoRA file were applied, and what was skipped (with `lora_partial` only)."""

    file: str
    applied: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did. `up_to_date`: there was nothing to do. `resumed_steps`: done by an interrupted call before."""

    directory: str
    backends: tuple[str, ...]
    added: tuple[str, ...]
    precision: str
    up_to_date: bool
    stages: int
    weight_bytes: int
    folder_bytes: int
    seconds: float
    resumed_steps: int = 0
    notes: tuple[str, ...] = ()
    loras: tuple[LoRAReport, ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that follows from request and checkpoint before a weight is read."""

    request: BuildRequest
    directory: Path
    checkpoint: "Checkpoint"
    precision: Precision
    backends: tuple[str, ...]
    definitions: dict[str, StageDefinition]
    tensors: dict[str, StageTensors]
    layout: StoreLayout
    sources: "dict[str, TensorSource]"


def build(
    request: BuildRequest, checkpoint: "Checkpoint", observer: BuildObserver | None = None
) -> BuildReport:
    """Make or complete the engine folder `request.output` from an open checkpoint (which may lack components).

    InputError: a backend or precision that cannot be had, a folder of other weights or options, a place that cannot be
    written or has no room. Scail2Error: a weight that the precision cannot hold, a disk that fills up.
    After an interruption of any kind the same call continues."""
    started = time.monotonic()
    noted = _Noted(observer or SilentObserver())
    refuse_unbuildable([name for name in request.backends if name != "auto"])
    directory = request.output.expanduser().absolute()
    previous = _previous(directory, request.rebuild)
    plan = _make_plan(request, directory, checkpoint, previous, noted)
    if previous is None:
        _check_room(plan)
    try:
        with _held(directory):
            identity = _identity(plan, previous, noted)
            if previous is not None:
                _check_previous(plan, previous, identity)
                if not set(plan.backends) - set(previous.backends):
                    _refresh(directory, previous, identity)
                    noted.note(f"{directory} is up to date: nothing to do.")
                    return _report(plan, previous, started, noted, added=())
            manifest, added, resumed = _Builder(plan, identity, previous, noted).run()
    except OSError as error:
        raise _disk_error(error, directory) from error
    return _report(plan, manifest, started, noted, added, resumed)


class _Noted:
    """The caller's observer, keeping the notes for the report."""

    def __init__(self, observer: BuildObserver) -> None:
        self._observer = observer
        self.notes: list[str] = []
        self.started, self.advanced, self.done = observer.started, observer.advanced, observer.done

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._observer.note(text)


def _previous(directory: Path, rebuild: bool) -> Manifest | None:
    """The manifest of a finished folder that is to be kept; refuses a place that is no engine folder."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise InputError(f"the output {directory} is a file; name a folder with -o.")
    if (directory / MANIFEST).exists():
        return None if rebuild else read_manifest(directory)
    if any(directory.iterdir()) and not (directory / JOURNAL).exists():
        raise InputError(f"the output {directory} has other files in it; name a new or empty folder with -o.")
    return None


def _make_plan(
    request: BuildRequest, directory: Path, checkpoint: "Checkpoint", previous: Manifest | None, observer: _Noted
) -> _Plan:
    backends = _backends(request, observer)
    precision = _precision(request, backends, previous, observer)
    sources: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    if request.loras:
        from scail2_rt.export.lora import apply_loras

        if "dit" not in sources:
            raise InputError("a LoRA was given, but the checkpoint has no transformer to fuse it into.")
        sources["dit"] = apply_loras(sources["dit"], request.loras, request.lora_partial)
    definitions = stage_definitions(checkpoint.config)
    tensors = planned_tensors(checkpoint.config, definitions, precision)
    layout = plan_store(tensors)
    return _Plan(request, directory, checkpoint, precision, backends, definitions, tensors, layout, sources)


def _backends(request: BuildRequest, observer: _Noted) -> tuple[str, ...]:
    chosen: list[str] = []
    for requested in request.backends or ("auto",):
        name, reason = choose_backend(requested)
        if requested == "auto":
            observer.note(f"backend {name}, because {reason}")
        if name not in chosen:
            chosen.append(name)
    return tuple(chosen)


def _precision(
    request: BuildRequest, backends: tuple[str, ...], previous: Manifest | None, observer: _Noted
) -> Precision:
    if request.precision is not None:
        return check_precision(request.precision)
    if previous is not None:
        return previous.precision
    precision, reason = default_precision(backends)
    observer.note(f"precision {precision}, because {reason}")
    return precision


def _check_room(plan: _Plan) -> None:
    """InputError when the place cannot be written or the disk has too little room for what is still to come."""
    place = plan.directory
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"the output {plan.directory} cannot be written: no right to write in {place}; choose another -o.")
    needed = plan.layout.size + DISK_MARGIN
    if "onnxruntime" in plan.backends:
        needed += GRAPH_BYTES * len(plan.definitions)
    stages = plan.directory / STAGES
    for file in stages.glob("*") if stages.is_dir() else ():
        needed -= file.stat().st_blocks * 512  # continued, or replaced
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"the engine folder needs {needed / 2**30:.2f} GiB on the disk of {plan.directory}, which has "
            f"{free / 2**30:.2f} GiB free; free some space or choose another folder with -o."
        )


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """The folder, made if needed, locked against a second build; an empty one that was made here is taken away again."""
    import fcntl

    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the output {directory} cannot be made: {error.strerror}; choose another -o.") from error
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another build is writing to {directory}; wait until it ends.") from None
        if not os.access(directory, os.W_OK | os.X_OK):
            raise InputError(f"the output {directory} cannot be written; choose another folder with -o.")
        yield
    finally:
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _identity(plan: _Plan, previous: Manifest | None, observer: _Noted) -> Identity:
    """Hashes of everything the build reads; unchanged files are not read again."""
    journal = Journal.load(plan.directory)
    # a LoRA is hashed and remembered like any other file, as the component "lora"
    remembered = [*(previous.identity.files if previous else ()), *journal.hashed]
    if previous is not None:
        remembered += [file for file in _lora_files(previous) if file is not None]
    hasher = Hasher(remembered)
    groups = files_by_component(plan.checkpoint.sources, _tokenizer_file(plan.checkpoint.tokenizer))
    groups += [("lora", (spec.path,)) for spec in plan.request.loras]
    new = {str(path): path.stat().st_size for _, paths in groups for path in paths if not hasher.is_known(path)}
    phase = Phase(observer, "hash", new)
    records: list[SourceFile] = []
    for component, paths in groups:
        if not paths:
            records.append(memory_record(component, plan.checkpoint.sources[component]))  # type: ignore[index]
        for path in paths:
            if hasher.is_known(path):
                records.append(hasher.record(component, path))
                continue
            step = phase.start(str(path))
            records.append(hasher.record(component, path, lambda done, step=step: observer.advanced(step, done)))
            phase.finish(step)
            journal.hashed.append(records[-1])
            journal.save() if previous is None else None
    files = tuple(record for record in records if record.component != "lora")
    fused = [record for record in records if record.component == "lora"]
    loras = tuple(
        LoRARecord(file.path, file.sha256, spec.strength) for file, spec in zip(fused, plan.request.loras, strict=True)
    )
    return Identity(plan.checkpoint.config, plan.precision, files, loras)
