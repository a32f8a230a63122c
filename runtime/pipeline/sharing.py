"""How a forward pass is divided: its rows among ranks, and the two guidance passes between two halves of the ranks.

This module defines only what the network needs; `runtime.distributed` implements ranks and process groups."""

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
    """everyone: all ranks; rows: the ranks that share the rows of this rank's passes, None if this rank holds all rows;
    halves: 2 if each half of the ranks computes one of two passes, else 1."""

    everyone: Peers
    rows: Peers | None
    halves: int = 1

    def mine(self, passes: Sequence[T]) -> list[T]:
        """Return the passes that this rank computes."""
        if self.halves == 1:
            return list(passes)
        half = self.everyone.rank // (self.everyone.size // self.halves)
        return list(passes[half : half + 1])

    def share(self, tokens: int, eight_bit: bool) -> RowShare | None:
        """Return this rank's rows of a sequence of `tokens` rows; None for all."""
        return None if self.rows is None else RowShare.of(self.rows, tokens, eight_bit)

    def collect(self, results: Sequence[Tensor], part: slice) -> list[Tensor]:
        """Gather rows `part` of every pass; results: this rank's rows [R, n] of each of its passes."""
        gathered = self.everyone.gather(torch.stack(list(results)))  # [ranks, passes here, R, n]
        grouped = gathered.unflatten(0, (self.halves, -1))
        return [rows.flatten(0, 1)[part] for half in grouped for rows in half.unbind(1)]


class Ranks(Protocol):
    """The ranks of a session."""

    def sharing(self, passes: int) -> Sharing:
        """Return how forward passes of `passes` contexts are divided."""
        ...
