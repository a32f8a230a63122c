"""Triton self-attention: 8-bit (int8 QK, PV in e4m3 or 16-bit) and 16-bit. Tiles are loaded by TMA if available.

Accuracy decided the 8-bit form. The fp8 tensor core keeps few bits of a running accumulator, so each tile's P·V starts
from zero and is added to the output in fp32 registers. Row sums are taken in fp32 from the unrounded p. p carries a
factor of 2⁸ inside its exponent so that small weights survive e4m3.
The number of issued instructions limits the speed. Int8 scores are read as floats by adding the bits of 1.5·2²³ (an
exact float for every score) instead of by a conversion. The row maximum is an integer maximum. Scale and maximum enter
exp2's argument as one multiply-add.
Padded keys are zero and score exactly 0. Instead of masking them, the kernel subtracts exp2(−max) per padded key from
the row sum.
NaN: a NaN scale of q or k drops out of the row maximum, but every p of that row and tile is exp2(NaN) and enters the
row sum, which divides the complete row. A NaN scale of V enters with the last multiply-add. 16-bit p and V carry NaN.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

P_SHIFT = tl.constexpr(8.0)  # log2 of the factor that p carries before e4m3
MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: float(MAGIC bits + n) = MAGIC + n for |n| < 2²²
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _tile(source, row, column, row_stride, rows_end, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Load [R, C] at (row, column) of a matrix with contiguous rows; rows from rows_end on are zero."""
    if TMA:
        return source.load([row, column])
    else:
        rows = row + tl.arange(0, R).to(tl.int64)
        at = rows[:, None] * row_stride + (column + tl.arange(0, C))[None]
        return tl.load(source + at, mask=(rows < rows_end)[:, None], other=0.0)


@triton.jit(do_not_specialize=["length"])
def _attention_8bit(
    q, k, v, q_scale, k_scale, v_scale, v_shift, out, length, padded, v_stride, channels,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, IMPRECISE: tl.constexpr,
):  # fmt: skip
    """One head × M query rows. q and k int8 [H·Lp, D]; v e4m3 [H·D, Lp] in stored order, or 16-bit [L, C]."""
    head = tl.program_id(1)
    start_row = tl.program_id(0) * M
    rows = start_row + tl.arange(0, M)
    head64 = head.to(tl.int64)
    query = _tile(q, head * padded + start_row, 0, D, (head64 + 1) * padded, M, D, TMA)
    row_scale = tl.load(q_scale + head64 * padded + rows)
    top = tl.zeros((M,), tl.float32)  # the running maximum; the mean key is removed, so no row's maximum is below 0
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, padded, N):
        key = _tile(k, head * padded + start, 0, D, (head64 + 1) * padded, N, D, TMA)
        scale = row_scale * tl.load(k_scale + head64 * (padded // 128) + start // 128)
        bits = tl.dot(query, key.T, tl.full((M, N), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        score = bits.to(tl.float32, bitcast=True)  # MAGIC + n, without a conversion instruction
        peak = tl.max(bits, 1).to(tl.float32, bitcast=True) - MAGIC
        highest = tl.maximum(top, peak * scale)
        offset = highest + MAGIC * scale
        if FP8:
            offset -= P_SHIFT
        p = tl.exp2(score * scale[:, None] - offset[:, None])
        alpha = tl.exp2(top - highest)
        total = total * alpha + tl.sum(p, 1)
        top = highest
        if FP8:
            # p8 takes the softmax's registers in stored order: no data moves between threads
            p8 = tl.reshape(p.to(tl.float8e4nv), (M, N // 16, 2, 4, 2))
            p8 = tl.reshape(tl.permute(p8, (0, 1, 3, 2, 4)), (M, N))
            value = _tile(v, head * D, start, padded, (head64 + 1) * D, D, N, TMA)
            part = tl.dot(p8, value.T, out_dtype=tl.float32, max_num_imprecise_acc=IMPRECISE)
            acc = acc * alpha[:, None] + part
        else:
            value = _tile(v, start, head * D, v_stride, length, N, D, TMA)
            acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None])
    shift = P_SHIFT if FP8 else 0.0
    total -= (padded - length).to(tl.float32) * tl.exp2(shift - top)
    acc = acc / total[:, None]
    lanes = head * D + tl.arange(0, D)
    if FP8:
        acc = acc * tl.load(v_scale + lanes)[None] + tl.load(v_shift + lanes)[None]
    at = rows.to(tl.int64)[:, None] * channels + lanes[None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit
def _softmax_step(query, k, v, row, k_column, v_column, k_stride, v_stride, end, scale, top, total, acc,
                  N: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Online softmax in base 2: the step for one tile of N keys, which starts at row `row` of the matrices k and v."""
    key = _tile(k, row, k_column, k_stride, end, N, D, TMA)
    score = tl.dot(query, key.T)
    if MASK:
        score = tl.where((row + tl.arange(0, N) < end)[None], score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1) * scale)
    p = tl.exp2(score * scale - highest[:, None])
    alpha = tl.exp2(top - highest)
    value = _tile(v, row, v_column, v_stride, end, N, D, TMA)
    return highest, total * alpha + tl.sum(p, 1), tl.dot(p.to(value.dtype), value, acc * alpha[:, None])


@triton.jit
def _attend(query, k, v, k_column, v_column, k_stride, v_stride, keys, scale,
            D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Return softmax(query·kᵀ·scale/log2(e))·v over `keys` keys, fp32 [M, D]; only the last tile is masked."""
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    whole = keys // N * N
    for start in range(0, whole, N):
        top, total, acc = _softmax_step(query, k, v, start, k_column, v_column, k_stride, v_stride, keys, scale,
                                        top, total, acc, N, D, False, TMA)  # fmt: skip
    if whole < keys:
        top, total, acc = _softmax_step(query, k, v, whole, k_column, v_column, k_stride, v_stride, keys, scale,
                                        top, total, acc, N, D, True, TMA)  # fmt: skip
    return acc / total[:, None]


@triton.jit
def _attention_16bit(
    q, k, v, out, length, k_stride, v_stride, channels, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One head × M query rows. q, k and v [L, C]; q and k share one row stride, v has a separate one."""
    column = tl.program_id(1) * D
    start_row = tl.program_id(0) * M
    query = _tile(q, start_row, column, k_stride, length, M, D, TMA)
    acc = _attend(query, k, v, column, column, k_stride, v_stride, length, scale, D, M, N, TMA)
    rows = (start_row + tl.arange(0, M)).to(tl.int64)
    at = rows[:, None] * channels + (column + tl.arange(0, D))[None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit
def _cross_attention(
    q, text, image, out, length, texts, images, q_stride, text_stride, image_stride, channels, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, N_IMAGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One head × M query rows: two softmaxes, outputs added. q [L, C]; text and image [n, 2·C] as k | v."""
    column = tl.program_id(1) * D
    rows = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    lanes = (column + tl.arange(0, D))[None]
    inside = (rows < length)[:, None]
    query = tl.load(q + rows[:, None] * q_stride + lanes, mask=inside, other=0.0)
    second = column + channels
    both = _attend(query, text, text, column, second, text_stride, text_stride, texts, scale, D, M, N, TMA)
    both += _attend(query, image, image, column, second, image_stride, image_stride, images, scale,
                    D, M, N_IMAGE, TMA)  # fmt: skip
    tl.store(out + rows[:, None] * channels + lanes, both.to(out.dtype.element_ty), mask=inside)
