"""One stage with random weights in a separate store, for tests of the ONNX files, with small and with real sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout, StoreReader, StoreWriter, TensorShape
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig
from scail2_rt.export.models.precision import PRECISIONS, Numerics
from scail2_rt.export.onnx.stages import export_stage, split_dim
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.rows.ops import E4M3
from tests.support.small import DIT, UMT5

SMALL = ModelConfig(
    dit=DIT,
    vae=VAEConfig(dim=6),  # as the tiny preset: graphs of equal sizes are traced once for all tests
    umt5=UMT5,
    clip=CLIPConfig(image_size=28, patch=14, dim=32, heads=2, layers=3, mlp_dim=64),
)
REAL = ModelConfig(
    dit=DiTConfig(dim=5120, heads=40, layers=1, ffn_dim=13824),
    vae=VAEConfig(dim=96),
    umt5=UMT5Config(vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64, layers=1),
    clip=CLIPConfig(image_size=224, patch=14, dim=1280, heads=16, layers=4, mlp_dim=5120),
)
STAGES = {name: stage for name, stage in stage_definitions(SMALL).items() if ".1." not in f"{name}."}  # one per family


def kinds_of_numerics(stage: StageDefinition) -> list[Numerics]:
    """Those of every precision flag, and fp32 arithmetic where bf16 is stored."""
    kinds = {stage.numerics(precision) for precision in PRECISIONS}
    return sorted(kinds | {n.in_arithmetic(torch.float32) for n in kinds if n.compute == torch.bfloat16}, key=str)


@dataclass(frozen=True)
class Case:
    """A stage in a folder: its ONNX file, its weight store, and the PyTorch module on the same weights."""

    definition: StageDefinition
    numerics: Numerics
    folder: Path
    module: nn.Module

    @property
    def path(self) -> Path:
        return self.folder / "stage.onnx"

    def inputs(self, sizes: Mapping[str, int], seed: int = 1) -> list[Tensor]:
        """Random inputs; `sizes` gives the value of every symbol."""
        return example_inputs(self.definition, self.numerics, sizes, seed)

    def expected(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            outputs = self.module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def make_case(definition: StageDefinition, numerics: Numerics, folder: Path, stored: Numerics | None = None) -> Case:
    """Write the store and the ONNX file. `stored`: numerics of the storage, when arithmetic differs."""
    layout = write_store([definition], stored or numerics, folder)
    case = Case(definition, numerics, folder, on_meta(definition, numerics))
    export_stage(definition, numerics, case.path, layout)
    weights = StoreReader(folder / STORE_NAME).stage(definition.name, case.module.state_dict())
    case.module.load_state_dict(weights, assign=True)
    return case


def on_meta(definition: StageDefinition, numerics: Numerics) -> nn.Module:
    with torch.device("meta"):
        return definition.build(numerics)


def plan(definitions: list[StageDefinition], numerics: Numerics) -> StoreLayout:
    return StoreLayout.plan(
        {
            f"{definition.name}.{name}": TensorShape(value.dtype, tuple(value.shape))
            for definition in definitions
            for name, value in on_meta(definition, numerics).state_dict().items()
        }
    )


def write_store(definitions: list[StageDefinition], numerics: Numerics, folder: Path) -> StoreLayout:
    layout = plan(definitions, numerics)
    writer = StoreWriter(folder / STORE_NAME, layout)
    generator = torch.Generator().manual_seed(0)
    for name in layout.names:
        place = layout.location(name)
        values = torch.empty(place.shape).normal_(generator=generator)
        if name.endswith(".scale"):
            values = 0.01 + 0.001 * values
        elif place.dtype == E4M3:
            values *= 60
        elif values.squeeze().ndim < 2:
            values = 0.1 * values + ("norm" in name or "gamma" in name) * (not name.endswith(".bias"))
        else:
            values *= values[0].numel() ** -0.5
        writer.write(name, values.to(place.dtype))
    writer.finish()
    return layout


def example_inputs(
    definition: StageDefinition, numerics: Numerics, sizes: Mapping[str, int], seed: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in definition.io(numerics)[0]:
        shape = [factor * sizes[symbol] if symbol else factor for factor, symbol in map(split_dim, spec.dims)]
        if spec.dtype == torch.int64:
            tensors.append(torch.randint(32, shape, generator=generator))
            continue
        values = torch.randn(shape, generator=generator)
        if spec.name == "driving" or (definition.component, spec.name) == ("umt5", "mask"):
            values = (values > 0).float()
            values.view(-1)[0] = 1
        tensors.append(values.to(spec.dtype))
    return tensors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
