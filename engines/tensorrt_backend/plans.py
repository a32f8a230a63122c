"""The ledger of a folder's plans: which ones are still valid.

A plan depends on its graph, weights, profiles and options, the library's version, and the GPU or the targets. A digest
of all these is kept in the library's ledger (`tensorrt.json`) beside the plans: a build makes only plans whose digest
is not there. So one rule covers all cases: an interrupted build continues, a changed LoRA rebuilds the stages it
affects, and a larger frame size those of the VAE. The ledger also keeps the options, which later calls without options
use.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.engines.folder.manifest import write_json
from scail2_rt.engines.tensorrt_backend.compiling import Shapes
from scail2_rt.engines.tensorrt_backend.library import Library
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import onnx

PIECE = 1 << 26


def graph_path(stages: Path, stage: str) -> Path:
    """Return the ONNX file that a plan is built from: in TensorRT's types, so not the file that ONNX Runtime runs."""
    return stages / f"{stage}.trt.onnx"


def plan_path(stages: Path, stage: str, library: Library) -> Path:
    """Return the file of a stage's plan."""
    return stages / f"{stage}.{library.suffix}"


def ledger_path(stages: Path, library: Library) -> Path:
    """Return the file of the library's ledger."""
    return stages / f"{library.name}.json"


def timings_path(stages: Path, library: Library) -> Path:
    """Return the file of the library's timing cache."""
    return stages / f"{library.name}.timings"


def log_path(directory: Path, stage: str, library: Library) -> Path:
    """Return a stage's log file, in the engine folder."""
    return directory / f"{library.name}-logs" / f"{stage}.log"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where plans can run: the library's version, and the GPU they were built on or, joined by commas, the targets they
    were built for."""

    version: str
    place: str


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """Digest of a plan's inputs, its size in bytes, and its build time in seconds."""

    digest: str
    size: int
    seconds: float


class PlanLedger:
    """The ledger of a stages folder. An unreadable file counts as empty: plans are then built again.

    options: of the last build; None if there was none."""

    def __init__(self, stages: Path, library: Library) -> None:
        self.stages, self.library = stages, library
        self.records: dict[str, PlanRecord] = {}
        self.options: PlanOptions | None = None
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            document = json.loads(ledger_path(stages, library).read_text())
            options: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in document["options"].items()
            }
            records = {str(stage): PlanRecord(**record) for stage, record in document["plans"].items()}
            self.options, self.records = PlanOptions(**options), records  # both or none

    def good(self, stage: str, digest: str) -> bool:
        """Whether the plan of this stage exists, is complete, and has this digest."""
        record, path = self.records.get(stage), plan_path(self.stages, stage, self.library)
        return record is not None and record.digest == digest and path.is_file() and path.stat().st_size == record.size

    def begin(self, options: PlanOptions) -> None:
        """Save the options of the build that starts now."""
        self.options = options
        self._save()

    def add(self, stage: str, record: PlanRecord) -> None:
        self.records[stage] = record
        self._save()

    def forget(self, stages: Iterable[str]) -> None:
        """Mark these plans as invalid, whatever their digests."""
        for stage in stages:
            self.records.pop(stage, None)
        self._save()

    def _save(self) -> None:
        plans = {name: dataclasses.asdict(known) for name, known in self.records.items()}
        options = dataclasses.asdict(self.options or PlanOptions())
        write_json(ledger_path(self.stages, self.library), {"options": options, "plans": plans})


def plan_digest(
    graph: Path, profiles: Sequence[Mapping[str, Shapes]], options: PlanOptions, environment: Environment
) -> str:
    """Return the SHA-256 of everything that a plan depends on. Weights count by value, not by location in the store.

    Raises Scail2Error if the store is shorter than the graph requires."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    weights = [_weight_digest(graph, tensor) for tensor in model.graph.initializer if tensor.external_data]
    for tensor in model.graph.initializer:
        del tensor.external_data[:]
    request = [
        [{name: list(shapes) for name, shapes in profile.items()} for profile in profiles],
        options.workspace_bytes,
        options.optimization_level,
        dataclasses.asdict(environment),
        weights,
    ]
    return hashlib.sha256(json.dumps(request).encode() + model.SerializeToString(deterministic=True)).hexdigest()


def _weight_digest(graph: Path, tensor: "onnx.TensorProto") -> str:
    place = {entry.key: entry.value for entry in tensor.external_data}
    digest, left = hashlib.sha256(), int(place["length"])
    with (graph.parent / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise Scail2Error(f"{file.name} ends within {tensor.name} of {graph}. Build the engine folder again.")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
