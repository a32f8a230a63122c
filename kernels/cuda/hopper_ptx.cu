// Functions shared by the sm_90a kernels: PTX barriers, TMA and wgmma. Compiled in front of a kernel's source.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers and TMA ------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Returns once the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(bar), "r"(parity) : "memory");
}

// Coordinates fastest first. Data outside the tensor arrives as zeros and counts towards the bytes expected.
__device__ __forceinline__ void load_tile(u32 dst, const TensorMap* map, u32 bar, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];"
        ::"r"(dst), "l"((u64)map), "r"(bar), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void load_tile(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(dst), "l"((u64)map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory");
}

// ---- wgmma ------------------------------------------------------------------------------------------------------

// K-major operand whose rows are ROW_BYTES (128 or 64) long, with the swizzle of that width. Groups of 8 rows follow
// each other (stride field, in units of 16 bytes); the leading field is unused; the top two bits select the swizzle. A
// k-step of 32 bytes adds 2.
template <int ROW_BYTES>
__device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 swizzle = ROW_BYTES == 128 ? 1 : 2;
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(ROW_BYTES / 2) << 32) | (swizzle << 62);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Eight elements of an array as operands of an asm statement.
#define LIST8(c, x, i) \
    c(x[i]), c(x[i + 1]), c(x[i + 2]), c(x[i + 3]), c(x[i + 4]), c(x[i + 5]), c(x[i + 6]), c(x[i + 7])

// ---- arithmetic -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Sums over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
