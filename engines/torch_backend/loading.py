"""Weights from the store to the device, in the background.

A few reader threads each own two pinned buffers and a stream: they read a piece of the file into a buffer, copy it to
the device and wait for their own copy, so while one copies the others read, and a finished future means that the data
is there. Each stage lies in one device buffer. On a CPU a piece is read straight into place. Other threads sum a piece
while its reader reads the next one into its other buffer: reading is no slower for it where cores are free. Whoever
waits for a stage compares the sums, so a damaged one never runs.

`WeightLoader.start` begins with one stage. `StageStream` keeps a family of stages in two buffers that take turns: while
one stage runs the next is on its way, so that a model larger than the device's memory still runs; it sums every stage
the first time.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from scail2_rt.engines.folder.store import StoreReader, TensorShape
from scail2_rt.engines.folder.sums import PIECE, SumChecker, piece_sum

READERS = SUMMERS = 6  # on an H200: 16.2 GB/s with sums; four of each 12.0, four readers without sums 14.2
ALIGNMENT = 256  # bytes; what matrix products and vector loads want
SLOTS = 2
Engine = TypeVar("Engine")


def buffer_bytes(tensors: Mapping[str, TensorShape]) -> int:
    """Bytes of a device buffer for the tensors of one stage."""
    return sum(-(-shape.nbytes // ALIGNMENT) * ALIGNMENT for shape in tensors.values())


def carve(buffer: Tensor, tensors: Mapping[str, TensorShape]) -> dict[str, Tensor]:
    """Views of a byte buffer, one per tensor, each aligned."""
    views, start = {}, 0
    for name, shape in tensors.items():
        views[name] = buffer[start : start + shape.nbytes].view(shape.dtype).view(shape.shape)
        start += -(-shape.nbytes // ALIGNMENT) * ALIGNMENT
    return views


Piece = tuple[str, "Future[bytes] | None"]


@dataclass(frozen=True, slots=True)
class Loading:
    """A stage on its way: its tensors on the device, valid after `wait()`.

    pieces: (tensor in the store, its sum to come), in order; checker: what the sums are compared with, None where
    nothing is summed"""

    stage: str
    tensors: dict[str, Tensor]
    pieces: tuple[Future[Piece], ...]
    checker: SumChecker | None = None

    def wait(self) -> dict[str, Tensor]:
        """Block until every piece has arrived; an error while reading is raised here, and DamagedError when a tensor is
        not what its sum says."""
        sums: dict[str, list[bytes]] = {}
        for name, coming in [piece.result() for piece in self.pieces]:
            if coming is not None:
                sums.setdefault(name, []).append(coming.result())
        if self.checker is not None:
            for name, pieces in sums.items():
                self.checker.tensor(self.stage, name, pieces)
            self.checker.whole.add(self.stage)
        return self.tensors

    def settle(self) -> None:
        """Block until nothing is read any more, for whom the stage is of no use."""
        wait(self.pieces)


class WeightLoader:
    """Reads stages of one store onto one device with background threads."""

    def __init__(self, store: StoreReader, device: torch.device) -> None:
        self.store, self.device = store, device
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._summers = ThreadPoolExecutor(SUMMERS, thread_name_prefix="sums")
        self._own = threading.local()

    def start(
        self, stage: str, tensors: Mapping[str, TensorShape], buffer: Tensor | None = None, again: bool = False
    ) -> Loading:
        """Begin to load a stage, into `buffer` (uint8, large enough) or a new one. `again`: one that was found whole
        before is not summed once more.

        What the current stream was told before this call is finished before the buffer is written."""
        if buffer is None:
            buffer = torch.empty(buffer_bytes(tensors), dtype=torch.uint8, device=self.device)
        views = carve(buffer, tensors)
        free = None
        if self.device.type == "cuda":
            free = torch.cuda.Event()
            free.record()
        checker = self.store.checker
        if again and checker is not None and stage in checker.whole:
            checker = None
        load = partial(self._load, free=free, summed=checker is not None)
        pieces = [
            self._pool.submit(load, f"{stage}.{name}", view.reshape(-1).view(torch.uint8), start)
            for name, view in views.items()
            for start in range(0, view.nbytes, PIECE)
        ]
        return Loading(stage, views, tuple(pieces), checker)

    def _load(self, name: str, target: Tensor, start: int, free: "torch.cuda.Event | None", summed: bool) -> Piece:
        """Read one piece. The whole of it in one call: each call waits for the interpreter's lock again."""
        part = target[start : start + PIECE]
        if free is None:
            data = part.numpy().data
            self.store.read_into(name, start, data)
            return name, self._summers.submit(piece_sum, data) if summed else None
        if not hasattr(self._own, "pinned"):
            if self.device.index is not None:
                torch.cuda.set_device(self.device)  # a new thread is on GPU 0
            self._own.pinned = deque((torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), None) for _ in range(2))
            self._own.stream = torch.cuda.Stream(self.device)
        (buffer, before), stream = self._own.pinned.popleft(), self._own.stream
        if before is not None:
            wait([before])
        pinned, coming = buffer[: len(part)], None
        try:
            self.store.read_into(name, start, pinned.numpy().data)
            free.synchronize()
            with torch.cuda.stream(stream):
                part.copy_(pinned, non_blocking=True)
            coming = self._summers.submit(piece_sum, pinned.numpy().data) if summed else None
            stream.synchronize()
        finally:
            self._own.pinned.append((buffer, coming))
        return name, coming

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._summers.shutdown(wait=True, cancel_futures=True)


class StageStream(Generic[Engine]):
    """Stages of one family that take turns in a few device buffers.

    `order` is the order in which they are run, over and over; running them in another order is right but waits.
    `make` turns the tensors of a buffer into an engine; all stages of a family have the same tensors."""

    def __init__(
        self,
        loader: WeightLoader,
        order: Sequence[str],
        tensors: Mapping[str, TensorShape],
        make: Callable[[Mapping[str, Tensor]], Engine],
    ) -> None:
        self._loader, self._tensors = loader, tensors
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        size = buffer_bytes(tensors)
        buffers = [torch.empty(size, dtype=torch.uint8, device=loader.device) for _ in range(SLOTS)]
        self._free = deque((buffer, make(carve(buffer, tensors))) for buffer in buffers)
        self._ahead: deque[tuple[str, tuple[Tensor, Engine], Loading]] = deque()
        self._current: tuple[Tensor, Engine] | None = None

    def take(self, name: str) -> Engine:
        """The engine of a stage, its weights in place. It is valid until the next call."""
        if self._current is not None:
            self._free.append(self._current)
            self._current = None
        if self._ahead and self._ahead[0][0] != name:
            self._drain()
        if not self._ahead:
            self._begin(name)
        _, slot, loading = self._ahead.popleft()
        upcoming = self._next[self._ahead[-1][0] if self._ahead else name]
        while self._free:
            self._begin(upcoming)
            upcoming = self._next[upcoming]
        loading.wait()
        self._current = slot
        return slot[1]

    def _begin(self, name: str) -> None:
        slot = self._free.popleft()
        self._ahead.append((name, slot, self._loader.start(name, self._tensors, slot[0], again=True)))

    def _drain(self) -> None:
        while self._ahead:
            _, slot, loading = self._ahead.popleft()
            loading.settle()
            self._free.append(slot)

    def close(self) -> None:
        self._drain()
        self._free.clear()
        self._current = None
