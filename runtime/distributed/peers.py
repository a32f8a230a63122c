"""Process groups: NCCL between GPUs, gloo between CPUs.

Groups are made directly, not through `torch.distributed.init_process_group`: a session must not take the one default
group of a program that may have its own. Tensors travel as bytes, so that every type can. A collective runs on the
current stream, as any kernel: it can be recorded in a CUDA graph, and the caller's next kernel may use its result.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions

from scail2_rt.runtime.pipeline.sharing import Sharing

TIMEOUT = timedelta(
    minutes=10
)  # of a collective that waits for a process which compiles or loads; death ends it at once
# A process that dies is noticed through its connection (`distributed.team`). NCCL's own threads would end this process.
NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast: no gain for all-to-all, and it can take a host's GPUs out of service
}


@dataclass(frozen=True, slots=True, eq=False)
class GroupPeers:
    """`kernels.peers.Peers` over a process group."""

    group: Any
    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        options = AllgatherOptions()
        options.asyncOp = False
        self._wait(self.group._allgather_base(_flat(out), _flat(x.contiguous()), options))
        return out

    def exchange(self, parts: Tensor, out: Tensor) -> Tensor:
        options = AllToAllOptions()
        options.asyncOp = False
        self._wait(self.group.alltoall_base(_flat(out), _flat(parts.contiguous()), [], [], options))
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        self._wait(self.group.broadcast([_flat(x)], options))
        return x

    @staticmethod
    def _wait(work: Any) -> None:
        """On a GPU the stream waits, not this thread."""
        if work is not None:
            work.wait()


def _flat(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


class Groups:
    """All groups of one process of a session: everyone, and the half that it belongs to where there are halves."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, local: bool) -> None:
        for name, value in NCCL_DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.rank, self.size, self.device = rank, size, device
        self._made: list[Any] = []
        self.everyone = self._group(store, "everyone", rank, size, local)
        self.half: GroupPeers | None = None
        if size % 2 == 0 and size > 2:
            half, index = divmod(rank, size // 2)
            self.half = self._group(store, f"half{half}", index, size // 2, local)

    def sharing(self, passes: int) -> Sharing:
        """`pipeline.sharing.Ranks`: two passes on two halves of the processes, else all share the rows of each."""
        if passes == 2 and self.size % 2 == 0:
            return Sharing(self.everyone, self.half, halves=2)
        return Sharing(self.everyone, self.everyone)

    def abort(self) -> None:
        """End what runs in these groups, here: a kernel that waits for a process that is gone would wait for ever."""
        for backend in self._made:
            if self.device.type == "cuda":
                backend.abort()

    def _group(self, store: Any, name: str, rank: int, size: int, local: bool) -> GroupPeers:
        backend = self._backend(dist.PrefixStore(name, store), rank, size, local)
        self._made.append(backend)
        return GroupPeers(backend, rank, size)

    def _backend(self, store: Any, rank: int, size: int, local: bool) -> Any:
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            return dist.ProcessGroupNCCL(store, rank, size, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = TIMEOUT
        create = dist.ProcessGroupGloo.create_device
        default = dist.ProcessGroupGloo.create_default_device
        options._devices = [create(hostname="127.0.0.1") if local else default()]
        return dist.ProcessGroupGloo(store, rank, size, options)
