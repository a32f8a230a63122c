"""The set of engines of one folder, whatever runs them.

An `EngineSet` is opened once a process. Opening checks the folder against the definitions of this version, chooses the
backend and says why. Running and holding stages is the executor's work; here is what is common: manifest, tables (the
constants that the runtime itself needs: modulation, q/k norm weights), tokenizer, and the attention between stages.
What belongs to no stage is compared with its checksum when the set is opened, a stage when it is loaded, and the token
embedding (a tenth of the weights) when a prompt is encoded: a cached prompt needs none of it.
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
    """What runs, why (in words), and where."""

    backend: Backend
    reason: str
    device: torch.device


class EngineSet:
    """The stages of one engine folder on one device. `tables`: those of the folder, on the device; `warnings`:
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
            torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions; fp32 means fp32 here
        self.executor = choice.backend.open(folder, self.device, execution)
        try:  # after opening, which says where kernels are kept: the choice may compile one
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
        """One printable line: what runs, where, and why."""
        attention = f"; attention {self.attention}, because {self.attention_reason}"
        return f"{self.backend} on {self.device} in {self.manifest.precision}, because {self.reason}{attention}"

    @property
    def cuda_graphs(self) -> bool:
        """Are denoising steps recorded in CUDA graphs? Weights that are streamed come from the host, so then not."""
        return self.execution.cuda_graphs and self.executor.cuda_graphs and not self.streamed

    @property
    def places_weights(self) -> bool:
        """Does the executor place weights itself, so that a memory plan applies?"""
        return self.executor.places_weights

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the stages that hold weights at the moment."""
        return self.executor.loaded

    @property
    def streamed(self) -> tuple[str, ...]:
        """Names of the stages whose weights pass through shared buffers."""
        return self.executor.streamed

    def numerics(self, stage: str) -> Numerics:
        """Storage and arithmetic of a stage in this executor."""
        return self.executor.numerics(stage)

    def compute_dtype(self, stage: str) -> torch.dtype:
        """Type of a stage's activations in this executor."""
        return self.numerics(stage).compute

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs of a stage; it is loaded on first use, and cut into row chunks beyond `max_rows`.

        Inputs must have the types of the stage's specs and be on `device`. `out`: where the first output may be written
        (the first input itself, say); the torch executor does so, the others return tensors of their own."""
        return self.executor.run(name, *inputs, out=out)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to load these stages in the background, in this order, where the executor can."""
        self.executor.prefetch(names)

    def stream(self, names: Sequence[str]) -> None:
        """From here on these stages, run in this order over and over, share two device buffers a family; all others
        stay loaded. For executors that place weights."""
        self.executor.stream(names)

    def release(self, prefix: str) -> None:
        """Drop every loaded stage whose name begins with `prefix`; a later run loads it again."""
        self.executor.release(prefix)

    def vae_stream(self, stage: str) -> VAEStream:
        """A stream over `vae.encode` or `vae.decode`, at its start, in the form that is fastest in this executor.

        One at a time for a stage: a second may be the first one, reset."""
        return self.executor.vae_stream(stage)

    @property
    def splits_pictures(self) -> bool:
        """Can the executor decode a part of the picture?"""
        return self.executor.splits_pictures and self.config.vae is not None

    def part_stream(self, part: Part) -> VAEStream:
        """A stream over `vae.decode`, at its start, that gives a part of the picture [3, 1 or 4, rows, W]."""
        return self.executor.part_stream(part)

    def plan_report(self, name: str) -> str | None:
        """How a stage was compiled, as JSON of the library's inspector; None where nothing is compiled."""
        return self.executor.plan_report(name)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the umT5 token embedding, read from the mapped store. ids [n] → fp32 [n, dim] on the device."""
        self.store.check(EMBEDDING)
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
    """Check an engine folder and open it. `device`: "cpu" or "cuda", by default where the executor is fastest;
    `compare`: what is loaded with its checksums. Without, a damaged stage runs: for who wants to see what it gives.

    InputError when the folder is damaged, of another version, or lacks the backend that was named."""
    from safetensors.torch import load_file

    from scail2_rt.export.stages.definitions import stage_definitions

    manifest = read_manifest(directory)
    definitions = stage_definitions(manifest.config)
    check_folder(directory, manifest, definitions)
    choice = _choose(directory, manifest, backend, device)
    obstacle = None if execution.vram_limit is None else choice.backend.limit_obstacle(choice.device.type)
    if obstacle is not None:
        raise InputError(
            f"a limit of GPU memory needs the torch executor on a GPU, but {obstacle}; use --backend torch."
        )
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
    """The backend for a folder, checked against the folder and this machine."""
    records = {record.backend: record for record in manifest.executors}
    obstacles = {name: backend_named(name).auto_obstacle(directory, manifest) for name in records}
    stopped = {n: text for n, text in obstacles.items() if text}
    name, reason = choose_backend(
        requested, tuple(records), stopped, describe_command(manifest, directory, backend="torch")
    )
    if name not in records:
        refuse_unbuildable([name])
        raise InputError(
            f"{directory} holds no {name} engines (it holds {', '.join(records)}); add them with: "
            f"{describe_command(manifest, directory, backend=name)}"
        )
    chosen = backend_named(name)
    chosen.check_place(records[name], describe_command(manifest, directory))
    place = device or chosen.device()
    if place not in ("cpu", "cuda"):
        raise InputError(f"the device {place!r} is unknown: use cpu or cuda (CUDA_VISIBLE_DEVICES says which GPU).")
    if place == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was named, but PyTorch finds no CUDA GPU on this machine; use the device cpu.")
    where = torch.device("cuda", torch.cuda.current_device()) if place == "cuda" else torch.device(place)
    return BackendChoice(chosen, reason, where)
