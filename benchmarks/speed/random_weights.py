"""Engines with random weights that are drawn on the device when they are read, without a checkpoint or files.

`RandomStore` has the interface of an engine folder's weight store. Each tensor is drawn in fp32 with a seed derived
from its checkpoint name and then rounded as in a build. All precisions thus share the same weights, and fast paths can
be compared with an fp32 run. The same seed gives different numbers on a CPU and on a GPU.
"""

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.benchmarks.speed.models import model
from scail2_rt.engines.backend import EngineFolder
from scail2_rt.engines.engine_set import DEFAULT_EXECUTION, BackendChoice, EngineSet, Execution
from scail2_rt.engines.folder.manifest import ExecutorRecord, Identity, Manifest, SourceFile, StageRecord
from scail2_rt.engines.folder.store import StoreLayout
from scail2_rt.engines.folder.weights import EMBEDDING, plan_store, planned_tensors
from scail2_rt.engines.registry import backend, gpu
from scail2_rt.export.checkpoint.derive import clip_shapes, dit_shapes, umt5_shapes, vae_shapes
from scail2_rt.export.checkpoint.random_checkpoint import distribution
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.dit import table_sources
from scail2_rt.kernels.rows.ops import E4M3, quantise_columns

SEED = 0


class RandomWeights:
    """fp32 checkpoint tensors by component (dit, vae, umt5, clip) and name, drawn on `device`."""

    def __init__(self, config: ModelConfig, device: torch.device | str, seed: int = SEED) -> None:
        self.device, self.seed = torch.device(device), seed
        self.shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
        if config.dit is not None:
            self.shapes["dit"] = dit_shapes(config.dit)
        if config.vae is not None:
            self.shapes["vae"] = vae_shapes(config.vae)
        if config.umt5 is not None:
            self.shapes["umt5"] = umt5_shapes(config.umt5)
        if config.clip is not None:
            self.shapes["clip"] = clip_shapes(config.clip)

    def draw(self, component: str, name: str) -> Tensor:
        """One tensor, fp32, drawn with a seed derived from its name."""
        shape = self.shapes[component][name]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed}/{component}/{name}".encode()))
        mean, deviation = distribution(component, name, shape)
        return torch.randn(shape, generator=generator, device=self.device).mul_(deviation).add_(mean)

    def component(self, component: str) -> dict[str, Tensor]:
        """Checkpoint name → tensor, for all tensors of a component."""
        return {name: self.draw(component, name) for name in self.shapes[component]}

    def tables(self, config: ModelConfig) -> dict[str, Tensor]:
        """The tensors that the runtime needs between stages, as a build writes them to `tables.safetensors`."""
        assert config.dit is not None
        found = {}
        for name, source in table_sources(config.dit).items():
            values = self.draw("dit", source).reshape(-1, config.dit.dim)
            found[name] = values if name.endswith("modulation") else values[0].contiguous()
        return found


class RandomStore:
    """Has the interface of `engines.folder.store.WeightStore`. Every call draws the tensors on the weights' device."""

    def __init__(self, config: ModelConfig, precision: Precision, weights: RandomWeights) -> None:
        definitions = stage_definitions(config)
        self.weights = weights
        self.shapes = planned_tensors(config, definitions, precision)
        self.layout: StoreLayout = plan_store(self.shapes)
        self._sources: dict[str, Mapping[str, tuple[str, ...]]] = {
            name: definition.weights for name, definition in definitions.items()
        }
        self._sources[EMBEDDING] = {"weight": ("token_embedding.weight",)}

    def get(self, name: str) -> Tensor:
        stage, parameter = self._split(name)
        return self.stage(stage, (parameter,))[parameter]

    def stage(self, name: str, parameters: Iterable[str]) -> dict[str, Tensor]:
        """Parameter name → tensor of one stage. An e4m3 weight and its scales are quantised from one fp32 tensor."""
        wanted = list(parameters)
        found: dict[str, Tensor] = {}
        for parameter, sources in self._sources[name].items():
            scale = parameter.removesuffix("weight") + "scale"
            if parameter not in wanted and scale not in wanted:
                continue
            target = self.shapes[name][parameter]
            component = name.partition(".")[0]
            drawn = [self.weights.draw(component, source).flatten() for source in sources]
            values = (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).view(target.shape)
            if target.dtype == E4M3:
                found[parameter], found[scale] = quantise_columns(values)
            else:
                found[parameter] = values.to(target.dtype)
        return {parameter: found[parameter] for parameter in wanted}

    def check(self, stage: str) -> None:
        """Nothing to do: random weights have no checksums."""

    def close(self) -> None:
        """Nothing to do: no resources are held."""

    def _split(self, name: str) -> tuple[str, str]:
        """`dit.blocks.3.mid.norm3.bias` → (`dit.blocks.3.mid`, `norm3.bias`)."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            stage, parameter = ".".join(parts[:end]), ".".join(parts[end:])
            if parameter in self.shapes.get(stage, {}):
                return stage, parameter
        raise KeyError(name)


def random_manifest(config: ModelConfig, precision: Precision, layout: StoreLayout, origin: str) -> Manifest:
    """The manifest of a folder with random weights, without artefacts. origin: description of the weights."""
    stages = []
    for name, definition in stage_definitions(config).items():
        inputs, outputs = definition.io(definition.numerics(precision))
        stages.append(StageRecord(name, inputs, outputs, layout.stage_bytes(name)))
    files = tuple(SourceFile(part, "memory", 0, 0, f"random-{SEED}") for part in ("dit", "vae", "umt5", "clip"))
    executor = ExecutorRecord("torch", backend("torch").versions(), gpu())
    return Manifest(Identity(config, precision, files), origin, {}, False, (executor,), tuple(stages), ())


def random_engines(
    config_name: str,
    precision: Precision,
    device: torch.device | str,
    layers: int | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> EngineSet:
    """The engines of a named model (such as `14b`) with random weights and nothing on disk. layers: number of
    transformer blocks; None: all."""
    config, place = model(config_name, layers), torch.device(device)
    weights = RandomWeights(config, place)
    store = RandomStore(config, precision, weights)
    manifest = random_manifest(config, precision, store.layout, f"random weights of {config_name}")
    folder = EngineFolder(Path("random"), manifest, stage_definitions(config), store)
    choice = BackendChoice(backend("torch"), "for random weights", place)
    return EngineSet(folder, weights.tables(config), choice, execution)


def random_on(config_name: str, precision: Precision, execution: Execution, device: torch.device) -> EngineSet:
    """`random_engines` with all layers and the device as last argument, for the ranks of a group."""
    return random_engines(config_name, precision, device, None, execution)
