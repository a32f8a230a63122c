"""Running stages: what an engine is, and the set of engines of one folder.

An `EngineSet` is opened once a process. Opening checks the folder against the definitions of this version, chooses the
executor and says why. The set loads a stage when it is first run and forgets it when told to, and cuts long token
sequences into row chunks. Constants that the runtime itself needs (modulation, q/k norm weights) are in `tables`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from scail2_rt.engines.backends import choose_backend, device_of, stage_numerics
from scail2_rt.engines.chunks import MAX_ROWS, RowChunks
from scail2_rt.engines.manifest import (
    STAGES,
    TABLES,
    TOKENIZER,
    Manifest,
    check_folder,
    describe_command,
    read_manifest,
)
from scail2_rt.engines.store import STORE_NAME, StoreReader
from scail2_rt.engines.weights import EMBEDDING
from scail2_rt.export.config import ModelConfig
from scail2_rt.export.errors import InputError, Scail2Error
from scail2_rt.export.precision import Numerics
from scail2_rt.export.spec import StageDefinition, TensorSpec

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_session import TensorRTSession


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


class EngineSet:
    """The stages of one engine folder on one device."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        definitions: dict[str, StageDefinition],
        backend: str,
        reason: str,
        device: torch.device,
        max_rows: int = MAX_ROWS,
    ) -> None:
        from safetensors.torch import load_file

        self.directory, self.manifest, self.definitions = directory, manifest, definitions
        self.backend, self.reason, self.device = backend, reason, device
        self.store = StoreReader(directory / STAGES / STORE_NAME)
        self.tables: dict[str, Tensor] = load_file(directory / TABLES, device=str(device))
        self._chunks = RowChunks(max_rows)
        self._engines: dict[str, tuple[Engine, EngineSpec]] = {}
        self._session: TensorRTSession | None = None

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def max_rows(self) -> int:
        return self._chunks.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self._chunks = RowChunks(rows)

    @property
    def choice(self) -> str:
        """One printable line: what runs, where, and why."""
        return f"{self.backend} on {self.device} in {self.manifest.precision}, because {self.reason}"

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages that hold weights at the moment."""
        return tuple(self._engines)

    def numerics(self, stage: str) -> Numerics:
        """Storage and arithmetic of a stage in this executor."""
        return stage_numerics(self._definition(stage), self.manifest.precision, self.backend)

    def compute_dtype(self, stage: str) -> torch.dtype:
        """Type of a stage's activations in this executor."""
        return self.numerics(stage).compute

    def run(self, name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of a stage; it is loaded on first use, and cut into row chunks beyond `max_rows`.

        Inputs must have the types of the stage's specs and be on `device`."""
        engine, spec = self._engine(name)
        have = [tensor.dtype for tensor in inputs]
        want = [tensor.dtype for tensor in spec.inputs]
        if have != want:
            raise Scail2Error(f"stage {name} needs inputs of types {want}, it was given {have}.")
        return self._chunks.run(engine, spec.family, (spec.inputs, spec.outputs), inputs)

    def plan_report(self, name: str) -> str | None:
        """What TensorRT's engine inspector says of a stage's plan, as JSON; None for the other executors."""
        report = getattr(self._engine(name)[0], "plan_report", None)
        return None if report is None else report()

    def release(self, prefix: str) -> None:
        """Drop every loaded stage whose name begins with `prefix`; a later run loads it again."""
        for name in [name for name in self._engines if name.startswith(prefix)]:
            self._engines.pop(name)[0].close()
        self._chunks.keep({spec.family for _, spec in self._engines.values()})

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the umT5 token embedding, read from the mapped store. ids [n] → fp32 [n, dim] on the device."""
        return self.store.get(f"{EMBEDDING}.weight")[ids.cpu().long()].to(self.device, torch.float32)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json of the folder; InputError when it was built without a text encoder."""
        path = self.directory / TOKENIZER
        if not path.is_file():
            raise InputError(f"{self.directory} has no {TOKENIZER}; rebuild it from a checkpoint with a tokenizer.")
        return path

    @property
    def encoder_hash(self) -> str:
        """Names what a prompt's encoding depends on: encoder and tokenizer files, precision, arithmetic."""
        identity = self.manifest.identity.sources
        parts = [repr(identity.get(part)) for part in ("umt5", "tokenizer")]
        parts.append(str(self.numerics("umt5.final")))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        self.release("")
        if self._session is not None:
            self._session.close()
            self._session = None
        self.store.close()
        self.tables = {}

    def __enter__(self) -> "EngineSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, name: str) -> tuple[Engine, EngineSpec]:
        if name not in self._engines:
            self._engines[name] = self._load(name), EngineSpec.of(self._definition(name), self.numerics(name))
        return self._engines[name]

    def _definition(self, name: str) -> StageDefinition:
        try:
            return self.definitions[name]
        except KeyError:
            raise InputError(
                f"{self.directory} has no stage {name}: the checkpoint that it was built from lacks the "
                f"{name.partition('.')[0]} part; rebuild it from a complete checkpoint."
            ) from None

    def _load(self, name: str) -> Engine:
        definition = self._definition(name)
        numerics = self.numerics(name)
        if self.backend == "torch":
            from scail2_rt.engines.torch_executor import TorchEngine

            return TorchEngine(definition, numerics, self.store, self.device)
        if self.backend == "tensorrt":
            return self._load_plan(definition, numerics)
        from scail2_rt.engines.onnx_executor import OnnxEngine

        return OnnxEngine(definition, numerics, self.directory / STAGES / f"{name}.onnx", self.device)

    def _load_plan(self, definition: StageDefinition, numerics: Numerics) -> Engine:
        from scail2_rt.engines.tensorrt_executor import TensorRTEngine
        from scail2_rt.engines.tensorrt_plans import plan_path
        from scail2_rt.engines.tensorrt_session import CudaDevice, TensorRTSession

        if self._session is None:
            self._session = TensorRTSession(CudaDevice(self.device))
        remedy = describe_command(self.manifest, self.directory)
        plan = plan_path(self.directory / STAGES, definition.name)
        return TensorRTEngine(definition, numerics, plan, self._session, remedy)


def open_engines(
    directory: Path, backend: str = "auto", max_rows: int = MAX_ROWS, device: str | None = None
) -> EngineSet:
    """Check an engine folder and open it. `device`: "cpu" or "cuda", by default where the executor is fastest.

    InputError when the folder is damaged, of another version, or lacks the backend that was named."""
    from scail2_rt.export.stages import stage_definitions

    manifest = read_manifest(directory)
    definitions = stage_definitions(manifest.config)
    check_folder(directory, manifest, definitions)
    built = [executor.backend for executor in manifest.executors]
    name, reason = choose_backend(backend, built)
    if name not in built:
        raise InputError(
            f"{directory} holds no {name} engines (it holds {', '.join(built)}); add them with: "
            f"{describe_command(manifest, directory, backend=name)}"
        )
    if name == "tensorrt":
        from scail2_rt.engines.tensorrt_preflight import check_place

        record = next(executor for executor in manifest.executors if executor.backend == name)
        check_place(record, describe_command(manifest, directory))
    place = device or device_of(name)
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was named, but PyTorch finds no CUDA GPU on this machine; use the device cpu.")
    return EngineSet(directory, manifest, definitions, name, reason, torch.device(place), max_rows)
