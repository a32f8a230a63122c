"""A tensor computed some rows at a time, so that what lies between storage and values stays small."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements computed at a time


def row_ranges(shape: tuple[int, ...], elements: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most this many elements together (one row at least)."""
    step = max(elements // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def filled_by_rows(shape: tuple[int, ...], rows: Callable[[int, int], Tensor]) -> Tensor:
    """fp32, put together from rows(start, stop)."""
    whole = torch.empty(shape, dtype=torch.float32)
    for start, stop in row_ranges(shape):
        whole[start:stop] = rows(start, stop)
    return whole
