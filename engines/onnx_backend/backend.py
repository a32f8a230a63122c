"""The onnxruntime backend: every stage as an ONNX file beside the weight store, run on a CPU or, if its CUDA build is
installed, on a GPU."""

from collections.abc import Iterable, Mapping

import torch

from scail2_rt.engines.backend import ArtefactPlan, Backend, EngineFolder, Execution, Executor
from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import STAGES
from scail2_rt.engines.observer import BuildObserver, Phase
from scail2_rt.engines.onnx_backend.engine import CUDA, OnnxEngine, onnxruntime_numerics
from scail2_rt.export.models.precision import Numerics, Precision
from scail2_rt.export.stages.spec import StageDefinition

GRAPH_BYTES = 1 << 18  # upper estimate of one graph without weights


def graph_file(stage: str) -> str:
    """Return the path of a stage's graph, relative to the engine folder."""
    return f"{STAGES}/{stage}.onnx"


class OnnxExecutor(Executor):
    """Stages as ONNX Runtime sessions."""

    follows_stream = False  # ONNX Runtime uses a separate stream

    def _load(self, name: str) -> OnnxEngine:
        """Check the graph, and the weights, which ONNX Runtime maps itself, then load the stage."""
        definition = self.folder.definition(name)
        graph = self.folder.check_file(graph_file(name), name)
        self.folder.store.check(name)
        return OnnxEngine(definition, self.numerics(name), graph, self.device)


class OnnxBackend(Backend):
    """ONNX Runtime; computes in fp32 where the precision says bf16."""

    name = module = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    install = 'pip install "scail2-rt[cpu]"'

    def device(self) -> str:
        if not torch.cuda.is_available():
            return "cpu"
        import onnxruntime

        return "cuda" if CUDA in onnxruntime.get_available_providers() else "cpu"

    def numerics(self, definition: StageDefinition, precision: Precision, device: str) -> Numerics:
        return onnxruntime_numerics(definition.numerics(precision))

    def room(self, plan: ArtefactPlan) -> int:
        return GRAPH_BYTES * len(plan.definitions)

    def build(self, plan: ArtefactPlan, observer: BuildObserver, journal: Journal) -> bool:
        from scail2_rt.export.onnx.stages import export_stage

        sizes = {stage: plan.stage_bytes[stage] for stage in plan.definitions}
        phase = Phase(observer, self.name, sizes, _tracing_effort(plan.definitions))
        for stage, definition in plan.definitions.items():
            path = plan.directory / graph_file(stage)
            if journal.has(self.name, stage) and path.is_file():
                phase.skip(stage)
                continue
            step = phase.start(stage)
            export_stage(definition, self.numerics(definition, plan.precision, self.device()), path, plan.store)
            journal.add(self.name, stage)
            phase.finish(step)
        return True

    def files(self, stages: Iterable[str]) -> tuple[str, ...]:
        return tuple(graph_file(stage) for stage in stages)

    def leftovers(self, wanted: bool) -> tuple[str, ...]:
        return ("*.onnx*",)  # includes graphs exported by another backend: both are traced quickly

    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> OnnxExecutor:
        return OnnxExecutor(self, folder, device, execution)


def _tracing_effort(definitions: Mapping[str, StageDefinition]) -> dict[str, float]:
    """Return the relative tracing time of each stage: one per family is traced; VAE graphs are ten times larger."""
    seen: set[str] = set()
    effort = {}
    for stage, definition in definitions.items():
        first = definition.family not in seen
        effort[stage] = (10.0 if definition.component == "vae" else 1.0) if first else 0.001
        seen.add(definition.family)
    return effort


BACKEND = OnnxBackend()
