// Self-attention for sm_90a with bf16 or fp16 operands, softmax and sums in fp32. Head width 128.
//
// One block = three consumer warpgroups of 64 query rows + one producer warpgroup, in which one thread fills the ring
// of key tiles and one thread the ring of value tiles. Tiles are processed from the last to the first: only the first
// one processed can hold keys beyond L, which are masked there.
//
// Shared memory: a tile of n tokens is two halves of 64 dimensions, [half][token][128 bytes], each with the 128-byte
// swizzle; one TMA box of three dimensions (64 dimensions, n tokens, 2 halves) writes it. Q and K are read as K-major
// operands (k = dimension), V as an MN-major one (k = token), so that V is used as projected.
//
// Fragments (PTX ISA, wgmma m64nNk16, lane l of warp w, r = 16w + l/4, b = l%4):
//   accumulator  element 4g + 2i + c holds  row r + 8i, column 8g + 2b + c          (i, c in 0..1; g: group of 8)
//   16-bit A     register 2h + i, half c    row r + 8i, k      8h + 2b + c          (h, i, c in 0..1)
// So the packed accumulator elements 2j and 2j + 1 of the scores ARE register j of the A operands of P.V, in order.
//
// A warpgroup issues Q.K of the next tile before P.V of this one, and computes the next tile's softmax while P.V runs.
// It therefore holds scores, probabilities and output at once. With the registers of three warpgroups, 80 keys per tile
// fit. The warpgroups are not synchronised with each other, as in `hopper_attention.cu`.
//
// The running maximum is raised, and the output rescaled, only where a weight would exceed 2^SLACK. Up to that limit,
// weights above 1 lose no accuracy, neither in 16-bit operands nor in fp32 sums.
//
// `hopper_ptx.cu` is compiled in front of this file.
#ifndef FP16
#define FP16 0  // operands and output: 0 bf16, 1 fp16
#endif

constexpr int WIDTH = 128;                        // head width
constexpr int GROUPS = 3;                         // consumer warpgroups
constexpr int KEYS = 80;                          // keys per tile
constexpr int STAGES = 4;                         // buffers of each ring
constexpr int ROWS = 64 * GROUPS;                 // query rows per block
constexpr int ROW_BYTES = 128;                    // one half of a token
constexpr int Q_BYTES = 2 * ROWS * ROW_BYTES;
constexpr int TILE_BYTES = 2 * KEYS * ROW_BYTES;  // one K or V tile
constexpr int SCORES = KEYS / 2;                  // accumulator elements per thread
constexpr int PAIRS = KEYS / 4;                   // packed probabilities per thread
constexpr int STEPS = KEYS / 16;                  // k-steps of P.V
constexpr float SCALE = 1.4426950408889634f * 0.08838834764831845f;  // log2(e) / sqrt(WIDTH)
constexpr float SLACK = 8.0f;
#define MINUS_INFINITY __int_as_float(0xFF800000)

// ---- wgmma ------------------------------------------------------------------------------------------------------

#define LIST20(c, x) LIST8(c, x, 0), LIST8(c, x, 8), c(x[16]), c(x[17]), c(x[18]), c(x[19])
#define LIST40(c, x) LIST8(c, x, 0), LIST8(c, x, 8), LIST8(c, x, 16), LIST8(c, x, 24), LIST8(c, x, 32)
#define LIST64(c, x) LIST40(c, x), LIST8(c, x, 40), LIST8(c, x, 48), LIST8(c, x, 56)
#define NUMBERS40                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "                \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define NUMBERS64                                                                                               \
    NUMBERS40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "              \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#if FP16
#define TYPES ".f32.f16.f16 {"
#else
#define TYPES ".f32.bf16.bf16 {"
#endif

// The registers are operands of a wait, so that the compiler cannot read or reuse them before it.
__device__ __forceinline__ void wait_scores(float (&s)[SCORES]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST40("+f", s)::"memory");
}
// Waits for the scores only: P.V, issued after them, may still run.
__device__ __forceinline__ void wait_scores_only(float (&s)[SCORES]) {
    asm volatile("wgmma.wait_group.sync.aligned 1;" : LIST40("+f", s)::"memory");
}
__device__ __forceinline__ void wait_output(float (&acc)[64], u32 (&p)[PAIRS]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST64("+f", acc), LIST20("+r", p)::"memory");
}

// Keeps the compiler from moving the computation of these values behind the next wait, where no products overlap it.
__device__ __forceinline__ void made_here(float (&s)[SCORES], float& sum0, float& sum1) {
    asm volatile("" : LIST40("+f", s), "+f"(sum0), "+f"(sum1));
}

// s (+)= Q[64 rows, 16 of D] . K[keys, 16 of D]^T.
__device__ __forceinline__ void wgmma_qk(float (&s)[SCORES], u64 q, u64 k, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %42, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n80k16" TYPES NUMBERS40 "}, %40, %41, add, 1, 1, 0, 0;\n\t}"
        : LIST40("+f", s) : "l"(q), "l"(k), "r"(accumulate) : "memory");
}

// acc += P[64 rows, 16 keys] . V[16 keys, 128]; P in registers, V stored [keys, 128].
__device__ __forceinline__ void wgmma_pv(float (&acc)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" TYPES NUMBERS64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : LIST64("+f", acc) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(v) : "memory");
}

// MN-major operand with the 128-byte swizzle: rows of 64 dimensions. The leading field is the offset to the other half,
// the stride field the offset to the next 8 tokens. A k-step of 16 tokens adds 2048 bytes, which is 128 in the
// descriptor.
__device__ __forceinline__ u64 value_descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)(KEYS * ROW_BYTES / 16) << 16) | (64ull << 32) | (1ull << 62);
}

// Scores of 64 rows and one tile of keys, from zero; q and k are descriptors.
__device__ __forceinline__ void issue_qk(float (&s)[SCORES], u64 q, u64 k) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 8; ++step)  // four steps of 32 bytes in each half
        wgmma_qk(s, q + step / 4 * (ROWS * ROW_BYTES / 16) + step % 4 * 2,
                 k + step / 4 * (KEYS * ROW_BYTES / 16) + step % 4 * 2, step);
    wgmma_commit();
}

__device__ __forceinline__ void issue_pv(float (&acc)[64], const u32 (&p)[PAIRS], u64 v) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        wgmma_pv(acc, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], v + 128 * step);
    wgmma_commit();
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// Two floats to 16 bits, the first in the lower half.
__device__ __forceinline__ u32 pack(float x0, float x1) {
    u32 out;
#if FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(x1), "f"(x0));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(x1), "f"(x0));
#endif
    return out;
}

// The four lanes of a quad hold one row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// State that a thread keeps from tile to tile for each of its two rows.
struct Row {
    float top;  // running maximum, in the unit of the scores
    float sum;  // this lane's part of the sum of p
};

// Masks the tile's keys from `rest` on: they get no weight.
__device__ __forceinline__ void mask(float (&s)[SCORES], int rest, int lane) {
    rest -= 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < SCORES; ++i)
        if (8 * (i / 4) + i % 2 >= rest) s[i] = MINUS_INFINITY;
}

// Raises the maxima of both rows to cover the scores of this tile, and rescales the sums to them. Returns true if the
// output has to be multiplied by alpha0 and alpha1.
__device__ __forceinline__ bool raise_maximum(const float (&s)[SCORES], Row& row0, Row& row1, float& alpha0,
                                              float& alpha1) {
    float new0 = fmaxf(s[0], s[1]), new1 = fmaxf(s[2], s[3]);
#pragma unroll
    for (int i = 4; i < SCORES; i += 4) {
        new0 = fmaxf(fmaxf(new0, s[i]), s[i + 1]);
        new1 = fmaxf(fmaxf(new1, s[i + 2]), s[i + 3]);
    }
    new0 = quad_max(new0), new1 = quad_max(new1);
    alpha0 = alpha1 = 1.0f;
    if (!__any_sync(~0u, new0 > row0.top + SLACK / SCALE || new1 > row1.top + SLACK / SCALE)) return false;
    new0 = fmaxf(row0.top, new0), new1 = fmaxf(row1.top, new1);
    alpha0 = exp2_fast((row0.top - new0) * SCALE), alpha1 = exp2_fast((row1.top - new1) * SCALE);
    row0 = {new0, row0.sum * alpha0}, row1 = {new1, row1.sum * alpha1};
    return true;
}

__device__ __forceinline__ void rescale(float (&acc)[64], float alpha0, float alpha1) {
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i] *= i % 4 < 2 ? alpha0 : alpha1;
}

// Scores -> probabilities, in place; adds them to the row sums.
__device__ __forceinline__ void exponentials(float (&s)[SCORES], Row& row0, Row& row1) {
    const float shift0 = -row0.top * SCALE, shift1 = -row1.top * SCALE;
    float even0 = 0, odd0 = 0, even1 = 0, odd1 = 0;
#pragma unroll
    for (int i = 0; i < SCORES; i += 4) {
        even0 += s[i] = exp2_fast(fmaf(s[i], SCALE, shift0));
        odd0 += s[i + 1] = exp2_fast(fmaf(s[i + 1], SCALE, shift0));
        even1 += s[i + 2] = exp2_fast(fmaf(s[i + 2], SCALE, shift1));
        odd1 += s[i + 3] = exp2_fast(fmaf(s[i + 3], SCALE, shift1));
    }
    row0.sum += even0 + odd0, row1.sum += even1 + odd1;
}

__device__ __forceinline__ void pack_all(u32 (&p)[PAIRS], const float (&s)[SCORES]) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) p[j] = pack(s[2 * j], s[2 * j + 1]);
}

// ---- roles ------------------------------------------------------------------------------------------------------

// Buffers of one ring; byte addresses in shared memory.
struct Ring {
    u32 data, full, empty;
};

struct Position {
    int stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void init_ring(const Ring& ring) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(ring.full + 8 * i, 1);
        barrier_init(ring.empty + 8 * i, 4 * GROUPS);  // one arrival per consumer warp
    }
}

// The producer of one ring: tiles of `head` from the last to the first.
__device__ __forceinline__ void fill(const Ring& ring, const TensorMap* map, int tiles, int head) {
    Position at = {0, 1};  // the first pass over the ring finds every buffer empty
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile, at.next()) {
        const u32 full = ring.full + 8 * at.stage;
        barrier_wait(ring.empty + 8 * at.stage, at.parity);
        barrier_expect(full, TILE_BYTES);
        load_tile(ring.data + at.stage * TILE_BYTES, map, full, 0, tile * KEYS, 2 * head);
    }
}

// A consumer's side of a ring: wait for the next tile; release a tile.
__device__ __forceinline__ u32 take(const Ring& ring, const Position& at) {
    barrier_wait(ring.full + 8 * at.stage, at.parity);
    return ring.data + at.stage * TILE_BYTES;
}
__device__ __forceinline__ void release(const Ring& ring, Position& at, int lane) {
    if (lane == 0) barrier_arrive(ring.empty + 8 * at.stage);
    at.next();
}

// State of a thread of a consumer warpgroup: its part of the output and its two rows.
struct Consumer {
    float acc[64];
    Row row0, row1;
    u64 q;
    int lane;
};

__device__ __forceinline__ void attend(const Ring& keys, const Ring& values, Consumer& c, int tiles, int rest) {
    Position k_at = {0, 0}, v_at = {0, 0};
    float s[SCORES], alpha0, alpha1;
    u32 p[PAIRS];
    issue_qk(s, c.q, descriptor<ROW_BYTES>(take(keys, k_at)));
    wait_scores(s);
    release(keys, k_at, c.lane);
    if (rest < KEYS) mask(s, rest, c.lane);
    raise_maximum(s, c.row0, c.row1, alpha0, alpha1);
    exponentials(s, c.row0, c.row1);
    pack_all(p, s);
    u32 key_tile = tiles > 1 ? take(keys, k_at) : 0;
    for (int tile = 1; tile < tiles; ++tile) {
        issue_qk(s, c.q, descriptor<ROW_BYTES>(key_tile));
        issue_pv(c.acc, p, value_descriptor(take(values, v_at)));
        wait_scores_only(s);
        release(keys, k_at, c.lane);
        const bool grew = raise_maximum(s, c.row0, c.row1, alpha0, alpha1);
        exponentials(s, c.row0, c.row1);
        made_here(s, c.row0.sum, c.row1.sum);
        if (tile + 1 < tiles) key_tile = take(keys, k_at);  // a loop that the assembler keeps in front of the wait
        wait_output(c.acc, p);
        release(values, v_at, c.lane);
        if (grew) rescale(c.acc, alpha0, alpha1);
        pack_all(p, s);
    }
    issue_pv(c.acc, p, value_descriptor(take(values, v_at)));
    wait_output(c.acc, p);
}

// acc / sum of one row -> 16 bits.
template <int I>
__device__ __forceinline__ void store_row(const float (&acc)[64], float sum, u32* out, int lane) {
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int g = 0; g < 16; ++g)
        out[4 * g + lane % 4] = pack(acc[4 * g + 2 * I] * inverse, acc[4 * g + 2 * I + 1] * inverse);
}

__device__ __forceinline__ void consume(u32 q, u32 q_full, const Ring& keys, const Ring& values, u32* out,
                                        int tokens, int tiles, int heads, int head) {
    Consumer c;
    c.row0 = c.row1 = {MINUS_INFINITY, 0.0f};
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // tells the compiler that all lanes have the same value
    c.lane = threadIdx.x % 32;
    c.q = descriptor<ROW_BYTES>(q + group * 64 * ROW_BYTES);
#pragma unroll
    for (int i = 0; i < 64; ++i) c.acc[i] = 0.0f;
    barrier_wait(q_full, 0);
    attend(keys, values, c, tiles, tokens - (tiles - 1) * KEYS);
    const int r0 = blockIdx.x * ROWS + threadIdx.x / 32 * 16 + c.lane / 4, r1 = r0 + 8;
    const float sum0 = quad_sum(c.row0.sum), sum1 = quad_sum(c.row1.sum);
    const long long pitch = (long long)heads * (WIDTH / 2);
    out += head * (WIDTH / 2);
    if (r0 < tokens) store_row<0>(c.acc, sum0, out + r0 * pitch, c.lane);
    if (r1 < tokens) store_row<1>(c.acc, sum1, out + r1 * pitch, c.lane);
}

// Grid (query blocks, heads). Dynamic shared memory: 1024 bytes for alignment, Q_BYTES, 2 * STAGES tiles, and
// 8 + 32 * STAGES bytes of barriers.
// q, k, v 16-bit [L, H * 128] as tensor maps [2 H halves, L, 64]; out 16-bit [L, H * 128] as pairs.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    hopper_attention_16bit(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, u32* out, int tokens, int tiles, int heads) {
    extern __shared__ unsigned char raw[];
    const u32 q = (smem_address(raw) + 1023) & ~1023u;  // the 128-byte swizzle repeats every 1024 bytes
    const u32 k = q + Q_BYTES, v = k + STAGES * TILE_BYTES, q_full = v + STAGES * TILE_BYTES;
    const u32 k_barriers = q_full + 8, v_barriers = k_barriers + 16 * STAGES;
    const Ring keys = {k, k_barriers, k_barriers + 8 * STAGES}, values = {v, v_barriers, v_barriers + 8 * STAGES};
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        init_ring(keys);
        init_ring(values);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(32));
        if (threadIdx.x == 128 * GROUPS) {
            barrier_expect(q_full, Q_BYTES);
            load_tile(q, &q_map, q_full, 0, blockIdx.x * ROWS, 2 * blockIdx.y);
            fill(keys, &k_map, tiles, blockIdx.y);
        } else if (threadIdx.x == 128 * GROUPS + 32) {
            fill(values, &v_map, tiles, blockIdx.y);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(160));
        consume(q, q_full, keys, values, out, tokens, tiles, heads, blockIdx.y);
    }
}
