"""CUDA graphs: a function of a few tensors, recorded once and replayed.

The first call runs eagerly (kernels compile, libraries make their workspaces, weights finish loading); the second is
recorded, and from then on a call copies its inputs into the recorded ones and replays. The results are copied out, so
they live as long as the caller likes. Whatever else the function reads must stay at its address. A recording that fails
is an error, never a silent return to eager running.

Graphs that are never replayed at the same time share one memory pool: each replay computes everything that it reads.
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
    """A recorded call: its inputs and outputs at fixed addresses, and what computes the latter from the former."""

    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]
    replay: Callable[[], None]


class GraphPool:
    """The memory that the graphs of a session share; counts what was recorded."""

    def __init__(self) -> None:
        self.recorded = 0
        self._handle: Any = None

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        """Record `function(*inputs)`. Scail2Error when it cannot be captured."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        static = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads that read weights and write video may go on using the device
            with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
                outputs = function(*static)
        except Exception as error:
            raise Scail2Error(
                f"the denoising step cannot be captured in a CUDA graph ({error}); run with --no-graphs."
            ) from error
        self.recorded += 1
        return Recording(static, outputs, graph.replay)


class StepGraph:
    """`call(function, *tensors)` behind a CUDA graph: always the same function of tensors of the same shapes.

    It does not hold the function, whose owner may hold it: so memory goes back as soon as the owner is dropped."""

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
