// Self-attention for sm_90a: int8 Q.K^T, softmax in fp32, fp8 (e4m3) P.V with two-level accumulation. Head width 128.
//
// One block = three consumer warpgroups of 64 query rows + one producer warpgroup, one thread of which issues TMA
// loads. Keys and values pass in tiles of 128 through two rings of STAGES buffers in shared memory.
//
// Fragments (PTX ISA, wgmma m64nNk32, lane l of warp w, r = 16w + l/4, b = l%4):
//   accumulator  element 4g + 2i + c holds  row r + 8i, column 8g + 2b + c   (i, c in 0..1; g: group of 8)
//   8-bit A      register 2h + i, byte e    row r + 8i, k      16h + 4b + e         (h, i in 0..1, e in 0..3)
// So a thread owns tokens 8a + 2b + c (a = g % 2) of each 16, and A needs it to own k positions 4b + 0..3. Token
// 8a + 2b + c is stored at position 4b + 2a + c (V is laid out this way), so e = 2a + c and the packed probabilities
// ARE the A operand: register 2h + i of k-step t packs accumulator groups g = 4t + 2h (low half) and 4t + 2h + 1
// (high). This needs no shuffle and no shared memory. A sum over keys does not depend on their order.
//
// Two-level accumulation: the fp8 tensor core keeps few bits of a running accumulator, so each tile's P.V starts from
// zero and is added to the output in fp32 registers.
//
// Integer scores become floats without a conversion: the int32 accumulator starts at the bits of 1.5 * 2^23, and as
// |score| <= 127*127*128 < 2^22 the result, read as a float, is exactly 1.5 * 2^23 + score. The constant of the
// multiply-add in front of exp2 subtracts the offset.
//
// The running maximum starts at 0: keys have their mean removed, so no row's largest score is (much) below 0. Keys
// beyond L are zero: their score is 0, so they never raise the maximum; their V is zero; their exp is subtracted from
// the row sum at the end.
//
// NaN arrives in the scales, since int8 has none (see prepare_triton.py). A NaN q_scale, or the NaN k_scale of a tile,
// makes scale0 or scale1 NaN. Comparison and fmaxf leave it out of the running maximum, but every fma in front of exp2
// gives NaN. So the p of that row and tile are NaN, and so is the row sum, whose reciprocal multiplies the complete row
// in store_row. A NaN v_scale or v_shift enters in the fma of store_row, for its channel of every row. So the loop
// needs no test. e4m3 of a NaN p is NaN too, but nothing depends on it.
//
// The consumer warpgroups are not synchronised with each other: the softmax of one overlaps the products of the others.
// Enforcing an order costs more than it gains. `hopper_ptx.cu` is compiled in front of this file.
#ifndef STAGES
#define STAGES 4  // buffers of each ring
#endif

constexpr int WIDTH = 128;                  // head width
constexpr int KEYS = 128;                   // keys per tile
constexpr int GROUPS = 3;                   // consumer warpgroups
constexpr int ROWS = 64 * GROUPS;           // query rows per block
constexpr int TILE_BYTES = KEYS * WIDTH;    // one K or V tile, 1 byte per element
constexpr int Q_BYTES = ROWS * WIDTH;
constexpr int OFFSET_BITS = 0x4B400000;
constexpr float OFFSET = 12582912.0f;
constexpr float P_LOG2 = 8.0f;              // probabilities are scaled by 2^8 to use the range of e4m3
// A warp rescales the output only where a maximum grew by more than e4m3 absorbs: 2^(8 + 0.75) = 431 < 448.
constexpr float SLACK = 0.75f;

// ---- wgmma ------------------------------------------------------------------------------------------------------

#define LIST64(c, x)                                                                                            \
    LIST8(c, x, 0), LIST8(c, x, 8), LIST8(c, x, 16), LIST8(c, x, 24), LIST8(c, x, 32), LIST8(c, x, 40),         \
        LIST8(c, x, 48), LIST8(c, x, 56)
#define OPERANDS64                                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                          \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                          \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// The registers are operands of the wait, so that the compiler cannot read or reuse them before it.
__device__ __forceinline__ void wgmma_wait(int (&s)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST64("+r", s)::"memory");
}
__device__ __forceinline__ void wgmma_wait(float (&t)[64], u32 (&p)[16]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST64("+f", t), LIST8("+r", p, 0), LIST8("+r", p, 8)::"memory");
}

// s += Q[64 rows, 32 of D] . K[128 keys, 32 of D]^T.
__device__ __forceinline__ void wgmma_qk(int (&s)[64], u64 q, u64 k) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " OPERANDS64 ", %64, %65, 1;"
                 : LIST64("+r", s) : "l"(q), "l"(k) : "memory");
}

// t (+)= P[64 rows, 32 keys] . V[32 keys, 128]; P in registers, V stored [128 of D, keys].
__device__ __forceinline__ void wgmma_pv(float (&t)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 v, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %69, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " OPERANDS64
        ", {%64, %65, %66, %67}, %68, add, 1, 1;\n\t}"
        : LIST64("+f", t) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(v), "r"(accumulate) : "memory");
}

// Scores of 64 rows and one tile of keys; q and k are descriptors. Complete after the next wait.
__device__ __forceinline__ void issue_qk(int (&s)[64], u64 q, u64 k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = OFFSET_BITS;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma_qk(s, q + 2 * step, k + 2 * step);
    wgmma_commit();
}

// P.V of one tile, accumulated from zero.
__device__ __forceinline__ void issue_pv(float (&t)[64], const u32 (&p)[16], u64 v) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
        wgmma_pv(t, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], v + 2 * step, step);
    wgmma_commit();
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// Four floats to e4m3, the first in the lowest byte.
__device__ __forceinline__ u32 pack_e4m3(float x0, float x1, float x2, float x3) {
    u32 out;
    asm("{\n\t.reg .b16 lo, hi;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n\t"
        "mov.b32 %0, {lo, hi};\n\t}"
        : "=r"(out) : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return out;
}

__device__ __forceinline__ u32 pack_bf16(float x0, float x1) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(x1), "f"(x0));
    return out;
}

// The four lanes of a quad hold one row.
__device__ __forceinline__ int quad_max(int x) {
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
}

// State that a thread keeps from tile to tile for each of its two rows.
struct Row {
    float scale;  // q_scale
    float top;    // running maximum, log2 units, >= 0
    float sum;    // this lane's part of the sum of 2^8 p
};

// 2^(P_LOG2 - top + score * scale) is exp2(fma(score read as a float, scale, shift(...))).
__device__ __forceinline__ float shift(const Row& row, float scale) { return fmaf(-OFFSET, scale, P_LOG2 - row.top); }

// Raises the maxima of both rows to cover the scores of this tile, and rescales the sums to them. Returns true if the
// output has to be multiplied by alpha0 and alpha1.
__device__ __forceinline__ bool raise_maximum(const int (&s)[64], float scale0, float scale1, Row& row0, Row& row1,
                                              float& alpha0, float& alpha1) {
    int top0 = OFFSET_BITS, top1 = OFFSET_BITS;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
        top0 = max(max(top0, s[4 * g]), s[4 * g + 1]);
        top1 = max(max(top1, s[4 * g + 2]), s[4 * g + 3]);
    }
    const float new0 = (float)(quad_max(top0) - OFFSET_BITS) * scale0;
    const float new1 = (float)(quad_max(top1) - OFFSET_BITS) * scale1;
    alpha0 = alpha1 = 1.0f;
    if (!__any_sync(~0u, new0 > row0.top + SLACK || new1 > row1.top + SLACK)) return false;
    const float old0 = row0.top, old1 = row1.top;
    row0.top = fmaxf(old0, new0);
    row1.top = fmaxf(old1, new1);
    alpha0 = exp2_fast(old0 - row0.top), alpha1 = exp2_fast(old1 - row1.top);
    row0.sum *= alpha0;
    row1.sum *= alpha1;
    return true;
}

__device__ __forceinline__ void rescale(float (&acc)[64], float alpha0, float alpha1) {
#pragma unroll
    for (int g = 0; g < 16; ++g) {
        acc[4 * g] *= alpha0;
        acc[4 * g + 1] *= alpha0;
        acc[4 * g + 2] *= alpha1;
        acc[4 * g + 3] *= alpha1;
    }
}

__device__ __forceinline__ void add(float (&acc)[64], const float (&t)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] += t[i];
}

// Scores -> probabilities, packed as the A operand of PV (see the top of this file); adds them to the row sums.
__device__ __forceinline__ void probabilities(const int (&s)[64], float scale0, float scale1, Row& row0, Row& row1,
                                              u32 (&p)[16]) {
    const float shift0 = shift(row0, scale0), shift1 = shift(row1, scale1);
    float even0 = 0, odd0 = 0, even1 = 0, odd1 = 0;
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {  // column groups 2 pair and 2 pair + 1: 16 tokens
        const int i = 8 * pair;
        const float x0 = exp2_fast(fmaf(__int_as_float(s[i]), scale0, shift0));
        const float x1 = exp2_fast(fmaf(__int_as_float(s[i + 1]), scale0, shift0));
        const float x2 = exp2_fast(fmaf(__int_as_float(s[i + 4]), scale0, shift0));
        const float x3 = exp2_fast(fmaf(__int_as_float(s[i + 5]), scale0, shift0));
        const float y0 = exp2_fast(fmaf(__int_as_float(s[i + 2]), scale1, shift1));
        const float y1 = exp2_fast(fmaf(__int_as_float(s[i + 3]), scale1, shift1));
        const float y2 = exp2_fast(fmaf(__int_as_float(s[i + 6]), scale1, shift1));
        const float y3 = exp2_fast(fmaf(__int_as_float(s[i + 7]), scale1, shift1));
        even0 += x0, odd0 += x1, even1 += y0, odd1 += y1;
        even0 += x2, odd0 += x3, even1 += y2, odd1 += y3;
        p[2 * pair] = pack_e4m3(x0, x1, x2, x3);
        p[2 * pair + 1] = pack_e4m3(y0, y1, y2, y3);
    }
    row0.sum += even0 + odd0;
    row1.sum += even1 + odd1;
}

// ---- roles ------------------------------------------------------------------------------------------------------

struct Shared {  // byte addresses in shared memory
    u32 q, k, v, q_full, k_full, k_empty, v_full, v_empty;
};

__device__ __forceinline__ void produce(const Shared& at, const TensorMap* q, const TensorMap* k, const TensorMap* v,
                                        int tiles, int head) {
    barrier_expect(at.q_full, Q_BYTES);
    load_tile(at.q, q, at.q_full, 0, blockIdx.x * ROWS, head);
    int stage = 0;
    u32 parity = 1;  // the first pass over the ring finds every buffer empty
    for (int tile = 0; tile < tiles; ++tile) {
        barrier_wait(at.k_empty + 8 * stage, parity);
        barrier_expect(at.k_full + 8 * stage, TILE_BYTES);
        load_tile(at.k + stage * TILE_BYTES, k, at.k_full + 8 * stage, 0, tile * KEYS, head);
        barrier_wait(at.v_empty + 8 * stage, parity);
        barrier_expect(at.v_full + 8 * stage, TILE_BYTES);
        load_tile(at.v + stage * TILE_BYTES, v, at.v_full + 8 * stage, tile * KEYS, 0, head);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
}

// (acc / sum) * v_scale + v_shift of one row -> bf16. The comparison lets a NaN sum through.
template <int I>
__device__ __forceinline__ void store_row(const float (&acc)[64], float sum, const float* v_scale, const float* v_shift,
                                          u32* out, int lane) {
    const float inverse = sum <= 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
        const int pair = 4 * g + lane % 4;  // columns 2 pair, 2 pair + 1
        const float2 scale = ((const float2*)v_scale)[pair], offset = ((const float2*)v_shift)[pair];
        out[pair] = pack_bf16(fmaf(acc[4 * g + 2 * I] * inverse, scale.x, offset.x),
                              fmaf(acc[4 * g + 2 * I + 1] * inverse, scale.y, offset.y));
    }
}

// State of a thread of a consumer warpgroup: its part of the output and its two rows.
struct Consumer {
    float acc[64];
    Row row0, row1;
    float scale0, scale1;  // of this tile's integer scores
    const float* k_scale;
    u64 q;
    int lane;
};

// Sets the scales for `tile`; key_scale was loaded one tile ahead.
__device__ __forceinline__ void next_scales(Consumer& c, float& key_scale, int tile, int tiles) {
    c.scale0 = c.row0.scale * key_scale, c.scale1 = c.row1.scale * key_scale;
    key_scale = __ldg(c.k_scale + min(tile + 1, tiles - 1));
}

__device__ __forceinline__ void attend(const Shared& at, Consumer& c, int tiles) {
    float key_scale = __ldg(c.k_scale);
    int stage = 0;
    u32 parity = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        next_scales(c, key_scale, tile, tiles);
        u32 p[16];
        {
            int s[64];
            barrier_wait(at.k_full + 8 * stage, parity);
            issue_qk(s, c.q, descriptor<128>(at.k + stage * TILE_BYTES));
            wgmma_wait(s);
            if (c.lane == 0) barrier_arrive(at.k_empty + 8 * stage);
            float alpha0, alpha1;
            if (raise_maximum(s, c.scale0, c.scale1, c.row0, c.row1, alpha0, alpha1)) rescale(c.acc, alpha0, alpha1);
            probabilities(s, c.scale0, c.scale1, c.row0, c.row1, p);
        }
        float t[64];
        barrier_wait(at.v_full + 8 * stage, parity);
        issue_pv(t, p, descriptor<128>(at.v + stage * TILE_BYTES));
        wgmma_wait(t, p);
        if (c.lane == 0) barrier_arrive(at.v_empty + 8 * stage);
        add(c.acc, t);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
}

__device__ __forceinline__ void consume(const Shared& at, const float* q_scale, const float* k_scale,
                                        const float* v_scale, const float* v_shift, u32* out, int tokens, int tiles,
                                        int heads, int head) {
    const int lane = threadIdx.x % 32;
    const int r0 = blockIdx.x * ROWS + threadIdx.x / 32 * 16 + lane / 4, r1 = r0 + 8;
    q_scale += (long long)head * tiles * KEYS;
    Consumer c;
    c.row0 = {r0 < tokens ? q_scale[r0] : 0.0f, 0.0f, 0.0f}, c.row1 = {r1 < tokens ? q_scale[r1] : 0.0f, 0.0f, 0.0f};
    c.k_scale = k_scale + (long long)head * tiles;
    c.lane = lane;
    c.q = descriptor<128>(at.q + threadIdx.x / 128 * 64 * WIDTH);
#pragma unroll
    for (int i = 0; i < 64; ++i) c.acc[i] = 0.0f;
    barrier_wait(at.q_full, 0);
    attend(at, c, tiles);
    // A padded key's score is 0. Its exp, computed as in the last tile, is bit-identical to that of the loop.
    const float padded = tiles * KEYS - tokens;
    const float zero0 = exp2_fast(fmaf(OFFSET, c.scale0, shift(c.row0, c.scale0)));
    const float zero1 = exp2_fast(fmaf(OFFSET, c.scale1, shift(c.row1, c.scale1)));
    const float sum0 = quad_sum(c.row0.sum) - padded * zero0, sum1 = quad_sum(c.row1.sum) - padded * zero1;
    v_scale += head * WIDTH, v_shift += head * WIDTH;
    const long long pitch = (long long)heads * (WIDTH / 2);
    out += head * (WIDTH / 2);
    if (r0 < tokens) store_row<0>(c.acc, sum0, v_scale, v_shift, out + r0 * pitch, lane);
    if (r1 < tokens) store_row<1>(c.acc, sum1, v_scale, v_shift, out + r1 * pitch, lane);
}

// Grid (query blocks, heads). Dynamic shared memory: 1024 bytes for alignment, Q_BYTES, 2 * STAGES tiles, and
// 8 + 32 * STAGES bytes of barriers.
// q, k int8 [H, Lp, 128], v e4m3 [H, 128, Lp] as tensor maps; q_scale [H, Lp], k_scale [H, Lp / 128],
// v_scale, v_shift [H, 128] fp32; out bf16 [L, H * 128] as pairs.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    hopper_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const float* q_scale, const float* k_scale,
                     const float* v_scale, const float* v_shift, u32* out, int tokens, int tiles, int heads) {
    extern __shared__ unsigned char raw[];
    Shared at;
    at.q = (smem_address(raw) + 1023) & ~1023u;  // the 128-byte swizzle repeats every 1024 bytes
    at.k = at.q + Q_BYTES;
    at.v = at.k + STAGES * TILE_BYTES;
    at.q_full = at.v + STAGES * TILE_BYTES;
    at.k_full = at.q_full + 8;
    at.k_empty = at.k_full + 8 * STAGES;
    at.v_full = at.k_empty + 8 * STAGES;
    at.v_empty = at.v_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        barrier_init(at.q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(at.k_full + 8 * i, 1);
            barrier_init(at.v_full + 8 * i, 1);
            barrier_init(at.k_empty + 8 * i, 4 * GROUPS);  // one arrival per consumer warp
            barrier_init(at.v_empty + 8 * i, 4 * GROUPS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(32));
        if (threadIdx.x == 128 * GROUPS) produce(at, &q_map, &k_map, &v_map, tiles, blockIdx.y);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(160));
        consume(at, q_scale, k_scale, v_scale, v_shift, out, tokens, tiles, heads, blockIdx.y);
    }
}
