"""Building an engine folder: checkpoint → weight store, tables, tokenizer, backends' artefacts, manifest.

This module decides; `assemble` executes. The order makes every interruption harmless: first all checks that can refuse
(backend, options, output path, disk space, a folder with other weights), then the work, and the manifest last. If there
is nothing to do, a call only checks the folder: it reads all files, compares their checksums and repairs damage,
because every message about damage names this command. One folder holds one set of weights in one precision: any other
is refused with the fields that differ, and replaced only with `rebuild`. Another backend adds its files and changes
nothing else.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.engines.build.assemble import Plan, assemble
from scail2_rt.engines.build.repair import RepairResult, repair_folder
from scail2_rt.engines.folder.journal import JOURNAL, Journal
from scail2_rt.engines.folder.lock import LOCK, alone
from scail2_rt.engines.folder.manifest import (
    MANIFEST,
    STAGES,
    BuildCommand,
    Identity,
    LoRARecord,
    Manifest,
    check_folder,
    differences,
    read_manifest,
    write_manifest,
)
from scail2_rt.engines.folder.sources import LORA_PART, file_groups, hash_sources
from scail2_rt.engines.folder.weights import plan_store, planned_tensors
from scail2_rt.engines.observer import BuildObserver, BuildStep, SilentObserver
from scail2_rt.engines.registry import backend, check_precision, choose_backend, default_precision, refuse_unbuildable
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
    from scail2_rt.export.checkpoint.lora import LoRAReport, LoRASpec
    from scail2_rt.export.checkpoint.open import Checkpoint
    from scail2_rt.export.checkpoint.tensors import TensorSource

__all__ = ["BuildObserver", "BuildReport", "BuildRequest", "BuildStep", "SilentObserver", "build", "choose_backend"]

DISK_MARGIN = 1 << 26


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build. precision None: the folder's, else the default for the hardware. components: parts of the
    checkpoint with a separate path ("vae", "umt5", "clip", "tokenizer" → path), for the command that rebuilds.
    plan_options and stages (shell patterns of the wanted stages) are only for backends with build options."""

    checkpoint: Path
    output: Path
    backends: tuple[str, ...] = ("auto",)
    precision: str | None = None
    loras: "tuple[LoRASpec, ...]" = ()
    lora_partial: bool = False
    rebuild: bool = False
    components: Mapping[str, Path] = field(default_factory=dict, hash=False)
    plan_options: "PlanOptions | None" = None
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildReport:
    """The result of a build. backends: all in the folder now; added: those built by this call; up_to_date: nothing was
    done; resumed_steps: done by an earlier, interrupted call; repaired: damaged stages and files that were made again;
    sums_added: the folder had no checksums."""

    directory: str
    backends: tuple[str, ...]
    added: tuple[str, ...]
    precision: str
    up_to_date: bool
    stages: int
    weight_bytes: int
    folder_bytes: int
    wall_s: float
    resumed_steps: int = 0
    notes: tuple[str, ...] = ()
    loras: "tuple[LoRAReport, ...]" = ()
    repaired: tuple[str, ...] = ()
    sums_added: bool = False


def build(request: BuildRequest, checkpoint: "Checkpoint", observer: BuildObserver | None = None) -> BuildReport:
    """Build or complete the engine folder `request.output` from an open checkpoint (which may lack components).

    Raises InputError for an unavailable backend or precision, a folder with other weights or options, and an output
    path that is not writable or has too little space; Scail2Error for a weight that the precision cannot represent, and
    for a full disk. After any interruption the same call continues."""
    started = time.monotonic()
    noted = _Noting(observer or SilentObserver())
    refuse_unbuildable([name for name in request.backends if name != "auto"])
    directory = request.output.expanduser().absolute()
    previous = _previous(directory, request.rebuild)
    plan = _make_plan(request, directory, checkpoint, previous, noted)
    if previous is None:
        _check_room(plan)
    _note_memory(plan, previous, noted)
    added: tuple[str, ...] = ()
    resumed = 0
    repair: RepairResult | None = None
    try:
        with _held(directory, noted):
            identity = _identity(plan, request, checkpoint, previous, noted)
            if previous is not None:
                _check_same(plan, request, previous, identity)
                repair = repair_folder(plan, previous, noted)
                previous = _kept(plan, previous, dataclasses.replace(repair.manifest, identity=identity))
            if previous is not None and set(plan.backends) <= set(previous.backends) and not plan.refreshed:
                manifest = previous
                if repair is None or not (repair.repaired or repair.sums_added):
                    noted.note(f"{directory} is up to date; there is nothing to do")
            else:
                done = assemble(plan, identity, previous, noted)
                manifest, added, resumed = done.manifest, done.added, done.resumed_steps
    except OSError as error:
        raise _disk_error(error, directory) from error
    repaired, sums_added = (repair.repaired, repair.sums_added) if repair else ((), False)
    return BuildReport(
        directory=str(directory),
        backends=manifest.backends,
        added=added,
        precision=plan.precision,
        up_to_date=not (added or plan.refreshed or repaired or sums_added),
        stages=len(manifest.stages),
        weight_bytes=plan.layout.size,
        folder_bytes=sum(artefact.size for artefact in manifest.artefacts),
        wall_s=time.monotonic() - started,
        resumed_steps=resumed,
        notes=tuple(noted.notes),
        loras=getattr(plan.sources.get("dit"), "report", ()),
        repaired=repaired,
        sums_added=sums_added,
    )


class _Noting:
    """The caller's observer; also keeps the notes for the report."""

    def __init__(self, observer: BuildObserver) -> None:
        self._observer = observer
        self.notes: list[str] = []
        self.started, self.advanced, self.done = observer.started, observer.advanced, observer.done

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._observer.note(text)


def _previous(directory: Path, rebuild: bool) -> Manifest | None:
    """Return the manifest of a finished folder to keep. Raises InputError if `directory` is not an engine folder."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise InputError(f"the output {directory} is a file. Name a folder with -o.")
    if (directory / MANIFEST).exists():
        return None if rebuild else read_manifest(directory)
    others = [file for file in directory.iterdir() if file.name != LOCK]  # a killed build leaves the lock file
    if others and not (directory / JOURNAL).exists():
        raise InputError(f"the output {directory} contains other files. Name a new or empty folder with -o.")
    return None


def _make_plan(
    request: BuildRequest, directory: Path, checkpoint: "Checkpoint", previous: Manifest | None, observer: _Noting
) -> Plan:
    backends = _backends(request, observer)
    precision = _precision(request, backends, previous, observer)
    sources: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    if request.loras:
        from scail2_rt.export.checkpoint.lora import apply_loras

        if "dit" not in sources:
            raise InputError("a LoRA was given, but the checkpoint has no transformer. Leave out --lora.")
        sources["dit"] = apply_loras(sources["dit"], request.loras, request.lora_partial)
    definitions = stage_definitions(checkpoint.config)
    tensors = planned_tensors(checkpoint.config, definitions, precision)
    tokenizer = checkpoint.tokenizer
    return Plan(
        directory=directory,
        config=checkpoint.config,
        precision=precision,
        backends=backends,
        definitions=definitions,
        tensors=tensors,
        layout=plan_store(tensors),
        sources=sources,
        tokenizer=tokenizer / "tokenizer.json" if tokenizer is not None and tokenizer.is_dir() else tokenizer,
        origin=_anywhere(request.checkpoint),
        overrides={name: _anywhere(path) for name, path in request.components.items()},
        lora_partial=request.lora_partial,
        plan_options=request.plan_options,
        patterns=request.stages,
    )


def _anywhere(path: Path) -> str:
    """Return the absolute path, valid in commands from any folder; a path that does not exist is returned unchanged."""
    full = path.expanduser().absolute()
    return str(full if full.exists() else path)


def _backends(request: BuildRequest, observer: _Noting) -> tuple[str, ...]:
    chosen: list[str] = []
    for requested in request.backends or ("auto",):
        name, reason = choose_backend(requested)
        if requested == "auto":
            observer.note(f"backend {name}, because {reason}")
        if name not in chosen:
            chosen.append(name)
    return tuple(chosen)


def _precision(
    request: BuildRequest, backends: tuple[str, ...], previous: Manifest | None, observer: _Noting
) -> Precision:
    if request.precision is not None:
        return check_precision(request.precision)
    if previous is not None:
        return previous.precision
    precision, reason = default_precision(backends)
    observer.note(f"precision {precision}, because {reason}")
    return precision


def _check_room(plan: Plan) -> None:
    """Raise InputError if the output is not writable or the disk has too little space for the rest of the build."""
    place = plan.directory
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"the output {plan.directory} cannot be made: {place} is not writable. Choose another -o.")
    needed = plan.layout.size + DISK_MARGIN + sum(backend(name).room(plan.artefacts) for name in plan.backends)
    stages = plan.directory / STAGES
    for file in stages.glob("*") if stages.is_dir() else ():
        needed -= file.stat().st_blocks * 512  # continued or replaced
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"the engine folder needs {needed / 2**30:.2f} GiB on the disk of {plan.directory}, which has "
            f"{free / 2**30:.2f} GiB free. Free some space or choose another folder with -o."
        )


def _note_memory(plan: Plan, previous: Manifest | None, observer: BuildObserver) -> None:
    """Report how much GPU memory the result needs, before the long work."""
    for name in plan.backends:
        new = previous is None or name not in previous.backends
        if new and (note := backend(name).memory_note(plan.artefacts.stage_bytes)) is not None:
            observer.note(note)


@contextlib.contextmanager
def _held(directory: Path, observer: BuildObserver) -> Iterator[None]:
    """Create the folder if needed and lock it against a second build. Removes a created folder that stays empty."""
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    refusal = f"another build is writing to {directory}. Wait until it ends."
    try:
        with alone(directory, refusal, observer.note):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty: the build wrote to it
                directory.rmdir()


def _identity(
    plan: Plan, request: BuildRequest, checkpoint: "Checkpoint", previous: Manifest | None, observer: _Noting
) -> Identity:
    """Return the hashes of everything that the build reads; unchanged files are not read again."""
    journal = Journal.load(plan.directory)
    known = list(journal.hashed)
    if previous is not None:
        known += [*previous.identity.files, *(file for lora in previous.loras for file in lora.files)]
    plain: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}  # without LoRA
    groups = file_groups(plain, plan.tokenizer, [spec.files for spec in request.loras])
    records = hash_sources(groups, plain, known, observer, journal.remember)
    fused = iter([record for record in records if record.component == LORA_PART])
    reports: tuple[LoRAReport, ...] = getattr(plan.sources.get("dit"), "report", ())
    return Identity(
        config=plan.config,
        precision=plan.precision,
        files=tuple(record for record in records if record.component != LORA_PART),
        loras=tuple(
            LoRARecord(next(fused), spec.strength, next(fused) if spec.files[1:] else None, report.distilled)
            for spec, report in zip(request.loras, reports, strict=True)
        ),
    )


def _check_same(plan: Plan, request: BuildRequest, previous: Manifest, identity: Identity) -> None:
    """Raise InputError if the finished folder was built from another request, or is damaged beyond repair."""
    found = differences(previous, identity)
    if found:
        command = BuildCommand(
            plan.origin,
            plan.directory,
            plan.precision,
            plan.backends,
            tuple((str(spec.path), spec.strength) for spec in request.loras),
            request.lora_partial,
            plan.overrides,
            rebuild=True,
            plan_words=request.plan_options.words if request.plan_options is not None else (),
        ).line
        listed = "; ".join(map(str, found))
        raise InputError(f"{plan.directory} was built from something else: {listed}. Replace it with: {command}")
    check_folder(plan.directory, previous, plan.definitions, repairing=True)


def _kept(plan: Plan, before: Manifest, after: Manifest) -> Manifest:
    """Return the manifest of a finished folder; write it again if it changed: new checksums, or names and times of
    files that were moved or touched. These save hashing next time and keep the printed command valid."""
    manifest = dataclasses.replace(after, checkpoint=plan.origin, overrides=plan.overrides)
    if manifest != before:
        write_manifest(plan.directory, manifest)
        Journal.load(plan.directory).remove_if_idle()
    return manifest


def _disk_error(error: OSError, directory: Path) -> Scail2Error:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = f"the disk of {directory} is full" if full else f"building {directory} failed: {error}"
    return Scail2Error(f"{what}. Finished steps are kept; correct this and run the same command again.")
