"""Asynchronous work beside a busy GPU: copies to the CPU, and reports of completed denoising steps."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CopyToCpu:
    """A tensor that is being copied to the CPU."""

    tensor: Tensor
    copied: "torch.cuda.Event | None"

    def arrived(self) -> Tensor:
        """Return the tensor on the CPU; waits for this copy only."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor


def pinned_like(tensor: Tensor) -> Tensor:
    """Allocate pinned memory for a copy of the tensor. May wait for all work queued on the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def copy_to_cpu(tensor: Tensor, host: Tensor | None = None) -> CopyToCpu:
    """Start copying a tensor to pinned memory (`host`, or newly allocated); a CPU tensor is returned unchanged."""
    if tensor.device.type != "cuda":
        return CopyToCpu(tensor, None)
    host = pinned_like(tensor) if host is None else host
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return CopyToCpu(host, copied)


class StepMarks:
    """Reports each step after the device has completed it, one step late, so that the device never waits: a step is
    queued while the previous one runs. At most two steps are queued, so a run can be cancelled within one step.

    report(step, seen): called with the step's small tensor `seen` on the CPU, whose memory is reused later."""

    def __init__(self, report: Callable[[int, Tensor], None]) -> None:
        self._report = report
        self._queued: deque[tuple[int, CopyToCpu]] = deque()
        self._hosts: list[Tensor] = []  # pinned memory for the two queued steps, allocated before anything waits

    def passed(self, step: int, seen: Tensor) -> None:
        """Register a step whose work has been queued, followed by `seen` (always of the same shape). On a CPU both are
        already complete."""
        on_gpu = seen.device.type == "cuda"
        if on_gpu and not self._hosts:
            self._hosts = [pinned_like(seen) for _ in range(2)]
        self._queued.append((step, copy_to_cpu(seen, self._hosts[step % 2] if on_gpu else None)))
        # the first step compiles and loads: the device has nothing to run meanwhile
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
