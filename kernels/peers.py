"""What kernels need of other processes: three collectives over tensors of one device.

The implementation is `runtime.distributed.peers`; here is only what the kernels may rely on, so that this floor knows
nothing of process groups."""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """`size` processes that call the same collectives in the same order; this one is number `rank`.

    All calls are ordered on the current stream and can be captured in a CUDA graph."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """x [...] of every process → [size, ...]."""
        ...

    def exchange(self, parts: Tensor, out: Tensor) -> Tensor:
        """parts [size, ...]: part i goes to process i → `out` [size, ...]: part i came from process i."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """x of process 0, written over everybody's x, which is returned."""
        ...
