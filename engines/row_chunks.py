"""Row chunks: a long token sequence passes through a token-wise stage in equal chunks.

A layout of `rows` rows is cut into the fewest chunks of at most `max_rows`, all of the same size; the last one is
padded by repeating its last row. Chunks are copied into static buffers, one set per stage family and chunk size, so
that a stage sees one shape and one set of addresses for a complete layout and can be captured in a graph. Results are
written directly into full-size tensors. A sequence that fits is passed through unchanged.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from scail2_rt.export.stages.spec import TensorSpec
from scail2_rt.kernels.errors import Scail2Error

MAX_ROWS = 16_384


def piece_size(rows: int, max_rows: int) -> tuple[int, int]:
    """Return (number of chunks, rows per chunk): the fewest equal chunks of at most `max_rows` that cover `rows`."""
    count = -(-rows // max_rows)
    return count, -(-rows // count)


def row_pieces(rows: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of each chunk; the last one may be shorter."""
    _, size = piece_size(rows, max_rows)
    for start in range(0, rows, size):
        yield start, min(size, rows - start)


class RowChunks:
    """The static input buffers, and the loop over chunks."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.max_rows = max_rows
        self._buffers: dict[tuple[str, int], list[Tensor | None]] = {}

    def run(
        self,
        call: Callable[..., tuple[Tensor, ...]],
        family: str,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
        inputs: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run `call(*inputs)`, in chunks along the row axis if needed. `specs`: of the inputs, and of the outputs.

        Inputs without a row axis are passed to every chunk unchanged. Raises Scail2Error if row counts differ."""
        axes = [spec.row_axis for spec in specs[0]]
        lengths = {tensor.shape[axis] for tensor, axis in zip(inputs, axes, strict=True) if axis is not None}
        if len(lengths) > 1:
            raise Scail2Error(f"stage {family} got inputs of different row counts: {sorted(lengths)}.")
        if not lengths or max(lengths) <= self.max_rows:
            return call(*inputs)
        rows = lengths.pop()
        count, size = piece_size(rows, self.max_rows)
        buffers = self._static(family, size, inputs, axes)
        results: list[Tensor] = []
        for piece in range(count):
            start = piece * size
            valid = min(size, rows - start)
            for buffer, tensor, axis in zip(buffers, inputs, axes, strict=True):
                if buffer is not None and axis is not None:
                    _fill(buffer, tensor, axis, start, valid)
            pieces = call(*(b if b is not None else t for b, t in zip(buffers, inputs, strict=True)))
            if not results:
                results = [_full(spec, part, rows) for spec, part in zip(specs[1], pieces, strict=True)]
            for spec, result, part in zip(specs[1], results, pieces, strict=True):
                axis = spec.row_axis or 0
                result.narrow(axis, start, valid).copy_(part.narrow(axis, 0, valid))
        return tuple(results)

    def _static(
        self, family: str, size: int, inputs: Sequence[Tensor], axes: Sequence[int | None]
    ) -> list[Tensor | None]:
        """Return the buffers of a family and chunk size; None for inputs that are not cut."""
        buffers = self._buffers.get((family, size))
        if buffers is None:
            buffers = [
                None if axis is None else tensor.new_empty([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
                for tensor, axis in zip(inputs, axes, strict=True)
            ]
            self._buffers[family, size] = buffers
        return buffers

    def keep(self, families: set[str]) -> None:
        """Free the buffers of every family that is not in `families`."""
        self._buffers = {key: value for key, value in self._buffers.items() if key[0] in families}


def _fill(buffer: Tensor, tensor: Tensor, axis: int, start: int, valid: int) -> None:
    size = buffer.shape[axis]
    buffer.narrow(axis, 0, valid).copy_(tensor.narrow(axis, start, valid))
    if valid < size:
        buffer.narrow(axis, valid, size - valid).copy_(buffer.narrow(axis, valid - 1, 1))


def _full(spec: TensorSpec, part: Tensor, rows: int) -> Tensor:
    axis = spec.row_axis
    if axis is None:
        raise Scail2Error(f"output {spec.name} has no row axis, so its stage cannot be cut into row chunks.")
    return torch.empty([*part.shape[:axis], rows, *part.shape[axis + 1 :]], dtype=part.dtype, device=part.device)
