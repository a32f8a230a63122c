"""Which plans of a folder are still good, and the timing cache that they share.

A plan follows from its graph, its weights, its profiles and options, the TensorRT version and the GPU. A digest of all
that is kept beside it in `plans.json`: a build makes only those plans whose digest is not there. So an interrupted
build goes on, a changed LoRA rebuilds the stages that it touches and a larger picture size those of the VAE, by one
rule. The timing cache is one file for all stages and is saved after each: what the first block's stage measured, the
other 39 find there.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scail2_rt.engines.folder.manifest import write_json
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions, Profile
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import onnx
    import tensorrt as trt

PLANS = "plans.json"
TIMINGS = "tensorrt.timings"
LOGS = "tensorrt-logs"
PIECE = 1 << 26


def graph_path(stages: Path, stage: str) -> Path:
    """The ONNX file that a plan is built from: in TensorRT's arithmetic, so not the one that ONNX Runtime runs."""
    return stages / f"{stage}.trt.onnx"


def plan_path(stages: Path, stage: str) -> Path:
    return stages / f"{stage}.plan"


@dataclass(frozen=True, slots=True)
class Environment:
    """Where plans are built, and the only place where they run."""

    tensorrt: str
    gpu: str


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """What a plan was built from, its size in bytes, and how long it took."""

    digest: str
    size: int
    seconds: float


class PlanLedger:
    """`plans.json` of a stages folder. A file that cannot be read counts as empty: plans are then built again."""

    def __init__(self, stages: Path) -> None:
        self.stages = stages
        self.records: dict[str, PlanRecord] = {}
        try:
            document = json.loads((stages / PLANS).read_text())
            self.records = {str(stage): PlanRecord(**record) for stage, record in document.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.records = {}

    def good(self, stage: str, digest: str) -> bool:
        """Is the plan of this stage there, whole, and of this digest?"""
        record, path = self.records.get(stage), plan_path(self.stages, stage)
        return record is not None and record.digest == digest and path.is_file() and path.stat().st_size == record.size

    def add(self, stage: str, record: PlanRecord) -> None:
        self.records[stage] = record
        self._save()

    def forget(self, stages: Iterable[str]) -> None:
        """These plans are not good any more, whatever they were built from."""
        for stage in stages:
            self.records.pop(stage, None)
        self._save()

    def _save(self) -> None:
        write_json(self.stages / PLANS, {name: dataclasses.asdict(known) for name, known in self.records.items()})


def plan_digest(graph: Path, profiles: Sequence[Profile], options: PlanOptions, environment: Environment) -> str:
    """SHA-256 of everything that a plan follows from. Weights count by value, not by their place in the store.

    Scail2Error when the store is shorter than the graph says."""
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
                raise Scail2Error(f"{file.name} ends within {tensor.name} of {graph}; build the engine folder again.")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


class TimingCache:
    """The measurements of earlier builds. What another GPU or TensorRT version measured is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes() if path.is_file() else b""

    def attach(self, config: "trt.IBuilderConfig") -> "trt.ITimingCache":
        """Give the measurements to a build. The result must be kept until the build has returned."""
        for data in (self.data, b"") if self.data else (b"",):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        raise Scail2Error("TensorRT refused even an empty timing cache; its installation seems to be damaged.")

    def save(self, config: "trt.IBuilderConfig") -> None:
        """Keep what a finished build knows, in the file too."""
        cache = config.get_timing_cache()
        if cache is None:
            raise Scail2Error("TensorRT lost the timing cache during a build; its installation seems to be damaged.")
        self.data = bytes(cache.serialize())
        write_file(self.path, self.data)


def write_file(path: Path, data: "bytes | trt.IHostMemory") -> None:
    """Replace a file atomically; it survives a crash of the machine."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
