"""Is everything in an engine folder what the build wrote? Every tensor and file is read and compared with its sum.

`build-engines` repairs what is found, `verify`, `inspect` and `doctor` name it. Loading a stage asks the same about
that stage alone (`StoreReader.check`, the loader of the torch backend). Files are read, not mapped: a disk that cannot
give a page back is then a finding and not the end of the process.
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

UNREADABLE = ""  # in place of a sum
CHECK = "check"  # the phase that observers hear of


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not what the build wrote. stage: whose it is, "" for the header, tables and tokenizer; kind:
    "tensor", "file" or "header" (of the weight store); name: of the tensor, or the file's path."""

    stage: str
    kind: str
    name: str = ""
    readable: bool = True

    @property
    def part(self) -> str:
        """In words."""
        named = HEADER if self.kind == "header" else f"{self.kind} {self.name}"
        return named if self.readable else f"{named}, which cannot be read,"

    def __str__(self) -> str:
        return f"stage {self.stage} ({self.part})" if self.stage else self.part


@dataclass(frozen=True, slots=True)
class Health:
    """What a check of a whole folder found. parts: how many tensors and files were compared; remedy: the command that
    repairs, or that adds the sums of a folder without any (checked False)."""

    directory: Path
    checked: bool
    parts: int
    damages: tuple[Damage, ...]
    remedy: str

    @property
    def text(self) -> str:
        """One sentence."""
        if not self.checked:
            return no_sums(self.directory, self.remedy)
        if not self.damages:
            return f"{self.parts} tensors and files have the checksums that the build gave them"
        first = self.damages[0]
        if len(self.damages) == 1:
            return sentence(self.directory, first.stage, first.part, self.remedy)
        return f"{self.directory} is damaged: {listed(self.damages)}. Repair that alone with: {self.remedy}"


def listed(damages: Iterable[Damage]) -> str:
    """A stage is named once, with the first of its parts."""
    by_stage: dict[str, list[Damage]] = {}
    for damage in damages:
        by_stage.setdefault(damage.stage or damage.part, []).append(damage)
    return ", ".join(
        str(found[0]) if len(found) == 1 else f"stage {stage} ({found[0].part} and {len(found) - 1} more)"
        for stage, found in by_stage.items()
    )


def no_sums(directory: Path, remedy: str) -> str:
    """The warning of a folder without sums."""
    return (
        f"{directory} has no checksums, so damaged weights would not be noticed; add them, without a new build, with: "
        f"{remedy}"
    )


def repair_command(manifest: Manifest, directory: Path, backend: str | None = None) -> str:
    """The command that repairs, or adds sums: one executor of the folder is enough for it, the one in use if known,
    else one that every machine with its library can build."""
    if backend is None:
        usable = [name for name in manifest.backends if name in BACKENDS and installed(name)]
        backend = min([*usable, *manifest.backends], key=lambda name: name not in usable or registered(name).needs_gpu)
    return describe_command(manifest, directory, backend)


def check_health(directory: Path, manifest: Manifest, observer: BuildObserver | None = None) -> Health:
    """Read a folder whose files have the right sizes, and compare."""
    remedy = repair_command(manifest, directory)
    if manifest.sums is None:
        return Health(directory, False, 0, (), remedy)
    parts = 1 + len(manifest.sums.tensors) + len(manifest.sums.files)
    return Health(directory, True, parts, find_damage(directory, manifest, manifest.sums, observer), remedy)


def find_damage(
    directory: Path, manifest: Manifest, sums: Sums, observer: BuildObserver | None = None
) -> tuple[Damage, ...]:
    """Everything that differs from `sums`. With a damaged header no tensor can be found, and none is looked for."""
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
    """The sums of a store with a good header and of these files, as they are on disk, UNREADABLE where they cannot be
    read. One step of the phase `check`, by several threads."""
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
