"""Interface between engines and the libraries that run them.

`Backend` answers questions before anything is opened: is the library installed, on which device and in which types does
it compute, which files does it make in an engine folder. `Executor` is a backend that has opened one folder. All other
code uses only these two classes; only `engines.registry` knows the backends. Each backend implements one of each.
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
    """Signature of an engine, in the types that its executor computes with."""

    name: str
    family: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, definition: StageDefinition, numerics: Numerics) -> "EngineSpec":
        inputs, outputs = definition.io(numerics)
        return cls(definition.name, definition.family or definition.name, inputs, outputs)


class Engine(Protocol):
    """One loaded stage. Takes tensors on the executor's device in the types of its `EngineSpec`, returns tensors; runs
    on the current stream."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Execution:
    """How engines run. `attention`: a variant's name (`kernels.attention.variants`) or "auto"; `cuda_graphs`: capture
    denoising steps in CUDA graphs (on a GPU); `vram_limit`: bytes of GPU memory that the process may use, None for all
    free memory."""

    max_rows: int = MAX_ROWS
    attention: str = "auto"
    cuda_graphs: bool = True
    vram_limit: int | None = None


DEFAULT_EXECUTION = Execution()


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """An engine folder that passed the checks of opening, or one that a benchmark made. checker: compares data with its
    checksum when it is read; None for a folder without checksums."""

    directory: Path
    manifest: Manifest
    definitions: Mapping[str, StageDefinition]
    store: WeightStore
    checker: SumChecker | None = None

    def definition(self, stage: str) -> StageDefinition:
        """Return a stage's definition. Raises InputError if the folder does not have the stage."""
        try:
            return self.definitions[stage]
        except KeyError:
            raise InputError(
                f"{self.directory} has no stage {stage}: the checkpoint that it was built from has no "
                f"{stage.partition('.')[0]} part. Rebuild it from a complete checkpoint."
            ) from None

    def check_file(self, path: str, stage: str = "") -> Path:
        """Return the path of an artefact. Raises DamagedError if its checksum differs (checked once per process)."""
        if self.checker is not None:
            self.checker.file(path, stage)
        return self.directory / path


@dataclass(frozen=True, slots=True)
class ArtefactPlan:
    """The inputs of a backend's build. stage_bytes: bytes of each stage's weights, for estimates; store: location of
    each weight. options and patterns (shell patterns of the wanted stages) are for backends with build options."""

    directory: Path
    config: ModelConfig
    precision: Precision
    definitions: Mapping[str, StageDefinition]
    stage_bytes: Mapping[str, int]
    store: StoreLayout
    options: "PlanOptions | None" = None
    patterns: tuple[str, ...] = ()


class Executor(ABC):
    """The engines of one folder on one device. A stage is loaded when it first runs and freed when it is released; long
    token sequences are cut into row chunks.

    cuda_graphs     denoising steps may be captured in CUDA graphs
    follows_stream  it computes on PyTorch's current stream, so that a CUDA graph can capture it
    places_weights  it controls where weights lie, so that a memory plan applies
    splits_pictures it can decode a strip of a frame
    reports_plans   it can report how a stage was compiled"""

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
        """The maximum number of rows per call of a stage."""
        return self._chunks.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self._chunks = RowChunks(rows)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages whose weights are loaded."""
        return tuple(self._engines)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the stages whose weights are streamed through shared buffers."""
        return ()

    def numerics(self, stage: str) -> Numerics:
        """Return storage and arithmetic types of a stage in this executor."""
        definition = self.folder.definition(stage)
        return self.backend.numerics(definition, self.folder.manifest.precision, self.device.type)

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Run a stage and return its outputs. Inputs must have the types of its specs and be on `device`. `out`: where
        the first output may be written (it may be the first input); an executor may return a new tensor instead.

        Raises Scail2Error for inputs of other types."""
        engine, spec = self._engine(name)
        have = [tensor.dtype for tensor in inputs]
        want = [tensor.dtype for tensor in spec.inputs]
        if have != want:
            raise Scail2Error(f"stage {name} needs inputs of types {want}, it was given {have}.")
        return self._call(engine, spec, inputs, out)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start loading these stages in the background, in this order, if the executor supports it."""
        return

    def stream(self, names: Sequence[str]) -> None:
        """Stream the weights of these stages, which run repeatedly in this order, through shared buffers from now on.

        Raises Scail2Error if the executor does not support it."""
        if names:
            raise Scail2Error(f"backend {self.backend.name} cannot stream weights. Run without a memory plan.")

    def release(self, prefix: str) -> None:
        """Free every loaded stage whose name begins with `prefix`; a later run loads it again."""
        for name in [name for name in self._engines if name.startswith(prefix)]:
            self._engines.pop(name)[0].close()
        self._chunks.keep({spec.family for _, spec in self._engines.values()})

    def vae_stream(self, stage: str) -> VAEStream:
        """Return a stream over `vae.encode` or `vae.decode`, at the start of a clip."""
        return StagedVAEStream(self, stage)

    def part_stream(self, part: Part) -> VAEStream:
        """Return a stream over `vae.decode`, at the start of a clip, that decodes a strip [3, 1 or 4, rows, W].

        Raises Scail2Error if the executor does not support it."""
        raise Scail2Error(f"backend {self.backend.name} decodes complete frames only.")

    def plan_report(self, name: str) -> str | None:
        """Return how a stage was compiled, as JSON of the library's inspector; None if nothing is compiled."""
        return None

    def close(self) -> None:
        """Free everything except the folder's store, which belongs to the caller."""
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
        """Load the engine of a stage. Raises InputError if the folder does not have it."""


class Backend(ABC):
    """One library that can run stages. The default methods suit a library that needs nothing special.

    name              on the command line, in manifests and in reports
    module            the imported module; packages: distributions whose versions affect the results
    install           the command that installs it
    needs_gpu         it runs only on a GPU
    built_by_auto     `--backend auto` of a build makes its artefacts; False if that takes long
    build_options     its builds take options; a build with such an option checks existing artefacts again
    compiles_kernels  on a GPU it compiles our kernels when they first run
    hosting           what its licence says about hosting a service; "" if nothing"""

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
        """Return whether its library can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    def device(self) -> str:
        """Return the device type on which it computes on this machine: "cuda" or "cpu"."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    def numerics(self, definition: StageDefinition, precision: Precision, device: str) -> Numerics:
        """Return storage and arithmetic types of a stage on "cuda" or "cpu". Storage depends on the precision only."""
        return definition.numerics(precision)

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that its artefacts depend on."""
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
        """Raise InputError if its artefacts cannot be built on this machine."""
        return

    def option_words(self, directory: Path, record: ExecutorRecord) -> list[str]:
        """The command line's options with which its artefacts in this folder were built."""
        return []

    def check_place(self, record: ExecutorRecord, remedy: str) -> None:
        """Raise InputError if artefacts of this record cannot run here. `remedy`: the command that rebuilds them."""
        return

    def auto_obstacle(self, directory: Path, manifest: Manifest) -> str | None:
        """Return why `auto` must not choose its artefacts in this folder, in words; None if it may."""
        return None

    def remember(self, directory: Path, manifest: Manifest, passed: bool) -> None:
        """Record that `verify` has tested its artefacts on this machine's GPU."""
        return

    def memory_note(self, stage_bytes: Mapping[str, int]) -> str | None:
        """Return in words how much GPU memory the weights of these stages (name → bytes) need; None if streamed."""
        return None

    def limit_obstacle(self, device: str) -> str | None:
        """Return why a GPU memory limit cannot be enforced on "cuda" or "cpu", in words; None if it can."""
        return f"{self.name} runs on the {device} here"

    def targets(self, plan: ArtefactPlan) -> tuple[str, ...]:
        """Return the GPU architectures that its artefacts are built for; none if they are built for this machine."""
        return ()

    def room(self, plan: ArtefactPlan) -> int:
        """Return the bytes of disk that its artefacts need beside the weight store. Raises InputError if it estimates
        the space itself and there is not enough."""
        return 0

    def build(self, plan: ArtefactPlan, observer: BuildObserver, journal: Journal) -> bool:
        """Make its artefacts in a folder whose weight store is complete; returns whether all of them exist now."""
        return True

    def files(self, stages: Iterable[str]) -> tuple[str, ...]:
        """Return the artefacts of these stages, relative to the engine folder."""
        return ()

    def forget(self, directory: Path, stages: Iterable[str]) -> None:
        """Mark the artefacts of these stages as damaged, so that a build replaces them. The files stay until then."""
        return

    def leftovers(self, wanted: bool) -> tuple[str, ...]:
        """Return patterns of its files in the folder `stages` that a build of other weights deletes. `wanted`: the
        build includes this backend, so it may keep files that are still valid."""
        return ()

    @abstractmethod
    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> Executor:
        """Open the executor for a folder. Raises InputError if it cannot run there."""
