"""CUDA graphs: a function of a few tensors, recorded once and replayed.

The first call runs eagerly (kernels compile, libraries make their workspaces, weights finish loading); the second is
recorded, and from then on a call copies its inputs into the recorded ones and replays. The results are copied out, so
they live as long as the caller likes. A recording that fails is an error, never a silent return to eager running.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scail2_rt.kernels.errors import Scail2Error


class StepGraph:
    """`call(function, *tensors)` behind a CUDA graph: always the same function of tensors of the same shapes.

    It does not hold the function, whose owner may hold it: so memory goes back as soon as the owner is dropped."""

    def __init__(self) -> None:
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def call(self, function: Callable[..., list[Tensor]], *inputs: Tensor) -> list[Tensor]:
        if not self._warm:
            self._warm = True
            return function(*inputs)
        if self._graph is None:
            self._record(function, inputs)
        assert self._graph is not None
        for recorded, tensor in zip(self._inputs, inputs, strict=True):
            recorded.copy_(tensor)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _record(self, function: Callable[..., list[Tensor]], inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads that read weights and write video may go on using the device
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs)
        except Exception as error:
            raise Scail2Error(
                f"the denoising step cannot be captured in a CUDA graph ({error}); run with --no-graphs."
            ) from error
        self._graph = graph
