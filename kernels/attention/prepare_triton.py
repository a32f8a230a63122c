"""Triton kernels that turn q | k | v of one block into attention's operands.

16-bit: one launch norms and rotates q and k; V stays in place. 8-bit: memory traffic limits the speed, so qkv is read
only twice: once for statistics over complete rows or columns (RMS of q and k, range and mean of V, the mean key of a
sample), once to write the 8-bit operands. Sums over tokens use partial buffers, never atomics, so results are
bit-identical from run to run.
The Hadamard rotation computes its first two stages as additions between neighbours, which RoPE splits anyway. The rest
is a small tensor-core product with ±1 in fp16: normed values stay below √C·|weight|, far inside fp16's range, and the
rounding of fp16 (2⁻¹¹) is a twentieth of int8's.
NaN is carried by the scales, because int8 has no NaN and a plain maximum on a GPU drops it. `_larger` and `_peak` keep
NaN in a range: a token of q or k that holds NaN gives its row (q) or tile (k) a NaN scale, a channel of V a NaN scale
and shift. Infinity becomes NaN on the way (its reciprocal RMS is 0, its distance from the mean undefined). The
attention multiplies by each of these scales anyway.
`do_not_specialize` keeps Triton from compiling a separate kernel for a count of 1: one token runs the same code.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    """Return the larger of two, NaN if one is NaN: one instruction, like the maximum that drops NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _peak(x, axis: tl.constexpr):
    """Return the largest magnitude of fp32 x along an axis, NaN if one is NaN.

    Compares bit patterns as integers: magnitudes have the order of floats, and NaN comes after infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["length"])
def _row_rms(x, stride, out, length, channels, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write out fp32 [2, L]: 1/rms of each token's q (program axis 1 = 0) and k (= 1)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = (rows < length)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = rows[:, None] * stride + part * channels + columns[None]
        y = tl.load(x + at, mask=inside & (columns < channels)[None], other=0.0).to(tl.float32)
        total += y * y
    rms = tl.rsqrt(tl.sum(total, 1) / channels + eps)
    tl.store(out + part.to(tl.int64) * length + rows, rms, mask=rows < length)


@triton.jit(do_not_specialize=["length"])
def _norm_rope(
    x, stride, q_weight, k_weight, cos, sin, q_out, k_out, length, channels, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the 16-bit q_out, k_out [L, C] in x's type; program axis 1 picks q or k. The second read hits the cache."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = (rows < length)[:, None]
    source = x + rows[:, None] * stride + part * channels
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        y = tl.load(source + columns[None], mask=inside & (columns < channels)[None], other=0.0).to(tl.float32)
        total += y * y
    rms = tl.rsqrt(tl.sum(total, 1) / channels + eps)
    weight, out = q_weight, q_out
    if part == 1:
        weight, out = k_weight, k_out
    for start in range(0, channels, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = inside & (columns < channels)[None]
        y = tl.load(source + columns[None], mask=mask, other=0.0).to(tl.float32)
        y = y * rms[:, None] * tl.load(weight + columns, mask=columns < channels, other=0.0)[None]
        even, odd = tl.split(tl.reshape(y, (ROWS, BLOCK // 2, 2)))
        angle = rows[:, None] * (D // 2) + ((start // 2 + tl.arange(0, BLOCK // 2)) % (D // 2))[None]
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, BLOCK))
        tl.store(out + rows[:, None] * channels + columns[None], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length"])
def _v_statistics(v, stride, partial, length, channels, CHUNK: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Write partial fp32 [3, chunks, C]: sum, minimum and maximum of V over CHUNK tokens; one head per program."""
    chunk = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * D + tl.arange(0, D)
    total = tl.zeros((T, D), tl.float32)
    low, high = tl.full((T, D), float("inf"), tl.float32), tl.full((T, D), float("-inf"), tl.float32)
    for start in tl.range(0, CHUNK, T, num_stages=STAGES):
        rows = chunk * CHUNK + start + tl.arange(0, T)
        inside = (rows < length)[:, None]
        y = tl.load(v + rows[:, None] * stride + columns[None], mask=inside, other=0.0).to(tl.float32)
        total += y
        low = tl.minimum(low, tl.where(inside, y, float("inf")))
        high = tl.maximum(high, tl.where(inside, y, float("-inf")))
    at = partial + chunk * channels + columns
    plane = tl.num_programs(0).to(tl.int64) * channels
    tl.store(at, tl.sum(total, 0))
    tl.store(at + plane, tl.min(low, 0))
    tl.store(at + 2 * plane, tl.max(high, 0))


@triton.jit(do_not_specialize=["samples", "step"])
def _key_sample(
    k, stride, weight, row_rms, cos, sin, partial, samples, step, channels, T: tl.constexpr, D: tl.constexpr
):
    """Write partial fp32 [programs, C]: sums of normed, rotated keys over T sampled tokens; one head per program."""
    index = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    inside = index < samples
    rows = index * step
    head = tl.program_id(1)
    columns = head * D + tl.arange(0, D)
    y = tl.load(k + rows[:, None] * stride + columns[None], mask=inside[:, None], other=0.0).to(tl.float32)
    y = y * tl.load(row_rms + rows, mask=inside, other=0.0)[:, None] * tl.load(weight + columns)[None]
    even, odd = tl.split(tl.reshape(y, (T, D // 2, 2)))
    angle = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None]
    c = tl.load(cos + angle, mask=inside[:, None], other=0.0)
    s = tl.load(sin + angle, mask=inside[:, None], other=0.0)
    y = tl.join(tl.sum(even * c - odd * s, 0), tl.sum(even * s + odd * c, 0))
    tl.store(partial + tl.program_id(0).to(tl.int64) * channels + columns, tl.reshape(y, (D,)))


@triton.jit(do_not_specialize=["chunks", "k_chunks", "length", "samples"])
def _finish_statistics(
    v_partial, k_partial, v_mean, v_scale, k_mean, chunks, k_chunks, length, samples, channels,
    P: tl.constexpr, D: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """Reduce the partials of one head: mean of V, its e4m3 scale, mean key. All fp32 [C].

    The mean carries NaN into the scale. A constant channel (as every channel of one token) becomes zeros, scale 1."""
    columns = tl.program_id(0) * D + tl.arange(0, D)
    total = tl.zeros((P, D), tl.float32)
    for start in range(0, k_chunks, P):
        rows = start + tl.arange(0, P)
        at = rows[:, None] * channels + columns[None]
        total += tl.load(k_partial + at, mask=(rows < k_chunks)[:, None], other=0.0)
    tl.store(k_mean + columns, tl.sum(total, 0) / samples)
    if HAS_V:
        total = tl.zeros((P, D), tl.float32)
        low, high = tl.full((P, D), float("inf"), tl.float32), tl.full((P, D), float("-inf"), tl.float32)
        for start in range(0, chunks, P):
            rows = start + tl.arange(0, P)
            at = rows[:, None] * channels + columns[None]
            inside = (rows < chunks)[:, None]
            total += tl.load(v_partial + at, mask=inside, other=0.0)
            low = tl.minimum(low, tl.load(v_partial + chunks * channels + at, mask=inside, other=float("inf")))
            high = tl.maximum(high, tl.load(v_partial + 2 * chunks * channels + at, mask=inside, other=float("-inf")))
        mean = tl.sum(total, 0) / length
        reach = _larger(tl.max(high, 0) - mean, mean - tl.min(low, 0))
        scale = tl.where(reach == 0.0, 1.0, _larger(reach / 448.0, 1e-12))
        tl.store(v_mean + columns, mean)
        tl.store(v_scale + columns, scale)


@triton.jit
def _signs(J: tl.constexpr):
    """Return the ±1 Sylvester matrix [J, J] in fp16: the sign is the parity of the bits shared by row and column."""
    bits = tl.arange(0, J)[:, None] & tl.arange(0, J)[None]
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return (1 - 2 * (bits & 1)).to(tl.float16)


@triton.jit
def _pairs(at, inside, T: tl.constexpr, D: tl.constexpr):
    """Load even and odd columns of a table's [T, D/2], each [T, D/4]."""
    return tl.split(tl.reshape(tl.load(at, mask=inside, other=0.0), (T, D // 4, 2)))


@triton.jit
def _split4(y, T: tl.constexpr, D: tl.constexpr):
    """Split [T, D] into its channels 4j, 4j+1, 4j+2, 4j+3, each [T, D/4]."""
    even, odd = tl.split(tl.reshape(y, (T, D // 2, 2)))
    y0, y2 = tl.split(tl.reshape(even, (T, D // 4, 2)))
    y1, y3 = tl.split(tl.reshape(odd, (T, D // 4, 2)))
    return y0, y1, y2, y3


@triton.jit
def _int8(y, inverse):
    """Round half to even: adding 1.5·2²³ leaves no fraction bits. |y·inverse| ≤ 127 by construction. NaN becomes an
    arbitrary number, which the NaN scale turns into NaN again."""
    return ((y * inverse + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=["length"])
def _quantise_qk(
    x, stride, weight, row_rms, cos, sin, mean, out, scale_out, length, padded, factor,
    D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, KEY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write int8 [H, Lp, D] and scales (q: one per token, k: one per T = 128 tokens) of HEADS heads × T tokens.

    All heads use the same RoPE rows, as wide as one head: they are read once and kept in registers."""
    block = tl.program_id(0).to(tl.int64)
    rows = block * T + tl.arange(0, T)
    inside = (rows < length)[:, None]
    rms = tl.load(row_rms + rows, mask=rows < length, other=0.0)[:, None]
    angle = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None]
    c0, c1 = _pairs(cos + angle, inside, T, D)
    s0, s1 = _pairs(sin + angle, inside, T, D)
    signs = _signs(D // 4)
    lanes = tl.arange(0, D)
    for i in tl.range(HEADS, num_stages=STAGES):
        head = tl.program_id(1).to(tl.int64) * HEADS + i
        y = tl.load(x + rows[:, None] * stride + (head * D + lanes)[None], mask=inside, other=0.0).to(tl.float32)
        y = y * rms * tl.load(weight + head * D + lanes)[None]
        y0, y1, y2, y3 = _split4(y, T, D)
        z0, z1, z2, z3 = y0 * c0 - y1 * s0, y0 * s0 + y1 * c0, y2 * c1 - y3 * s1, y2 * s1 + y3 * c1
        if KEY:
            at = mean + head * D + 4 * tl.arange(0, D // 4)
            z0 = tl.where(inside, z0 - tl.load(at)[None], 0.0)
            z1 = tl.where(inside, z1 - tl.load(at + 1)[None], 0.0)
            z2 = tl.where(inside, z2 - tl.load(at + 2)[None], 0.0)
            z3 = tl.where(inside, z3 - tl.load(at + 3)[None], 0.0)
        a, b = z0 + z1, z2 + z3  # Hadamard stages over channel bits 0 and 1, then over the others
        d, e = z0 - z1, z2 - z3
        y0, y2 = tl.dot((a + b).to(tl.float16), signs), tl.dot((a - b).to(tl.float16), signs)
        y1, y3 = tl.dot((d + e).to(tl.float16), signs), tl.dot((d - e).to(tl.float16), signs)
        peak = _larger(_larger(tl.abs(y0), tl.abs(y1)), _larger(tl.abs(y2), tl.abs(y3)))
        if KEY:
            amax = _larger(_peak(_peak(peak, 1), 0), 1.27e-10)
            tl.store(scale_out + head * (padded // T) + block, amax / 127.0 * factor)
            inverse = 127.0 / amax
        else:
            amax = _larger(_peak(peak, 1), 1.27e-10)
            tl.store(scale_out + head * padded + rows, amax / 127.0 * factor)
            inverse = (127.0 / amax)[:, None]
        low = tl.join(_int8(y0, inverse), _int8(y2, inverse))
        high = tl.join(_int8(y1, inverse), _int8(y3, inverse))
        q = tl.reshape(tl.join(low, high), (T, D))
        tl.store(out + (head * padded + rows)[:, None] * D + lanes[None], q)


@triton.jit(do_not_specialize=["length"])
def _quantise_v(v, stride, mean, scale, out, residual, length, padded, channels, T: tl.constexpr, D: tl.constexpr):
    """Write e4m3 [H, D, Lp] in stored order, and residual fp32 [blocks, C]: sums of the rounding errors."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, T)
    within = place % 16
    token = place - within + (within // 2 % 2) * 8 + (within // 4) * 2 + within % 2
    rows = block * T + token
    inside = (rows < length)[:, None]
    lanes = tl.arange(0, D)
    y = tl.load(v + rows[:, None] * stride + (head * D + lanes)[None], mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(scale + head * D + lanes)
    y = tl.where(inside, y - tl.load(mean + head * D + lanes)[None], 0.0)
    scaled = tl.minimum(tl.maximum(y * (1.0 / unit)[None], -448.0), 448.0)
    v8 = scaled.to(tl.float8e4nv)
    left = y - v8.to(tl.float32) * unit[None]
    tl.store(residual + block * channels + head * D + lanes, tl.sum(left, 0))
    at = (head * D + lanes)[:, None] * padded + (block * T + place)[None]
    tl.store(out + at, tl.trans(v8))


@triton.jit(do_not_specialize=["blocks", "length"])
def _v_shift(mean, residual, shift, blocks, length, channels, P: tl.constexpr, D: tl.constexpr):
    """Write shift = mean + Σ residual / L."""
    columns = tl.program_id(0) * D + tl.arange(0, D)
    total = tl.zeros((P, D), tl.float32)
    for start in range(0, blocks, P):
        rows = start + tl.arange(0, P)
        at = rows[:, None].to(tl.int64) * channels + columns[None]
        total += tl.load(residual + at, mask=(rows < blocks)[:, None], other=0.0)
    tl.store(shift + columns, tl.load(mean + columns) + tl.sum(total, 0) / length)
