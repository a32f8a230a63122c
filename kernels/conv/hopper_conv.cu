// 3x3x3 convolution of bordered frames [slot, H+2, W+2, C] for sm_90a: implicit GEMM, fp16 operands, fp32 sums.
//
// A block is persistent: GROUPS consumer warpgroups, each with TILES accumulators of 64 pixels x COLUMNS channels, and
// one producer warpgroup (one thread of it issues TMA loads), which runs ahead into the next tile during an epilogue.
// A tile is a range of ROWS = 64 * TILES * GROUPS flattened pixels of one output frame; border pixels are computed but
// not stored. Tap (dt, dy, dx) of channel chunk c reads the pixels shifted by a constant.
//
// One pipeline stage holds 32 channels (64 bytes, 64-byte swizzle) of a range of pixels, and the weights of all three
// dx. The three A operands are the same pixels in shared memory, each shifted by one row, which is 64 bytes more in the
// descriptor. The swizzle is a function of the address, and the tile's start is a multiple of the pattern's 512 bytes,
// so a shifted operand reads the data that TMA wrote. This cuts the pixel traffic from the L2 cache, the limit for 96
// channels, to a third.
//
// Epilogue: y = sum * rescale + bias + residual; raw = y * scale; normed = silu(y / rms(y) * gamma), where a thread's
// quad holds all channels of a row. Values pass through a 4 x 4 transposition within the quad, so that memory is
// accessed in 16 bytes per thread and 64 bytes per row.
//
// `hopper_ptx.cu` is compiled in front of this file.
#ifndef COLUMNS
#define COLUMNS 96  // output channels per block: 96 or 192
#endif
#ifndef GROUPS
#define GROUPS 3  // consumer warpgroups: 2 or 3
#endif
#ifndef TILES
#define TILES 2  // accumulators per warpgroup; TILES * COLUMNS / 2 registers per thread
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef BOX
#define BOX 200  // pixels of one TMA load: a multiple of 8, at most 256
#endif

constexpr int ROWS = 64 * TILES * GROUPS;
constexpr int VALUES = COLUMNS / 2;            // accumulator elements per thread
constexpr int TAPS = 3;                        // per stage: all dx
constexpr int ROW_BYTES = 64;                  // 32 channels
constexpr int BOXES = (ROWS + TAPS - 1 + BOX - 1) / BOX;
constexpr int A_BYTES = BOXES * BOX * ROW_BYTES;
constexpr int B_BYTES = COLUMNS * ROW_BYTES;   // one tap
constexpr int B_AT = (A_BYTES + 1023) / 1024 * 1024;
constexpr int STAGE_BYTES = (B_AT + TAPS * B_BYTES + 1023) / 1024 * 1024;
constexpr float LARGEST = 65504.0f;

struct Frames {  // frame t is at slot (clock[counter] + offset + t) mod ring; data 0: absent
    u32* data;
    int ring, counter, offset;
    float scale;
};

struct Problem {
    const int* clock;
    const float* bias;
    const float* gamma;
    Frames src, residual, raw, normed;  // scale of src and residual: factor applied to the values read
    int frames, height, width, pitch, frame_rows, c_in, c_out, group_pitch, tiles;  // tiles of ROWS pixels per frame
    float norm_channels, norm_floor;
    int silu;
};

// ---- wgmma ------------------------------------------------------------------------------------------------------

#define LIST48(c, x) \
    LIST8(c, x, 0), LIST8(c, x, 8), LIST8(c, x, 16), LIST8(c, x, 24), LIST8(c, x, 32), LIST8(c, x, 40)
#define NUMBERS48                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                    \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                          \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#if COLUMNS == 96
#define LIST(c, x) LIST48(c, x)
#define PRODUCT "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" NUMBERS48 "}, %48, %49, 1, 1, 1, 0, 0;"
#else
#define LIST(c, x)                                                                                              \
    LIST48(c, x), LIST8(c, x, 48), LIST8(c, x, 56), LIST8(c, x, 64), LIST8(c, x, 72), LIST8(c, x, 80),          \
        LIST8(c, x, 88)
#define PRODUCT                                                                                                 \
    "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" NUMBERS48 ", "                                      \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                          \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                          \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, %96, %97, 1, 1, 1, 0, 0;"
#endif

// acc += A[64 pixels, 16 channels] . B[COLUMNS, 16 channels]^T.
__device__ __forceinline__ void product(float (&acc)[VALUES], u64 a, u64 b) {
    asm volatile(PRODUCT : LIST("+f", acc) : "l"(a), "l"(b) : "memory");
}

// Waits for the products. The registers are operands, so that the compiler cannot read them earlier.
__device__ __forceinline__ void finish(float (&acc)[VALUES]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST("+f", acc)::"memory");
}

// ---- tile index -------------------------------------------------------------------------------------------------

struct Tile {
    int row, frame, column;  // first flattened pixel, output frame, first output channel
};

// Neighbours share pixels across channels and frames: six source frames serve four outputs from the L2 cache.
__device__ __forceinline__ Tile tile_of(const Problem& p, int index) {
    const int blocks = p.c_out / COLUMNS;
    Tile tile;
    tile.column = index % blocks * COLUMNS;
    index /= blocks;
    tile.frame = index % p.frames;
    tile.row = index / p.frames * ROWS;
    return tile;
}

__device__ __forceinline__ int slot_of(const Problem& p, const Frames& f, int frame) {
    return (p.clock[f.counter] + f.offset + frame) % f.ring;
}

// ---- producer ---------------------------------------------------------------------------------------------------

struct Ring {  // byte addresses in shared memory
    u32 data, full, empty;
};

struct Position {
    int stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void load_stage(const Ring& ring, int stage, const TensorMap* pixels,
                                           const TensorMap* weights, int row, int channel, int k, int c_in,
                                           int column) {
    const u32 data = ring.data + stage * STAGE_BYTES, full = ring.full + 8 * stage;
    barrier_expect(full, A_BYTES + TAPS * B_BYTES);
#pragma unroll
    for (int i = 0; i < BOXES; ++i) load_tile(data + i * BOX * ROW_BYTES, pixels, full, channel, row + i * BOX);
#pragma unroll
    for (int dx = 0; dx < TAPS; ++dx)
        load_tile(data + B_AT + dx * B_BYTES, weights, full, k + dx * c_in, column);
}

__device__ __forceinline__ void produce(const Ring& ring, const Problem& p, const TensorMap* pixels,
                                        const TensorMap* weights, int count) {
    Position at = {0, 1};  // the first pass over the ring finds every buffer empty
    for (int index = blockIdx.x; index < count; index += gridDim.x) {
        const Tile tile = tile_of(p, index);
        int slot = slot_of(p, p.src, tile.frame);
        for (int dt = 0; dt < 3; ++dt) {
            for (int dy = 0; dy < 3; ++dy) {
                const int row = slot * p.frame_rows + dy * p.pitch + tile.row, k = (dt * 3 + dy) * p.group_pitch;
                for (int dx = 0; dx < 3; dx += TAPS) {  // one round: without it the compiler schedules this differently
                    for (int channel = 0; channel < p.c_in; channel += 32) {
                        barrier_wait(ring.empty + 8 * at.stage, at.parity);
                        load_stage(ring, at.stage, pixels, weights, row + dx, channel, k + dx * p.c_in + channel,
                                   p.c_in, tile.column);
                        at.next();
                    }
                }
            }
            if (++slot == p.src.ring) slot = 0;
        }
    }
}

// ---- epilogue ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 pack_f16(float x0, float x1) {
    u32 out;
    x0 = fminf(fmaxf(x0, -LARGEST), LARGEST), x1 = fminf(fmaxf(x1, -LARGEST), LARGEST);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(x1), "f"(x0));
    return out;
}

__device__ __forceinline__ float2 unpack_f16(u32 pair) {
    float2 out;
    asm("{\n\t.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %2;\n\tcvt.f32.f16 %0, lo;\n\tcvt.f32.f16 %1, hi;\n\t}"
        : "=f"(out.x), "=f"(out.y) : "r"(pair));
    return out;
}

__device__ __forceinline__ float silu(float x) {
    return __fdividef(x, 1.0f + exp2_fast(-1.4426950408889634f * x));  // exact division costs 6 % of a decoding
}

// Lane b of a quad holds element i of its row in v.i; afterwards it holds element b of lane i's row. Self-inverse.
__device__ __forceinline__ uint4 transpose(uint4 v, int b) {
    const bool odd = b & 1, high = b & 2;
    const u32 s0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), s1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
    if (odd) v.x = s0, v.z = s1;
    else v.y = s0, v.w = s1;
    const u32 s2 = __shfl_xor_sync(~0u, high ? v.x : v.z, 2), s3 = __shfl_xor_sync(~0u, high ? v.y : v.w, 2);
    if (high) v.x = s2, v.y = s3;
    else v.z = s2, v.w = s3;
    return v;
}

// Row I (0, 1) of a thread: element 4g + 2I + c of acc is channel 8g + 2b + c. Adds bias and residual.
template <int I>
__device__ __forceinline__ void add_inputs(float (&acc)[VALUES], float rescale, const float* bias, const uint4* residual,
                                           float residual_rescale, bool valid, int b) {
#pragma unroll
    for (int set = 0; set < COLUMNS / 32; ++set) {  // four groups of eight channels
        uint4 pairs = make_uint4(0, 0, 0, 0);
        if (residual) {
            if (valid) pairs = residual[4 * set + b];
            pairs = transpose(pairs, b);
        }
        const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            const int at = 16 * set + 4 * g + 2 * I;
            const float2 add = __ldg((const float2*)bias + 16 * set + 4 * g + b), rest = unpack_f16(words[g]);
            acc[at] = fmaf(rest.x, residual_rescale, fmaf(acc[at], rescale, add.x));
            acc[at + 1] = fmaf(rest.y, residual_rescale, fmaf(acc[at + 1], rescale, add.y));
        }
    }
}

template <int I>
__device__ __forceinline__ void store(const float (&acc)[VALUES], float scale, uint4* out, bool valid, int b) {
#pragma unroll
    for (int set = 0; set < COLUMNS / 32; ++set) {
        const int at = 16 * set + 2 * I;
        uint4 pairs = make_uint4(
            pack_f16(acc[at] * scale, acc[at + 1] * scale), pack_f16(acc[at + 4] * scale, acc[at + 5] * scale),
            pack_f16(acc[at + 8] * scale, acc[at + 9] * scale), pack_f16(acc[at + 12] * scale, acc[at + 13] * scale));
        pairs = transpose(pairs, b);
        if (valid) out[4 * set + b] = pairs;
    }
}

// acc becomes silu(acc / rms * gamma).
template <int I>
__device__ __forceinline__ void normalise(float (&acc)[VALUES], const Problem& p, int b) {
    float squares = 0.0f;
#pragma unroll
    for (int g = 0; g < COLUMNS / 8; ++g) {
        const int at = 4 * g + 2 * I;
        squares = fmaf(acc[at], acc[at], fmaf(acc[at + 1], acc[at + 1], squares));
    }
    const float inverse = 1.0f / fmaxf(sqrtf(quad_sum(squares) / p.norm_channels), p.norm_floor);
#pragma unroll
    for (int g = 0; g < COLUMNS / 8; ++g) {
        const int at = 4 * g + 2 * I;
        const float2 gamma = __ldg((const float2*)p.gamma + 4 * g + b);
        acc[at] *= inverse * gamma.x, acc[at + 1] *= inverse * gamma.y;
        if (p.silu) acc[at] = silu(acc[at]), acc[at + 1] = silu(acc[at + 1]);
    }
}

// Address of a pixel's channels in `frame`, null if the frames are absent; `at` counts pixels within the frame.
__device__ __forceinline__ uint4* pixel_of(const Problem& p, const Frames& f, int frame, int at, int column) {
    if (!f.data) return nullptr;
    const long long pixel = (long long)slot_of(p, f, frame) * p.frame_rows + at;
    return (uint4*)f.data + (pixel * p.c_out + column) / 8;
}

template <int I>
__device__ __forceinline__ void store_row(float (&acc)[VALUES], const Problem& p, const Tile& tile, int row, int b) {
    const int y = row / p.pitch;
    const bool valid = y < p.height && row - y * p.pitch < p.width;
    const int at = valid ? row + p.pitch + 1 : 0;  // past the border's first row and column
    add_inputs<I>(acc, p.src.scale, p.bias + tile.column, pixel_of(p, p.residual, tile.frame, at, tile.column),
                  p.residual.scale, valid, b);
    if (p.raw.data) store<I>(acc, p.raw.scale, pixel_of(p, p.raw, tile.frame, at, tile.column), valid, b);
    if (p.normed.data) {
        normalise<I>(acc, p, b);
        store<I>(acc, 1.0f, pixel_of(p, p.normed, tile.frame, at, 0), valid, b);
    }
}

// ---- consumer ---------------------------------------------------------------------------------------------------

// The products of one stage; a and b are descriptors, a at the warpgroup's first pixel.
__device__ __forceinline__ void multiply(float (&acc)[TILES][VALUES], u64 a, u64 b) {
    wgmma_fence();
#pragma unroll
    for (int dx = 0; dx < TAPS; ++dx)
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                product(acc[tile], a + (tile * 64 + dx) * (ROW_BYTES / 16) + 2 * step,
                        b + dx * (B_BYTES / 16) + 2 * step);
    wgmma_commit();
}

__device__ __forceinline__ void consume(const Ring& ring, const Problem& p, int count) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int first = group * TILES * 64, steps = 9 * (p.c_in / 32);
    Position at = {0, 0};
    for (int index = blockIdx.x; index < count; index += gridDim.x) {
        float acc[TILES][VALUES];
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j < VALUES; ++j) acc[i][j] = 0.0f;
        u32 previous = 0;
        for (int step = 0; step < steps; ++step) {
            const u32 data = ring.data + at.stage * STAGE_BYTES;
            barrier_wait(ring.full + 8 * at.stage, at.parity);
            multiply(acc, descriptor<ROW_BYTES>(data + first * ROW_BYTES), descriptor<ROW_BYTES>(data + B_AT));
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the products of the previous stage
            if (step && lane == 0) barrier_arrive(previous);
            previous = ring.empty + 8 * at.stage;
            at.next();
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) finish(acc[i]);
        if (lane == 0) barrier_arrive(previous);
        const Tile tile = tile_of(p, index);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int row = tile.row + first + i * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
            store_row<0>(acc[i], p, tile, row, lane % 4);
            store_row<1>(acc[i], p, tile, row + 8, lane % 4);
        }
    }
}

// Grid: at most one block per multiprocessor. Dynamic shared memory: 1024 bytes for alignment, STAGES stages, barriers.
// pixels: fp16 [slots * (H+2) * (W+2), c_in] in boxes of BOX x 32; weights: fp16 [c_out, 9 * group_pitch] in boxes of
// COLUMNS x 32, channel i of tap (dt, dy, dx) at (dt * 3 + dy) * group_pitch + dx * c_in + i.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    hopper_conv(const __grid_constant__ TensorMap pixels, const __grid_constant__ TensorMap weights,
                const __grid_constant__ Problem p) {
    extern __shared__ unsigned char memory[];
    Ring ring;
    ring.data = (smem_address(memory) + 1023) & ~1023u;
    ring.full = ring.data + STAGES * STAGE_BYTES;
    ring.empty = ring.full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, 4 * GROUPS);  // one arrival per consumer warp
        }
        barrier_init_done();
    }
    __syncthreads();
    const int count = p.tiles * p.frames * (p.c_out / COLUMNS);
    if (threadIdx.x >= 128 * GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GROUPS == 3 ? 32 : 24));
        if (threadIdx.x == 128 * GROUPS) produce(ring, p, &pixels, &weights, count);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 3 ? 160 : 240));
        consume(ring, p, count);
    }
}
