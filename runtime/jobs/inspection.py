"""`inspect`: identify a file or folder by its contents: checkpoint, one network of it, LoRA or engine folder.

Only headers of weights files are read. All files of an engine folder are read and compared with its checksums. The
networks of a checkpoint are opened separately, so that a missing or damaged one does not hide the others. Anything else
is refused.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scail2_rt.engines.folder.damage import check_health
from scail2_rt.engines.folder.journal import JOURNAL, Journal
from scail2_rt.engines.folder.manifest import MANIFEST, Manifest, check_folder, read_manifest
from scail2_rt.engines.observer import BuildObserver
from scail2_rt.export.checkpoint.find import LABELS, foreign_file, group_of, open_group
from scail2_rt.export.checkpoint.gguf_file import GGUFSource
from scail2_rt.export.checkpoint.lora import is_adapter, lora_file
from scail2_rt.export.checkpoint.lora_facts import LoRAFacts, lora_facts
from scail2_rt.export.checkpoint.open import COMPONENTS, MissingPart, check_sources, find_tokenizer, open_sources
from scail2_rt.export.checkpoint.quantised import Dequantised
from scail2_rt.export.checkpoint.recognise import recognise
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.export.models.precision import Component
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

MIB = 2**20
_LISTED = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One network.

    size      bytes of its files
    names     naming scheme of the tensors, and their prefix
    dtypes    stored type → number of parameters
    formats   format of quantised weights → number of weights
    config    sizes of the network
    problem   why it cannot be used; None if it can"""

    component: str
    files: tuple[str, ...]
    size: int
    names: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    formats: dict[str, int]
    config: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result for `path`. kind: "checkpoint", "network", "lora", "engines" or "unfinished engines"; size: bytes."""

    kind: str
    path: str
    layout: str
    size: int
    parts: tuple[Part, ...] = ()
    tokenizer: str | None = None
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    lora: LoRAFacts | None = None
    engines: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(_lines(self))


def inspect(path: Path, observer: BuildObserver | None = None) -> Inspection:
    """Identify `path`. `observer` receives the progress of the check of an engine folder.

    Raises InputError if the path does not exist, cannot be read, or is of no known kind."""
    path = path.expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist. Check the path.")
    if path.is_dir() and (path / MANIFEST).is_file():
        return _engines(path, observer)
    if path.is_dir() and (path / JOURNAL).is_file():
        return _unfinished(path)
    if path.is_dir() and not is_adapter(path):
        return _checkpoint(path)
    return _file(lora_file(path) if path.is_dir() else path)


def _file(path: Path) -> Inspection:
    group = group_of(path)
    source = open_group(group)
    found = recognise(source)
    size = sum(file.stat().st_size for file in group)
    if found is not None and found.foreign:
        raise InputError(foreign_file(path, found))
    if found is not None and found.component == "dit":
        return _checkpoint(path)
    if found is not None:
        part = _part(found.component, found.source, source)
        return Inspection("network", str(path), _layout(part), size, parts=(part,))
    facts = lora_facts(source, path)
    if facts is not None:
        return Inspection("lora", str(path), f"{facts.kind}, {facts.names} names", size, lora=facts)
    names = list(source.keys())
    raise InputError(
        f"{path} is a weights file, but neither a network of SCAIL-2 nor a LoRA: it has "
        f"{counted(len(names), 'tensor')}, for example {', '.join(names[:3])}. Give a file of a checkpoint or a LoRA."
    )


def _checkpoint(path: Path) -> Inspection:
    parts, missing, problems, errors = [], [], dict[str, None](), dict[Component, InputError]()
    root = path if path.is_dir() else path.parent
    umt5_files: tuple[Path, ...] = ()
    for component in COMPONENTS:
        try:
            root, sources = open_sources(path, (component,))
        except InputError as error:
            errors[component] = error
            if isinstance(error, MissingPart):
                missing.append(LABELS[component])
            problems |= dict.fromkeys(error.unreadable if isinstance(error, MissingPart) else (str(error),))
            continue
        source = sources[component]
        umt5_files = source.files if component == "umt5" else umt5_files
        parts.append(_part(component, source, open_group(source.files)))
    if not parts:
        raise errors["dit"]
    tokenizer = None
    try:
        tokenizer = str(find_tokenizer(root, umt5_files, None))
    except InputError:
        missing.append("tokenizer (tokenizer.json)")
    files = {file for part in parts for file in part.files}
    return Inspection(
        kind="checkpoint",
        path=str(path),
        layout=_layout(parts[0]) if parts[0].component == LABELS["dit"] else "parts without a transformer",
        size=sum(Path(file).stat().st_size for file in files),
        parts=tuple(parts),
        tokenizer=tokenizer,
        missing=tuple(missing),
        problems=tuple(problems),
    )


def _layout(part: Part) -> str:
    if part.names.startswith("SAT"):
        return "official layout (SAT)"
    many = len(part.files)
    return f"{part.names}, {f'{many} shards' if many > 1 else 'one file'}"


def _part(component: Component, source: TensorSource, stored: TensorSource) -> Part:
    """Describe one network. source: its tensors under Wan names; stored: under the names in the file."""
    found = recognise(stored)
    prefix = f" (prefix {found.prefix})" if found and found.prefix else ""
    dtypes: Counter[str] = Counter()
    quantised = stored if isinstance(stored, Dequantised | GGUFSource) else None
    for name in stored.keys():  # noqa: SIM118
        dtype = quantised.stored_type(name) if quantised else str(stored.dtype(name)).removeprefix("torch.")
        dtypes[dtype] += _count(stored.shape(name))
    config: dict[str, Any] = {}
    problem = None
    try:
        sizes = getattr(check_sources({component: source}), component)
        config = dataclasses.asdict(sizes)
    except InputError as error:
        problem = str(error)
    return Part(
        component=LABELS[component],
        files=tuple(str(file) for file in stored.files),
        size=sum(file.stat().st_size for file in stored.files),
        names=f"{found.names if found else 'unknown'} names{prefix}",
        tensors=len(list(source.keys())),
        parameters=sum(_count(source.shape(name)) for name in source.keys()),  # noqa: SIM118
        dtypes=dict(dtypes.most_common()),
        formats=dict(Counter(quantised.formats.values()).most_common()) if quantised else {},
        config=config,
        problem=problem,
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _engines(path: Path, observer: BuildObserver | None) -> Inspection:
    manifest = read_manifest(path)
    problems, health = [], None
    try:
        check_folder(path, manifest, stage_definitions(manifest.config))
        health = check_health(path, manifest, observer)
        if health.damages:
            problems.append(health.text)
    except InputError as error:
        problems.append(str(error))
    facts = {
        "precision": manifest.precision,
        "executors": [dataclasses.asdict(executor) for executor in manifest.executors],
        "loras": [
            {"file": lora.file.path, "strength": lora.strength, "distilled": lora.distilled} for lora in manifest.loras
        ],
        "checkpoint": manifest.checkpoint,
        "sources": [
            {**dataclasses.asdict(file), "state": _state(file.path, file.size, file.mtime_ns)}
            for file in manifest.identity.files
        ],
        "stages": len(manifest.stages),
        "weight_bytes": sum(stage.weight_bytes for stage in manifest.stages),
        "config": {part: value for part, value in dataclasses.asdict(manifest.config).items() if value},
        "created_by": manifest.created_by,
        "checksums": health.text if health else None,
        "damages": [dataclasses.asdict(damage) for damage in health.damages] if health else [],
    }
    size = sum(artefact.size for artefact in manifest.artefacts)
    return Inspection("engines", str(path), _executors(manifest), size, problems=tuple(problems), engines=facts)


def _executors(manifest: Manifest) -> str:
    return f"{manifest.precision} for {', '.join(manifest.backends) or 'no executor'}"


def _state(path: str, size: int, mtime_ns: int) -> str:
    if path == "memory":
        return "memory"
    try:
        state = Path(path).stat()
    except OSError:
        return "missing"
    return "unchanged" if (state.st_size, state.st_mtime_ns) == (size, mtime_ns) else "changed"


def _unfinished(path: Path) -> Inspection:
    journal = Journal.load(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    problem = "the build was interrupted: run the same build-engines command again to continue it"
    done = f"{counted(len(journal.done), 'step')} done"
    return Inspection("unfinished engines", str(path), done, size, problems=(problem,))


def _lines(found: Inspection) -> Iterator[str]:
    yield f"{found.path}: {found.kind}, {found.layout}, {_size(found.size)}"
    for part in found.parts:
        yield from _part_lines(part)
    if found.kind == "checkpoint":
        yield f"  tokenizer: {found.tokenizer or 'missing'}"
    if found.lora:
        yield from _lora_lines(found.lora)
    if found.kind == "engines":
        yield from _engine_lines(found.engines)
    if found.missing:
        yield f"  missing: {', '.join(found.missing)}"
    for problem in found.problems:
        yield f"  problem: {problem}"


def _part_lines(part: Part) -> Iterator[str]:
    dtypes = ", ".join(f"{dtype} {count / sum(part.dtypes.values()):.0%}" for dtype, count in part.dtypes.items())
    formats = "".join(f", {counted(count, 'weight')} in {name}" for name, count in part.formats.items())
    yield (
        f"  {part.component}: {part.parameters:,} parameters in {counted(part.tensors, 'tensor')}, {part.names}, "
        f"{dtypes}{formats}, {_size(part.size)}"
    )
    yield f"    {', '.join(part.files)}"
    if part.config:
        yield f"    {_listed_values(part.config)}"
    if part.problem:
        yield f"    problem: {part.problem}"


def _lora_lines(lora: LoRAFacts) -> Iterator[str]:
    parts = (_listed_values(lora.dtypes), _listed_values(lora.kinds), counted(lora.blocks, "block"))
    yield f"  {counted(lora.tensors, 'tensor')}, {'; '.join(part for part in parts if part)}"
    if lora.ranks:
        yield f"  rank: {_pairs_by_number(lora.ranks)}"
    if lora.scales:
        alphas = f"{_pairs_by_number(lora.alphas)}, " if lora.alphas else ""
        yield f"  alpha: {alphas}{lora.alpha_from}"
        scale = "alpha/√rank (rsLoRA)" if lora.rslora else "alpha/rank"
        yield f"  {scale}: {_pairs_by_number(lora.scales)}"
    known = f"yes, according to its {lora.distilled}: use --preset fast" if lora.distilled else "unknown"
    yield f"  step-distilled: {known}"
    yield f"  targets: {_listed_values(lora.targets) or 'none of SCAIL-2'}"
    if lora.unknown:
        more = len(lora.unknown) - _LISTED
        yield f"  not for SCAIL-2: {', '.join(lora.unknown[:_LISTED])}{f' and {more} more' if more > 0 else ''}"
    if lora.refused:
        yield f"  cannot be fused: {lora.refused}"


def _engine_lines(engines: Mapping[str, Any]) -> Iterator[str]:
    for executor in engines["executors"]:
        place = executor["gpu"] or ", ".join(executor["targets"])
        gpu = f", for {place}" if place else ""
        yield f"  {executor['backend']}: {_listed_values(executor['versions'])}{gpu}"
    size, stages = _size(engines["weight_bytes"]), counted(engines["stages"], "stage")
    yield f"  {stages}, {size} of weights, made by {engines['created_by']}"
    if engines["checksums"] and not engines["damages"]:
        yield f"  checksums: {engines['checksums']}"
    for lora in engines["loras"]:
        distilled = f", step-distilled (according to its {lora['distilled']})" if lora["distilled"] else ""
        yield f"  LoRA {lora['file']} at strength {lora['strength']:g}{distilled}"
    yield f"  from {engines['checkpoint']}:"
    for file in engines["sources"]:
        yield f"    {file['component']}: {file['path']} ({file['state']}), sha256 {file['sha256'][:12]}"
    for part, sizes in engines["config"].items():
        yield f"  {LABELS.get(part, part)}: {_listed_values(sizes)}"


def _pairs_by_number(values: Mapping[Any, int]) -> str:
    """Format number → count of tensor pairs with this number, as `16 (2 pairs), 32 (1 pair)`."""
    return ", ".join(f"{value:g} ({counted(pairs, 'pair')})" for value, pairs in values.items())


def _listed_values(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / MIB:.1f} MiB"
