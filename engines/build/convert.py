"""Conversion of a checkpoint in any layout to one safetensors file with Wan names, which other tools can read.

The transformer is written to the named file; `everything` adds VAE, umT5, CLIP and tokenizer beside it, so that the
folder is a complete checkpoint. Matrices get the requested type. Tensors that all engines hold in fp32 (norms,
modulation, time embedding, head) stay fp32, so bf16 engines built from either checkpoint are identical. Sizes that
shapes do not determine (heads) are stored in the file's metadata. Writing works as in the weight store: header first,
tensors at their offsets in `FILE.partial`, finished groups in `FILE.partial.json`, so a call after an interruption
continues; the file is renamed when it is complete and hashed. `FILE.json` records sources and hashes; from it a second
call recognises a finished conversion.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.engines.build.convert_target import PARTS, TOKENIZER, ConvertRequest, Target, check_places, make_target
from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.lock import alone
from scail2_rt.engines.folder.manifest import SourceFile, write_json
from scail2_rt.engines.folder.sources import file_groups, hash_file, hash_sources
from scail2_rt.engines.folder.store import StoreLayout, StoreWriter
from scail2_rt.engines.folder.weights import finite_extremes, pieces
from scail2_rt.engines.observer import BuildObserver, Phase, SilentObserver
from scail2_rt.export.checkpoint.find import LABELS
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.lora import LoRAReport

FORMAT_VERSION = 1
STEP_EFFORT = 1 << 22  # fixed cost of a step, expressed in bytes, for the time estimate
_CHECKSUM = "checksum"


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """One finished file. dtypes: type → number of tensors; resumed_groups: written by an earlier, interrupted call."""

    component: str
    path: str
    size: int
    sha256: str
    tensors: int
    dtypes: dict[str, int]
    sources: tuple[SourceFile, ...]
    up_to_date: bool
    resumed_groups: int


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The result of a conversion. tokenizer: path of the copied file, None if it was not copied; loras: fused LoRAs."""

    files: tuple[ConvertedFile, ...]
    tokenizer: str | None
    wall_s: float
    loras: "tuple[LoRAReport, ...]" = ()

    @property
    def text(self) -> str:
        """One line per file, followed by its hash in the format of `sha256sum -c`."""
        lines = []
        for file in self.files:
            dtypes = ", ".join(f"{count} in {dtype}" for dtype, count in file.dtypes.items())
            done = "unchanged" if file.up_to_date else "written"
            tensors = counted(file.tensors, "tensor")
            lines.append(f"{file.component}, {tensors} ({dtypes}), {file.size / 2**20:.1f} MiB, {done}:")
            lines.append(f"{file.sha256}  {file.path}")
        if self.tokenizer is None:
            lines.append(
                "VAE, umT5, CLIP and tokenizer are not included. Keep them in its folder, name them with --vae, --t5, "
                "--clip and --tokenizer, or convert with --all"
            )
        return "\n".join((*lines, *(lora.text for lora in self.loras)))


def convert(request: ConvertRequest, checkpoint: Checkpoint, observer: BuildObserver | None = None) -> ConvertReport:
    """Write the files. Raises InputError for an unusable output path, another file at that path, a source that changed
    since an interrupted call, or values that are not finite; Scail2Error for values too large for the type, and for a
    full disk."""
    started = time.monotonic()
    observer = observer or SilentObserver()
    output = request.output.expanduser().absolute()
    if output.suffix != ".safetensors":
        raise InputError(f"the output {request.output} has another extension. Name it *.safetensors.")
    parts: dict[Component, Path] = {"dit": output}
    if request.everything:
        parts |= {component: output.parent / name for component, name in PARTS.items()}
    targets = [make_target(checkpoint, component, path, request) for component, path in parts.items()]
    tokenizer = output.parent / TOKENIZER if request.everything else None
    check_places(targets, checkpoint, tokenizer, request.overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"another conversion is writing to {output.parent}. Wait until it ends."
        with alone(output.parent, refusal, observer.note):
            files = tuple(_convert(target, request.overwrite, observer) for target in targets)
            if tokenizer is not None and checkpoint.tokenizer is not None:
                _copy(checkpoint.tokenizer, tokenizer)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"the disk of {output.parent} is full" if full else f"writing to {output.parent} failed: {error}"
        raise Scail2Error(f"{what}. Finished work is kept; run the same command again to continue.") from error
    except KeyboardInterrupt:
        observer.note("finished work is kept; the same command continues")
        raise
    return ConvertReport(
        files,
        None if tokenizer is None else str(tokenizer),
        time.monotonic() - started,
        getattr(targets[0].source, "report", ()),
    )


def _convert(target: Target, overwrite: bool, observer: BuildObserver) -> ConvertedFile:
    journal = Journal.read(target.journal)
    record = _read_record(target.record)
    known = [*journal.hashed, *(SourceFile(**file) for file in record.get("sources", ()))]
    groups = file_groups({target.component: target.source}, None, [spec.files for spec in target.loras])
    sources = tuple(hash_sources(groups, {target.component: target.source}, known, observer, journal.remember))
    hashes = [file.sha256 for file in sources]
    document = [FORMAT_VERSION, hashes, *([[lora.strength for lora in target.loras]] if target.loras else [])]
    fingerprint = hashlib.sha256(json.dumps(document).encode() + target.layout.header).hexdigest()
    begun = journal.fingerprint == fingerprint and bool(journal.done)
    if not begun and (done := _finished(target, record, fingerprint)):
        target.journal.unlink(missing_ok=True)
        return _describe(target, sources, done, up_to_date=True)
    if not begun and not overwrite:
        if journal.done and target.partial.exists():
            raise InputError(
                f"{target.partial} was begun from other files or with another --dtype or --lora ({target.component}: "
                f"{', '.join(file.path for file in sources)} changed?). Use --overwrite to begin again, or another -o."
            )
        if target.path.exists():
            raise InputError(
                f"{target.path} was made from other files or with another --dtype or --lora. Use --overwrite to "
                "replace it, or another -o."
            )
    journal.begin(fingerprint)
    resumed = len(journal.done)
    if resumed:
        observer.note(f"{target.path}: continuing an interrupted conversion; groups already done: {resumed}")
    digest = _write(target, journal, sources, observer)
    write_json(target.record, _record(target, fingerprint, digest, sources))
    journal.remove()
    return _describe(target, sources, digest, up_to_date=False, resumed=resumed)


def _write(target: Target, journal: Journal, sources: tuple[SourceFile, ...], observer: BuildObserver) -> str:
    """Write the missing groups, hash the file and rename it → SHA-256."""
    if target.path.exists() and not target.partial.exists() and (sealed := _sealed(journal)):
        return sealed  # interrupted between the renaming and the record
    sizes = {name: _bytes(target.layout, group) for name, group in target.groups.items()}
    phase = Phase(observer, "convert", sizes, {name: float(size + STEP_EFFORT) for name, size in sizes.items()})
    writer = StoreWriter(target.path, target.layout)
    try:
        if not writer.resumed:
            journal.forget("convert")
        for name, group in target.groups.items():
            if journal.has("convert", name):
                phase.skip(name)
                continue
            step = phase.start(name)
            for tensor in group:
                _write_tensor(writer, target.source, tensor)
            writer.flush()
            journal.add("convert", name)
            phase.finish(step)
        _check_unchanged(sources)
        phase = Phase(observer, _CHECKSUM, {target.path.name: target.layout.size})
        step = phase.start(target.path.name)
        digest = hash_file(target.partial, partial(observer.advanced, step))
        phase.finish(step)
        journal.forget(_CHECKSUM)
        journal.add(_CHECKSUM, digest)
        target.record.unlink(missing_ok=True)  # it describes the file that is now replaced
        writer.finish()
    finally:
        writer.close()
    return digest


def _write_tensor(writer: StoreWriter, source: TensorSource, name: str) -> None:
    dtype = writer.layout.location(name).dtype
    if not dtype.is_floating_point:
        writer.write(name, source.get(name))
        return
    position = 0
    for _, values in pieces(source, (name,)):
        extremes = finite_extremes(name, values)
        if not extremes.to(dtype).isfinite().all():
            raise Scail2Error(
                f"tensor {name} has values up to {extremes.abs().max():.3g}, more than {str(dtype)[6:]} can hold; "
                "convert with --dtype bf16 or fp32."
            )
        writer.write(name, values.to(dtype), position)
        position += values.numel()


def _bytes(layout: StoreLayout, names: tuple[str, ...]) -> int:
    return sum(layout.location(name).length for name in names)


def _check_unchanged(sources: tuple[SourceFile, ...]) -> None:
    for file in sources:
        if file.path == "memory":
            continue
        state = Path(file.path).stat()
        if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
            raise InputError(f"{file.path} changed during the conversion. Run it again with --overwrite.")


def _sealed(journal: Journal) -> str | None:
    return next((step.partition("/")[2] for step in journal.done if step.startswith(f"{_CHECKSUM}/")), None)


def _record(target: Target, fingerprint: str, digest: str, sources: tuple[SourceFile, ...]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "component": target.component,
        "sha256": digest,
        "size": target.layout.size,
        "fingerprint": fingerprint,
        "sources": [dataclasses.asdict(file) for file in sources],
    }


def _read_record(path: Path) -> Mapping[str, Any]:
    """Return the record beside a converted file, or an empty one if there is no usable record."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record["format_version"] != FORMAT_VERSION:
            return {}
        [SourceFile(**file) for file in record["sources"]]
        return {**record, "sha256": str(record["sha256"]), "size": int(record["size"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _finished(target: Target, record: Mapping[str, Any], fingerprint: str) -> str | None:
    """Return the SHA-256 of the output if it already is the requested file."""
    there = target.path.is_file() and target.path.stat().st_size == record.get("size")
    return record["sha256"] if there and record["fingerprint"] == fingerprint else None


def _describe(
    target: Target, sources: tuple[SourceFile, ...], digest: str, up_to_date: bool, resumed: int = 0
) -> ConvertedFile:
    dtypes: dict[str, int] = {}
    for name in target.layout.names:
        label = str(target.layout.location(name).dtype).removeprefix("torch.")
        dtypes[label] = dtypes.get(label, 0) + 1
    return ConvertedFile(
        component=LABELS[target.component],
        path=str(target.path),
        size=target.layout.size,
        sha256=digest,
        tensors=len(target.layout.names),
        dtypes=dtypes,
        sources=sources,
        up_to_date=up_to_date,
        resumed_groups=resumed,
    )


def _copy(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    unfinished = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
