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


def pinned_like(tensor: Tensor) -> Tensor:
    """Pinned memory for a copy of the tensor. Getting it may wait for all that the device has queued."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def copy_to_cpu(tensor: Tensor, host: Tensor | None = None) -> CopyToCpu:
    """Start copying a tensor to pinned memory, to `host` or new; a CPU tensor is returned unchanged."""
    if tensor.device.type != "cuda":
        return CopyToCpu(tensor, None)
    host = pinned_like(tensor) if host is None else host
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return CopyToCpu(host, copied)


class StepMarks:
    """Reports each step when the device has done it, one step late, so that the device never waits: a step is queued
    while the one before it runs. At most two steps are queued, so a run can be cancelled within one.

    report(step, seen): what is called, with the small tensor that was queued behind the step, on the CPU; its memory is
    used again for later steps."""

    def __init__(self, report: Callable[[int, Tensor], None]) -> None:
        self._report = report
        self._queued: deque[tuple[int, CopyToCpu]] = deque()
        self._hosts: list[Tensor] = []  # pinned memory for the two steps that may be queued, made before anything waits

    def passed(self, step: int, seen: Tensor) -> None:
        """The work of a step has been queued, and after it `seen`, of the same shape every time; on a CPU both are
        done."""
        on_gpu = seen.device.type == "cuda"
        if on_gpu and not self._hosts:
            self._hosts = [pinned_like(seen) for _ in range(2)]
        self._queued.append((step, copy_to_cpu(seen, self._hosts[step % 2] if on_gpu else None)))
        # the first step compiles and loads: there is nothing to keep busy
        late = 1 if on_gpu and step > 0 else 0
        while len(self._queued) > late:
            self._wait()

    def finish(self) -> None:
        """Wait for the last step."""
        while self._queued:
            self._wait()

    def _wait(self) -> None:
        step, seen = self._queued.popleft()
        self._report(step, seen.arrived())
