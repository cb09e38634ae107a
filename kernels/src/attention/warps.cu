// The same in bf16 with products of warps, for every architecture and head width: 4 warps of 16 rows each over tiles of WN rows. Widths are
// filled up with zeros to PP; rows in shared memory are 16 bytes longer than that, so that matrices load without conflicts.
#ifdef WARPS
#define PP ((P + 15) / 16 * 16)
#define LD (PP + 8)
#define WM 64
#define WN (PP > 128 ? 32 : 64)
// Columns of gradients that one block accumulates: half of them where all would not fit the registers.
#define PC (PP > 128 ? (PP / 16 + 1) / 2 * 16 : PP)
__device__ __forceinline__ void bring(bf16* to, const bf16* from, i64 stride, int first, int rows, int limit) {
#ifdef WHOLE
    for (int i = threadIdx.x; i < rows * (PP / 8); i += 128) {
        int r = i / (PP / 8), c = i % (PP / 8) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (first + r < limit && c < P) v = *(const uint4*)(from + (first + r) * stride + c);
        *(uint4*)(to + r * LD + c) = v;
    }
#else
    for (int i = threadIdx.x; i < rows * PP; i += 128) {
        int r = i / PP, c = i % PP;
        to[r * LD + c].x = first + r < limit && c < P ? from[(first + r) * stride + c].x : 0;
    }
#endif
}
// s [16 N] = rows of a times rows of b, over PP.
template <int N> __device__ __forceinline__ void rows_by_rows(float (&s)[N / 2], const bf16* a, int row, const bf16* b) {
#pragma unroll
    for (int x = 0; x < N / 2; x++) s[x] = 0;
#pragma unroll
    for (int k = 0; k < PP; k += 16) {
        u32 x[4], y[4];
        load_a<0>(x, a, LD, row, k);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            load_b<0>(y, b, LD, n, k);
            mma(s + n / 2, x, y);
            mma(s + n / 2 + 4, x, y + 2);
        }
    }
}
// o [16 N] += p [16 K] times rows of b, columns from `column` on as far as there are.
template <int N, int K> __device__ __forceinline__ void shares_by_rows(float (&o)[N / 2], const float (&p)[K / 2], const bf16* b, int column) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        u32 x[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack(p[k / 2 + 2 * i], p[k / 2 + 2 * i + 1]);
#pragma unroll
        for (int n = 0; n < N; n += 16)
            if (N == PP || column + n < PP) {
                load_b<1>(y, b, LD, column + n, k);
                mma(o + n / 2, x, y);
                mma(o + n / 2 + 4, x, y + 2);
            }
    }
}
template <int N> __device__ __forceinline__ void store_pair(bf16* to, i64 stride, const float (&d)[N], float f0, float f1, bool on0, bool on1, int columns) {
    int c = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int x = 0; x < N / 4; x++)
#pragma unroll
        for (int y = 0; y < 2; y++)
            if (c + 8 * x + y < columns) {
                if (on0) st(to, c + 8 * x + y, d[4 * x + y] * f0);
                if (on1) st(to, 8 * stride + c + 8 * x + y, d[4 * x + 2 + y] * f1);
            }
}
#define WARPS_KERNEL extern "C" __global__ void __launch_bounds__(128)
WARPS_KERNEL attn_fwd_warps(const bf16* q, const bf16* k, const bf16* v, const int* pos, const int* slot, bf16* out, float* lse, int T, int S, int H, int G, float scale, int window) {
    bf16 *qs = (bf16*)smem, *ks = qs + WM * LD, *vs = ks + WN * LD;
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, h = blockIdx.y, g = h / (H / G), t0 = (gridDim.x - 1 - blockIdx.x) * WM, s0 = slot ? slot[0] : 0;
    i64 b = blockIdx.z;
    int t = t0 + row + (lane >> 2), q0 = s0 + t, q1 = q0 + 8;
    int lo0 = first_seen(q0, t < T ? pos : 0, b * T + t, window), lo1 = first_seen(q1, t + 8 < T ? pos : 0, b * T + t + 8, window);
    int last = (s0 + min(t0 + WM, T) - 1) / WN, first = first_of_tile(s0, t0, WM, T, pos, b * T, window) / WN;
    float o[PP / 2], s[WN / 2], top[2] = {-INF, -INF}, sum[2] = {0, 0}, fix[2];
#pragma unroll
    for (int x = 0; x < PP / 2; x++) o[x] = 0;
    bring(qs, q + (b * T * H + h) * P, (i64)H * P, t0, WM, T);
    for (int j = first; j <= last; j++) {
        __syncthreads();
        // Slots after those of the queries may hold anything.
        bring(ks, k + (b * S * G + g) * P, (i64)G * P, j * WN, WN, min(S, s0 + min(t0 + WM, T)));
        bring(vs, v + (b * S * G + g) * P, (i64)G * P, j * WN, WN, min(S, s0 + min(t0 + WM, T)));
        __syncthreads();
        rows_by_rows<WN>(s, qs, row, ks);
        mask_rows(s, j * WN, -INF, q0, lo0, q1, lo1);
        soften(s, top, sum, fix, scale * LOG2E);
#pragma unroll
        for (int x = 0; x < PP / 8; x++)
#pragma unroll
            for (int y = 0; y < 4; y++) o[4 * x + y] *= fix[y >> 1];
        shares_by_rows<PP, WN>(o, s, vs, 0);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        if ((lane & 3) == 0 && t + 8 * r < T) lse[(b * H + h) * T + t + 8 * r] = top[r] * scale + logf(sum[r]);
    }
    store_pair(out + ((b * T + t) * H + h) * P, (i64)H * P, o, sum[0] > 0 ? 1.f / sum[0] : 0.f, sum[1] > 0 ? 1.f / sum[1] : 0.f, t < T, t + 8 < T, P);
}
WARPS_KERNEL attn_dq_warps(const bf16* q, const bf16* k, const bf16* v, const int* pos, const float* lse, const bf16* dout, const float* delta, bf16* dq, int T, int H, int G, float scale, int window) {
    bf16 *qs = (bf16*)smem, *os = qs + WM * LD, *ks = os + WM * LD, *vs = ks + WN * LD;
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, h = blockIdx.y, g = h / (H / G), t0 = (gridDim.x - 1 - blockIdx.x) * WM;
    i64 b = blockIdx.z;
    int t = t0 + row + (lane >> 2), lo[2];
    float ls[2], dl[2], o[PP / 2], s[WN / 2], d[WN / 2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool on = t + 8 * r < T;
        i64 at = (b * H + h) * T + t + 8 * r;
        ls[r] = on ? lse[at] * LOG2E : INF;
        dl[r] = on ? delta[at] : 0.f;
        lo[r] = first_seen(t + 8 * r, on ? pos : 0, b * T + t + 8 * r, window);
    }
    int last = (min(t0 + WM, T) - 1) / WN, first = first_of_tile(0, t0, WM, T, pos, b * T, window) / WN;
#pragma unroll
    for (int x = 0; x < PP / 2; x++) o[x] = 0;
    bring(qs, q + (b * T * H + h) * P, (i64)H * P, t0, WM, T);
    bring(os, dout + (b * T * H + h) * P, (i64)H * P, t0, WM, T);
    for (int j = first; j <= last; j++) {
        __syncthreads();
        bring(ks, k + (b * T * G + g) * P, (i64)G * P, j * WN, WN, T);
        bring(vs, v + (b * T * G + g) * P, (i64)G * P, j * WN, WN, T);
        __syncthreads();
        rows_by_rows<WN>(s, qs, row, ks);
        rows_by_rows<WN>(d, os, row, vs);
#pragma unroll
        for (int x = 0; x < WN / 2; x++) s[x] = exp2_fast(fmaf(s[x], scale * LOG2E, -ls[x >> 1 & 1]));
        mask_rows(s, j * WN, 0.f, t, lo[0], t + 8, lo[1]);
#pragma unroll
        for (int x = 0; x < WN / 2; x++) s[x] *= d[x] - dl[x >> 1 & 1];
        shares_by_rows<PP, WN>(o, s, ks, 0);
    }
    store_pair(dq + ((b * T + t) * H + h) * P, (i64)H * P, o, scale, scale, t < T, t + 8 < T, P);
}
// Blocks of 64 keys of one group and, of wide heads, one half of the columns.
WARPS_KERNEL attn_dkv_warps(const bf16* q, const bf16* k, const bf16* v, const int* pos, const float* lse, const bf16* dout, const float* delta, bf16* dk, bf16* dv, int T, int H, int G, float scale, int window) {
    __shared__ float ls[WN], dl[WN];
    __shared__ int lo[WN];
    bf16 *ks = (bf16*)smem, *vs = ks + WM * LD, *qs = vs + WM * LD, *os = qs + WN * LD;
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * 16, g = blockIdx.y % G, column = blockIdx.y / G * PC, c0 = blockIdx.x * WM;
    i64 b = blockIdx.z;
    int key = c0 + row + (lane >> 2);
    float ak[PC / 2], av[PC / 2], s[WN / 2], d[WN / 2];
#pragma unroll
    for (int x = 0; x < PC / 2; x++) ak[x] = av[x] = 0;
    bring(ks, k + (b * T * G + g) * P, (i64)G * P, c0, WM, T);
    bring(vs, v + (b * T * G + g) * P, (i64)G * P, c0, WM, T);
    int end = T;
    if (window < T && c0 + WM - 1 + window < T) end = c0 + WM - 1 + window;
    for (int h = g * (H / G); h < (g + 1) * (H / G); h++)
        for (int t0 = c0 / WN * WN; t0 < end; t0 += WN) {
            // Queries that see one of the keys, known to all threads.
            int from = 0x7fffffff;
            if (threadIdx.x < WN && t0 + threadIdx.x < T) from = first_seen(t0 + threadIdx.x, pos, b * T + t0 + threadIdx.x, window);
            if (!__syncthreads_or(from < c0 + WM)) continue;
            bring(qs, q + (b * T * H + h) * P, (i64)H * P, t0, WN, T);
            bring(os, dout + (b * T * H + h) * P, (i64)H * P, t0, WN, T);
            if (threadIdx.x < WN) {
                int t = t0 + threadIdx.x;
                i64 at = (b * H + h) * T + t;
                ls[threadIdx.x] = t < T ? lse[at] * LOG2E : INF;
                dl[threadIdx.x] = t < T ? delta[at] : 0.f;
                lo[threadIdx.x] = from;
            }
            __syncthreads();
            rows_by_rows<WN>(s, ks, row, qs);
            rows_by_rows<WN>(d, vs, row, os);
#pragma unroll
            for (int x = 0; x < WN / 2; x++) {
                int e = 8 * (x >> 2) + 2 * (lane & 3) + (x & 1), c = key + 8 * (x >> 1 & 1);
                s[x] = t0 + e >= c && lo[e] <= c ? exp2_fast(fmaf(s[x], scale * LOG2E, -ls[e])) : 0.f;
                d[x] = s[x] * (d[x] - dl[e]);
            }
            shares_by_rows<PC, WN>(av, s, os, column);
            shares_by_rows<PC, WN>(ak, d, qs, column);
        }
    i64 at = ((b * T + key) * G + g) * P + column;
    store_pair(dk + at, (i64)G * P, ak, scale, scale, key < T, key + 8 < T, P - column);
    store_pair(dv + at, (i64)G * P, av, 1.f, 1.f, key < T, key + 8 < T, P - column);
}
#endif

