# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `ops.py`: the implicit GEMM and the RMS norm over channels.

A program computes `ROWS` output pixels of one frame. With TMA, a tile is a contiguous range of the flattened, bordered
source (the two border pixels per row are computed but not stored), so that every tap is a two-dimensional box of a view
whose rows are kx·C values long and C apart. Without TMA, a tile is a contiguous range of output pixels, and any stride
works. Neighbouring programs share a tile across channels and frames, which keeps the six source frames of four outputs
in the L2 cache."""

import triton
import triton.language as tl

# Arguments that depend on the size of the video or on places in the rings. One compiled kernel serves all their values:
# addresses are multiples of a channel count, which is specialised.
PLACES = [
    "frames",
    "pixels",
    "height",
    "width",
    "pitch",
    "frame_rows",
    "src_pitch",
    "src_rows",
    "dst_pitch",
    "dst_rows",
]
PLACES += ["top", "left"]
PLACES += [
    f"{buffer}_{place}" for buffer in ("src", "dst", "residual", "raw", "normed") for place in ("ring", "counter")
]
PLACES += [f"{buffer}_offset" for buffer in ("src", "dst", "residual", "raw", "normed")]


@triton.jit
def _saturated(y, dtype: tl.constexpr):
    """Cast fp32 to dtype; fp16 saturates to its finite range."""
    if dtype == tl.float16:
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    return y.to(dtype)


@triton.jit
def _frame_of(data, clock, counter, offset, ring, frame, frame_rows, channels):
    """Return the pointer to the slot of `frame`: a 64-bit offset, so that offsets inside a frame take 32 bits."""
    slot = (tl.load(clock + counter) + offset + frame) % ring
    return data + slot.to(tl.int64) * frame_rows * channels


@triton.jit
def _finish(acc, rescale, columns, bias, residual, rows, residual_rescale, valid, c_out, HAS_RESIDUAL: tl.constexpr):
    """Return acc · rescale + bias + residual, zero beyond c_out. residual: a frame [*, c_out]; rows int32 [ROWS]."""
    inside = columns < c_out
    y = acc * rescale + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if HAS_RESIDUAL:
        pointers = residual + (rows[:, None] * c_out + columns[None, :])
        mask = valid[:, None] & inside[None, :]
        y += tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * residual_rescale
    return y


@triton.jit
def _store(out, rows, columns, y, valid, c_out):
    """Store y to out: a frame [*, c_out]; rows int32 [ROWS]."""
    mask = valid[:, None] & (columns < c_out)[None, :]
    tl.store(out + (rows[:, None] * c_out + columns[None, :]), _saturated(y, out.dtype.element_ty), mask=mask)


@triton.jit
def _gamma_silu(y, scale, gamma, columns, c_out, SILU: tl.constexpr):
    """Return y · scale[:, None] · gamma, then SiLU."""
    y = y * scale[:, None] * tl.load(gamma + columns, mask=columns < c_out, other=0.0)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _store_planar(planar, columns, y, valid, frame, frames, pixel, plane, PLANAR: tl.constexpr):
    """Store y to planar fp32 [PLANAR, frames, plane]."""
    mask = valid[:, None] & (columns < PLANAR)[None, :]
    at = (columns[None, :].to(tl.int64) * frames + frame) * plane + pixel[:, None]
    tl.store(planar + at, y, mask=mask)


@triton.jit(do_not_specialize=PLACES)
def conv_kernel(
    src,  # descriptor of [rows, kx·C] with row stride C, or pointer to [ring, H+2, W+2, C]
    weights0,  # descriptor of [phases·c_out, K] with boxes of COLUMNS0, or pointer
    weights1,  # the same with boxes of COLUMNS1
    bias,  # fp32 [phases·c_out]
    clock,  # int32 counters
    residual,  # [ring, H'+2, W'+2, c_out]
    raw,
    normed,
    gamma,  # fp32 [c_out]
    planar,  # fp32 [PLANAR, frames, H, W]
    frames,
    height,  # of the output of one phase
    width,
    src_pitch,
    src_rows,
    src_ring,
    src_counter,
    src_offset,
    top,
    left,
    rescale,
    weight_pitch,
    c_in,
    c_out,
    dst_pitch,
    dst_rows,
    residual_ring,
    residual_counter,
    residual_offset,
    residual_rescale,
    raw_ring,
    raw_counter,
    raw_offset,
    raw_scale,
    normed_ring,
    normed_counter,
    normed_offset,
    norm_channels,
    norm_floor,
    KT: tl.constexpr,
    KY: tl.constexpr,
    GROUP: tl.constexpr,  # kx·C
    SPAN: tl.constexpr,  # values in one row of the source view: a complete group, or one pixel
    GROUP_PITCH: tl.constexpr,  # the same in the weight matrix
    STRIDE: tl.constexpr,
    TIME_STRIDE: tl.constexpr,
    PHASES: tl.constexpr,  # 1; 2 in time; 4 in space
    COLUMN_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS0: tl.constexpr,
    COLUMNS1: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SILU: tl.constexpr,
    PLANAR: tl.constexpr,
):
    """Convolve ROWS output pixels × (COLUMNS0 + COLUMNS1) channels of one frame and phase (see the module)."""
    pid = tl.program_id(0)
    column_block = pid % COLUMN_BLOCKS
    phase = (pid // COLUMN_BLOCKS) % PHASES
    t = (pid // (COLUMN_BLOCKS * PHASES)) % frames
    tile = pid // (COLUMN_BLOCKS * PHASES * frames)
    a = 0
    b = 0
    if PHASES == 4:
        a = phase // 2
        b = phase % 2
    pixel = tile * ROWS + tl.arange(0, ROWS)
    first = (top + a) * src_pitch + left + b
    slot = (tl.load(clock + src_counter) + src_offset + t * TIME_STRIDE) % src_ring
    if TMA:
        y = pixel // src_pitch
        x = pixel - y * src_pitch
        first += tile * ROWS
    else:
        y = pixel // width
        x = pixel - y * width
    valid = (y < height) & (x < width)
    column = column_block * (COLUMNS0 + COLUMNS1)
    weight_row = phase * c_out + column
    columns0 = column + tl.arange(0, COLUMNS0)
    if COLUMNS1 > 0:
        columns1 = column + COLUMNS0 + tl.arange(0, COLUMNS1)
        acc1 = tl.zeros((ROWS, COLUMNS1), tl.float32)
    acc0 = tl.zeros((ROWS, COLUMNS0), tl.float32)
    if not TMA:
        k = tl.arange(0, DEPTH)
        pixel_at = (tl.where(valid, y * STRIDE * src_pitch + x * STRIDE, 0) + first).to(tl.int64) * c_in
        w0_at = (phase * c_out + tl.minimum(columns0, c_out - 1)).to(tl.int64) * weight_pitch
        if COLUMNS1 > 0:
            w1_at = (phase * c_out + tl.minimum(columns1, c_out - 1)).to(tl.int64) * weight_pitch
    BLOCKS: tl.constexpr = (SPAN + DEPTH - 1) // DEPTH
    PER_GROUP: tl.constexpr = GROUP // SPAN * BLOCKS
    for step in tl.range(0, KT * KY * PER_GROUP, num_stages=STAGES):
        group = step // PER_GROUP
        dx = step % PER_GROUP // BLOCKS  # 0 where a row holds the complete group
        inner = (step % BLOCKS) * DEPTH
        # a block that reaches beyond SPAN reads zeros from the source, so its weights there have no effect
        w_inner = group * GROUP_PITCH + dx * SPAN + inner
        at = slot + group // KY
        at = tl.where(at >= src_ring, at - src_ring, at)
        row = at * src_rows + (group % KY) * src_pitch
        if TMA:
            operand = src.load([row + first + dx, inner])
            w0 = weights0.load([weight_row, w_inner])
        else:
            in_group = inner + k < SPAN
            operand = tl.load(
                src + row.to(tl.int64) * c_in + pixel_at[:, None] + (dx * SPAN + inner + k)[None, :],
                mask=in_group[None, :],
                other=0.0,
            )
            w_at = w_inner + k
            w0 = tl.load(weights0 + w0_at[:, None] + w_at[None, :], mask=in_group[None, :], other=0.0)
        acc0 = tl.dot(operand, w0.T, acc0)
        if COLUMNS1 > 0:
            if TMA:
                w1 = weights1.load([weight_row + COLUMNS0, w_inner])
            else:
                w1 = tl.load(weights1 + w1_at[:, None] + w_at[None, :], mask=in_group[None, :], other=0.0)
            acc1 = tl.dot(operand, w1.T, acc1)

    frame = t
    if PHASES == 2:
        frame = t * 2 + phase
    if PHASES == 4:  # noqa: SIM108
        rows = (y * 2 + a + 1) * dst_pitch + x * 2 + b + 1
    else:
        rows = (y + 1) * dst_pitch + x + 1
    if HAS_RESIDUAL:
        residual = _frame_of(residual, clock, residual_counter, residual_offset, residual_ring, frame, dst_rows, c_out)
    bias += phase * c_out
    y0 = _finish(acc0, rescale, columns0, bias, residual, rows, residual_rescale, valid, c_out, HAS_RESIDUAL)
    if COLUMNS1 > 0:
        y1 = _finish(acc1, rescale, columns1, bias, residual, rows, residual_rescale, valid, c_out, HAS_RESIDUAL)
    if HAS_RAW:
        raw = _frame_of(raw, clock, raw_counter, raw_offset, raw_ring, frame, dst_rows, c_out)
        _store(raw, rows, columns0, y0 * raw_scale, valid, c_out)
        if COLUMNS1 > 0:
            _store(raw, rows, columns1, y1 * raw_scale, valid, c_out)
    if HAS_NORM:
        # columns beyond c_out hold values of the next phase's weights
        squares = tl.sum(tl.where((columns0 < c_out)[None, :], y0 * y0, 0.0), axis=1)
        if COLUMNS1 > 0:
            squares += tl.sum(tl.where((columns1 < c_out)[None, :], y1 * y1, 0.0), axis=1)
        scale = 1.0 / tl.maximum(tl.sqrt(squares / norm_channels), norm_floor)
        normed = _frame_of(normed, clock, normed_counter, normed_offset, normed_ring, frame, dst_rows, c_out)
        _store(normed, rows, columns0, _gamma_silu(y0, scale, gamma, columns0, c_out, SILU), valid, c_out)
        if COLUMNS1 > 0:
            _store(normed, rows, columns1, _gamma_silu(y1, scale, gamma, columns1, c_out, SILU), valid, c_out)
    if PLANAR > 0:
        _store_planar(planar, columns0, y0, valid, frame, frames, y * width + x, height * width, PLANAR)
        if COLUMNS1 > 0:
            _store_planar(planar, columns1, y1, valid, frame, frames, y * width + x, height * width, PLANAR)


@triton.jit(do_not_specialize=PLACES)
def norm_kernel(
    src,  # [ring, H+2, W+2, channels]
    dst,  # the same with its own ring
    gamma,  # fp32 [channels]
    clock,
    pixels,  # H·W
    width,
    pitch,
    frame_rows,
    channels,
    src_ring,
    src_counter,
    src_offset,
    src_rescale,
    dst_ring,
    dst_counter,
    dst_offset,
    norm_channels,
    norm_floor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two ≥ channels
    SILU: tl.constexpr,
):
    """RMS-norm ROWS pixels of one frame over their channels, times gamma, optionally with SiLU."""
    frame = tl.program_id(1)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = pixel < pixels
    y = pixel // width
    rows = (y + 1) * pitch + (pixel - y * width) + 1
    columns = tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < channels)[None, :]
    src = _frame_of(src, clock, src_counter, src_offset, src_ring, frame, frame_rows, channels)
    x = tl.load(src + (rows[:, None] * channels + columns[None, :]), mask=mask, other=0.0).to(tl.float32) * src_rescale
    scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1) / norm_channels), norm_floor)
    dst = _frame_of(dst, clock, dst_counter, dst_offset, dst_ring, frame, frame_rows, channels)
    _store(dst, rows, columns, _gamma_silu(x, scale, gamma, columns, channels, SILU), valid, channels)
