"""What a GPU does while it goes on working: copies to the CPU, and steps that are reported when they are done."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CopyToCpu:
    """A tensor on its way to the CPU."""

    tensor: Tensor
    copied: "torch.cuda.Event | None"

    def arrived(self) -> Tensor:
        """The tensor on the CPU; waits for its own copy alone."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor


def copy_to_cpu(tensor: Tensor) -> CopyToCpu:
    """Start copying a tensor to pinned memory; a CPU tensor is returned unchanged."""
    if tensor.device.type != "cuda":
        return CopyToCpu(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return CopyToCpu(host, copied)


class StepMarks:
    """Reports each step when the device has done it, one step late, so that the device never waits: a step is queued
    while the one before it runs. At most two steps are queued, so a run can be cancelled within one.

    report(step, seen): what is called, with the small tensor that was queued behind the step, on the CPU."""

    def __init__(self, report: Callable[[int, Tensor], None]) -> None:
        self._report = report
        self._queued: deque[tuple[int, CopyToCpu]] = deque()

    def passed(self, step: int, seen: Tensor) -> None:
        """The work of a step has been queued, and after it `seen`; on a CPU both are done."""
        self._queued.append((step, copy_to_cpu(seen)))
        # the first step compiles and loads: there is nothing to keep busy
        late = 1 if seen.device.type == "cuda" and step > 0 else 0
        while len(self._queued) > late:
            self._wait()

    def finish(self) -> None:
        """Wait for the last step."""
        while self._queued:
            self._wait()

    def _wait(self) -> None:
        step, seen = self._queued.popleft()
        self._report(step, seen.arrived())
