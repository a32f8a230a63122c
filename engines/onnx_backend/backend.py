"""The onnxruntime backend: every stage as an ONNX file beside the weight store, on a CPU or, where its CUDA build is
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

GRAPH_BYTES = 1 << 18  # room that one graph without weights may take


def graph_file(stage: str) -> str:
    """Relative to the engine folder."""
    return f"{STAGES}/{stage}.onnx"


class OnnxExecutor(Executor):
    follows_stream = False  # ONNX Runtime has a stream of its own

    def _load(self, name: str) -> OnnxEngine:
        """The graph, and the weights that ONNX Runtime maps itself, are checked first."""
        definition = self.folder.definition(name)
        graph = self.folder.check_file(graph_file(name), name)
        self.folder.store.check(name)
        return OnnxEngine(definition, self.numerics(name), graph, self.device)


class OnnxBackend(Backend):
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
        return ("*.onnx*",)  # and what another backend has exported on its way: both are traced in a moment

    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> OnnxExecutor:
        return OnnxExecutor(self, folder, device, execution)


def _tracing_effort(definitions: Mapping[str, StageDefinition]) -> dict[str, float]:
    """How long each stage's graph takes: one is traced a family, and a VAE graph is ten times as big as the others."""
    seen: set[str] = set()
    effort = {}
    for stage, definition in definitions.items():
        first = definition.family not in seen
        effort[stage] = (10.0 if definition.component == "vae" else 1.0) if first else 0.001
        seen.add(definition.family)
    return effort


BACKEND = OnnxBackend()
