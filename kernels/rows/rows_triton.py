# mypy: disable-error-code="no-untyped-def"
"""The row operations as Triton kernels.

A program works on one row at a time and keeps it in registers: it is read once, normed or activated, and written once
as the GEMM's operand. The row length is a compile-time constant, so that lanes of the power-of-two block beyond it are
known to be empty and cost nothing. Each thread holds `VEC` neighbouring columns: without the hint, the layout would
follow the one-byte output, and the fp32 loads would touch 64 bytes per thread.
With a grid of one program per row, many short programs hide each other's latency. With a grid of a few programs per
multiprocessor (`LOOP`), the weights stay in registers and the next row is prefetched (`STAGES`). One compiled kernel
serves every number of rows.
All arithmetic between load and store is fp32. e4m3 is rounded from fp32 once: in hardware where there is an instruction
(sm89 and later), else by integer arithmetic with the same result.
Every row is read before it is written, so an output may share the storage of its input.
"""

import triton
import triton.language as tl


@triton.jit
def _e4m3(x, NATIVE: tl.constexpr):
    """Convert fp32, at most 448 in magnitude, to e4m3: to the type, or to its bits in a byte."""
    if NATIVE:
        return x.to(tl.float8e4nv)
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits &= 0x7FFFFFFF
        # keep 3 of 23 mantissa bits, round to nearest even; the exponent bias changes from 127 to 7
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6, codes are multiples of 2^-9, which is the last bit of 2^14: adding 2^14 rounds
        small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(bits < 0x3C800000, small, tl.minimum(normal, 0x7F))
        return (code | sign).to(tl.uint8)


@triton.jit
def _store_rows(
    values, data, scales, row, columns, inside, C: tl.constexpr, QUANTISE: tl.constexpr, NATIVE: tl.constexpr
):
    """Store values fp32 [BLOCK], 0 outside → data [row], cast, or as e4m3 with scales [row] fp32 = amax/448.

    The scale of a row with NaN is NaN: a maximum of floats would drop it, a maximum of their bits does not (as
    integers, magnitudes have the order of floats, and NaN comes after infinity). Infinity gives scale ∞ and value
    NaN."""
    target = data + tl.cast(row, tl.int64) * C + columns
    if QUANTISE:
        amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
        scale = tl.maximum(amax / 448.0, 1e-12, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scales + row, scale)
        tl.store(target, _e4m3(values * (1.0 / scale), NATIVE), mask=inside)
    else:
        tl.store(target, values.to(data.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x,  # fp32 [rows, C]
    y,  # any float type [rows, C], added to x; None
    gate,  # fp32 [C], times y; None
    weight,  # fp32 [C]
    bias,  # fp32 [C]
    x_out,  # fp32 [rows, C], may be x; None
    data,
    scales,
    rows,
    eps,
    offset,  # added to weight: 1 for a modulation
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    QUANTISE: tl.constexpr,
    NATIVE: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VEC)
    inside = columns < C
    if LOOP:  # load once for all rows; a program of one row loads each value where it is needed, for fewer registers
        multiplier = tl.load(weight + columns, mask=inside, other=0.0) + offset
        addend = tl.load(bias + columns, mask=inside, other=0.0)
        if GATED:
            gates = tl.load(gate + columns, mask=inside, other=0.0)
    first = tl.program_id(0)
    stop = rows if LOOP else first + 1
    for row in tl.range(first, stop, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64) * C
        v = tl.load(x + start + columns, mask=inside, other=0.0)
        if ADD:
            added = tl.load(y + start + columns, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                if not LOOP:
                    gates = tl.load(gate + columns, mask=inside, other=0.0)
                added *= gates
            v += added
            tl.store(x_out + start + columns, v, mask=inside)
        centred = tl.where(inside, v - tl.sum(v, 0) / C, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
        if not LOOP:
            multiplier = tl.load(weight + columns, mask=inside, other=0.0) + offset
            addend = tl.load(bias + columns, mask=inside, other=0.0)
        normed = tl.where(inside, centred * rstd * multiplier + addend, 0.0)
        _store_rows(normed, data, scales, row, columns, inside, C, QUANTISE, NATIVE)


@triton.jit(do_not_specialize=["rows"])
def _activation_kernel(
    h,  # any float type [rows, C]
    data,
    scales,
    rows,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    GELU: tl.constexpr,
    QUANTISE: tl.constexpr,
    NATIVE: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VEC)
    inside = columns < C
    first = tl.program_id(0)
    stop = rows if LOOP else first + 1
    for row in tl.range(first, stop, tl.num_programs(0), num_stages=STAGES):
        v = tl.load(h + tl.cast(row, tl.int64) * C + columns, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            # v·(1 + tanh(u))/2 = v / (1 + exp(−2u)), u = √(2/π)·(v + 0.044715·v³); the constants carry −2·log2(e)
            v = v / (1.0 + tl.exp2(v * (-2.302208198 - 0.1029432396 * (v * v))))
        _store_rows(v, data, scales, row, columns, inside, C, QUANTISE, NATIVE)


@triton.jit(do_not_specialize=["rows"])
def _rms_kernel(
    x,
    weight,
    out,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute RMS norm: x any float type [rows, C], weight fp32 [C] → out [rows, C], may be x."""
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VEC)
    inside = columns < C
    multiplier = tl.load(weight + columns, mask=inside, other=0.0)
    first = tl.program_id(0)
    stop = rows if LOOP else first + 1
    for row in tl.range(first, stop, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64) * C
        v = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        v *= tl.rsqrt(tl.sum(v * v, 0) / C + eps) * multiplier
        tl.store(out + start + columns, v.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _residual_kernel(
    x, y, gate, out, rows, C: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, GATED: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute x fp32 [rows, C] + gate fp32 [C] · y any float type [rows, C] → out fp32, may be x."""
    columns = tl.max_contiguous(tl.arange(0, BLOCK), VEC)
    inside = columns < C
    if GATED:
        gates = tl.load(gate + columns, mask=inside, other=0.0)
    first = tl.program_id(0)
    stop = rows if LOOP else first + 1
    for row in tl.range(first, stop, tl.num_programs(0), num_stages=STAGES):
        start = tl.cast(row, tl.int64) * C
        v = tl.load(x + start + columns, mask=inside, other=0.0)
        added = tl.load(y + start + columns, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            added *= gates
        tl.store(out + start + columns, v + added, mask=inside)
