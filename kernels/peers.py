"""Interface of a group of ranks as the kernels need it: three collectives over tensors of one device.

`runtime.distributed.peers` implements it. The protocol keeps this package independent of process groups."""

from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """A group of `size` ranks that call the same collectives in the same order; this process has number `rank`.

    All calls are ordered on the current stream and can be captured in a CUDA graph."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """Gather x [...] of every rank → [size, ...]."""
        ...

    def exchange(self, parts: Tensor, out: Tensor) -> Tensor:
        """All-to-all of parts [size, ...]: part i goes to rank i; part i of `out` [size, ...] came from rank i."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite x on every rank with rank 0's x; returns x."""
        ...
