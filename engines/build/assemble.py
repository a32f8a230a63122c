"""Putting an engine folder together, step by step, each step on disk before the next one starts.

Weights go stage by stage into the store, then come the runtime's tables and the tokenizer, then the files of each
executor, then hashes of all that, then the manifest. Files appear whole, by renaming. The journal names the finished
steps: a call after an interruption skips them, whatever interrupted it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout, StoreWriter
from scail2_rt.engines.folder.weights import EMBEDDING, StageTensors, runtime_tables, write_stage
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.engines.registry import device_of, gpu, stage_numerics, versions
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.spec import StageDefinition

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
    from scail2_rt.export.checkpoint.tensors import TensorSource

EMBEDDING_SOURCE = "token_embedding.weight"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be built, all of it known before a weight is read. `sources`: component → tensors, LoRA included;
    `origin`: the checkpoint as the user named it; `overrides`: parts named apart."""

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
        """Executors whose artefacts are looked at again although the folder has them: plans that were asked for."""
        asked = self.plan_options is not None or self.patterns
        return ("tensorrt",) if asked and "tensorrt" in self.backends else ()

    def stage_bytes(self, stage: str) -> int:
        return sum(tensor.nbytes for tensor in self.tensors[stage].values())


@dataclass(frozen=True, slots=True)
class Assembled:
    """The manifest that was written, the executors that are new, and the steps that an earlier call had done."""

    manifest: Manifest
    added: tuple[str, ...]
    resumed_steps: int


def assemble(plan: Plan, identity: Identity, previous: Manifest | None, observer: BuildObserver) -> Assembled:
    """Build everything (`previous` None), or add the executors that the finished folder lacks."""
    return _Assembly(plan, identity, previous, observer).run()


def _fingerprint(identity: Identity, layout: StoreLayout) -> str:
    """Equal for two requests exactly when the steps of one serve the other."""
    document = [
        FORMAT_VERSION,
        dataclasses.asdict(identity.config),
        identity.precision,
        identity.sources,
        [(lora.file.sha256, lora.strength) for lora in identity.loras],
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
            self.observer.note(f"continuing an interrupted build: {resumed} steps are done already")
        if previous is None:
            if not continued:
                self._clear()
            self._weights()
            self._tables()
            self._tokenizer()
        added = tuple(name for name in plan.backends if previous is None or name not in previous.backends)
        made = tuple(name for name in plan.backends if name in (*added, *plan.refreshed) and self._artefacts(name))
        added = tuple(name for name in added if name in made)
        manifest = self._manifest(made, self._seal(made))
        if manifest.executors:
            write_manifest(plan.directory, manifest)
            self.journal.remove()
        return Assembled(manifest, added, resumed)

    def _clear(self) -> None:
        """Take away what an earlier build made; the manifest first, so that the folder is not taken for valid."""
        with contextlib.suppress(FileNotFoundError):
            (self.plan.directory / MANIFEST).unlink()
        for file in (self.plan.directory / TABLES, self.plan.directory / TOKENIZER, *self._old_stages()):
            file.unlink(missing_ok=True)

    def _old_stages(self) -> list[Path]:
        patterns = [f"{STORE_NAME}*", "*.onnx*"]
        if "tensorrt" not in self.plan.backends:  # else plans are kept as far as they are still good
            patterns += ["*.plan*", "plans.json"]
        return [file for pattern in patterns for file in self.stages.glob(pattern)]

    def _weights(self) -> None:
        plan = self.plan
        phase = Phase(self.observer, "weights", {stage: plan.stage_bytes(stage) for stage in plan.tensors})
        store = self.stages / STORE_NAME
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
                self._write_stage(writer, stage)
                writer.flush()
                self.journal.add("weights", stage)
                phase.finish(step)
            writer.finish()
        finally:
            writer.close()

    def _write_stage(self, writer: StoreWriter, stage: str) -> None:
        component = stage.partition(".")[0]
        weights = {"weight": (EMBEDDING_SOURCE,)} if stage == EMBEDDING else self.plan.definitions[stage].weights
        source = self.plan.sources[component]
        write_stage(writer, stage, self.plan.tensors[stage], weights, source, self.plan.precision)

    def _tables(self) -> None:
        from safetensors.torch import save_file

        path = self.plan.directory / TABLES
        partial = path.with_name(f"{path.name}.partial")
        save_file(runtime_tables(self.plan.config, self.plan.sources.get("dit")), partial)
        os.replace(partial, path)

    def _tokenizer(self) -> None:
        if self.plan.tokenizer is None:
            return
        path = self.plan.directory / TOKENIZER
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        shutil.copyfile(self.plan.tokenizer, partial)
        os.replace(partial, path)

    def _artefacts(self, backend: str) -> bool:
        """Make the files of one executor; are they complete? The torch executor runs from the store alone."""
        if backend == "tensorrt":
            return self._plans()
        if backend == "torch":
            return True
        from scail2_rt.export.onnx.stages import export_stage

        plan = self.plan
        sizes = {stage: plan.stage_bytes(stage) for stage in plan.definitions}
        phase = Phase(self.observer, backend, sizes, _tracing_effort(plan.definitions))
        for stage, definition in plan.definitions.items():
            path = self.stages / f"{stage}.onnx"
            if self.journal.has(backend, stage) and path.is_file():
                phase.skip(stage)
                continue
            step = phase.start(stage)
            numerics = stage_numerics(definition, plan.precision, backend, device_of(backend))
            export_stage(definition, numerics, path, plan.layout)
            self.journal.add(backend, stage)
            phase.finish(step)
        return True

    def _plans(self) -> bool:
        from scail2_rt.engines.tensorrt_backend.builder import build_plans

        plan = self.plan
        sizes = {stage: plan.stage_bytes(stage) for stage in plan.definitions}
        build_plans(
            plan.directory,
            plan.definitions,
            sizes,
            plan.precision,
            plan.config,
            plan.layout,
            self.observer,
            plan.plan_options,
            plan.patterns,
        )
        files = [plan.directory / file for file in self._plan_files()]
        missing = [file for file in files if not file.is_file()]
        if missing:
            self.observer.note(
                f"{len(files) - len(missing)} of {len(files)} files of the TensorRT stages are there; the same command "
                "without --stages makes the others"
            )
        return not missing

    def _plan_files(self) -> list[str]:
        from scail2_rt.engines.tensorrt_backend.plans import graph_path, plan_path

        folder = Path(STAGES)
        return [str(path(folder, stage)) for stage in self.plan.definitions for path in (graph_path, plan_path)]

    def _seal(self, added: tuple[str, ...]) -> tuple[Artefact, ...]:
        """Size and hash of every file of the folder; those of an existing manifest are kept unless made again."""
        plans = self._plan_files() if "tensorrt" in added else []
        before = self.previous.artefacts if self.previous is not None else ()
        kept = tuple(artefact for artefact in before if artefact.path not in plans)
        paths = [] if kept else [f"{STAGES}/{STORE_NAME}", TABLES, *([TOKENIZER] if self.plan.tokenizer else [])]
        if "onnxruntime" in added:
            paths += [f"{STAGES}/{stage}.onnx" for stage in self.plan.definitions]
        paths += plans
        sizes = {path: (self.plan.directory / path).stat().st_size for path in paths}
        phase = Phase(self.observer, "seal", sizes)
        sealed = []
        for path, size in sizes.items():
            step = phase.start(path)
            digest = hash_file(self.plan.directory / path, partial(self.observer.advanced, step))
            sealed.append(Artefact(path, size, digest))
            phase.finish(step)
        return (*kept, *sealed)

    def _manifest(self, added: tuple[str, ...], artefacts: tuple[Artefact, ...]) -> Manifest:
        plan = self.plan
        new = [ExecutorRecord(name, versions(name), gpu() if device_of(name) == "cuda" else None) for name in added]
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
            created_by=f"scail2-rt {importlib.metadata.version('scail2-rt')}",
        )


def _tracing_effort(definitions: Mapping[str, StageDefinition]) -> dict[str, float]:
    """How long each stage's graph takes: one is traced a family, and a VAE graph is ten times as big as the others."""
    seen: set[str] = set()
    effort = {}
    for stage, definition in definitions.items():
        first = definition.family not in seen
        effort[stage] = (10.0 if definition.component == "vae" else 1.0) if first else 0.001
        seen.add(definition.family)
    return effort
