"""Definition of a stage: named input and output tensors, and their free dimensions.

A `StageDefinition` contains everything that export and the executors need to know about one engine stage without
reading any weight: how to create its module, which checkpoint tensors feed each parameter, and the names, types and
symbolic dimensions of its inputs and outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from scail2_rt.export.models.precision import Numerics, Precision, numerics_of

ROWS = "rows"  # the token dimension of a token-wise stage: any size, may be cut into chunks

Dim = int | str  # a fixed size, or a symbol, optionally with a factor: "2*h"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a stage. `dims` are sizes or symbols: `ROWS`, `"h"`, `"8*h"`."""

    name: str
    dtype: torch.dtype
    dims: tuple[Dim, ...]

    @property
    def row_axis(self) -> int | None:
        return self.dims.index(ROWS) if ROWS in self.dims else None


Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # of inputs, of outputs


@dataclass(frozen=True, slots=True)
class StageDefinition:
    """One engine stage.

    name      `dit.blocks.7.ffn`
    build     creates the module for given numerics (on the current default device: `meta` costs nothing)
    io        input and output specs for given numerics
    weights   parameter name → checkpoint tensor names, concatenated along dimension 0 and reshaped to the parameter
              (an e4m3 parameter `x.weight` also fills `x.scale`)
    family    stages of one family are structurally identical: one ONNX graph, different weights
    """

    name: str
    build: Callable[[Numerics], nn.Module]
    io: Callable[[Numerics], Specs]
    weights: Mapping[str, tuple[str, ...]] = field(hash=False)
    family: str = ""

    @property
    def component(self) -> str:
        return self.name.partition(".")[0]

    def numerics(self, precision: Precision) -> Numerics:
        return numerics_of(self.name, precision)
