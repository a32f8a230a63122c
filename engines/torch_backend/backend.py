"""The torch backend: PyTorch modules and our kernels, on a CPU or a GPU, with weights from the weight store.

On a GPU it controls where weights lie: stages are read in the background, a family of stages may share two buffers, and
the VAE keeps its causal past in ring buffers. On a CPU, weights are views of the mapped store.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from scail2_rt.engines.backend import Backend, Engine, EngineFolder, EngineSpec, Execution, Executor
from scail2_rt.engines.folder.manifest import KERNELS
from scail2_rt.engines.folder.store import StoreReader, TensorShape
from scail2_rt.engines.torch_backend.engine import TorchEngine, check_stored, run_rows, stage_tensors
from scail2_rt.engines.torch_backend.loading import Loading, StageStream, WeightLoader
from scail2_rt.engines.torch_backend.vae_streams import DecodeStream, EncodeStream, choose_implementation
from scail2_rt.engines.vae_stream import Part, VAEStream
from scail2_rt.export.models.precision import Numerics, Precision
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels import ahead
from scail2_rt.kernels.cache_folder import use_kernel_cache

Rings = EncodeStream | DecodeStream
VAE_HALVES: dict[str, type[Rings]] = {"vae.encode": EncodeStream, "vae.decode": DecodeStream}


class TorchExecutor(Executor):
    """Stages as PyTorch modules. Raises InputError if the folder's VAE needs kernels that cannot run here."""

    def __init__(self, backend: Backend, folder: EngineFolder, device: torch.device, execution: Execution) -> None:
        super().__init__(backend, folder, device, execution)
        self._on_gpu = device.type == "cuda"
        # on a CPU, complete frames through the stages are faster than strips through ring buffers
        self.cuda_graphs = self.places_weights = self.splits_pictures = self._on_gpu
        if self._on_gpu:
            use_kernel_cache(folder.directory / KERNELS)
            ahead.start(torch.cuda.get_device_capability(device))
            if folder.manifest.config.vae is not None:
                choose_implementation(device, self.numerics("vae.decode_step").compute)  # raises now, not at a frame
        self._loader = WeightLoader(folder.store, device) if isinstance(folder.store, StoreReader) else None
        self._loading: dict[str, Loading] = {}
        self._rings: dict[str, Rings] = {}
        self._streamed: dict[str, tuple[str, ...]] = {}  # stage → the stages of its family that share buffers
        self._streams: dict[str, StageStream[TorchEngine]] = {}  # family → the shared buffers

    @property
    def streamed(self) -> tuple[str, ...]:
        return tuple(self._streamed)

    def prefetch(self, names: Iterable[str]) -> None:
        """Prefetch on a GPU only: on a CPU, views of the mapped store need no loading."""
        if not self._on_gpu or self._loader is None:
            return
        there = self._engines, self._loading, self._streamed, {f"{ring}_step" for ring in self._rings}
        for name in names:
            if not any(name in names for names in there):
                self._loading[name] = self._loader.start(name, self._tensors(name))

    def stream(self, names: Sequence[str]) -> None:
        """Stream through two device buffers per family; all other stages stay loaded."""
        if set(names) == set(self._streamed):
            return
        for stage in {*names, *self._streamed}:
            self.release(stage)
        for family in list(self._streams):
            self._streams.pop(family).close()
        families: dict[str, list[str]] = {}
        for name in names:
            families.setdefault(self.folder.definition(name).family, []).append(name)
        self._streamed = {name: tuple(family) for family in families.values() for name in family}

    def release(self, prefix: str) -> None:
        for name in [name for name in self._loading if name.startswith(prefix)]:
            self._loading.pop(name).settle()
        super().release(prefix)
        for family in [family for family in self._streams if family.startswith(prefix)]:
            self._streams.pop(family).close()
        self._rings = {stage: rings for stage, rings in self._rings.items() if not stage.startswith(prefix)}

    def vae_stream(self, stage: str) -> VAEStream:
        """Use ring buffers on a GPU; the stream is made once, with its weights in the kernels' layout."""
        if not self._on_gpu:
            return super().vae_stream(stage)
        return self._ring_stream(stage)

    def part_stream(self, part: Part) -> VAEStream:
        """Use ring buffers on a CPU too: stages need complete frames."""
        return self._ring_stream("vae.decode", part)

    def _ring_stream(self, stage: str, part: Part | None = None) -> Rings:
        key = stage if part is None else f"{stage}.{part.index}/{part.count}"
        if key not in self._rings:
            name = f"{stage}_step"
            tensors, config = self._tensors(name), self.folder.manifest.config.vae
            assert config is not None, "a folder with a VAE stage has a VAE"
            weights = self._loaded(name) or self.folder.store.stage(name, tensors)
            about = weights, config, self.device, self.numerics(name).compute
            self._rings[key] = VAE_HALVES[stage](*about) if part is None else DecodeStream(*about, part=part)
        self._rings[key].reset()
        return self._rings[key]

    def close(self) -> None:
        super().close()
        if self._loader is not None:
            self._loader.close()

    def _engine(self, name: str) -> tuple[Engine, EngineSpec]:
        if name not in self._streamed:
            return super()._engine(name)
        spec = EngineSpec.of(self.folder.definition(name), self.numerics(name))
        return self._stream_of(name, spec.family).take(name), spec

    def _call(
        self, engine: Engine, spec: EngineSpec, inputs: Sequence[Tensor], out: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Run on row slices instead of chunk buffers: a module reads and writes any slice."""
        assert isinstance(engine, TorchEngine)
        return run_rows(engine, (spec.inputs, spec.outputs), inputs, self.max_rows, out)

    def _load(self, name: str) -> TorchEngine:
        definition = self.folder.definition(name)
        return TorchEngine(definition, self.numerics(name), self.folder.store, self.device, self._loaded(name))

    def _loaded(self, name: str) -> dict[str, Tensor] | None:
        """Return the weights of a stage on the GPU; None if nothing is loaded in the background."""
        self.prefetch([name])
        return self._loading.pop(name).wait() if name in self._loading else None

    def _stream_of(self, name: str, family: str) -> StageStream[TorchEngine]:
        if family not in self._streams:
            assert self._loader is not None, "weights are streamed from a store on disk"
            definition = self.folder.definition(name)
            make = partial(TorchEngine, definition, self.numerics(name), self.folder.store, self.device)
            self._streams[family] = StageStream(self._loader, self._streamed[name], self._tensors(name), make)
        return self._streams[family]

    def _tensors(self, name: str) -> dict[str, TensorShape]:
        """Return the weights of a stage, checked against the store."""
        tensors = stage_tensors(self.folder.definition(name), self.numerics(name))
        check_stored(name, tensors, self.folder.store)
        return tensors


class TorchBackend(Backend):
    """PyTorch on a CPU or a GPU, with our kernels."""

    name = module = "torch"
    packages = ("torch",)
    install = "pip install torch"
    compiles_kernels = True

    def numerics(self, definition: StageDefinition, precision: Precision, device: str) -> Numerics:
        """Compute in fp32 instead of fp16 on a CPU: PyTorch has no fast fp16 there."""
        numerics = definition.numerics(precision)
        if device == "cpu" and numerics.compute == torch.float16:
            return numerics.in_arithmetic(torch.float32)
        return numerics

    def limit_obstacle(self, device: str) -> str | None:
        return None if device == "cuda" else super().limit_obstacle(device)

    def open(self, folder: EngineFolder, device: torch.device, execution: Execution) -> TorchExecutor:
        return TorchExecutor(self, folder, device, execution)


BACKEND = TorchBackend()
