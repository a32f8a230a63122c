"""Checkpoints in memory that are smaller than the `tiny` preset, for tests that build many engine folders; and building
them, with an observer that records its calls."""

from pathlib import Path

import torch

from scail2_rt.engines.build.build import BuildReport, BuildRequest, BuildStep, SilentObserver, build
from scail2_rt.export.checkpoint.derive import dit_shapes, umt5_shapes
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.export.models.config import DiTConfig, ModelConfig, UMT5Config

DIT = DiTConfig(dim=32, heads=2, layers=2, ffn_dim=48, freq_dim=16, text_dim=24, clip_dim=20)
UMT5 = UMT5Config(vocab=50, dim=24, attn_dim=16, ffn_dim=40, heads=2, layers=2)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def small_checkpoint(seed: int = 0, **changed: torch.Tensor) -> Checkpoint:
    """A transformer and a text encoder without files; `changed` replaces transformer tensors ("." written "__")."""
    dit = random_tensors(dit_shapes(DIT), seed) | {name.replace("__", "."): value for name, value in changed.items()}
    sources = {"dit": MappingSource(dit), "umt5": MappingSource(random_tensors(umt5_shapes(UMT5), seed + 1))}
    return Checkpoint(Path("small"), ModelConfig(dit=DIT, umt5=UMT5), sources, None)


class Steps(SilentObserver):
    """Records its calls."""

    def __init__(self) -> None:
        self.steps: list[BuildStep] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def done(self, step: BuildStep) -> None:
        self.steps.append(step)

    def names(self, phase: str) -> list[str]:
        return [step.name for step in self.steps if step.phase == phase]


def request(output: Path, precision: str | None = "fp32", **more: object) -> BuildRequest:
    return BuildRequest(Path("small"), output, ("torch",), precision, **more)  # type: ignore[arg-type]


def build_small(output: Path, precision: str | None = "fp32", **more: object) -> BuildReport:
    return build(request(output, precision, **more), small_checkpoint())
