"""Process groups: NCCL between GPUs, gloo between CPUs.

Groups are created directly, not through `torch.distributed.init_process_group`: the default group may belong to the
program that opened the session. Tensors are sent as bytes, so that every type is supported. A collective runs on the
current stream like a kernel: it can be captured in a CUDA graph, and the caller's next kernel may use its result.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions

from scail2_rt.runtime.pipeline.sharing import Sharing

# Limit of a collective that waits for a rank which compiles or loads; the death of that rank ends it at once.
TIMEOUT = timedelta(minutes=10)
# `distributed.team` notices a dead rank through its connection. NCCL's threads would end this process.
NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast: no gain for all-to-all, and it can take a host's GPUs out of service
}


Seconds = Callable[[], float]
Seen = dict[str, list[tuple[int, Seconds]]]  # kind of collective → (bytes sent, seconds once it is complete) per call


@dataclass(slots=True)
class Watch:
    """Records the collectives of a rank's groups for benchmarks; `seen` is None while nothing is recorded."""

    seen: Seen | None = None

    def run(self, kind: str, given: Tensor, start: Callable[[], Any]) -> None:
        """Start a collective. On a GPU the stream waits for it, not this thread."""
        if self.seen is None:
            if (work := start()) is not None:
                work.wait()
            return
        seen, self.seen = self.seen, None
        seconds = _timed(given.device, lambda: self.run(kind, given, start))
        self.seen = seen
        seen.setdefault(kind, []).append((given.nbytes, seconds))


def _timed(device: torch.device, call: Callable[[], None]) -> Seconds:
    """Call it and return a function that gives its duration in seconds, on a GPU once the device has completed it.

    The duration includes waiting for other ranks."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    wall_s = time.perf_counter() - started
    return lambda: wall_s


@dataclass(frozen=True, slots=True, eq=False)
class GroupPeers:
    """`kernels.peers.Peers` over a process group."""

    group: Any
    rank: int
    size: int
    watch: Watch = field(default_factory=Watch)

    def gather(self, x: Tensor) -> Tensor:
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        options = AllgatherOptions()
        options.asyncOp = False
        given = x.contiguous()
        self.watch.run("gather", given, lambda: self.group._allgather_base(_flat(out), _flat(given), options))
        return out

    def exchange(self, parts: Tensor, out: Tensor) -> Tensor:
        options = AllToAllOptions()
        options.asyncOp = False
        given = parts.contiguous()
        self.watch.run("exchange", given, lambda: self.group.alltoall_base(_flat(out), _flat(given), [], [], options))
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        self.watch.run("broadcast", x, lambda: self.group.broadcast([_flat(x)], options))
        return x


def _flat(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class Groups:
    """All groups of one rank of a session: `everyone`, and `half`, the half of the ranks it belongs to, if there are
    halves. The constructor waits until the other ranks create theirs."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, local: bool) -> None:
        for name, value in NCCL_DEFAULTS.items():
            os.environ.setdefault(name, value)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for the thread that creates the groups
        self.rank, self.size, self.device = rank, size, device
        self._made: list[Any] = []
        self._watch = Watch()
        self._aborting: list[threading.Thread] = []
        self.everyone = self._group(store, "everyone", rank, size, local)
        self.half: GroupPeers | None = None
        if size % 2 == 0 and size > 2:
            half, index = divmod(rank, size // 2)
            self.half = self._group(store, f"half{half}", index, size // 2, local)

    def sharing(self, passes: int) -> Sharing:
        """Implement `pipeline.sharing.Ranks`: two passes on two halves of the ranks, else all ranks share each pass."""
        if passes == 2 and self.size % 2 == 0:
            return Sharing(self.everyone, self.half, halves=2)
        return Sharing(self.everyone, self.everyone)

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Record bytes and seconds of every collective of this rank inside the `with` block."""
        seen: Seen = {}
        self._watch.seen = seen
        try:
            yield seen
        finally:
            self._watch.seen = None

    def abort(self) -> list[threading.Thread]:
        """Abort the collectives of these groups: a kernel that waits for a dead rank would wait for ever.

        NCCL ends the kernels at once, but then waits until no captured graph refers to a group; so each group is
        aborted in a thread. Returns the threads. Join them after the graphs are freed: a thread that is inside a
        library when the interpreter exits would crash the process."""
        if self.device.type == "cuda" and not self._aborting:
            self._aborting = [
                threading.Thread(target=group.abort, name="scail2-rt abort", daemon=True) for group in self._made
            ]
            for thread in self._aborting:
                thread.start()
        return self._aborting

    def _group(self, store: Any, name: str, rank: int, size: int, local: bool) -> GroupPeers:
        backend = self._backend(dist.PrefixStore(name, store), rank, size, local)
        self._made.append(backend)
        peers = GroupPeers(backend, rank, size, self._watch)
        peers.gather(torch.zeros(1, device=self.device))  # connects now: later collectives wait for the work only
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return peers

    def _backend(self, store: Any, rank: int, size: int, local: bool) -> Any:
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            return dist.ProcessGroupNCCL(store, rank, size, options)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = TIMEOUT
        options._devices = [gloo.create_device(hostname="127.0.0.1") if local else gloo.create_default_device()]
        return gloo(store, rank, size, options)
