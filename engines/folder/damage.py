"""Damage check of an engine folder: every tensor and file is read and compared with its checksum.

`build-engines` repairs damage; `verify`, `inspect` and `doctor` report it. Loading a stage checks that stage only
(`StoreReader.check`, and the loader of the torch backend). Files are read, not mapped, so that a disk error is reported
as damage instead of killing the process.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scail2_rt.engines.folder.manifest import STAGES, Manifest, describe_command
from scail2_rt.engines.folder.store import CHECKERS, STORE_NAME, StoreReader, read_header
from scail2_rt.engines.folder.sums import HEADER, Sums, joined, sentence, sum_of, sum_of_file
from scail2_rt.engines.folder.weights import EMBEDDING
from scail2_rt.engines.observer import BuildObserver, Phase, SilentObserver
from scail2_rt.engines.registry import BACKENDS, installed
from scail2_rt.engines.registry import backend as registered

UNREADABLE = ""  # in place of a checksum
CHECK = "check"  # name of the phase for observers


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged part. stage: its stage, "" for the header, tables and tokenizer; kind: "tensor", "file" or "header"
    (of the weight store); name: of the tensor, or the file's path."""

    stage: str
    kind: str
    name: str = ""
    readable: bool = True

    @property
    def part(self) -> str:
        """The part in words."""
        named = HEADER if self.kind == "header" else f"{self.kind} {self.name}"
        return named if self.readable else f"{named}, which cannot be read,"

    def __str__(self) -> str:
        return f"stage {self.stage} ({self.part})" if self.stage else self.part


@dataclass(frozen=True, slots=True)
class Health:
    """Result of checking a complete folder. parts: number of compared tensors and files; remedy: the command that
    repairs, or that adds checksums to a folder without (checked False)."""

    directory: Path
    checked: bool
    parts: int
    damages: tuple[Damage, ...]
    remedy: str

    @property
    def text(self) -> str:
        """The result in one sentence."""
        if not self.checked:
            return no_sums(self.directory, self.remedy)
        if not self.damages:
            return f"{self.parts} tensors and files have the checksums recorded by the build"
        first = self.damages[0]
        if len(self.damages) == 1:
            return sentence(self.directory, first.stage, first.part, self.remedy)
        return f"{self.directory} is damaged: {listed(self.damages)}. Repair only this with: {self.remedy}"


def listed(damages: Iterable[Damage]) -> str:
    """List damages in words; each stage is named once, with the first of its parts."""
    by_stage: dict[str, list[Damage]] = {}
    for damage in damages:
        by_stage.setdefault(damage.stage or damage.part, []).append(damage)
    return ", ".join(
        str(found[0]) if len(found) == 1 else f"stage {stage} ({found[0].part} and {len(found) - 1} more)"
        for stage, found in by_stage.items()
    )


def no_sums(directory: Path, remedy: str) -> str:
    """Return the warning for a folder without checksums."""
    return (
        f"{directory} has no checksums, so damaged weights would not be noticed. Add them, without rebuilding, with: "
        f"{remedy}"
    )


def repair_command(manifest: Manifest, directory: Path, backend: str | None = None) -> str:
    """Return the command that repairs, or adds checksums. One backend of the folder is enough: `backend` if given, else
    one that can be built on this machine, preferably without a GPU."""
    if backend is None:
        usable = [name for name in manifest.backends if name in BACKENDS and installed(name)]
        backend = min([*usable, *manifest.backends], key=lambda name: name not in usable or registered(name).needs_gpu)
    return describe_command(manifest, directory, backend)


def check_health(directory: Path, manifest: Manifest, observer: BuildObserver | None = None) -> Health:
    """Read a folder whose files have the right sizes, and compare checksums."""
    remedy = repair_command(manifest, directory)
    if manifest.sums is None:
        return Health(directory, False, 0, (), remedy)
    parts = 1 + len(manifest.sums.tensors) + len(manifest.sums.files)
    return Health(directory, True, parts, find_damage(directory, manifest, manifest.sums, observer), remedy)


def find_damage(
    directory: Path, manifest: Manifest, sums: Sums, observer: BuildObserver | None = None
) -> tuple[Damage, ...]:
    """Return everything that differs from `sums`. With a damaged header no tensor can be checked."""
    if sum_of(read_header(directory / STAGES / STORE_NAME)) != sums.header:
        return (Damage("", "header"),)
    found = sums_now(directory, sums.files, observer)
    stages = [EMBEDDING, *(stage.name for stage in manifest.stages)]
    damages = []
    for kind, have, want in (("tensor", found.tensors, sums.tensors), ("file", found.files, sums.files)):
        for name in [name for name in have if have[name] != want.get(name)]:
            stage = _stage_of(name.removeprefix(f"{STAGES}/"), stages)
            damages.append(Damage(stage, kind, name, have[name] != UNREADABLE))
    return tuple(damages)


def _stage_of(name: str, stages: Iterable[str]) -> str:
    return next((stage for stage in stages if name.startswith(f"{stage}.")), "")


def sums_now(directory: Path, files: Iterable[str], observer: BuildObserver | None = None) -> Sums:
    """Compute the checksums of a store with a valid header and of these files, as they are on disk; UNREADABLE where a
    part cannot be read. One step of the phase `check`, in several threads."""
    store = StoreReader(directory / STAGES / STORE_NAME)
    sizes = {file: (directory / file).stat().st_size if (directory / file).is_file() else 0 for file in files}
    phase = Phase(observer or SilentObserver(), CHECK, {str(directory): store.layout.size + sum(sizes.values())})
    step, done = phase.start(str(directory)), 0
    pool = ThreadPoolExecutor(CHECKERS)
    try:
        pieces = {
            name: [pool.submit(store.piece_sum, name, start) for start in store.starts(name)]
            for name in store.layout.names
        }
        whole = {file: pool.submit(sum_of_file, directory / file) for file in sizes}
        tensors, others = {}, {}
        for name, jobs in pieces.items():
            tensors[name] = _value(partial(_joined, jobs))
            done += store.layout.location(name).length
            phase.observer.advanced(step, done)
        for file, job in whole.items():
            others[file] = _value(job.result)
            done += sizes[file]
            phase.observer.advanced(step, done)
    finally:
        pool.shutdown(cancel_futures=True)
        store.close()
    phase.finish(step)
    return Sums(sum_of(store.layout.header), tensors, others)


def _joined(jobs: Iterable["Future[bytes]"]) -> str:
    return joined(job.result() for job in jobs)


def _value(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError:
        return UNREADABLE
