// y [M N] = x [M K] times the rows of w [N K] in bf16, for few rows of x: the weights are read once, 16 bytes a lane, straight to the operands of
// products of warps. What is summed over may come in any order as long as both operands agree: lane t of four takes 8 elements in a row.
// A block computes 16 TILES columns of y for up to 8 COLUMNS rows; its WARPS share what is summed over in pieces of 64, DEPTH of which are under
// way in each, and their sums are added in order. With FIXED the first of them are fetched while what was launched before still runs; with
// BOTH the pieces of x are fetched as far ahead as those of w, for which registers of HOLD blocks a multiprocessor suffice.
__device__ __forceinline__ uint4 stream16(const bf16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
#ifndef HOLD
#define HOLD 1
#endif
#ifndef BOTH
#define BOTH 0
#endif
extern "C" __global__ void __launch_bounds__(32 * WARPS, HOLD) linear_few(const bf16* x, const bf16* w, const TA2* bias, const TR0* add, TR0* y, int M, int N, int K) {
    constexpr int TOGETHER = COLUMNS < 2 ? COLUMNS : 2;
    __shared__ float sums[WARPS][8 * TOGETHER][16 * TILES + 1];
    const uint4 none = make_uint4(0, 0, 0, 0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, n0 = blockIdx.x * (16 * TILES);
    const bf16 *from[TILES][2], *rows[COLUMNS];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) from[i][h] = w + (i64)min(n0 + 16 * i + 8 * h + g, N - 1) * K + 8 * t;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) rows[j] = x + (i64)min(8 * j + g, M - 1) * K + 8 * t;
    float c[TILES][COLUMNS][4];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[i][j][e] = 0;
    uint4 a[DEPTH][2][TILES][2];
    auto fetch = [&](int s, int k0) {
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) a[s][p][i][h] = k0 + 32 * p + 8 * t < K ? stream16(from[i][h] + k0 + 32 * p) : none;
    };
    // Of x, as far ahead as it is fetched.
    constexpr int FAR = BOTH ? DEPTH : 1;
    uint4 b[FAR][2][COLUMNS];
    auto fetch_x = [&](int s, int k0) {
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) b[s][p][j] = k0 + 32 * p + 8 * t < K ? *(const uint4*)(rows[j] + k0 + 32 * p) : none;
    };
#ifndef FIXED
    early();
#endif
#pragma unroll
    for (int s = 0; s < DEPTH; s++) fetch(s, (warp + s * WARPS) * 64);
#ifdef FIXED
    early();
#endif
    if (BOTH)
#pragma unroll
        for (int s = 0; s < FAR; s++) fetch_x(s, (warp + s * WARPS) * 64);
    for (int k0 = warp * 64; k0 < K; k0 += DEPTH * WARPS * 64) {
#pragma unroll
        for (int s = 0; s < DEPTH; s++) {
            int k = k0 + s * WARPS * 64;
            if (k >= K) break;
            if (!BOTH) fetch_x(0, k);
#pragma unroll
            for (int p = 0; p < 2; p++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    const uint4& d = b[BOTH ? s : 0][p][j];
                    u32 b0[2] = {d.x, d.y}, b1[2] = {d.z, d.w};
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        const uint4 &u = a[s][p][i][0], &v = a[s][p][i][1];
                        u32 a0[4] = {u.x, v.x, u.y, v.y}, a1[4] = {u.z, v.z, u.w, v.w};
                        mma(c[i][j], a0, b0);
                        mma(c[i][j], a1, b1);
                    }
                }
            int next = k + DEPTH * WARPS * 64;
            if (next < K) {
                fetch(s, next);
                if (BOTH) fetch_x(s, next);
            }
        }
    }
#pragma unroll
    for (int j0 = 0; j0 < COLUMNS; j0 += TOGETHER) {
        if (j0) __syncthreads();
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < TOGETHER; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[warp][8 * j + 2 * t + (e & 1)][16 * i + g + (e & 2) * 4] = c[i][j0 + j][e];
        __syncthreads();
        for (int e = threadIdx.x; e < 16 * TILES * 8 * TOGETHER; e += 32 * WARPS) {
            int n = e % (16 * TILES), row = e / (16 * TILES), m = 8 * j0 + row;
            if (m >= M) break;
            if (n0 + n >= N) continue;
            float r = 0;
#pragma unroll
            for (int s = 0; s < WARPS; s++) r += sums[s][row][n];
            i64 at = (i64)m * N + n0 + n;
            if (bias) r += ld(bias, n0 + n);
            if (add) r += ld(add, at);
            st(y, at, r);
        }
    }
}
