// Tensor cores and asynchronous copies by inline PTX that sm_80 has. Addresses of shared memory are 32 bits wide.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// 16 bytes, or zeros when `bytes` is 0.
__device__ __forceinline__ void cp16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ u32 lds32(u32 at) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void sts32(u32 at, u32 v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ uint4 lds128(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void sts128(u32 at, uint4 v) { asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
__device__ __forceinline__ void ldsm4(u32* r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldsm4t(u32* r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// An 8 x 8 matrix of 16-bit elements across a warp, transposed.
__device__ __forceinline__ u32 transposed(u32 v) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
// c[16 8] += a[16 16] b[16 8].
__device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two bf16 products.
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
    return r;
}
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float log2_fast(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// Where the element of a swizzled tile of 16-bit elements with rows of W lies, in bytes: eight rows at one column hit all banks.
template <int W> __device__ __forceinline__ int turn(int row) {
    constexpr int C = W / 8;
    return C >= 8 ? row & 7 : C == 4 ? (row >> 1) & 3 : C == 2 ? (row >> 2) & 1 : 0;
}
template <int W> __device__ __forceinline__ u32 tile(int row, int col) { return (row * (W / 8) + ((col >> 3) ^ turn<W>(row))) * 16 + (col & 7) * 2; }
// Addresses for ldmatrix of operand a or of two n tiles of operand b, m, n, k being multiples of 16: from rows (m, k) and (n, k), and
// for the transposing form from rows (k, m) and (k, n).
template <int W> __device__ __forceinline__ u32 frag(u32 base, int row, int more, int col, int odd) {
    return base + (row + more) * (W * 2) + (((col >> 3) ^ odd ^ turn<W>(more)) << 4);
}
template <int W> __device__ __forceinline__ u32 frag_a(u32 base, int m, int k) {
    int l = threadIdx.x & 31;
    return frag<W>(base, m, l & 15, k, l >> 4);
}
template <int W> __device__ __forceinline__ u32 frag_b(u32 base, int n, int k) {
    int l = threadIdx.x & 31;
    return frag<W>(base, n, (l & 7) + (l >> 4) * 8, k, (l >> 3) & 1);
}
// One n tile, two steps of k.
template <int W> __device__ __forceinline__ u32 frag_b2(u32 base, int n, int k) {
    int l = threadIdx.x & 31;
    return frag<W>(base, n, l & 7, k, l >> 3);
}
template <int W> __device__ __forceinline__ u32 frag_a_across(u32 base, int m, int k) {
    int l = threadIdx.x & 31;
    return frag<W>(base, k, (l & 7) + (l >> 4) * 8, m, (l >> 3) & 1);
}
template <int W> __device__ __forceinline__ u32 frag_b_across(u32 base, int n, int k) {
    int l = threadIdx.x & 31;
    return frag<W>(base, k, l & 15, n, l >> 4);
}
// From special functions, to about 1e-6.
__device__ __forceinline__ float sigmoid_fast(float x) { return reciprocal(1.f + exp2_fast(-1.4426950408889634f * x)); }
__device__ __forceinline__ float softplus_fast(float x) {
    float e = exp2_fast(1.4426950408889634f * x);
    float few = e * (1.f - e * (0.5f - e * (0.33333333f - e * (0.25f - e * 0.2f))));
    return x > 20.f ? x : e < 0.0625f ? few : 0.69314718056f * log2_fast(1.f + e);
}
// COUNT neighbouring elements, COUNT sizeof(T) bytes aligned to themselves or to 16.
template <int COUNT> __device__ __forceinline__ void load(float* to, const float* from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float4 v = *(const float4*)(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = from[i];
    }
}
template <int COUNT> __device__ __forceinline__ void load(float* to, const bf16* from) {
    if constexpr (COUNT % 8 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
            uint4 v = *(const uint4*)(from + i);
            to[i] = low(v.x), to[i + 1] = high(v.x), to[i + 2] = low(v.y), to[i + 3] = high(v.y);
            to[i + 4] = low(v.z), to[i + 5] = high(v.z), to[i + 6] = low(v.w), to[i + 7] = high(v.w);
        }
    } else if constexpr (COUNT == 4) {
        uint2 v = *(const uint2*)from;
        to[0] = low(v.x), to[1] = high(v.x), to[2] = low(v.y), to[3] = high(v.y);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = widen(from[i]);
    }
}
template <int COUNT> __device__ __forceinline__ void load(float* to, const f16* from) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = widen(from[i]);
}
template <int COUNT> __device__ __forceinline__ void store(float* to, const float* v) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) *(float4*)(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = v[i];
    }
}
template <int COUNT> __device__ __forceinline__ void store(bf16* to, const float* v) {
    if constexpr (COUNT % 8 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) *(uint4*)(to + i) = uint4{pack(v[i], v[i + 1]), pack(v[i + 2], v[i + 3]), pack(v[i + 4], v[i + 5]), pack(v[i + 6], v[i + 7])};
    } else if constexpr (COUNT == 4) {
        *(uint2*)to = uint2{pack(v[0], v[1]), pack(v[2], v[3])};
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) st(to, i, v[i]);
    }
}
template <int COUNT> __device__ __forceinline__ void store(f16* to, const float* v) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) st(to, i, v[i]);
}
// Operands for mma from tiles in shared memory with rows of `ld` elements: a [16 16] stored by its rows, or (ACROSS) by rows of what is
// summed over; two n tiles of b [16 16] stored by its columns, or (ACROSS) by rows of what is summed over.
template <int ACROSS> __device__ __forceinline__ void load_a(u32* r, const bf16* tile, int ld, int row, int k) {
    int l = threadIdx.x & 31;
    if (ACROSS) ldsm4t(r, shared_address(tile + (k + (l & 7) + ((l >> 4) << 3)) * ld + row + ((l >> 3) & 1) * 8));
    else ldsm4(r, shared_address(tile + (row + (l & 15)) * ld + k + ((l >> 4) << 3)));
}
template <int ACROSS> __device__ __forceinline__ void load_b(u32* r, const bf16* tile, int ld, int column, int k) {
    int l = threadIdx.x & 31;
    if (ACROSS) ldsm4t(r, shared_address(tile + (k + (l & 7) + ((l >> 3) & 1) * 8) * ld + column + ((l >> 4) << 3)));
    else ldsm4(r, shared_address(tile + (column + (l & 7) + ((l >> 4) << 3)) * ld + k + ((l >> 3) & 1) * 8));
}
