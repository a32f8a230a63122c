"""The seam between engines and the libraries that run them: what a backend is, and what it opens.

`Backend` is what is known before anything opens: is its library here, where does it compute, in which arithmetic, and
which files it makes in an engine folder. `Executor` is a backend at work on one folder. Everything above talks to these
two; which backends there are only `engines.registry` knows. A backend is one file with a class for each.
"""

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import ExecutorRecord, Manifest
from scail2_rt.engines.folder.store import StoreLayout, WeightStore
from scail2_rt.engines.folder.sums import SumChecker
from scail2_rt.engines.observer import BuildObserver
from scail2_rt.engines.row_chunks import MAX_ROWS, RowChunks
from scail2_rt.engines.vae_stream import Part, StagedVAEStream, VAEStream
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics, Precision
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Signature of an engine, in the types that its executor computes in."""

    name: str
    family: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, definition: StageDefinition, numerics: Numerics) -> "EngineSpec":
        inputs, outputs = definition.io(numerics)
        return cls(definition.name, definition.family or definition.name, inputs, outputs)


class Engine(Protocol):
    """One loaded stage: tensors of the executor's device in, in the types of its `EngineSpec`, tensors out, on the
    current stream."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Execution:
    """How engines run. `attention`: a variant's name (`kernels.attention.variants`) or "auto"; `cuda_graphs`: record
    denoising steps in CUDA graphs (on a GPU); `vram_limit`: bytes of GPU memory that the process may use, None for
    what is free."""

    max_rows: int = MAX_ROWS
    attention: str = "auto"
    cuda_graphs: bool = True
    vram_limit: int | None = None


DEFAULT_EXECUTION = Execution()


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An engine folder that was found whole, or made up by a benchmark. checker: of what is read of it; None for a
    folder without sums."""

    directory: Path
    manifest: Manifest
    definitions: Mapping[str, StageDefinition]
    store: WeightStore
    checker: SumChecker | None = None

    def definition(self, stage: str) -> StageDefinition:
        """InputError for a stage that the folder does not have."""
        try:
            return self.definitions[stage]
        except KeyError:
            raise InputError(
                f"{self.directory} has no stage {stage}: the checkpoint that it was built from lacks the "
                f"{stage.partition('.')[0]} part; rebuild it from a complete checkpoint."
            ) from None

    def check_file(self, path: str, stage: str = "") -> Path:
        """Where an artefact is. DamagedError when it is not what its sum says, which is asked once a process."""
        if self.checker is not None:
            self.checker.file(path, stage)
        return self.directory / path


@dataclass(frozen=True, slots=True)
class ArtefactPlan:
    """What a backend makes its files from. stage_bytes: bytes of each stage's weights, for estimates; store: where each
    weight lies. options and patterns (shell patterns of the stages wanted) are for backends with build options."""

    directory: Path
    config: ModelConfig
    precision: Precision
    definitions: Mapping[str, StageDefinition]
    stage_bytes: Mapping[str, int]
    store: StoreLayout
    options: "PlanOptions | None" = None
    patterns: tuple[str, ...] = ()


class Executor(ABC):
    """The engines of one folder on one device. A stage is loaded when it is first run and goes when it is released;
    long token sequences are cut into row chunks.

    cuda_graphs     may denoising steps be recorded in CUDA graphs?
    follows_stream  does it compute on PyTorch's current stream, so that a CUDA graph can record it?
    places_weights  does it place weights itself, so that a memory plan applies?
    splits_pictures can it decode a part of the picture?
    reports_plans   can it say how a stage was compiled?"""

    cuda_graphs = False
    follows_stream = True
    places_weights = False
    splits_pictures = False
    reports_plans = False

    def __init__(self, backend: "Backend", folder: EngineFolder, device: torch.device, execution: Execution) -> None:
        self.backend, self.folder, self.device = backend, folder, device
        self._chunks = RowChunks(execution.max_rows)
        self._engines: dict[str, tuple[Engine, EngineSpec]] = {}

    @property
    def max_rows(self) -> int:
        """Most rows that a stage sees at once."""
        return self._chunks.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self._chunks = RowChunks(rows)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages that hold weights at the moment."""
        return tuple(self._engines)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the stages whose weights pass through shared buffers."""
        return ()

    def numerics(self, stage: str) -> Numerics:
        """Storage and arithmetic of a stage here."""
        definition = self.folder.definition(stage)
        return self.backend.numerics(definition, self.folder.manifest.precision, self.device.type)

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs of a stage. Inputs must have the types of its specs and be on `device`. `out`: where the first
        output may be written (the first input itself, say); an executor may return a tensor of its own instead."""
        engine, spec = self._engine(name)
        have = [tensor.dtype for tensor in inputs]
        want = [tensor.dtype for tensor in spec.inputs]
        if have != want:
            raise Scail2Error(f"stage {name} needs inputs of types {want}, it was given {have}.")
        return self._call(engine, spec, inputs, out)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to load these stages in the background, in this order, where the executor can."""
        return

    def stream(self, names: Sequence[str]) -> None:
        """From here on the weights of these stages, run in this order over and over, pass through shared buffers."""
        if names:
            raise Scail2Error(f"backend {self.backend.name} cannot stream weights; run without a memory plan.")

    def release(self, prefix: str) -> None:
        """Drop every loaded stage whose name begins with `prefix`; a later run loads it again."""
        for name in [name for name in self._engines if name.startswith(prefix)]:
            self._engines.pop(name)[0].close()
        self._chunks.keep({spec.family for _, spec in self._engines.values()})

    def vae_stream(self, stage: str) -> VAEStream:
        """A stream over `vae.encode` or `vae.decode` that is at its start."""
        return StagedVAEStream(self, stage)

    def part_stream(self, part: Part) -> VAEStream:
        """A stream over `vae.decode` at its start that gives a part of the picture, [3, 1 or 4, rows, W]."""
        raise Scail2Error(f"backend {self.backend.name} decodes whole pictures only.")

    def plan_report(self, name: str) -> str | None:
        """How a stage was compiled, as JSON of the library's inspector; None where nothing is compiled."""
        return None

    def close(self) -> None:
        """Drop everything; the folder's store is the caller's."""
        self.release("")

    def _engine(self, name: str) -> tuple[Engine, EngineSpec]:
        if name not in self._engines:
            spec = EngineSpec.of(self.folder.definition(name), self.numerics(name))
            self._engines[name] = self._load(name), spec
        return self._engines[name]

    def _call(
        self, engine: Engine, spec: EngineSpec, inputs: Sequence[Tensor], out: Tensor | None
    ) -> tuple[Tensor, ...]:
        return self._chunks.run(engine, spec.family, (spec.inputs, spec.outputs), inputs)

    @abstractmethod
    def _load(self, name: str) -> Engine:
        """The engine of a stage. InputError for one that the folder does not have."""


class Backend(ABC):
    """One library that can run stages. What a method does not override is right for a library that needs nothing.

    name              on the command line, in manifests and in reports
    module            what is imported; packages: distributions that decide what it computes
    install           the command that installs it
    needs_gpu         it runs on a GPU alone
    built_by_auto     `--backend auto` of a build makes its artefacts: False where that takes long
    build_options     its builds take options, and a build that names one looks at its artefacts again
    compiles_kernels  on a GPU it compiles kernels of ours when they are first run
    hosting           what its licence says to those who run a service; "" where it says nothing"""

    name: str
    module: str
    packages: tuple[str, ...] = ()
    install: str
    needs_gpu = False
    built_by_auto = True
    build_options = False
    compiles_kernels = False
    hosting = ""

    def installed(self) -> bool:
        """Can its library be imported here?"""
        return importlib.util.find_spec(self.module) is not None

    def device(self) -> str:
        """ "cuda" or "cpu": where it computes on this machine."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def numerics(self, definition: StageDefinition, precision: Precision, device: str) -> Numerics:
        """Storage and arithmetic of a stage on "cuda" or "cpu". Storage follows from the precision alone."""
        return definition.numerics(precision)

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that its artefacts depend on."""
        found = {}
        for package in self.packages:
            for distribution in (package, f"{package}-gpu"):
                try:
                    found[package] = importlib.metadata.version(distribution)
                    break
                except importlib.metadata.PackageNotFoundError:
                    continue
        return found

    def check_machine(self, precision: Precision | None = None) -> None:
        """InputError when its artefacts cannot be built on this machine."""
        return

    def option_words(self, directory: Path, record: ExecutorRecord) -> list[str]:
        """The command line's options with which its artefacts in this folder were built."""
        return []

    def check_place(self, record: ExecutorRecord, remedy: str) -> None:
        """InputError when artefacts of this record cannot run here. `remedy`: the command that builds them again."""
        return

    def auto_obstacle(self, directory: Path, manifest: Manifest) -> str | None:
        """Why `auto` must not take its artefacts in this folder, in words; None when it may."""
        return None

    def remember(self, directory: Path, manifest: Manifest, passed: bool) -> None:
        """`verify` has tested its artefacts on this machine's GPU."""
        return

    def memory_note(self, stage_bytes: Mapping[str, int]) -> str | None:
        """What a GPU must hold of the weights of these stages (name → bytes) at once, in words; None where weights can
        be streamed."""
        return None

    def limit_obstacle(self, device: str) -> str | None:
        """Why a limit of GPU memory cannot be kept on "cuda" or "cpu", in words; None when it can."""
        return f"{self.name} runs on the {device} here"

    def targets(self, plan: ArtefactPlan) -> tuple[str, ...]:
        """The GPU architectures that its artefacts were built for; none when they were built for this machine's."""
        return ()

    def room(self, plan: ArtefactPlan) -> int:
        """Bytes of disk that its artefacts need beside the weight store. InputError when there is no room for what it
        estimates itself."""
        return 0

    def build(self, plan: ArtefactPlan, observer: BuildObserver, journal: Journal) -> bool:
        """Make its artefacts in a folder whose weight store is complete; are all of them there now?"""
        return True

    def files(self, stages: Iterable[str]) -> tuple[str, ...]:
        """The artefacts of these stages, relative to the engine folder."""
        return ()

    def forget(self, directory: Path, stages: Iterable[str]) -> None:
        """The artefacts of these stages are damaged: whatever makes a build keep them goes. The files stay until they
        are replaced."""
        return

    def leftovers(self, wanted: bool) -> tuple[str, ...]:
        """Patterns of its files in the folder `stages` that a build of other weights takes away. `wanted`: it is built
        for itself, and may keep what is still good."""
        return ()

    @abstractmethod
    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> Executor:
        """The executor for a folder. InputError when it cannot run there."""
