// Tensors in 8 bits with one factor each. TO is e4m3 (3 bits of mantissa, up to 448), or e5m2 (2 bits, up to 57344) where the launcher says
// so; both are converted by instructions of sm_89 and later, and refused before launch on earlier devices.
#ifdef E5M2
#define LARGEST 57344.f
#define CONVERT "cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;"
#else
#define LARGEST 448.f
#define CONVERT "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
#endif
// Two numbers, the first in the low byte.
__device__ __forceinline__ u32 narrow2(float lo, float hi) {
#if __CUDA_ARCH__ >= 890
    u16 r;
    asm(CONVERT : "=h"(r) : "f"(hi), "f"(lo));
    return r;
#else
    __trap();
    return 0;
#endif
}
__device__ __forceinline__ u32 narrow4(const float* v, float f) {
    return narrow2(v[0] * f, v[1] * f) | narrow2(v[2] * f, v[3] * f) << 16;
}
// The largest magnitude, with a floor that keeps the factor finite; what is no number stays none.
__device__ __forceinline__ float factor(const u32* most, float* scale) {
    float m = fmaxf(__uint_as_float(*most), 1e-30f);
    if (global_thread() == 0 && blockIdx.y == 0) *scale = m / LARGEST;
    return LARGEST / m;
}

// most = max(most, max |x|), as bits: those of numbers that are not negative are in their order. An infinity makes the factor 0 and the
// product of both no number.
KERNEL most(const TA0* x, u32* most, i64 n) {
    float m = 0;
    for (i64 i = global_thread(); i < n; i += all_threads()) m = fmaxf(m, fabsf(ld(x, i)));
    m = block_max(m);
    if (threadIdx.x == 0) atomicMax(most, __float_as_uint(m));
}
// n is a multiple of 8, the address of 16 bytes. Walks from behind, where caches still hold what was written last; whoever narrows then
// walks from the front, where they hold what was read last.
KERNEL most8(const TA0* x, u32* most, i64 n) {
    float m = 0;
    for (i64 i = n - 8 * (global_thread() + 1); i >= 0; i -= 8 * all_threads()) {
        float v[8];
        ld8(x, i, v);
#pragma unroll
        for (int k = 0; k < 8; k++) m = fmaxf(m, fabsf(v[k]));
    }
    m = block_max(m);
    if (threadIdx.x == 0) atomicMax(most, __float_as_uint(m));
}

// q[rows' cols'] = x[rows cols] in 8 bits, both sizes rounded up to a multiple of 16, zeros beyond x. 16 elements a thread.
KERNEL narrow(const TA0* x, unsigned char* q, const u32* most, float* scale, i64 rows, i64 cols, i64 pieces) {
    float f = factor(most, scale);
    i64 wide = (cols + 15) / 16;
    for (i64 p = global_thread(); p < pieces; p += all_threads()) {
        i64 r = p / wide, c = p % wide * 16;
        float v[16];
#pragma unroll
        for (int k = 0; k < 16; k++) v[k] = r < rows && c + k < cols ? ld(x, r * cols + c + k) : 0.f;
        *(uint4*)(q + 16 * p) = make_uint4(narrow4(v, f), narrow4(v + 4, f), narrow4(v + 8, f), narrow4(v + 12, f));
    }
}
// The same where cols is a multiple of 16 and x begins at one of 16 bytes: the rows of x lie as those of q.
KERNEL narrow16(const TA0* x, unsigned char* q, const u32* most, float* scale, i64 n, i64 pieces) {
    float f = factor(most, scale);
    for (i64 p = global_thread(); p < pieces; p += all_threads()) {
        float v[16];
        if (16 * p < n) {
            ld8(x, 16 * p, v);
            ld8(x, 16 * p + 8, v + 8);
        } else {
#pragma unroll
            for (int k = 0; k < 16; k++) v[k] = 0.f;
        }
        *(uint4*)(q + 16 * p) = make_uint4(narrow4(v, f), narrow4(v + 4, f), narrow4(v + 8, f), narrow4(v + 12, f));
    }
}
// t[cols' rows'] = x[rows cols] transposed, in 8 bits, and q[rows' cols'] as it lies where that is wanted; sizes rounded up as above. Tiles
// of 128 rows and 64 columns, 256 threads of 4 rows and 8 columns each: words of 4 rows go through shared memory, shifted by 4 every 8
// columns so that no two of a warp meet in a bank. WHOLE: cols is a multiple of 8 and x begins at one of 16 bytes.
KERNEL narrow_turned(const TA0* x, unsigned char* q, unsigned char* t, const u32* most, float* scale, i64 rows, i64 cols) {
    __shared__ __align__(16) u32 tile[64 * 32 + 8 * 4];
    float f = factor(most, scale);
    i64 r0 = (i64)blockIdx.y * 128, c0 = (i64)blockIdx.x * 64, tall = (rows + 15) / 16 * 16, wide = (cols + 15) / 16 * 16;
    int piece = threadIdx.x & 7, four = threadIdx.x >> 3;
    i64 c = c0 + 8 * piece;
    u32 w[2][4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        i64 r = r0 + 4 * four + k;
        float v[8];
#ifdef WHOLE
        if (r < rows && c < cols) ld8(x, r * cols + c, v);
        else {
#pragma unroll
            for (int e = 0; e < 8; e++) v[e] = 0.f;
        }
#else
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = r < rows && c + e < cols ? ld(x, r * cols + c + e) : 0.f;
#endif
        w[0][k] = narrow4(v, f);
        w[1][k] = narrow4(v + 4, f);
        if (q && r < tall && c < wide) *(uint2*)(q + r * wide + c) = make_uint2(w[0][k], w[1][k]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32* m = w[half];
        u32* to = tile + (8 * piece + 4 * half) * 32 + 4 * piece + four;
        u32 a = __byte_perm(m[0], m[1], 0x5140), b = __byte_perm(m[2], m[3], 0x5140);
        u32 d = __byte_perm(m[0], m[1], 0x7362), e = __byte_perm(m[2], m[3], 0x7362);
        to[0] = __byte_perm(a, b, 0x5410);
        to[32] = __byte_perm(a, b, 0x7632);
        to[64] = __byte_perm(d, e, 0x5410);
        to[96] = __byte_perm(d, e, 0x7632);
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int column = four + 32 * half;
        i64 to = c0 + column, r = r0 + 16 * piece;
        if (to < wide && r < tall) *(uint4*)(t + to * tall + r) = *(const uint4*)(tile + column * 32 + 4 * (column >> 3) + 4 * piece);
    }
}
// y = x + beta old of a product that was padded: x[.. wide], y and old [rows cols]. An absent beta is 1; with one of 0, old is not read.
KERNEL crop(const TR0* x, TR0* y, const TR0* old, const float* beta, i64 rows, i64 cols, i64 wide) {
    float b = !old ? 0.f : beta ? *beta : 1.f;
    for (i64 e = global_thread(); e < rows * cols; e += all_threads()) {
        float v = ld(x, e / cols * wide + e % cols);
        st(y, e, b == 0.f ? v : b * ld(old, e) + v);
    }
}
