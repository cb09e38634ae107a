// What every kernel shares: element types with conversions by inline PTX (no header is needed), reductions over warps and blocks, and the
// functions of the elementwise ops. TA0.. are the element types of an op's arguments by slot, TR0.. those of its results; float unless
// the launcher defines another.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct bf16 { u16 x; };
struct f16 { u16 x; };
#ifndef TA0
#define TA0 float
#endif
#ifndef TA1
#define TA1 float
#endif
#ifndef TA2
#define TA2 float
#endif
#ifndef TA3
#define TA3 float
#endif
#ifndef TA4
#define TA4 float
#endif
#ifndef TA5
#define TA5 float
#endif
#ifndef TA6
#define TA6 float
#endif
#ifndef TA7
#define TA7 float
#endif
#ifndef TA8
#define TA8 float
#endif
#ifndef TA9
#define TA9 float
#endif
#ifndef TA10
#define TA10 float
#endif
#ifndef TR0
#define TR0 float
#endif
#ifndef TR1
#define TR1 float
#endif
#ifndef TR2
#define TR2 float
#endif
#ifndef TR3
#define TR3 float
#endif
#ifndef TR4
#define TR4 float
#endif
#ifndef TR5
#define TR5 float
#endif
#ifndef TR6
#define TR6 float
#endif
#ifndef TR7
#define TR7 float
#endif

#define KERNEL extern "C" __global__ void
#define INF __int_as_float(0x7f800000)
#define FULL 0xffffffffu

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float((u32)v.x << 16); }
__device__ __forceinline__ float widen(f16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.x)); return r; }
template <class T> __device__ __forceinline__ float ld(const T* p, i64 i) { return widen(p[i]); }
__device__ __forceinline__ void st(float* p, i64 i, float v) { p[i] = v; }
__device__ __forceinline__ void st(bf16* p, i64 i, float v) { u16 r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v)); p[i].x = r; }
__device__ __forceinline__ void st(f16* p, i64 i, float v) { u16 r; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v)); p[i].x = r; }

// Eight elements at once; `i` is a multiple of 8, and p is aligned to 16 bytes.
__device__ __forceinline__ void ld8(const float* p, i64 i, float* r) {
    float4 a = *(const float4*)(p + i), b = *(const float4*)(p + i + 4);
    r[0] = a.x; r[1] = a.y; r[2] = a.z; r[3] = a.w; r[4] = b.x; r[5] = b.y; r[6] = b.z; r[7] = b.w;
}
__device__ __forceinline__ void ld8(const bf16* p, i64 i, float* r) {
    uint4 a = *(const uint4*)(p + i);
    u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        r[2 * k] = __uint_as_float(w[k] << 16);
        r[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
    }
}
__device__ __forceinline__ void ld8(const f16* p, i64 i, float* r) {
    uint4 a = *(const uint4*)(p + i);
    u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        f16 low = {(u16)w[k]}, high = {(u16)(w[k] >> 16)};
        r[2 * k] = widen(low);
        r[2 * k + 1] = widen(high);
    }
}
__device__ __forceinline__ void st8(float* p, i64 i, const float* r) {
    *(float4*)(p + i) = make_float4(r[0], r[1], r[2], r[3]);
    *(float4*)(p + i + 4) = make_float4(r[4], r[5], r[6], r[7]);
}
__device__ __forceinline__ void st8(bf16* p, i64 i, const float* r) {
    u32 w[4];
#pragma unroll
    for (int k = 0; k < 4; k++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[k]) : "f"(r[2 * k + 1]), "f"(r[2 * k]));
    *(uint4*)(p + i) = make_uint4(w[0], w[1], w[2], w[3]);
}
__device__ __forceinline__ void st8(f16* p, i64 i, const float* r) {
    u32 w[4];
#pragma unroll
    for (int k = 0; k < 4; k++) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[k]) : "f"(r[2 * k + 1]), "f"(r[2 * k]));
    *(uint4*)(p + i) = make_uint4(w[0], w[1], w[2], w[3]);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
__device__ __forceinline__ float dsilu(float x) { float s = sigmoid(x); return s * (1.f + x * (1.f - s)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float dgelu(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x); }
__device__ __forceinline__ float gelu_tanh(float x) { return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x))); }
__device__ __forceinline__ float dgelu_tanh(float x) {
    float t = tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.79788456080286536f * (1.f + 0.134145f * x * x);
}

template <class T> __device__ __forceinline__ T warp_sum(T v) {
    for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(FULL, v, m);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int m = 16; m; m >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, m));
    return v;
}
// Over all threads of a block (a multiple of 32, at most 1024); every thread gets the result.
template <class T> __device__ T block_sum(T v) {
    __shared__ T part[32];
    v = warp_sum(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    int n = blockDim.x >> 5;
    v = (threadIdx.x & 31) < n ? part[threadIdx.x & 31] : T(0);
    return warp_sum(v);
}
__device__ inline float block_max(float v) {
    __shared__ float part[32];
    v = warp_max(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    int n = blockDim.x >> 5;
    v = (threadIdx.x & 31) < n ? part[threadIdx.x & 31] : -INF;
    return warp_max(v);
}
// First in every kernel that is launched early (see `Launch::early`): lets the next one begin as well, and waits for the results of all before.
__device__ __forceinline__ void early() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ i64 global_thread() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ i64 all_threads() { return (i64)gridDim.x * blockDim.x; }
