"""Running stages: what an engine is, and the set of engines of one folder.

An `EngineSet` is opened once a process. Opening checks the folder against the definitions of this version, chooses the
executor and says why. The set loads a stage when it is first run and forgets it when told to, and cuts long token
sequences into row chunks. Constants that the runtime itself needs (modulation, q/k norm weights) are in `tables`.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from scail2_rt.engines.folder.manifest import (
    KERNELS,
    STAGES,
    TABLES,
    TOKENIZER,
    Manifest,
    check_folder,
    describe_command,
    read_manifest,
)
from scail2_rt.engines.folder.store import STORE_NAME, StoreReader, TensorShape, WeightStore
from scail2_rt.engines.folder.weights import EMBEDDING
from scail2_rt.engines.registry import choose_backend, device_of, stage_numerics
from scail2_rt.engines.row_chunks import MAX_ROWS, RowChunks
from scail2_rt.engines.torch_backend.loading import Loading, StageStream, WeightLoader
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    from scail2_rt.engines.tensorrt_backend.session import TensorRTSession
    from scail2_rt.engines.torch_backend.engine import TorchEngine


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


def use_kernel_cache(directory: Path) -> None:
    """Let Triton and NVRTC keep compiled kernels in `directory`, unless the user said where or it cannot be written."""
    with contextlib.suppress(OSError):
        directory.mkdir(exist_ok=True)
        for variable in ("TRITON_CACHE_DIR", "SCAIL2_RT_KERNELS"):
            os.environ.setdefault(variable, str(directory))


class VAERings(Protocol):
    """A half of the VAE that keeps its causal caches itself."""

    def reset(self) -> None: ...

    def step(self, x: Tensor) -> Tensor: ...

    def free(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Execution:
    """How engines run. `attention`: a variant of `kernels.attention.ops` or "auto"; `cuda_graphs`: record denoising
    steps in CUDA graphs (on a GPU); `vram_limit`: bytes of GPU memory that the process may use, None for what is
    free."""

    max_rows: int = MAX_ROWS
    attention: str = "auto"
    cuda_graphs: bool = True
    vram_limit: int | None = None


DEFAULT_EXECUTION = Execution()


class EngineSet:
    """The stages of one engine folder on one device. `store` and `tables` replace those of the folder (benchmarks)."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        definitions: dict[str, StageDefinition],
        backend: str,
        reason: str,
        device: torch.device,
        execution: Execution = DEFAULT_EXECUTION,
        store: WeightStore | None = None,
        tables: dict[str, Tensor] | None = None,
    ) -> None:
        from safetensors.torch import load_file

        self.directory, self.manifest, self.definitions = directory, manifest, definitions
        self.backend, self.reason, self.device = backend, reason, device
        self.store: WeightStore = store or StoreReader(directory / STAGES / STORE_NAME)
        if tables is None:
            tables = load_file(directory / TABLES, device=str(device))
        self.tables = tables
        self.execution = execution
        self._chunks = RowChunks(self.execution.max_rows)
        self._engines: dict[str, tuple[Engine, EngineSpec]] = {}
        self._session: TensorRTSession | None = None
        if backend == "torch" and device.type == "cuda":
            use_kernel_cache(directory / KERNELS)
        if manifest.precision == "fp32" and device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions; fp32 means fp32 here
        self.attention, self.attention_reason = self._choose_attention()
        self._on_gpu = backend == "torch" and device.type == "cuda"
        self._loader = WeightLoader(self.store, device) if isinstance(self.store, StoreReader) else None
        self._loading: dict[str, Loading] = {}
        self._rings: dict[str, VAERings] = {}
        self._streamed: dict[str, tuple[str, ...]] = {}  # stage → the stages of its family that share buffers
        self._streams: dict[str, StageStream[TorchEngine]] = {}  # family → the shared buffers

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
        attention = f"; attention {self.attention}, because {self.attention_reason}"
        return f"{self.backend} on {self.device} in {self.manifest.precision}, because {self.reason}{attention}"

    @property
    def cuda_graphs(self) -> bool:
        """Are denoising steps recorded in CUDA graphs? Weights that are streamed come from the host, so then not."""
        return self.execution.cuda_graphs and self._on_gpu and not self._streamed

    @property
    def places_weights(self) -> bool:
        """Does the runtime decide which weights lie in GPU memory?"""
        return self._on_gpu

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages that hold weights at the moment."""
        return tuple(self._engines)

    def numerics(self, stage: str) -> Numerics:
        """Storage and arithmetic of a stage in this executor."""
        return stage_numerics(self._definition(stage), self.manifest.precision, self.backend, self.device.type)

    def compute_dtype(self, stage: str) -> torch.dtype:
        """Type of a stage's activations in this executor."""
        return self.numerics(stage).compute

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs of a stage; it is loaded on first use, and cut into row chunks beyond `max_rows`.

        Inputs must have the types of the stage's specs and be on `device`. `out`: where the first output may be written
        (the first input itself, say); the torch executor does so, the others return tensors of their own."""
        engine, spec = self._engine(name)
        have = [tensor.dtype for tensor in inputs]
        want = [tensor.dtype for tensor in spec.inputs]
        if have != want:
            raise Scail2Error(f"stage {name} needs inputs of types {want}, it was given {have}.")
        if self.backend == "torch":
            from scail2_rt.engines.torch_backend.engine import TorchEngine, run_rows

            assert isinstance(engine, TorchEngine)
            return run_rows(engine, (spec.inputs, spec.outputs), inputs, self.max_rows, out)
        return self._chunks.run(engine, spec.family, (spec.inputs, spec.outputs), inputs)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to load these stages in the background, in this order. Only the torch executor on a GPU does so."""
        if not self._on_gpu or self._loader is None:
            return
        for name in names:
            if name not in self._engines and name not in self._loading and name not in self._streamed:
                self._loading[name] = self._loader.start(name, self._tensors(name))

    def stream(self, names: Sequence[str]) -> None:
        """From here on these stages, run in this order over and over, share two device buffers a family; all others
        stay loaded."""
        if set(names) == set(self._streamed):
            return
        for stage in {*names, *self._streamed}:
            self.release(stage)
        for family in list(self._streams):
            self._streams.pop(family).close()
        families: dict[str, list[str]] = {}
        for name in names:
            families.setdefault(self._definition(name).family, []).append(name)
        self._streamed = {name: tuple(family) for family in families.values() for name in family}

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the stages whose weights pass through shared buffers."""
        return tuple(self._streamed)

    def plan_report(self, name: str) -> str | None:
        """What TensorRT's engine inspector says of a stage's plan, as JSON; None for the other executors."""
        report = getattr(self._engine(name)[0], "plan_report", None)
        return None if report is None else report()

    def release(self, prefix: str) -> None:
        """Drop every loaded stage whose name begins with `prefix`; a later run loads it again."""
        for name in [name for name in self._loading if name.startswith(prefix)]:
            self._loading.pop(name).wait()
        for name in [name for name in self._engines if name.startswith(prefix)]:
            self._engines.pop(name)[0].close()
        for family in [family for family in self._streams if family.startswith(prefix)]:
            self._streams.pop(family).close()
        self._rings = {stage: rings for stage, rings in self._rings.items() if not stage.startswith(prefix)}
        self._chunks.keep({spec.family for _, spec in self._engines.values()})

    def vae_rings(self, stage: str) -> "VAERings | None":
        """The GPU form of `vae.encode` or `vae.decode`, made once; None for other executors and on a CPU."""
        if not self._on_gpu:
            return None
        if stage not in self._rings:
            from scail2_rt.engines.torch_backend.vae_streams import DecodeStream, EncodeStream

            assert self.config.vae is not None
            name = f"{stage}_step"
            self.prefetch([name])
            weights = self._loading.pop(name).wait() if name in self._loading else self._stored(name)
            form = EncodeStream if stage == "vae.encode" else DecodeStream
            self._rings[stage] = form(weights, self.config.vae, self.device, self.compute_dtype(name))
        return self._rings[stage]

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
        if self._loader is not None:
            self._loader.close()
        self.store.close()
        self.tables = {}

    def __enter__(self) -> "EngineSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, name: str) -> tuple[Engine, EngineSpec]:
        if name in self._streamed:
            return self._stream_of(name).take(name), EngineSpec.of(self._definition(name), self.numerics(name))
        if name not in self._engines:
            self._engines[name] = self._load(name), EngineSpec.of(self._definition(name), self.numerics(name))
        return self._engines[name]

    def _choose_attention(self) -> tuple[str, str]:
        from scail2_rt.kernels.attention.ops import choose_attention

        if self.config.dit is None:
            return "none", "the folder has no transformer"
        return choose_attention(
            self.execution.attention, self.manifest.precision, self.device, self.config.dit.head_dim
        )

    def _stream_of(self, name: str) -> "StageStream[TorchEngine]":
        definition = self._definition(name)
        if definition.family not in self._streams:
            from scail2_rt.engines.torch_backend.engine import TorchEngine

            assert self._loader is not None
            make = partial(TorchEngine, definition, self.numerics(name), self.store, self.device)
            tensors = self._tensors(name)
            self._streams[definition.family] = StageStream(self._loader, self._streamed[name], tensors, make)
        return self._streams[definition.family]

    def _stored(self, name: str) -> dict[str, Tensor]:
        return self.store.stage(name, self._tensors(name))

    def _tensors(self, name: str) -> dict[str, TensorShape]:
        """The weights of a stage, checked against the store."""
        from scail2_rt.engines.torch_backend.engine import check_stored, stage_tensors

        tensors = stage_tensors(self._definition(name), self.numerics(name))
        check_stored(name, tensors, self.store)
        return tensors

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
            from scail2_rt.engines.torch_backend.engine import TorchEngine

            weights = None
            if self._on_gpu and self._loader is not None:
                self.prefetch([name])
                weights = self._loading.pop(name).wait()
            return TorchEngine(definition, numerics, self.store, self.device, weights)
        if self.backend == "tensorrt":
            return self._load_plan(definition, numerics)
        from scail2_rt.engines.onnx_backend.engine import OnnxEngine

        return OnnxEngine(definition, numerics, self.directory / STAGES / f"{name}.onnx", self.device)

    def _load_plan(self, definition: StageDefinition, numerics: Numerics) -> Engine:
        from scail2_rt.engines.tensorrt_backend.engine import TensorRTEngine
        from scail2_rt.engines.tensorrt_backend.plans import plan_path
        from scail2_rt.engines.tensorrt_backend.session import CudaDevice, TensorRTSession

        if self._session is None:
            self._session = TensorRTSession(CudaDevice(self.device))
        remedy = describe_command(self.manifest, self.directory)
        plan = plan_path(self.directory / STAGES, definition.name)
        return TensorRTEngine(definition, numerics, plan, self._session, remedy)


def open_engines(
    directory: Path, backend: str = "auto", execution: Execution = DEFAULT_EXECUTION, device: str | None = None
) -> EngineSet:
    """Check an engine folder and open it. `device`: "cpu" or "cuda", by default where the executor is fastest.

    InputError when the folder is damaged, of another version, or lacks the backend that was named."""
    from scail2_rt.export.stages.definitions import stage_definitions

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
        from scail2_rt.engines.tensorrt_backend.preflight import check_place

        record = next(executor for executor in manifest.executors if executor.backend == name)
        check_place(record, describe_command(manifest, directory))
    place = device or device_of(name)
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was named, but PyTorch finds no CUDA GPU on this machine; use the device cpu.")
    if execution.vram_limit is not None and (name, place) != ("torch", "cuda"):
        why = "plans carry their weights" if name == "tensorrt" else f"{name} runs on the {place} here"
        raise InputError(f"a limit of GPU memory needs the torch executor on a GPU, but {why}; use --backend torch.")
    where = torch.device("cuda", torch.cuda.current_device()) if place == "cuda" else torch.device(place)
    return EngineSet(directory, manifest, definitions, name, reason, where, execution)
