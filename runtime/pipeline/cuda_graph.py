"""CUDA graphs: capture a function of a few tensors once, then replay it.

The first call runs eagerly (kernels compile, libraries allocate their workspaces, weights finish loading). The second
call is captured. From then on, a call copies its inputs into the captured ones, replays, and copies the results out, so
that the caller may keep them. All other memory that the function reads must keep its address. A capture that fails
raises; it never falls back silently to eager execution.

Graphs that are never replayed at the same time share one memory pool: each replay computes all intermediate data it
reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scail2_rt.kernels.errors import Scail2Error

Function = Callable[..., list[Tensor]]


@dataclass(frozen=True, slots=True)
class Recording:
    """A captured call: inputs and outputs at fixed addresses, and the function that replays the graph."""

    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    replay: Callable[[], None]


class GraphPool:
    """The memory shared by a session's graphs. `recorded` counts the captures."""

    def __init__(self) -> None:
        self.recorded = 0
        self._handle: Any = None

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        """Capture `function(*inputs)`. Raises Scail2Error if it cannot be captured."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        static = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads that read weights and write video may keep using the device
            with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
                outputs = function(*static)
        except Exception as error:
            raise Scail2Error(
                f"the denoising step cannot be captured in a CUDA graph ({error}). Use --no-graphs."
            ) from error
        self.recorded += 1
        return Recording(static, outputs, graph.replay)


class StepGraph:
    """Runs `call(function, *tensors)` through a CUDA graph; always the same function, with tensors of the same shapes.

    It holds no reference to the function: its owner may hold this object, and is then freed without a cycle."""

    def __init__(self, pool: GraphPool) -> None:
        self.pool = pool
        self._warm = False
        self._recording: Recording | None = None

    def call(self, function: Function, *inputs: Tensor) -> list[Tensor]:
        if not self._warm:
            self._warm = True
            return function(*inputs)
        if self._recording is None:
            self._recording = self.pool.record(function, inputs)
        for recorded, tensor in zip(self._recording.inputs, inputs, strict=True):
            recorded.copy_(tensor)
        self._recording.replay()
        return [output.clone() for output in self._recording.outputs]
