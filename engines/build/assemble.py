"""Assembly of an engine folder, step by step; each step is on disk before the next one starts.

Order: weights, stage by stage, into the store; the runtime's tables and the tokenizer; the files of each backend;
hashes and checksums of all of these; the manifest. Files appear complete, by renaming. The journal lists the finished
steps: a call after any interruption skips them. Weights are summed as they are written; the journal keeps the sums.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STAGES,
    TABLES,
    TOKENIZER,
    Artefact,
    ExecutorRecord,
    Identity,
    Manifest,
    StageRecord,
    write_manifest,
)
from scail2_rt.engines.folder.sources import hash_file
from scail2_rt.engines.folder.store import (
    STORE_NAME,
    StoreLayout,
    StoreReader,
    StoreWriter,
    SummingWriter,
    TensorWriter,
)
from scail2_rt.engines.folder.sums import Sums, joined, sum_of, sum_of_file
from scail2_rt.engines.folder.weights import EMBEDDING, StageTensors, runtime_tables, write_stage
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.engines.registry import BACKENDS, backend, gpu
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.wording import counted

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
    from scail2_rt.export.checkpoint.tensors import TensorSource

EMBEDDING_SOURCE = "token_embedding.weight"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a build, complete before a weight is read. `sources`: component → tensors, LoRA included; `origin`:
    the checkpoint as named by the user; `overrides`: components with a separate path."""

    directory: Path
    config: ModelConfig
    precision: Precision
    backends: tuple[str, ...]
    definitions: dict[str, StageDefinition]
    tensors: dict[str, StageTensors]
    layout: StoreLayout
    sources: "dict[str, TensorSource]"
    tokenizer: Path | None
    origin: str
    overrides: dict[str, str]
    lora_partial: bool
    plan_options: "PlanOptions | None" = None
    patterns: tuple[str, ...] = ()

    @property
    def refreshed(self) -> tuple[str, ...]:
        """Backends whose existing artefacts are checked again because build options were given."""
        asked = self.plan_options is not None or self.patterns
        return tuple(name for name in self.backends if asked and backend(name).build_options)

    @property
    def artefacts(self) -> ArtefactPlan:
        """The inputs of a backend's build."""
        return ArtefactPlan(
            self.directory,
            self.config,
            self.precision,
            self.definitions,
            {stage: self.stage_bytes(stage) for stage in self.definitions},
            self.layout,
            self.plan_options,
            self.patterns,
        )

    @property
    def store(self) -> Path:
        return self.directory / STAGES / STORE_NAME

    def stage_bytes(self, stage: str) -> int:
        return sum(tensor.nbytes for tensor in self.tensors[stage].values())

    def write_stage(self, writer: TensorWriter, stage: str) -> None:
        """Convert the weights of one stage, or the token embedding."""
        weights = {"weight": (EMBEDDING_SOURCE,)} if stage == EMBEDDING else self.definitions[stage].weights
        source = self.sources[stage.partition(".")[0]]
        write_stage(writer, stage, self.tensors[stage], weights, source, self.precision)

    def write_tables(self) -> None:
        from safetensors.torch import save_file

        path = self.directory / TABLES
        partial = path.with_name(f"{path.name}.partial")
        save_file(runtime_tables(self.config, self.sources.get("dit")), partial)
        os.replace(partial, path)

    def copy_tokenizer(self) -> None:
        """Copy the tokenizer, if the checkpoint has one."""
        if self.tokenizer is None:
            return
        path = self.directory / TOKENIZER
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        shutil.copyfile(self.tokenizer, partial)
        os.replace(partial, path)


@dataclass(frozen=True, slots=True)
class Assembled:
    """The manifest that was written, the backends that were added, and the steps done by an earlier call."""

    manifest: Manifest
    added: tuple[str, ...]
    resumed_steps: int


def assemble(plan: Plan, identity: Identity, previous: Manifest | None, observer: BuildObserver) -> Assembled:
    """Build everything (`previous` None), or add the backends that the finished folder lacks."""
    return _Assembly(plan, identity, previous, observer).run()


def _fingerprint(identity: Identity, layout: StoreLayout) -> str:
    """Return a hash that is equal for two requests exactly if the steps of one are valid for the other."""
    document = [
        FORMAT_VERSION,
        dataclasses.asdict(identity.config),
        identity.precision,
        identity.sources,
        [lora.identity for lora in identity.loras],
    ]
    return hashlib.sha256(json.dumps(document).encode() + layout.header).hexdigest()


class _Assembly:
    def __init__(self, plan: Plan, identity: Identity, previous: Manifest | None, observer: BuildObserver) -> None:
        self.plan, self.identity, self.previous, self.observer = plan, identity, previous, observer
        self.stages = plan.directory / STAGES
        self.journal = Journal.load(plan.directory)

    def run(self) -> Assembled:
        plan, previous = self.plan, self.previous
        replaced = previous is None and (plan.directory / MANIFEST).exists()
        continued = self.journal.begin(_fingerprint(self.identity, plan.layout), afresh=replaced)
        resumed = len(self.journal.done)
        if resumed:
            self.observer.note(f"continuing an interrupted build: {counted(resumed, 'step')} done already")
        if previous is None:
            if not continued:
                self._clear()
            self._weights()
            plan.write_tables()
            plan.copy_tokenizer()
        added = tuple(name for name in plan.backends if previous is None or name not in previous.backends)
        wanted = [name for name in plan.backends if name in (*added, *plan.refreshed)]
        made = tuple(n for n in wanted if backend(n).build(plan.artefacts, self.observer, self.journal))
        added = tuple(name for name in added if name in made)
        manifest = self._manifest(made, self._seal(made))
        if manifest.executors:
            write_manifest(plan.directory, manifest)
            self.journal.remove()
        return Assembled(manifest, added, resumed)

    def _clear(self) -> None:
        """Delete the results of an earlier build; the manifest first, so that the folder does not count as valid."""
        with contextlib.suppress(FileNotFoundError):
            (self.plan.directory / MANIFEST).unlink()
        for file in (self.plan.directory / TABLES, self.plan.directory / TOKENIZER, *self._old_stages()):
            file.unlink(missing_ok=True)

    def _old_stages(self) -> list[Path]:
        patterns = [f"{STORE_NAME}*"]
        for name in BACKENDS:
            patterns += backend(name).leftovers(wanted=name in self.plan.backends)
        return [file for pattern in patterns for file in self.stages.glob(pattern)]

    def _weights(self) -> None:
        plan = self.plan
        phase = Phase(self.observer, "weights", {stage: plan.stage_bytes(stage) for stage in plan.tensors})
        store = plan.store
        if store.is_file() and all(self.journal.has("weights", stage) for stage in plan.tensors):
            return
        self.stages.mkdir(exist_ok=True)
        writer = StoreWriter(store, plan.layout)
        try:
            if not writer.resumed:
                self.journal.forget("weights")
            for stage in plan.tensors:
                if self.journal.has("weights", stage):
                    phase.skip(stage)
                    continue
                step = phase.start(stage)
                summing = SummingWriter(writer)
                plan.write_stage(summing, stage)
                writer.flush()
                self.journal.sums |= summing.sums
                self.journal.add("weights", stage)
                phase.finish(step)
            writer.finish()
        finally:
            writer.close()

    def _seal(self, added: tuple[str, ...]) -> tuple[Artefact, ...]:
        """Return size and hash of every file; those of an existing manifest are kept unless the file was made again."""
        made = [file for name in added for file in backend(name).files(self.plan.definitions)]
        before = self.previous.artefacts if self.previous is not None else ()
        kept = tuple(artefact for artefact in before if artefact.path not in made)
        paths = [] if kept else [f"{STAGES}/{STORE_NAME}", TABLES, *([TOKENIZER] if self.plan.tokenizer else [])]
        paths += made
        sizes = {path: (self.plan.directory / path).stat().st_size for path in paths}
        phase = Phase(self.observer, "seal", sizes)
        sealed = []
        for path, size in sizes.items():
            step = phase.start(path)
            digest = hash_file(self.plan.directory / path, partial(self.observer.advanced, step))
            sealed.append(Artefact(path, size, digest))
            phase.finish(step)
        return (*kept, *sealed)

    def _sums(self, artefacts: tuple[Artefact, ...], made: tuple[str, ...]) -> Sums:
        """Return the checksums of the weights as written, and of every other file; those of an existing manifest are
        kept unless the file was made again."""
        before = self.previous.sums if self.previous is not None else None
        tensors = dict(self.journal.sums) if before is None else before.tensors
        again = {file for name in made for file in backend(name).files(self.plan.definitions)}
        files = {} if before is None else {path: value for path, value in before.files.items() if path not in again}
        store = f"{STAGES}/{STORE_NAME}"
        sizes = {a.path: a.size for a in artefacts if a.path not in (store, *files)}
        phase = Phase(self.observer, "seal", sizes)
        for path in sizes:
            step = phase.start(path)
            files[path] = sum_of_file(self.plan.directory / path)
            phase.finish(step)
        if missing := [name for name in self.plan.layout.names if name not in tensors]:  # by a version without sums
            reader = StoreReader(self.plan.store)
            tensors = {**tensors, **{name: joined(reader.pieces(name)) for name in missing}}
            reader.close()
        return Sums(sum_of(self.plan.layout.header), tensors, files)

    def _manifest(self, added: tuple[str, ...], artefacts: tuple[Artefact, ...]) -> Manifest:
        plan = self.plan
        new = []
        for name in added:
            maker = backend(name)
            targets = maker.targets(plan.artefacts)
            here = gpu() if maker.device() == "cuda" and not targets else None
            new.append(ExecutorRecord(name, maker.versions(), here, targets))
        before = self.previous.executors if self.previous is not None else ()
        stages = []
        for name, definition in plan.definitions.items():
            inputs, outputs = definition.io(definition.numerics(plan.precision))
            stages.append(StageRecord(name, inputs, outputs, plan.stage_bytes(name)))
        return Manifest(
            identity=self.identity,
            checkpoint=plan.origin,
            overrides=plan.overrides,
            lora_partial=plan.lora_partial,
            executors=(*(record for record in before if record.backend not in added), *new),
            stages=tuple(stages),
            artefacts=artefacts,
            sums=self._sums(artefacts, added),
            created_by=f"scail2-rt {importlib.metadata.version('scail2-rt')}",
        )
