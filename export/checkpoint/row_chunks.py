"""Tensors computed a few rows at a time, so that intermediate results stay small."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements computed at a time


def row_ranges(shape: tuple[int, ...], elements: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows with at most `elements` elements each (but at least one row)."""
    step = max(elements // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def filled_by_rows(shape: tuple[int, ...], rows: Callable[[int, int], Tensor]) -> Tensor:
    """Return an fp32 tensor of this shape, filled from rows(start, stop)."""
    whole = torch.empty(shape, dtype=torch.float32)
    for start, stop in row_ranges(shape):
        whole[start:stop] = rows(start, stop)
    return whole
