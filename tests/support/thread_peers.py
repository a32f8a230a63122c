"""Several ranks as threads of one process, for tests of what ranks compute: collectives by copying. One thread runs at
a time, until its next collective: Triton's interpreter has one global state."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(eq=False)
class ThreadPeers:
    """`kernels.peers.Peers` of one thread."""

    rank: int
    size: int
    board: list[Tensor | None]
    barrier: threading.Barrier
    turn: threading.Lock

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._posted(x))

    def exchange(self, parts: Tensor, out: Tensor) -> Tensor:
        for i, sent in enumerate(self._posted(parts)):
            _raw(out[i]).copy_(_raw(sent[self.rank]))
        self._meet()
        return out

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._posted(x)[0])

    def _posted(self, x: Tensor) -> list[Tensor]:
        self.board[self.rank] = x.contiguous()
        self._meet()
        seen = [tensor.clone() for tensor in self.board if tensor is not None]
        self._meet()
        return seen

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def on_ranks(size: int, call: Callable[[ThreadPeers], T]) -> list[T]:
    """Run `call` in `size` threads that are each other's peers. Returns the results by rank; raises the first error."""
    board: list[Tensor | None] = [None] * size
    barrier, turn = threading.Barrier(size), threading.Lock()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with turn, torch.no_grad():
                results[rank] = call(ThreadPeers(rank, size, board, barrier, turn))
        except threading.BrokenBarrierError:
            return
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
