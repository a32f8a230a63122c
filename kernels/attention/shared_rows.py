"""Self-attention over a sequence whose rows are distributed over several ranks (Ulysses).

Before and after attention, every rank holds R rows of all H heads; during attention, all rows of H/N heads. There are
two all-to-alls around the kernel, which sees the same operands as on one GPU. Operands are exchanged as prepared: for
8-bit attention as 8-bit values with their scales. Only the end of the sequence is padded. For 8-bit attention, R is a
multiple of the tile that shares a key scale, so that the tiles are the same as on one rank; means and ranges over
tokens are taken over all ranks before quantisation.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023), section 3.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.attention.eight_bit import TILE, Prepared8, padded_length
from scail2_rt.kernels.peers import Peers
from scail2_rt.kernels.rope import Rope

if TYPE_CHECKING:
    from scail2_rt.kernels.attention.ops import PreparedQKV


@dataclass(frozen=True, slots=True)
class RowShare:
    """The rows of a sequence of `tokens` = L tokens that this rank holds: `rows` = R rows from row `first` on.

    Of these, `valid` rows are tokens and the others are padding."""

    peers: Peers
    tokens: int
    rows: int

    @classmethod
    def of(cls, peers: Peers, tokens: int, eight_bit: bool) -> "RowShare":
        """Divide `tokens` rows over the ranks of `peers`; `eight_bit` rounds R up to a multiple of TILE."""
        unit = TILE if eight_bit else 1
        units = -(-tokens // unit)
        return cls(peers, tokens, -(-units // peers.size) * unit)

    @property
    def first(self) -> int:
        return self.peers.rank * self.rows

    @property
    def valid(self) -> int:
        return min(max(self.tokens - self.first, 0), self.rows)

    def held(self, part: slice) -> tuple[slice, slice]:
        """Intersect the sequence's rows `part` with this rank's: (slice of this rank's rows, slice of `part`)."""
        start = min(max(part.start, self.first), self.first + self.valid)
        stop = min(max(part.stop, start), self.first + self.valid)
        return slice(start - self.first, stop - self.first), slice(start - part.start, stop - part.start)

    def rope(self, table: Rope) -> Rope:
        """Return the rotary table of these rows; padded rows are zero."""
        padding = (0, 0, 0, self.peers.size * self.rows - self.tokens)
        cos, sin = (F.pad(t, padding)[self.first : self.first + self.rows].contiguous() for t in (table.cos, table.sin))
        return Rope(cos, sin)


class HeadExchange:
    """The all-to-alls of one forward pass. Its buffers are allocated at the first block and used by all others, so that
    a captured graph has one set of them."""

    def __init__(self, share: RowShare) -> None:
        self.share = share
        self._buffers: dict[str, Tensor] = {}

    def to_heads(self, prepared: "PreparedQKV | Prepared8") -> "PreparedQKV | Prepared8":
        """Exchange operands of this rank's rows and all heads → all L tokens and this rank's heads."""
        return self._eight_bit(prepared) if isinstance(prepared, Prepared8) else self._sixteen_bit(prepared)

    def attended(self, prepared: "PreparedQKV | Prepared8", head_dim: int) -> Tensor:
        """Return the output buffer of attention: [L, C/N], the first rows of the buffer that `to_rows` sends."""
        dtype = prepared.v.dtype
        if isinstance(prepared, Prepared8) and prepared.v_scale is not None:
            dtype = torch.bfloat16
        rows = self.share.peers.size * self.share.rows
        shape = (rows, prepared.q.shape[0] * head_dim)
        return self._zeros("attended", shape, dtype, prepared.q.device)[: self.share.tokens]

    def to_rows(self) -> Tensor:
        """Exchange the attention output → [R, C]: this rank's rows of all heads."""
        size, rows = self.share.peers.size, self.share.rows
        parts = self._buffers["attended"].view(size, rows, -1)
        arrived = self.share.peers.exchange(parts, self._like("attended back", parts))
        ordered = torch.empty(rows, size, parts.shape[2], dtype=parts.dtype, device=parts.device)
        _copy(arrived.transpose(0, 1), ordered)
        return ordered.flatten(1)

    def _sixteen_bit(self, prepared: "PreparedQKV") -> "PreparedQKV":
        """Exchange 16-bit operands. q | k | v of a row and a rank's heads lie side by side, to be read in place."""
        size, rows = self.share.peers.size, self.share.rows
        heads, _, dim = prepared.q.shape
        operands = (prepared.q, prepared.k, prepared.v)
        shape = (size, rows, len(operands), heads // size * dim)
        parts = self._zeros("qkv", shape, prepared.q.dtype, prepared.q.device)
        for i, operand in enumerate(operands):
            _copy(operand.transpose(0, 1).reshape(rows, size, -1).transpose(0, 1), parts[:, :, i])
        arrived = self.share.peers.exchange(parts, self._like("qkv back", parts)).flatten(0, 1)[: self.share.tokens]
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(0, 1) for t in arrived.unbind(1))
        return replace(prepared, q=q, k=k, v=v)

    def _eight_bit(self, prepared: Prepared8) -> Prepared8:
        tokens, padded, size = self.share.tokens, padded_length(self.share.tokens), self.share.peers.size
        heads = prepared.q.shape[0] // size
        q = self._whole("q", prepared.q, 1, padded)
        k = self._whole("k", prepared.k, 1, padded)
        scales = [prepared.q_scale, prepared.k_scale]
        if prepared.v_shift is not None:  # each rank has its part of the shift: the parts are summed
            scales.append(prepared.v_shift)
        parts = torch.cat([scale.reshape(size, -1) for scale in scales], 1)
        arrived = self.share.peers.exchange(parts, self._like("scales", parts))
        arrived_scales = arrived.split([scale.numel() // size for scale in scales], 1)
        q_scale, k_scale = (
            t.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1)[:, :length].contiguous()
            for t, length in zip(arrived_scales, (padded, padded // TILE), strict=False)
        )
        if prepared.v_scale is None:
            return replace(prepared, q=q, k=k, q_scale=q_scale, k_scale=k_scale, v=self._v16(prepared.v), tokens=tokens)
        v = self._whole("v", prepared.v, 2, padded)
        mine = slice(self.share.peers.rank * heads, (self.share.peers.rank + 1) * heads)
        v_scale, v_shift = prepared.v_scale[mine].contiguous(), arrived_scales[2].sum(0).view(heads, -1)
        return replace(
            prepared, q=q, k=k, v=v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, v_shift=v_shift, tokens=tokens
        )

    def _whole(self, name: str, operand: Tensor, axis: int, length: int) -> Tensor:
        """Exchange operand [H, …] with this rank's rows on `axis` → [H/N, …] with `length` rows of all ranks there."""
        size, rows = self.share.peers.size, operand.shape[axis]
        parts = operand.unflatten(0, (size, -1))
        arrived = self.share.peers.exchange(parts, self._like(f"{name} back", parts))
        shape = [*parts.shape[1 : axis + 1], length, *parts.shape[axis + 2 :]]
        whole = self._zeros(name, tuple(shape), operand.dtype, operand.device)
        for i, part in enumerate(arrived):
            if (count := min(length - i * rows, rows)) > 0:
                place = whole.view(torch.uint8).narrow(axis, i * rows, count)
                _copy(part.view(torch.uint8).narrow(axis, 0, count), place)
        return whole

    def _v16(self, v: Tensor) -> Tensor:
        """Exchange V in 16 bits [H, R, D] → [H/N, L, D], heads side by side."""
        size, rows = self.share.peers.size, self.share.rows
        heads, _, dim = v.shape
        parts = self._zeros("v", (size, rows, heads // size * dim), v.dtype, v.device)
        _copy(v.transpose(0, 1).reshape(rows, size, -1).transpose(0, 1), parts)
        arrived = self.share.peers.exchange(parts, self._like("v back", parts)).flatten(0, 1)[: self.share.tokens]
        return arrived.unflatten(-1, (-1, dim)).transpose(0, 1)

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._buffers:
            empty = torch.empty(shape, dtype=dtype, device=device)
            empty.view(torch.uint8).zero_()
            self._buffers[name] = empty
        return self._buffers[name]

    def _like(self, name: str, parts: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(parts, memory_format=torch.contiguous_format)
        return self._buffers[name]


def _copy(source: Tensor, place: Tensor) -> None:
    """Copy in 8-byte units where both tensors allow it: PyTorch copies strided tensors element by element, and single
    bytes at a fraction of the memory's speed."""
    if _in_eights(source) and _in_eights(place):
        source, place = source.view(torch.int64), place.view(torch.int64)
    place.copy_(source)


def _in_eights(x: Tensor) -> bool:
    places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(place * x.element_size() % 8 == 0 for place in places)
