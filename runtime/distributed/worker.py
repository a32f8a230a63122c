"""A rank beside the leader: opens the same engines on its GPU and runs its part of every call.

It runs as `python -m scail2_rt.runtime.distributed.worker` and reads the leader's address from standard input. It ends
when the leader says so, when a call fails (after reporting the error to the leader), and at once when the connection to
the leader closes, even during a call: a collective without the leader would never return."""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.distributed.channel import Channel
from scail2_rt.runtime.distributed.decoding import SharedDecoding
from scail2_rt.runtime.distributed.peers import Groups
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.placement import Placement, apply
from scail2_rt.runtime.pipeline.transformer import BlockKV, References, Schedule, Transformer

Opener = Callable[[torch.device], EngineSet]
LOST = 3  # exit code after the connection to the leader is lost


@dataclass(frozen=True, slots=True)
class Start:
    """Instructions for a rank that has connected. store: address of the process groups' store; local: all ranks are on
    this host; opener: opens the engines on a device."""

    rank: int
    size: int
    store: tuple[str, int]
    local: bool
    device: str
    opener: Opener


class Worker:
    """One rank's engines and constants. Every method implements the leader's call of the same name."""

    def __init__(self, start: Start, store: Any) -> None:
        self.device = torch.device(start.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._join = partial(Groups, store, start.rank, start.size, self.device, start.local)
        self.engines = start.opener(self.device)
        self._contexts: list[BlockKV] = []
        self._transformer: Transformer | None = None
        self._schedule: Schedule | None = None
        self._decoding: SharedDecoding | None = None

    def join(self) -> None:
        self.groups = self._join()
        self.constants = Constants(self.engines, self.groups)

    def place(self, placement: Placement | None) -> None:
        if placement is not None:
            if set(placement.streamed) != set(self.engines.streamed):
                self.constants.drop_transformers()
            apply(placement, self.engines)

    def contexts(self, texts: list[Tensor], clip: Tensor) -> None:
        self._contexts = self.constants.contexts(texts, clip)

    def schedule(self, timesteps: tuple[float, ...]) -> None:
        self._schedule = self.constants.schedule(timesteps)

    def transformer(self, layout: Layout) -> None:
        self._transformer = self.constants.transformer(layout, self._contexts)

    def show_references(self, *shown: Tensor) -> None:
        assert self._transformer is not None
        self._transformer.show_references(References(*(tensor.to(self.device) for tensor in shown)))

    def show_driving(self, driving: Tensor, driving_mask: Tensor) -> None:
        assert self._transformer is not None
        self._transformer.show_driving(driving.to(self.device), driving_mask.to(self.device))

    def velocities(self, shape: tuple[int, ...], step: int) -> None:
        assert self._transformer is not None
        assert self._schedule is not None
        video = self.groups.everyone.broadcast(torch.empty(shape, device=self.device))
        history = self._transformer.config.history_channels
        self._transformer.velocities(video[:-history], video[-history:], self._schedule, step)

    def decode(self, shape: tuple[int, ...]) -> None:
        self._decoding = SharedDecoding(self.engines, self.groups.everyone, torch.empty(shape, device=self.device))

    def decode_frame(self) -> None:
        assert self._decoding is not None
        self._decoding.frame()

    def begin_segment(self, placement: Placement | None) -> None:
        self.constants.begin_segment(placement)

    def make_room(self, placement: Placement | None) -> None:
        self.constants.make_room(placement)
        self._transformer = None

    def close(self) -> None:
        self.constants.drop()
        self.engines.close()


def serve(channel: Channel, start: Start) -> None:
    """Run the leader's calls until it sends `close`. Reports an error to the leader and ends the process."""
    import torch.distributed as dist

    calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
    closing = threading.Event()
    channel.listen(calls.put, lambda: os._exit(0 if closing.is_set() else LOST))
    try:
        store = dist.TCPStore(*start.store, is_master=False)
        worker = Worker(start, store)
        channel.send(("ready", None))
        with torch.no_grad():
            while True:
                name, arguments = calls.get()
                if name == "close":
                    break
                getattr(worker, name)(*arguments)
        worker.close()
        closing.set()
        channel.send(("closed", None))
    except BaseException as error:
        channel.send(("failed", _described(error)))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _described(error: BaseException) -> str:
    """Describe an error in one sentence."""
    from scail2_rt.kernels.errors import Scail2Error

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory ran out ({text.partition('.')[0]})"
    if isinstance(error, MemoryError):
        return "the host's memory ran out"
    return text if isinstance(error, Scail2Error) else f"{type(error).__name__}: {text}"


def main() -> None:
    """Connect to the leader that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader decides what Ctrl-C means
    where = json.loads(sys.stdin.readline())
    channel = Channel.to((where["host"], where["port"]), bytes.fromhex(where["key"]))
    channel.send(("hello", (where["rank"], where["rank"])))
    serve(channel, channel.receive())
    os._exit(0)  # threads of libraries may outlive their groups


if __name__ == "__main__":
    main()
