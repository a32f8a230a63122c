"""The manifest of an engine folder: everything that its engines depend on, and the files in the folder.

A folder is valid if it has a manifest, which is written last and atomically. Opening compares it with the definitions
of the running version and with the files on disk; building compares it with the request. A difference names the field,
both values and the command that repairs it. Source files are hashed once: the hash is kept with size and modification
time, and a file is not read again while both are unchanged.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scail2_rt.engines.folder.sums import KIND, Sums
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from scail2_rt.export.models.precision import PRECISIONS, Precision
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STAGES = "stages"
KERNELS = "kernels"  # compiled GPU kernels; made again if missing
TABLES = "tables.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
_OPTIONS = {"umt5": "t5"}  # components whose command-line option has a different name
_CONFIGS: dict[str, Any] = {"dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config, "clip": CLIPConfig}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the checkpoint. `path` is absolute, or "memory"; a hash is valid while mtime_ns and size agree."""

    component: str
    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class LoRARecord:
    """One fused LoRA file. config: its PEFT configuration file, if any; distilled: how it was recognised as
    step-distilled, None if it is not."""

    file: SourceFile
    strength: float
    config: SourceFile | None = None
    distilled: str | None = None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return (self.file, self.config) if self.config else (self.file,)

    @property
    def identity(self) -> tuple[tuple[str, ...], float]:
        """Everything that determines its effect on the weights."""
        return tuple(file.sha256 for file in self.files), self.strength

    def __str__(self) -> str:
        files = " with ".join(f"{Path(file.path).name} (sha256 {file.sha256[:12]})" for file in self.files)
        return f"{files} at strength {self.strength:g}"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """Name and signature of a stage in the types of the folder's precision, and the bytes of its weights."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class ExecutorRecord:
    """A backend built into the folder: library versions, and its target GPU or architectures ("sm89"), if any."""

    backend: str
    versions: dict[str, str]
    gpu: str | None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file of the folder; `path` is relative to it."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that determines the weights of a folder: one folder, one identity."""

    config: ModelConfig
    precision: Precision
    files: tuple[SourceFile, ...]
    loras: tuple[LoRARecord, ...] = ()

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Component → SHA-256 of each of its files."""
        found: dict[str, tuple[str, ...]] = {}
        for file in self.files:
            found[file.component] = (*found.get(file.component, ()), file.sha256)
        return found


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`. sums: None if the folder's version made no checksums, or another kind."""

    identity: Identity
    checkpoint: str
    overrides: dict[str, str]
    lora_partial: bool
    executors: tuple[ExecutorRecord, ...]
    stages: tuple[StageRecord, ...]
    artefacts: tuple[Artefact, ...]
    sums: Sums | None = None
    created_by: str = "scail2-rt"
    format_version: int = FORMAT_VERSION

    @property
    def config(self) -> ModelConfig:
        return self.identity.config

    @property
    def precision(self) -> Precision:
        return self.identity.precision

    @property
    def loras(self) -> tuple[LoRARecord, ...]:
        return self.identity.loras

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(executor.backend for executor in self.executors)


class Difference(NamedTuple):
    """A field in which a folder differs from the request."""

    field: str
    have: str
    want: str

    def __str__(self) -> str:
        return f"{self.field}: the folder has {self.have}, the request is {self.want}"


def differences(manifest: Manifest, wanted: Identity) -> list[Difference]:
    """Return every field in which the folder's identity differs from the wanted one; empty if they agree."""
    have = manifest.identity
    found = []
    if have.precision != wanted.precision:
        found.append(Difference("precision", have.precision, wanted.precision))
    mine, theirs = _flat(have.config), _flat(wanted.config)
    for field in mine | theirs:
        if mine.get(field, "none") != theirs.get(field, "none"):
            found.append(Difference(f"model.{field}", mine.get(field, "none"), theirs.get(field, "none")))
    for part in have.sources | wanted.sources:
        if have.sources.get(part) != wanted.sources.get(part):
            found.append(Difference(f"sources.{part}", _files(have, part), _files(wanted, part)))
    if [lora.identity for lora in have.loras] != [lora.identity for lora in wanted.loras]:
        found.append(Difference("loras", _loras(have.loras), _loras(wanted.loras)))
    return found


def _flat(config: ModelConfig) -> dict[str, str]:
    return {
        f"{part}.{field}": str(value)
        for part, fields in dataclasses.asdict(config).items()
        for field, value in (fields or {}).items()
    }


def _files(identity: Identity, component: str) -> str:
    files = [file for file in identity.files if file.component == component]
    return ", ".join(f"{Path(f.path).name} (sha256 {f.sha256[:12]}, {f.size} bytes)" for f in files) or "none"


def _loras(loras: Iterable[LoRARecord]) -> str:
    return " + ".join(map(str, loras)) or "none"


def describe_command(manifest: Manifest, directory: Path, backend: str | None = None) -> str:
    """Return the command that rebuilds this folder for those of its backends that this machine can build (all of them
    if it can build none), or that adds `backend` to it. Options of plans are included if one command can hold them."""
    from scail2_rt.engines.registry import backend as registered
    from scail2_rt.engines.registry import buildable

    names = (backend,) if backend else tuple(filter(buildable, manifest.backends)) or manifest.backends
    planned = [r for r in manifest.executors if r.backend in names and registered(r.backend).build_options]
    return BuildCommand(
        manifest.checkpoint,
        directory,
        manifest.precision,
        names,
        tuple((lora.file.path, lora.strength) for lora in manifest.loras),
        manifest.lora_partial,
        manifest.overrides,
        rebuild=backend is None,
        plan_words=registered(planned[0].backend).option_words(directory, planned[0])
        if len(planned) == 1 and backend is None
        else (),
    ).line


@dataclass(frozen=True, slots=True)
class BuildCommand:
    """A `scail2-rt build-engines` command. loras: (file, strength); overrides: component → path; plan_words: flags."""

    checkpoint: str
    directory: Path
    precision: str
    backends: tuple[str, ...]
    loras: tuple[tuple[str, float], ...] = ()
    lora_partial: bool = False
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rebuild: bool = False
    plan_words: Sequence[str] = ()

    @property
    def line(self) -> str:
        """The command line, quoted for a shell, with absolute paths."""
        words = ["scail2-rt", "build-engines", self.checkpoint]
        for component, path in self.overrides.items():
            words += [f"--{_OPTIONS.get(component, component)}", path]
        words += ["-o", str(self.directory.absolute()), "--precision", self.precision]
        for lora, strength in self.loras:
            short = f"{strength:g}"
            words += ["--lora", f"{lora}:{short if float(short) == strength else strength}"]
        words += ["--lora-partial"] if self.lora_partial else []
        for name in self.backends:
            words += ["--backend", name]
        words += self.plan_words
        return shlex.join([*words, "--rebuild"] if self.rebuild else words)


def check_folder(
    directory: Path, manifest: Manifest, definitions: Mapping[str, StageDefinition], repairing: bool = False
) -> None:
    """Raise InputError if a stage or a file does not match the manifest and this version. repairing: the next step
    repairs, so files with a checksum (all but the weight store) may be missing or truncated."""
    fault, repairable = _stage_fault(manifest, definitions), False
    if fault is None and (found := _file_fault(directory, manifest, repairing)) is not None:
        path, fault = found
        repairable = manifest.sums is not None and path in manifest.sums.files
    if fault is not None:
        if repairable:
            from scail2_rt.engines.folder.damage import repair_command

            what = f"Repair only this with: {repair_command(manifest, directory)}"
        else:
            what = f"Rebuild it with: {describe_command(manifest, directory)}"
        raise InputError(f"{directory} does not match: {fault}. {what}")


def _stage_fault(manifest: Manifest, definitions: Mapping[str, StageDefinition]) -> str | None:
    have = {stage.name: stage for stage in manifest.stages}
    for name in have.keys() | definitions.keys():
        if (name in have) != (name in definitions):
            return f"stages: {name} is {'unknown to this version' if name in have else 'missing from the manifest'}"
    for name, definition in definitions.items():
        inputs, outputs = definition.io(definition.numerics(manifest.precision))
        for field, mine, wanted in (
            ("inputs", have[name].inputs, inputs),
            ("outputs", have[name].outputs, outputs),
        ):
            if mine != wanted:
                return f"{field} of stage {name}: the manifest has {_show(mine)}, this version needs {_show(wanted)}"
    return None


def _show(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {_dtype_name(s.dtype)} [{', '.join(map(str, s.dims))}]" for s in specs)


def _file_fault(directory: Path, manifest: Manifest, repairing: bool) -> tuple[str, str] | None:
    """Return the first file that is missing or has a wrong size, and the fault in words."""
    for artefact in manifest.artefacts:
        path = directory / artefact.path
        if repairing and manifest.sums is not None and artefact.path in manifest.sums.files:
            continue
        has = f"file {artefact.path}: the manifest has {artefact.size} bytes, the file"
        if not path.is_file():
            return artefact.path, f"{has} is missing"
        if path.stat().st_size != artefact.size:
            return artefact.path, f"{has} has {path.stat().st_size}"
    return None


def read_manifest(directory: Path) -> Manifest:
    """Read a folder's manifest. Raises InputError if it is missing, damaged or of another format version."""
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{directory} is not a finished engine folder: it has no {MANIFEST}. {_build_hint(directory)}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. {_rebuild_hint(directory)}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: field format_version is {version}, this version of scail2-rt needs {FORMAT_VERSION}. "
            f"{_rebuild_hint(directory)}"
        )
    try:
        return _decode(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {_reason(error)}. {_rebuild_hint(directory)}") from error


def _reason(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def _build_hint(directory: Path) -> str:
    """Say how to build a folder that has no manifest. A folder with other files in it would be refused."""
    other = directory.is_dir() and any(directory.iterdir()) and not (directory / ".build.json").exists()
    place = "ENGINES" if other or directory.is_file() else shlex.quote(str(directory.absolute()))
    return f"Build {'one' if place == 'ENGINES' else 'it'} with: scail2-rt build-engines CHECKPOINT -o {place}"


def _rebuild_hint(directory: Path) -> str:
    place = shlex.quote(str(directory.absolute()))
    return f"Rebuild it with: scail2-rt build-engines CHECKPOINT -o {place} --rebuild"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: the folder becomes valid."""
    write_json(directory / MANIFEST, encode(manifest))


def write_json(path: Path, document: object) -> None:
    """Replace a file atomically and durably (it survives a crash of the machine)."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def encode(manifest: Manifest) -> dict[str, Any]:
    """Convert the manifest to a JSON document."""
    identity = manifest.identity
    sums = {} if manifest.sums is None else {"sums": {"kind": KIND, **dataclasses.asdict(manifest.sums)}}
    return {
        "format_version": manifest.format_version,
        "created_by": manifest.created_by,
        "checkpoint": manifest.checkpoint,
        "overrides": manifest.overrides,
        "precision": identity.precision,
        "model": dataclasses.asdict(identity.config),
        "sources": [dataclasses.asdict(file) for file in identity.files],
        "loras": [dataclasses.asdict(lora) for lora in identity.loras],
        "lora_partial": manifest.lora_partial,
        "executors": [dataclasses.asdict(executor) for executor in manifest.executors],
        "stages": [_encode_stage(stage) for stage in manifest.stages],
        "artefacts": [dataclasses.asdict(artefact) for artefact in manifest.artefacts],
        **sums,
    }


def _encode_stage(stage: StageRecord) -> dict[str, Any]:
    def specs(tensors: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": t.name, "dtype": _dtype_name(t.dtype), "dims": list(t.dims)} for t in tensors]

    return {
        "name": stage.name,
        "inputs": specs(stage.inputs),
        "outputs": specs(stage.outputs),
        "weight_bytes": stage.weight_bytes,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _decode(document: dict[str, Any]) -> Manifest:
    if document["precision"] not in PRECISIONS:
        raise ValueError(f"field precision is {document['precision']!r}, not one of {', '.join(PRECISIONS)}")
    identity = Identity(
        config=_decode_config(document["model"]),
        precision=document["precision"],
        files=tuple(SourceFile(**file) for file in document["sources"]),
        loras=tuple(_decode_lora(lora) for lora in document["loras"]),
    )
    return Manifest(
        identity=identity,
        checkpoint=document["checkpoint"],
        overrides=dict(document["overrides"]),
        lora_partial=document["lora_partial"],
        executors=tuple(
            ExecutorRecord(**{**executor, "targets": tuple(executor.get("targets", ()))})
            for executor in document["executors"]
        ),
        stages=tuple(_decode_stage(stage) for stage in document["stages"]),
        artefacts=tuple(Artefact(**artefact) for artefact in document["artefacts"]),
        sums=_decode_sums(document.get("sums")),
        created_by=document["created_by"],
    )


def _decode_sums(sums: dict[str, Any] | None) -> Sums | None:
    if sums is None or sums["kind"] != KIND:
        return None
    return Sums(sums["header"], dict(sums["tensors"]), dict(sums["files"]))


def _decode_lora(lora: dict[str, Any]) -> LoRARecord:
    config = lora.get("config")  # absent in folders of earlier versions, like `distilled`
    return LoRARecord(
        SourceFile(**lora["file"]), lora["strength"], SourceFile(**config) if config else None, lora.get("distilled")
    )


def _decode_config(model: dict[str, Any]) -> ModelConfig:
    def part(name: str) -> Any:
        fields = model.get(name)
        if fields is None:
            return None
        return _CONFIGS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    return ModelConfig(**{name: part(name) for name in _CONFIGS})


def _decode_stage(stage: dict[str, Any]) -> StageRecord:
    def specs(tensors: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], getattr(torch, t["dtype"]), tuple(t["dims"])) for t in tensors)

    return StageRecord(stage["name"], specs(stage["inputs"]), specs(stage["outputs"]), stage["weight_bytes"])
