"""How a forward pass is shared out: rows of every pass to some processes, the two passes of guidance to two halves.

Only what the network asks for is here; processes and process groups are `runtime.distributed`'s."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from scail2_rt.kernels.attention.shared_rows import RowShare
from scail2_rt.kernels.peers import Peers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sharing:
    """everyone: all processes; rows: those that this one shares the rows of its passes with, None when it holds them
    all; halves: 2 where each half of the processes computes one of two passes, else 1."""

    everyone: Peers
    rows: Peers | None
    halves: int = 1

    def mine(self, passes: Sequence[T]) -> list[T]:
        """The passes that this process computes."""
        if self.halves == 1:
            return list(passes)
        half = self.everyone.rank // (self.everyone.size // self.halves)
        return list(passes[half : half + 1])

    def share(self, tokens: int, eight_bit: bool) -> RowShare | None:
        """The rows of a sequence that this process holds; None for all."""
        return None if self.rows is None else RowShare.of(self.rows, tokens, eight_bit)

    def collect(self, results: Sequence[Tensor], part: slice) -> list[Tensor]:
        """Rows `part` of every pass, from what each process has of its own passes [R, n] each."""
        gathered = self.everyone.gather(torch.stack(list(results)))  # [processes, passes here, R, n]
        grouped = gathered.unflatten(0, (self.halves, -1))
        return [rows.flatten(0, 1)[part] for half in grouped for rows in half.unbind(1)]


class Ranks(Protocol):
    """The processes of a session."""

    def sharing(self, passes: int) -> Sharing:
        """How forward passes of this many contexts are shared out."""
        ...
