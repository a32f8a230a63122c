"""Results that leave the GPU while it goes on working: a copy to pinned memory, and an event that says it is there."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Leaving:
    """A tensor on its way to the CPU."""

    tensor: Tensor
    copied: "torch.cuda.Event | None"

    def arrive(self) -> Tensor:
        """The tensor on the CPU; waits for its own copy alone."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor


def leave(tensor: Tensor) -> Leaving:
    """Start copying a tensor to the CPU; one that is there already is itself."""
    if tensor.device.type != "cuda":
        return Leaving(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return Leaving(host, copied)
