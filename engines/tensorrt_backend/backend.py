"""The backends of TensorRT's family: every stage as a plan.

One class serves all libraries of the family; a `Library` holds the differences between them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from scail2_rt.engines.backend import ArtefactPlan, Backend, EngineFolder, Execution, Executor
from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import STAGES, ExecutorRecord, Manifest, describe_command
from scail2_rt.engines.observer import BuildObserver
from scail2_rt.engines.tensorrt_backend.engine import TensorRTEngine
from scail2_rt.engines.tensorrt_backend.library import LIBRARIES, Library, require_library
from scail2_rt.engines.tensorrt_backend.plans import PlanLedger, graph_path, ledger_path, plan_path
from scail2_rt.engines.tensorrt_backend.preflight import (
    GIB,
    check_machine,
    check_place,
    check_resources,
    find_gpu,
    resident_bytes,
)
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
from scail2_rt.engines.tensorrt_backend.session import TensorRTSession
from scail2_rt.engines.tensorrt_backend.trust import obstacle, remember
from scail2_rt.export.models.precision import Precision
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted


class TensorRTExecutor(Executor):
    """Stages as TensorRT plans."""

    reports_plans = True

    def __init__(
        self, backend: Backend, folder: EngineFolder, device: torch.device, execution: Execution, library: Library
    ) -> None:
        super().__init__(backend, folder, device, execution)
        self.library = library
        self.cuda_graphs = device.type == "cuda"
        self._session: TensorRTSession | None = None

    def plan_report(self, name: str) -> str:
        engine = self._engine(name)[0]
        assert isinstance(engine, TensorRTEngine)
        return engine.plan_report()

    def close(self) -> None:
        super().close()
        if self._session is not None:
            self._session.close()
            self._session = None

    def _load(self, name: str) -> TensorRTEngine:
        from scail2_rt.engines.tensorrt_backend.session import CudaDevice

        folder = self.folder
        definition, numerics = folder.definition(name), self.numerics(name)
        library = self.library
        if self._session is None:
            self._session = TensorRTSession(library, CudaDevice(self.device), folder.directory)
        plan = folder.check_file(plan_path(Path(STAGES), name, library).as_posix(), name)
        return TensorRTEngine(
            definition, numerics, plan, self._session, describe_command(folder.manifest, folder.directory)
        )


class TensorRTBackend(Backend):
    """TensorRT or TensorRT for RTX, according to `library`."""

    needs_gpu = True
    built_by_auto = False  # plans take long to build: only a named backend builds them
    build_options = True

    def __init__(self, library: Library) -> None:
        self.library = library
        self.name, self.module, self.install = library.name, library.module, library.install
        self.hosting = library.hosting

    def device(self) -> str:
        return "cuda"

    def versions(self) -> dict[str, str]:
        """Return the version reported by the library: its wheels have several names."""
        return {self.name: require_library(self.library)}

    def check_machine(self, precision: Precision | None = None) -> None:
        check_machine(self.library, precision)

    def option_words(self, directory: Path, record: ExecutorRecord) -> list[str]:
        options = PlanLedger(directory / STAGES, self.library).options or PlanOptions()
        return replace(options, targets=record.targets).words

    def check_place(self, record: ExecutorRecord, remedy: str) -> None:
        check_place(self.library, record, remedy)

    def auto_obstacle(self, directory: Path, manifest: Manifest) -> str | None:
        library = self.library
        if library.compiles_here or find_gpu() is None or not self.installed():
            return None  # compiled on this GPU, so it has run; or it cannot run here
        record = next(record for record in manifest.executors if record.backend == self.name)
        try:
            check_place(library, record, describe_command(manifest, directory))
        except InputError as error:
            return f"{self.name} cannot run here ({error})"
        return obstacle(library, directory, manifest, self._plans(manifest))

    def remember(self, directory: Path, manifest: Manifest, passed: bool) -> None:
        if not self.library.compiles_here:
            remember(self.library, directory, manifest, self._plans(manifest), passed)

    def _plans(self, manifest: Manifest) -> tuple[str, ...]:
        return self.files(stage.name for stage in manifest.stages)

    def memory_note(self, stage_bytes: Mapping[str, int]) -> str:
        phases = resident_bytes(stage_bytes)
        phase = max(phases, key=lambda name: phases[name])
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in phases.items())
        return (
            f"plans of {self.library.title} include their weights: a GPU must hold {phases[phase] / GIB:.1f} GiB of "
            f"them at once ({phase}; GiB per phase: {parts}) beside the activations; for a smaller GPU, build for the "
            "torch backend, which streams weights (generate --vram-limit)"
        )

    def limit_obstacle(self, device: str) -> str:
        return "plans include their weights"

    def room(self, plan: ArtefactPlan) -> int:
        from scail2_rt.engines.tensorrt_backend.builder import chosen_stages, resolve_options

        resolve_options(plan, self.library)
        wanted = chosen_stages(tuple(plan.definitions), plan.patterns)
        todo = [stage for stage in wanted if not plan_path(plan.directory / STAGES, stage, self.library).is_file()]
        check_resources(self.library, {stage: plan.stage_bytes[stage] for stage in todo}, plan.directory)
        return 0  # check_resources has checked the space

    def targets(self, plan: ArtefactPlan) -> tuple[str, ...]:
        options = PlanLedger(plan.directory / STAGES, self.library).options
        return options.targets if options is not None else ()

    def build(self, plan: ArtefactPlan, observer: BuildObserver, journal: Journal) -> bool:
        from scail2_rt.engines.tensorrt_backend.builder import build_plans

        build_plans(plan, observer, self.library)
        files = [plan.directory / file for file in self.files(plan.definitions)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            observer.note(
                f"{len(files) - len(missing)} of {counted(len(files), 'file')} of the {self.library.title} stages "
                "exist; the same command without --stages makes the others"
            )
        return not missing

    def files(self, stages: Iterable[str]) -> tuple[str, ...]:
        folder = Path(STAGES)
        return tuple(
            path.as_posix()
            for stage in stages
            for path in (graph_path(folder, stage), plan_path(folder, stage, self.library))
        )

    def forget(self, directory: Path, stages: Iterable[str]) -> None:
        PlanLedger(directory / STAGES, self.library).forget(stages)

    def leftovers(self, wanted: bool) -> tuple[str, ...]:
        """Return nothing if plans are rebuilt anyway: their digests show which ones are still valid."""
        return () if wanted else (f"*.{self.library.suffix}*", ledger_path(Path(), self.library).name)

    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> TensorRTExecutor:
        return TensorRTExecutor(self, folder, device, execution, self.library)


BACKENDS = {name: TensorRTBackend(library) for name, library in LIBRARIES.items()}
