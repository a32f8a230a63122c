"""The engines of one folder, independent of the backend.

An `EngineSet` is opened once per process. Opening checks the folder against the definitions of this version, chooses
the backend and gives the reason. The executor runs and holds stages; this module holds what all backends share:
manifest, tables (constants of the runtime: modulation, q/k norm weights), tokenizer, and the attention between stages.
Checksums of tables and tokenizer are compared when the set is opened, those of a stage when it is loaded, and those of
the token embedding (a tenth of the weights) when a prompt is encoded: a cached prompt does not need it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.engines.backend import DEFAULT_EXECUTION, Backend, EngineFolder, Execution
from scail2_rt.engines.folder.damage import no_sums, repair_command
from scail2_rt.engines.folder.manifest import (
    STAGES,
    TABLES,
    TOKENIZER,
    Manifest,
    check_folder,
    describe_command,
    read_manifest,
)
from scail2_rt.engines.folder.store import STORE_NAME, StoreReader, WeightStore
from scail2_rt.engines.folder.sums import SumChecker
from scail2_rt.engines.folder.weights import EMBEDDING
from scail2_rt.engines.registry import backend as backend_named
from scail2_rt.engines.registry import choose_backend, refuse_unbuildable
from scail2_rt.engines.vae_stream import Part, VAEStream
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Numerics
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.attention.variants import NO_ATTENTION, AttentionVariant, choose_attention
from scail2_rt.kernels.errors import InputError

__all__ = ["DEFAULT_EXECUTION", "BackendChoice", "EngineSet", "Execution", "open_engines"]


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The chosen backend, the reason in words, and the device."""

    backend: Backend
    reason: str
    device: torch.device


class EngineSet:
    """The stages of one engine folder on one device. `tables`: the folder's tables, on the device; `warnings`:
    sentences for the user about the folder."""

    def __init__(
        self,
        folder: EngineFolder,
        tables: dict[str, Tensor],
        choice: BackendChoice,
        execution: Execution = DEFAULT_EXECUTION,
    ) -> None:
        self.tables, self.execution = tables, execution
        self.warnings: tuple[str, ...] = ()
        self.reason, self.device = choice.reason, choice.device
        if folder.manifest.precision == "fp32" and self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # PyTorch allows tf32 in convolutions; fp32 means fp32 here
        self.executor = choice.backend.open(folder, self.device, execution)
        try:  # after opening, which sets the kernels' cache folder: the choice may compile a kernel
            self.attention, self.attention_reason = self._choose_attention()
        except BaseException:
            self.executor.close()
            raise

    @property
    def backend(self) -> str:
        """The backend's name, for reports."""
        return self.executor.backend.name

    @property
    def directory(self) -> Path:
        return self.executor.folder.directory

    @property
    def manifest(self) -> Manifest:
        return self.executor.folder.manifest

    @property
    def definitions(self) -> Mapping[str, StageDefinition]:
        return self.executor.folder.definitions

    @property
    def store(self) -> WeightStore:
        return self.executor.folder.store

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @property
    def max_rows(self) -> int:
        return self.executor.max_rows

    @max_rows.setter
    def max_rows(self, rows: int) -> None:
        self.executor.max_rows = rows

    @property
    def choice(self) -> str:
        """One printable line: backend, device, precision, attention, and the reasons."""
        attention = f"; attention {self.attention} ({self.attention_reason})"
        return f"{self.backend} on {self.device} in {self.manifest.precision}, because {self.reason}{attention}"

    @property
    def cuda_graphs(self) -> bool:
        """Whether denoising steps are captured in CUDA graphs. Not with streamed weights, which come from the host."""
        return self.execution.cuda_graphs and self.executor.cuda_graphs and not self.streamed

    @property
    def places_weights(self) -> bool:
        """Whether the executor controls where weights lie, so that a memory plan applies."""
        return self.executor.places_weights

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages whose weights are loaded."""
        return self.executor.loaded

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the stages whose weights are streamed through shared buffers."""
        return self.executor.streamed

    def numerics(self, stage: str) -> Numerics:
        """Return storage and arithmetic types of a stage in this executor."""
        return self.executor.numerics(stage)

    def compute_dtype(self, stage: str) -> torch.dtype:
        """Return the type of a stage's activations in this executor."""
        return self.numerics(stage).compute

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """Run a stage and return its outputs. It is loaded on first use, and run in chunks beyond `max_rows` rows.

        Inputs must have the types of the stage's specs and be on `device`. `out`: where the first output may be written
        (it may be the first input); the torch executor does so, the others return new tensors."""
        return self.executor.run(name, *inputs, out=out)

    def prefetch(self, names: Iterable[str]) -> None:
        """Start loading these stages in the background, in this order, if the executor supports it."""
        self.executor.prefetch(names)

    def stream(self, names: Sequence[str]) -> None:
        """Stream these stages, which run repeatedly in this order, through two device buffers per family from now on;
        all others stay loaded. Only for executors with `places_weights`."""
        self.executor.stream(names)

    def release(self, prefix: str) -> None:
        """Free every loaded stage whose name begins with `prefix`; a later run loads it again."""
        self.executor.release(prefix)

    def vae_stream(self, stage: str) -> VAEStream:
        """Return the executor's fastest stream over `vae.encode` or `vae.decode`, at the start of a clip.

        Use one stream per stage at a time: a second call may reset and return the first stream."""
        return self.executor.vae_stream(stage)

    @property
    def splits_pictures(self) -> bool:
        """Whether the executor can decode a strip of a frame."""
        return self.executor.splits_pictures and self.config.vae is not None

    def part_stream(self, part: Part) -> VAEStream:
        """Return a stream over `vae.decode`, at the start of a clip, that decodes a strip [3, 1 or 4, rows, W]."""
        return self.executor.part_stream(part)

    def plan_report(self, name: str) -> str | None:
        """Return how a stage was compiled, as JSON of the library's inspector; None if nothing is compiled."""
        return self.executor.plan_report(name)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Read rows of the umT5 token embedding from the mapped store. ids [n] → fp32 [n, dim] on the device."""
        self.store.check(EMBEDDING)
        return self.store.get(f"{EMBEDDING}.weight")[ids.cpu().long()].to(self.device, torch.float32)

    @property
    def tokenizer_path(self) -> Path:
        """The folder's tokenizer.json. Raises InputError if the folder was built without a text encoder."""
        path = self.directory / TOKENIZER
        if not path.is_file():
            raise InputError(f"{self.directory} has no {TOKENIZER}. Rebuild it from a checkpoint with a tokenizer.")
        return path

    @property
    def encoder_hash(self) -> str:
        """A hash of everything that a prompt's encoding depends on: encoder and tokenizer files, precision, types."""
        identity = self.manifest.identity.sources
        parts = [repr(identity.get(part)) for part in ("umt5", "tokenizer")]
        parts.append(str(self.numerics("umt5.final")))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def close(self) -> None:
        self.executor.close()
        self.store.close()
        self.tables = {}

    def __enter__(self) -> "EngineSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose_attention(self) -> tuple[AttentionVariant, str]:
        dit = self.config.dit
        if dit is None:
            return NO_ATTENTION, "the folder has no transformer"
        return choose_attention(self.execution.attention, self.manifest.precision, self.device, dit.head_dim)


def open_engines(
    directory: Path,
    backend: str = "auto",
    execution: Execution = DEFAULT_EXECUTION,
    device: str | None = None,
    compare: bool = True,
) -> EngineSet:
    """Check an engine folder and open it. `device`: "cpu" or "cuda", None for the backend's default; `compare`: compare
    checksums when data is loaded. With False a damaged stage runs, for tools that inspect its results.

    Raises InputError if the folder is damaged, of another version, or lacks the named backend."""
    from safetensors.torch import load_file

    from scail2_rt.export.stages.definitions import stage_definitions

    manifest = read_manifest(directory)
    definitions = stage_definitions(manifest.config)
    check_folder(directory, manifest, definitions)
    choice = _choose(directory, manifest, backend, device)
    obstacle = None if execution.vram_limit is None else choice.backend.limit_obstacle(choice.device.type)
    if obstacle is not None:
        raise InputError(f"a GPU memory limit needs the torch backend on a GPU, but {obstacle}. Use --backend torch.")
    remedy = repair_command(manifest, directory, choice.backend.name)
    checker = SumChecker(directory, manifest.sums, remedy) if compare and manifest.sums is not None else None
    store = StoreReader(directory / STAGES / STORE_NAME, checker)
    try:
        if checker is not None:
            for path in {TABLES, TOKENIZER} & checker.sums.files.keys():
                checker.file(path)
        tables = load_file(directory / TABLES, device=str(choice.device))
        engines = EngineSet(EngineFolder(directory, manifest, definitions, store, checker), tables, choice, execution)
    except BaseException:
        store.close()
        raise
    if manifest.sums is None:
        engines.warnings = (no_sums(directory, remedy),)
    return engines


def _choose(directory: Path, manifest: Manifest, requested: str, device: str | None) -> BackendChoice:
    """Choose the backend for a folder, and check it against the folder and this machine."""
    records = {record.backend: record for record in manifest.executors}
    obstacles = {name: backend_named(name).auto_obstacle(directory, manifest) for name in records}
    stopped = {n: text for n, text in obstacles.items() if text}
    name, reason = choose_backend(
        requested, tuple(records), stopped, describe_command(manifest, directory, backend="torch")
    )
    if name not in records:
        refuse_unbuildable([name])
        raise InputError(
            f"{directory} holds no {name} engines (it holds {', '.join(records)}). Add them with: "
            f"{describe_command(manifest, directory, backend=name)}"
        )
    chosen = backend_named(name)
    chosen.check_place(records[name], describe_command(manifest, directory))
    place = device or chosen.device()
    if place not in ("cpu", "cuda"):
        raise InputError(f"the device {place!r} is unknown. Use cpu or cuda (CUDA_VISIBLE_DEVICES selects the GPU).")
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was named, but PyTorch finds no CUDA GPU on this machine. Use the device cpu.")
    where = torch.device("cuda", torch.cuda.current_device()) if place == "cuda" else torch.device(place)
    return BackendChoice(chosen, reason, where)
