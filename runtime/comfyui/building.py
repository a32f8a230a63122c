"""Builds engines from ComfyUI's checkpoint and LoRA files, in folders named by their content.

The folder's name contains a hash of everything that the engines depend on: renamed files are not built again, and
another LoRA strength makes another folder. Source files are hashed once (`hashes.json` beside the folders stores the
hashes). An interrupted build resumes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.engines.folder.sources import file_groups, hash_sources
from scail2_rt.engines.observer import BuildObserver
from scail2_rt.engines.registry import backend, choose_backend, default_precision
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.runtime.session.warm import warm_kernels

HASHES = "hashes.json"
PARTS = ("vae", "umt5", "clip", "tokenizer")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of a build. parts: paths of vae, umt5, clip and tokenizer; missing ones are searched beside the
    checkpoint. precision: None chooses by the hardware."""

    checkpoint: Path
    parts: Mapping[str, Path]
    loras: tuple[LoRASpec, ...]
    precision: str | None
    backend: str


def built(wanted: Wanted, root: Path, observer: BuildObserver) -> Path:
    """Return the engine folder in `root`, building it if necessary. An interrupted build resumes at the next call.
    Raises InputError for a checkpoint or LoRA that cannot be used."""
    vae, umt5, clip, tokenizer = (wanted.parts.get(name) for name in PARTS)
    checkpoint = open_checkpoint(wanted.checkpoint, vae, umt5, clip, tokenizer)
    executor, _ = choose_backend(wanted.backend)
    precision = wanted.precision or default_precision((executor,))[0]
    folder = root / f"{wanted.checkpoint.stem}-{_prepared(wanted, checkpoint, root, precision, observer)}"
    if (folder / MANIFEST).is_file() and executor in read_manifest(folder).backends:
        return folder
    request = BuildRequest(wanted.checkpoint, folder, (executor,), precision, wanted.loras, components=wanted.parts)
    report = build(request, checkpoint, observer)
    if any(backend(name).compiles_kernels for name in report.added):
        warm_kernels(folder)
    return folder


def _prepared(wanted: Wanted, checkpoint: Checkpoint, root: Path, precision: str, observer: BuildObserver) -> str:
    """The hash of everything that the engines depend on, 12 hexadecimal digits. The hashes of the files are written to
    the engine folder, so that the build does not compute them again."""
    root.mkdir(parents=True, exist_ok=True)
    known = Journal.read(root / HASHES)
    sources: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    groups = file_groups(sources, checkpoint.tokenizer, [spec.files for spec in wanted.loras])
    records = hash_sources(groups, sources, known.hashed, observer, known.remember)
    parts = [(record.component, record.sha256) for record in records]
    text = json.dumps([parts, [spec.strength for spec in wanted.loras], precision])
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = root / f"{wanted.checkpoint.stem}-{key}"
    if not folder.exists():
        folder.mkdir()
        journal = Journal.load(folder)
        journal.hashed = records
        journal.save()
    return key
