"""Background loading of weights from the store to the device.

Each of several reader threads has two pinned buffers and a stream. It reads a piece of the file into a buffer, copies
it to the device and waits for this copy; while one thread copies, the others read, and a finished future means that the
data is on the device. Each stage lies in one device buffer. On a CPU, a piece is read directly into place. Other
threads compute a piece's checksum while its reader reads the next piece into its other buffer: if cores are free, this
does not slow down reading. The thread that waits for a stage compares the checksums, so a damaged stage never runs.

`WeightLoader.start` starts loading one stage. `StageStream` keeps a family of stages in two alternating buffers: while
one stage runs, the next is loaded, so that a model larger than GPU memory runs. It checks every stage the first time.
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

READERS = SUMMERS = 6  # on an H200: 16.2 GB/s with checksums; 12.0 with four of each, 14.2 with four and no checksums
ALIGNMENT = 256  # bytes; suits matrix products and vector loads
SLOTS = 2
Engine = TypeVar("Engine")


def buffer_bytes(tensors: Mapping[str, TensorShape]) -> int:
    """Return the bytes of a device buffer for the tensors of one stage."""
    return sum(-(-shape.nbytes // ALIGNMENT) * ALIGNMENT for shape in tensors.values())


def carve(buffer: Tensor, tensors: Mapping[str, TensorShape]) -> dict[str, Tensor]:
    """Return views of a byte buffer, one per tensor, each aligned."""
    views, start = {}, 0
    for name, shape in tensors.items():
        views[name] = buffer[start : start + shape.nbytes].view(shape.dtype).view(shape.shape)
        start += -(-shape.nbytes // ALIGNMENT) * ALIGNMENT
    return views


Piece = tuple[str, "Future[bytes] | None"]


@dataclass(frozen=True, slots=True)
class Loading:
    """A stage that is being loaded: its tensors on the device, valid after `wait()`.

    pieces: (tensor in the store, its future checksum), in order; checker: compares the checksums, None if none are
    computed"""

    stage: str
    tensors: dict[str, Tensor]
    pieces: tuple[Future[Piece], ...]
    checker: SumChecker | None = None

    def wait(self) -> dict[str, Tensor]:
        """Block until every piece is loaded. Raises the error of a failed read, or DamagedError if a tensor does not
        match its checksum."""
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
        """Block until nothing is being read, without checks, for a stage that is not used."""
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
        """Start loading a stage into `buffer` (uint8, large enough) or a new one. `again`: do not compute checksums for
        a stage that was checked before.

        The buffer is written after all work queued on the current stream before this call."""
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
        """Read one piece in a single call: each call has to wait for the interpreter lock."""
        part = target[start : start + PIECE]
        if free is None:
            data = part.numpy().data
            self.store.read_into(name, start, data)
            return name, self._summers.submit(piece_sum, data) if summed else None
        if not hasattr(self._own, "pinned"):
            if self.device.index is not None:
                torch.cuda.set_device(self.device)  # a new thread starts on GPU 0
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
    """Stages of one family that alternate in two device buffers.

    `order`: the order in which they run repeatedly; another order gives correct results but waits. `make` creates an
    engine from the tensors of a buffer; all stages of a family have the same tensor shapes."""

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
        """Return the engine of a stage with its weights loaded. It is valid until the next call."""
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
