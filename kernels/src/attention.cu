// Tiles of 32 rows against tiles of BN rows, 8 threads a row, all in f32; scores never leave the block. P: head width; NJ: columns of it
// that one thread accumulates.
#ifndef P
#define P 128
#endif
#ifndef BN
#define BN 32
#endif
#define BM 32
#define LDP (P + 1)
#define NC (BN / 8)
#define NJ ((P + 7) / 8)
extern __shared__ float smem[];

// delta[b,h,t] = out . dout: one warp a row.
KERNEL attn_delta(const TA4* out, const TA6* dout, float* delta, i64 rows, int T, int H) {
    i64 row = global_thread() >> 5;
    if (row >= rows) return;
    float s = 0;
    for (int i = threadIdx.x & 31; i < P; i += 32) s += ld(out, row * P + i) * ld(dout, row * P + i);
    s = warp_sum(s);
    if ((threadIdx.x & 31) == 0) {
        i64 bt = row / H;
        delta[(bt / T * H + row % H) * T + bt % T] = s;
    }
}

#if !defined(TENSOR) && !defined(WARPS)
template <class T> __device__ __forceinline__ void tile(float* to, const T* from, i64 stride, int first, int rows, int limit) {
    for (int i = threadIdx.x; i < rows * P; i += 256) {
        int r = i / P, c = i % P;
        to[r * LDP + c] = first + r < limit ? ld(from, (first + r) * stride + c) : 0.f;
    }
}
__device__ __forceinline__ bool seen(int q, int s, int pos, int window) { int d = q - s; return d >= 0 && d <= pos && d < window; }

KERNEL attn_fwd(const TA0* q, const TA1* k, const TA2* v, const int* pos, const int* slot, TR0* out, float* lse, int T, int S, int H, int G, float scale, int window) {
    float *qs = smem, *ks = qs + BM * LDP, *ps = ks + BN * LDP;
    int r = threadIdx.x >> 3, l = threadIdx.x & 7, h = blockIdx.y, g = h / (H / G), t0 = blockIdx.x * BM, t = t0 + r, s0 = slot ? slot[0] : 0;
    i64 b = blockIdx.z;
    const TA1* kb = k + (b * S * G + g) * P;
    const TA2* vb = v + (b * S * G + g) * P;
    tile(qs, q + (b * T * H + h) * P, (i64)H * P, t0, BM, T);
    int reach = t < T ? (pos ? pos[b * T + t] : 0x7fffffff) : -1;
    float m = -INF, sum = 0, acc[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) acc[j] = 0;
    int last = s0 + (t0 + BM < T ? t0 + BM : T), first = s0 + t0 - window + 1;
    if (last > S) last = S;
    if (window == 0x7fffffff || first < 0) first = 0;
    for (int c0 = first / BN * BN; c0 < last; c0 += BN) {
        __syncthreads();
        tile(ks, kb, (i64)G * P, c0, BN, last);
        __syncthreads();
        float s[NC], top = -INF;
#pragma unroll
        for (int j = 0; j < NC; j++) s[j] = 0;
        for (int i = 0; i < P; i++) {
            float qv = qs[r * LDP + i];
#pragma unroll
            for (int j = 0; j < NC; j++) s[j] += qv * ks[(l + 8 * j) * LDP + i];
        }
#pragma unroll
        for (int j = 0; j < NC; j++) {
            int c = c0 + l + 8 * j;
            s[j] = c < S && seen(s0 + t, c, reach, window) ? s[j] * scale : -INF;
            top = fmaxf(top, s[j]);
        }
        for (int x = 4; x; x >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, x));
        float next = fmaxf(m, top), fix = next == -INF ? 1.f : expf(m - next), part = 0;
#pragma unroll
        for (int j = 0; j < NC; j++) {
            float p = next == -INF ? 0.f : expf(s[j] - next);
            ps[r * (BN + 1) + l + 8 * j] = p;
            part += p;
        }
        for (int x = 4; x; x >>= 1) part += __shfl_xor_sync(FULL, part, x);
        sum = sum * fix + part;
        m = next;
        __syncthreads();
        tile(ks, vb, (i64)G * P, c0, BN, last);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < NJ; j++) acc[j] *= fix;
        for (int c = 0; c < BN; c++) {
            float p = ps[r * (BN + 1) + c];
#pragma unroll
            for (int j = 0; j < NJ; j++) if (l + 8 * j < P) acc[j] += p * ks[c * LDP + l + 8 * j];
        }
    }
    if (t < T) {
        float inv = sum > 0 ? 1.f / sum : 0.f;
#pragma unroll
        for (int j = 0; j < NJ; j++) if (l + 8 * j < P) st(out, ((b * T + t) * H + h) * P + l + 8 * j, acc[j] * inv);
        if (l == 0) lse[(b * H + h) * T + t] = m + logf(sum);
    }
}

KERNEL attn_dq(const TA0* q, const TA1* k, const TA2* v, const int* pos, const float* lse, const TA6* dout, const float* delta, TR0* dq, int T, int H, int G, float scale, int window) {
    float *qs = smem, *os = qs + BM * LDP, *ks = os + BM * LDP, *ps = ks + BN * LDP;
    int r = threadIdx.x >> 3, l = threadIdx.x & 7, h = blockIdx.y, g = h / (H / G), t0 = blockIdx.x * BM, t = t0 + r;
    i64 b = blockIdx.z;
    const TA1* kb = k + (b * T * G + g) * P;
    const TA2* vb = v + (b * T * G + g) * P;
    tile(qs, q + (b * T * H + h) * P, (i64)H * P, t0, BM, T);
    tile(os, dout + (b * T * H + h) * P, (i64)H * P, t0, BM, T);
    bool on = t < T;
    int reach = on ? (pos ? pos[b * T + t] : 0x7fffffff) : -1;
    float ls = on ? lse[(b * H + h) * T + t] : 0.f, dl = on ? delta[(b * H + h) * T + t] : 0.f, acc[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) acc[j] = 0;
    int last = t0 + BM < T ? t0 + BM : T, first = t0 - window + 1;
    if (window == 0x7fffffff || first < 0) first = 0;
    for (int c0 = first / BN * BN; c0 < last; c0 += BN) {
        __syncthreads();
        tile(ks, vb, (i64)G * P, c0, BN, T);
        __syncthreads();
        float s[NC], dp[NC];
#pragma unroll
        for (int j = 0; j < NC; j++) s[j] = dp[j] = 0;
        for (int i = 0; i < P; i++) {
            float ov = os[r * LDP + i];
#pragma unroll
            for (int j = 0; j < NC; j++) dp[j] += ov * ks[(l + 8 * j) * LDP + i];
        }
        __syncthreads();
        tile(ks, kb, (i64)G * P, c0, BN, T);
        __syncthreads();
        for (int i = 0; i < P; i++) {
            float qv = qs[r * LDP + i];
#pragma unroll
            for (int j = 0; j < NC; j++) s[j] += qv * ks[(l + 8 * j) * LDP + i];
        }
#pragma unroll
        for (int j = 0; j < NC; j++) {
            int c = c0 + l + 8 * j;
            float p = c < T && seen(t, c, reach, window) ? expf(s[j] * scale - ls) : 0.f;
            ps[r * (BN + 1) + l + 8 * j] = p * (dp[j] - dl) * scale;
        }
        __syncwarp();
        for (int c = 0; c < BN; c++) {
            float p = ps[r * (BN + 1) + c];
#pragma unroll
            for (int j = 0; j < NJ; j++) if (l + 8 * j < P) acc[j] += p * ks[c * LDP + l + 8 * j];
        }
    }
    if (on)
#pragma unroll
        for (int j = 0; j < NJ; j++) if (l + 8 * j < P) st(dq, ((b * T + t) * H + h) * P + l + 8 * j, acc[j]);
}

// One block a tile of keys of one group; walks the heads of the group and the queries that see the tile. No atomics.
KERNEL attn_dkv(const TA0* q, const TA1* k, const TA2* v, const int* pos, const float* lse, const TA6* dout, const float* delta, TR1* dk, TR2* dv, int T, int H, int G, float scale, int window) {
    float *ks = smem, *vs = ks + BM * LDP, *qs = vs + BM * LDP, *os = qs + BN * LDP, *ps = os + BN * LDP, *ds = ps + BM * (BN + 1);
    int r = threadIdx.x >> 3, l = threadIdx.x & 7, g = blockIdx.y, c0 = blockIdx.x * BM, c = c0 + r;
    i64 b = blockIdx.z;
    tile(ks, k + (b * T * G + g) * P, (i64)G * P, c0, BM, T);
    tile(vs, v + (b * T * G + g) * P, (i64)G * P, c0, BM, T);
    float ak[NJ], av[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) ak[j] = av[j] = 0;
    int last = T;
    if (window != 0x7fffffff && (i64)c0 + BM + window < T) last = c0 + BM + window;
    for (int h = g * (H / G); h < (g + 1) * (H / G); h++) {
        for (int t0 = c0 / BN * BN; t0 < last; t0 += BN) {
            __syncthreads();
            tile(qs, q + (b * T * H + h) * P, (i64)H * P, t0, BN, T);
            tile(os, dout + (b * T * H + h) * P, (i64)H * P, t0, BN, T);
            __syncthreads();
            float s[NC], dp[NC];
#pragma unroll
            for (int j = 0; j < NC; j++) s[j] = dp[j] = 0;
            for (int i = 0; i < P; i++) {
                float kv = ks[r * LDP + i], vv = vs[r * LDP + i];
#pragma unroll
                for (int j = 0; j < NC; j++) {
                    s[j] += kv * qs[(l + 8 * j) * LDP + i];
                    dp[j] += vv * os[(l + 8 * j) * LDP + i];
                }
            }
#pragma unroll
            for (int j = 0; j < NC; j++) {
                int t = t0 + l + 8 * j;
                float p = 0, d = 0;
                if (t < T && c < T && seen(t, c, pos ? pos[b * T + t] : 0x7fffffff, window)) {
                    i64 at = (b * H + h) * T + t;
                    p = expf(s[j] * scale - lse[at]);
                    d = p * (dp[j] - delta[at]) * scale;
                }
                ps[r * (BN + 1) + l + 8 * j] = p;
                ds[r * (BN + 1) + l + 8 * j] = d;
            }
            __syncwarp();
            for (int x = 0; x < BN; x++) {
                float p = ps[r * (BN + 1) + x], d = ds[r * (BN + 1) + x];
#pragma unroll
                for (int j = 0; j < NJ; j++)
                    if (l + 8 * j < P) {
                        av[j] += p * os[x * LDP + l + 8 * j];
                        ak[j] += d * qs[x * LDP + l + 8 * j];
                    }
            }
        }
    }
    if (c < T)
#pragma unroll
        for (int j = 0; j < NJ; j++)
            if (l + 8 * j < P) {
                i64 e = ((b * T + c) * G + g) * P + l + 8 * j;
                st(dk, e, ak[j]);
                st(dv, e, av[j]);
            }
}
#endif

#if defined(TENSOR) || defined(WARPS)
#define LOG2E 1.4426950408889634f
// Position q of a query and the first key it sees.
__device__ __forceinline__ int first_seen(int q, const int* pos, i64 at, int window) {
    int back = window - 1 < q ? window - 1 : q;
    if (pos) back = pos[at] < back ? pos[at] : back;
    return q - back;
}
// The smallest of first_seen over `rows` queries from t0, by one warp.
__device__ __forceinline__ int first_of_tile(int s0, int t0, int rows, int T, const int* pos, i64 row, int window) {
    if (!pos) return first_seen(s0 + t0, pos, 0, window);
    int low = 0x7fffffff;
    for (int t = t0 + (threadIdx.x & 31); t < t0 + rows && t < T; t += 32) low = min(low, first_seen(s0 + t, pos, row + t, window));
    return __reduce_min_sync(FULL, low);
}
// Scores of two rows against columns c0.. that do not see their keys become `what`.
template <int N> __device__ __forceinline__ void mask_rows(float (&s)[N], int c0, float what, int q0, int lo0, int q1, int lo1) {
    int c = c0 + 2 * (threadIdx.x & 3);
    u32 w0 = q0 - lo0, w1 = q1 - lo1;
#pragma unroll
    for (int x = 0; x < N / 4; x++)
#pragma unroll
        for (int y = 0; y < 2; y++) {
            if ((u32)(c + 8 * x + y - lo0) > w0) s[4 * x + y] = what;
            if ((u32)(c + 8 * x + y - lo1) > w1) s[4 * x + 2 + y] = what;
        }
}
// Scores become shares of the maximum so far; sl: factor on scores, times log2 e. `sum` is over this lane's columns; what was summed under
// the maximum before is to be multiplied by `fix`.
template <int N> __device__ __forceinline__ void soften(float (&s)[N], float (&top)[2], float (&sum)[2], float (&fix)[2], float sl) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = top[r];
#pragma unroll
        for (int x = 0; x < N / 4; x++) a = fmaxf(a, fmaxf(s[4 * x + 2 * r], s[4 * x + 2 * r + 1]));
        a = fmaxf(a, __shfl_xor_sync(FULL, a, 1));
        a = fmaxf(a, __shfl_xor_sync(FULL, a, 2));
        float off = a == -INF ? 0.f : a * sl, part = 0;
        fix[r] = exp2_fast(top[r] * sl - off);
        top[r] = a;
#pragma unroll
        for (int x = 0; x < N / 4; x++)
#pragma unroll
            for (int y = 0; y < 2; y++) {
                float e = exp2_fast(fmaf(s[4 * x + 2 * r + y], sl, -off));
                s[4 * x + 2 * r + y] = e;
                part += e;
            }
        sum[r] = sum[r] * fix[r] + part;
    }
}
#endif

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

// The same on sm_90a in bf16: warpgroup products, tiles brought by the copy engine. Head widths are multiples of 8, filled up with zeros to
// HB blocks of 64. Warpgroup 0 brings tiles, the others compute.
#if defined(TENSOR) && defined(HOPPER)
#define HB ((P + 63) / 64)
// Rows of a tile of queries, and of the tiles of keys it walks.
#define QM 128
#define KN (HB > 2 ? 64 : 128)

template <int N> __device__ __forceinline__ void to_operand(u32 (&a)[N / 2], const float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) a[i] = pack(d[2 * i], d[2 * i + 1]);
}

#define STAGES 2
#define Q_BYTES (HB * QM * 128)
#define K_BYTES (HB * KN * 128)
// Tiles in order: sections of heads whose keys stay in the cache; within one the longest tiles first.
__device__ __forceinline__ void tile_of(int i, int tiles, int heads, int section, int& m, int& head) {
    int s = i / (section * tiles), r = i - s * section * tiles, n = min(section, heads - s * section);
    m = tiles - 1 - r / n;
    head = s * section + r % n;
}
extern "C" __global__ void __launch_bounds__(384, 1) attn_fwd_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const int* pos, const int* slot, bf16* out, float* lse, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 qs = base, ks = qs + Q_BYTES, vs = ks + STAGES * K_BYTES, bars = vs + STAGES * K_BYTES;
    u32 q_full = bars, q_empty = bars + 8, k_full = bars + 16, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, s0 = slot ? slot[0] : 0, tiles = (T + QM - 1) / QM, all = tiles * B * H;
    if (threadIdx.x == 0) {
        bar_init(q_full, 1);
        bar_init(q_empty, 8);
        for (int i = 0; i < STAGES; i++) {
            bar_init(k_full + 8 * i, 1);
            bar_init(k_empty + 8 * i, 8);
            bar_init(v_full + 8 * i, 1);
            bar_init(v_empty + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x >= 32) return;
        int n = 0, stage = 0, phase = 0;
        for (int i = blockIdx.x; i < all; i += gridDim.x, n++) {
            int m, head;
            tile_of(i, tiles, B * H, section, m, head);
            int b = head / H, h = head % H, g = h / (H / G), t0 = m * QM;
            int last = (s0 + min(t0 + QM, T) - 1) / KN, first = first_of_tile(s0, t0, QM, T, pos, (i64)b * T, window) / KN;
            if (lane == 0) {
                bar_wait(q_empty, (n & 1) ^ 1);
                bar_expect(q_full, Q_BYTES);
                for (int x = 0; x < HB; x++) copy_box(qs + x * QM * 128, &mq, q_full, 64 * x, t0, h, b);
                for (int j = last; j >= first; j--) {
                    bar_wait(k_empty + 8 * stage, phase ^ 1);
                    bar_expect(k_full + 8 * stage, K_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(ks + stage * K_BYTES + x * KN * 128, &mk, k_full + 8 * stage, 64 * x, j * KN, g, b);
                    bar_wait(v_empty + 8 * stage, phase ^ 1);
                    bar_expect(v_full + 8 * stage, K_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(vs + stage * K_BYTES + x * KN * 128, &mv, v_full + 8 * stage, 64 * x, j * KN, g, b);
                    if (++stage == STAGES) { stage = 0; phase ^= 1; }
                }
            }
            __syncwarp();
        }
        return;
    }
    registers_more<232>();
    int w = group - 1, warp = (threadIdx.x >> 5) & 3, row = 64 * w + 16 * warp + (lane >> 2);
    float sl = scale * LOG2E;
    // Whose turn it is to issue products: a warpgroup computes its softmax under the products of the other.
    if (w == 1) named_arrive(1, 256);
    int n = 0, stage = 0, phase = 0;
    for (int i = blockIdx.x; i < all; i += gridDim.x, n++) {
        int m_tile, head;
        tile_of(i, tiles, B * H, section, m_tile, head);
        int b = head / H, h = head % H, t0 = m_tile * QM;
        int last = (s0 + min(t0 + QM, T) - 1) / KN, first = first_of_tile(s0, t0, QM, T, pos, (i64)b * T, window) / KN;
        int t = t0 + row, q0 = s0 + t, q1 = q0 + 8;
        int lo0 = first_seen(q0, t < T ? pos : 0, (i64)b * T + t, window), lo1 = first_seen(q1, t + 8 < T ? pos : 0, (i64)b * T + t + 8, window);
        // Keys that every row of this warp sees lie between the two.
        int sure_from = __reduce_max_sync(FULL, max(lo0, lo1)), sure_to = s0 + t0 + 64 * w + 16 * warp;
        float o[32 * HB], s[KN / 2], top[2] = {-INF, -INF}, sum[2] = {0, 0}, fix[2];
        u32 p[KN / 4];
        auto scores = [&](int st) {
#pragma unroll
            for (int kk = 0; kk < 4 * HB; kk++)
                mma<0, 0>(s, operand(qs + (kk >> 2) * QM * 128 + w * 8192 + (kk & 3) * 32), operand(ks + st * K_BYTES + (kk >> 2) * KN * 128 + (kk & 3) * 32), kk > 0);
        };
        // Slots after those of the queries may hold anything, which no share of 0 makes 0: each warpgroup clears them for itself.
        auto clear = [&](int st, int j) {
            int rows = s0 + min(t0 + QM, T) - j * KN;
            if (!slot || rows >= KN) return;
            for (int x = threadIdx.x & 127; x < (KN - rows) * 8 * HB; x += 128) {
                u32 at = vs + st * K_BYTES + (x >> 3) % HB * KN * 128 + (rows + (x >> 3) / HB) * 128 + (x & 7) * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
            }
            fence_shared();
            named_wait(3 + w, 128);
        };
        auto values = [&](int st, int add) {
#pragma unroll
            for (int kk = 0; kk < KN / 16; kk++) mma<1>(o, p + 4 * kk, operand(vs + st * K_BYTES + kk * 2048, KN * 128), add || kk > 0);
        };
        auto softmax = [&](int j) {
            int c0 = j * KN;
            if (c0 + KN - 1 > sure_to || c0 < sure_from) mask_rows(s, c0, -INF, q0, lo0, q1, lo1);
            soften(s, top, sum, fix, sl);
        };
        bar_wait(q_full, n & 1);
        bar_wait(k_full + 8 * stage, phase);
        named_wait(1 + w, 256);
        mma_begin();
        scores(stage);
        mma_commit();
        named_arrive(2 - w, 256);
        mma_wait<0>();
        pin(s);
        warp_arrive(k_empty + 8 * stage);
        softmax(last);
        to_operand(p, s);
        int add = 0;
        for (int j = last - 1; j >= first; j--) {
            int before = stage, before_phase = phase;
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
            bar_wait(k_full + 8 * stage, phase);
            named_wait(1 + w, 256);
            pin(p);
            pin(s);
            pin(o);
            mma_begin();
            scores(stage);
            mma_commit();
            bar_wait(v_full + 8 * before, before_phase);
            clear(before, j + 1);
            values(before, add);
            add = 1;
            mma_commit();
            named_arrive(2 - w, 256);
            mma_wait<1>();
            pin(s);
            warp_arrive(k_empty + 8 * stage);
            softmax(j);
            mma_wait<0>();
            pin(o);
            warp_arrive(v_empty + 8 * before);
            to_operand(p, s);
#pragma unroll
            for (int x = 0; x < 8 * HB; x++) {
                o[4 * x] *= fix[0];
                o[4 * x + 1] *= fix[0];
                o[4 * x + 2] *= fix[1];
                o[4 * x + 3] *= fix[1];
            }
        }
        warp_arrive(q_empty);
        bar_wait(v_full + 8 * stage, phase);
        clear(stage, first);
        pin(p);
        pin(o);
        mma_begin();
        values(stage, add);
        mma_commit();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        }
        mma_wait<0>();
        pin(o);
        warp_arrive(v_empty + 8 * stage);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
        float f0 = sum[0] > 0 ? 1.f / sum[0] : 0.f, f1 = sum[1] > 0 ? 1.f / sum[1] : 0.f;
        if ((lane & 3) == 0) {
            if (t < T) lse[(i64)head * T + t] = top[0] * scale + logf(sum[0]);
            if (t + 8 < T) lse[(i64)head * T + t + 8] = top[1] * scale + logf(sum[1]);
        }
        store_rows(out + (((i64)b * T + t) * H + h) * P, (i64)H * P, o, f0, f1, t < T, t + 8 < T, P);
    }
    if (w == 0) named_wait(1, 256);
}

// One warp 32 / L rows, L lanes a row, 8 elements a lane.
#define DELTA_LANES (P > 128 ? 32 : P > 64 ? 16 : P > 32 ? 8 : 4)
KERNEL attn_delta_tc(const bf16* out, const bf16* dout, float* delta, i64 rows, int T, int H) {
    i64 row = global_thread() / DELTA_LANES;
    int c = threadIdx.x % DELTA_LANES * 8;
    float s = 0;
    if (row < rows && c < P) {
        uint4 x = *(const uint4*)(out + row * P + c), y = *(const uint4*)(dout + row * P + c);
        u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            s += __uint_as_float(xs[i] << 16) * __uint_as_float(ys[i] << 16) + __uint_as_float(xs[i] & 0xffff0000u) * __uint_as_float(ys[i] & 0xffff0000u);
    }
#pragma unroll
    for (int m = DELTA_LANES / 2; m; m >>= 1) s += __shfl_xor_sync(FULL, s, m);
    if (row < rows && threadIdx.x % DELTA_LANES == 0) {
        i64 bt = row / H;
        delta[(bt / T * H + row % H) * T + bt % T] = s;
    }
}

#if HB <= 2
// dq: blocks of 128 queries over tiles of 128 keys.
#define T_BYTES (HB * 128 * 128)
extern "C" __global__ void __launch_bounds__(384, 1) attn_dq_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const __grid_constant__ TensorMap mo, const int* pos, const float* lse, const float* delta, bf16* dq, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 qs = base, os = qs + T_BYTES, ks = os + T_BYTES, vs = ks + 2 * T_BYTES, bars = vs + 2 * T_BYTES;
    u32 q_full = bars, k_full = bars + 8, k_empty = bars + 24, v_full = bars + 40, v_empty = bars + 56;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, tiles = (T + 127) / 128, m, head;
    tile_of(blockIdx.x, tiles, B * H, section, m, head);
    int b = head / H, h = head % H, g = h / (H / G), t0 = m * 128;
    int last = (min(t0 + 128, T) - 1) / 128, first = first_of_tile(0, t0, 128, T, pos, (i64)b * T, window) / 128;
    if (threadIdx.x == 0) {
        bar_init(q_full, 1);
        for (int i = 0; i < 2; i++) {
            bar_init(k_full + 8 * i, 1);
            bar_init(k_empty + 8 * i, 8);
            bar_init(v_full + 8 * i, 1);
            bar_init(v_empty + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x != 0) return;
        bar_expect(q_full, 2 * T_BYTES);
        for (int x = 0; x < HB; x++) {
            copy_box(qs + x * 16384, &mq, q_full, 64 * x, t0, h, b);
            copy_box(os + x * 16384, &mo, q_full, 64 * x, t0, h, b);
        }
        int stage = 0, phase = 0;
        for (int j = last; j >= first; j--) {
            bar_wait(k_empty + 8 * stage, phase ^ 1);
            bar_expect(k_full + 8 * stage, T_BYTES);
            for (int x = 0; x < HB; x++) copy_box(ks + stage * T_BYTES + x * 16384, &mk, k_full + 8 * stage, 64 * x, j * 128, g, b);
            bar_wait(v_empty + 8 * stage, phase ^ 1);
            bar_expect(v_full + 8 * stage, T_BYTES);
            for (int x = 0; x < HB; x++) copy_box(vs + stage * T_BYTES + x * 16384, &mv, v_full + 8 * stage, 64 * x, j * 128, g, b);
            if (++stage == 2) { stage = 0; phase ^= 1; }
        }
        return;
    }
    registers_more<232>();
    int w = group - 1, warp = (threadIdx.x >> 5) & 3, q0 = t0 + 64 * w + 16 * warp + (lane >> 2), q1 = q0 + 8;
    float sl = scale * LOG2E, ls[2], dl[2];
    i64 at = (i64)head * T + q0;
    ls[0] = q0 < T ? lse[at] * LOG2E : INF;
    ls[1] = q1 < T ? lse[at + 8] * LOG2E : INF;
    dl[0] = q0 < T ? delta[at] : 0.f;
    dl[1] = q1 < T ? delta[at + 8] : 0.f;
    int lo0 = first_seen(q0, q0 < T ? pos : 0, (i64)b * T + q0, window), lo1 = first_seen(q1, q1 < T ? pos : 0, (i64)b * T + q1, window);
    int sure_from = __reduce_max_sync(FULL, max(lo0, lo1)), sure_to = t0 + 64 * w + 16 * warp;
    float o[32 * HB], s[64], dp[64];
    u32 df[32];
#pragma unroll
    for (int x = 0; x < 32 * HB; x++) o[x] = 0;
    int stage = 0, phase = 0;
    bar_wait(q_full, 0);
    for (int j = last; j >= first; j--) {
        u32 kt = ks + stage * T_BYTES, vt = vs + stage * T_BYTES, pf[32];
        bar_wait(k_full + 8 * stage, phase);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(s, operand(qs + (kk >> 2) * 16384 + w * 8192 + (kk & 3) * 32), operand(kt + (kk >> 2) * 16384 + (kk & 3) * 32), kk > 0);
        mma_commit();
        bar_wait(v_full + 8 * stage, phase);
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(dp, operand(os + (kk >> 2) * 16384 + w * 8192 + (kk & 3) * 32), operand(vt + (kk >> 2) * 16384 + (kk & 3) * 32), kk > 0);
        mma_commit();
        mma_wait<1>();
        pin(s);
        int c0 = j * 128;
#pragma unroll
        for (int x = 0; x < 16; x++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int y = 0; y < 2; y++) s[4 * x + 2 * r + y] = exp2_fast(fmaf(s[4 * x + 2 * r + y], sl, -ls[r]));
        if (c0 + 127 > sure_to || c0 < sure_from) mask_rows(s, c0, 0.f, q0, lo0, q1, lo1);
        to_operand(pf, s);
        mma_wait<0>();
        pin(dp);
        warp_arrive(v_empty + 8 * stage);
#pragma unroll
        for (int x = 0; x < 32; x++) df[x] = pack(low(pf[x]) * (dp[2 * x] - dl[x & 1]), high(pf[x]) * (dp[2 * x + 1] - dl[x & 1]));
        pin(df);
        pin(o);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 8; kk++) mma<1>(o, df + 4 * kk, operand(kt + kk * 2048, 16384), 1);
        mma_commit();
        mma_wait<0>();
        pin(o);
        warp_arrive(k_empty + 8 * stage);
        if (++stage == 2) { stage = 0; phase ^= 1; }
    }
    store_rows(dq + (((i64)b * T + q0) * H + h) * P, (i64)H * P, o, scale, scale, q0 < T, q1 < T, P);
}

// dk, dv: blocks of 128 keys of one group over tiles of 64 queries of each of its heads; the products are transposed, so that keys are
// rows. The warp that brings tiles also writes each query's log-sum-exp, delta and first key, and says where the tile begins; -1 ends.
// With SUMS, heads of two blocks of 64: the block's share of dq, unscaled, is added to sums too, in whatever order blocks run. Each
// warpgroup adds one block of 64 columns, from shares that both have written to shared memory, keys as rows. The layout of sums is
// [B H tile column-block] and then that of the registers of a warpgroup, which go there by way of shared memory.
#ifdef SUMS
#define KV_STAGES 2
#else
#define KV_STAGES 3
#endif
#define W_BYTES (HB * 64 * 128)
#define AUX 1024
extern "C" __global__ void __launch_bounds__(384, 1) attn_dkv_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const __grid_constant__ TensorMap mo, const int* pos, const float* lse, const float* delta, bf16* dk, bf16* dv, float* sums, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 ks = base, vs = ks + T_BYTES, qs = vs + T_BYTES, os = qs + KV_STAGES * W_BYTES, aux = os + KV_STAGES * W_BYTES, bars = aux + KV_STAGES * AUX, shares = bars + 1024, sent = shares + 32768;
    char* aux_at = (char*)smem + (aux - shared_address(smem));
    u32 kv_full = bars, full = bars + 8, empty = full + 8 * KV_STAGES;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, tiles = (T + 127) / 128, m, head;
    tile_of(blockIdx.x, tiles, B * G, section, m, head);
    int b = head / G, g = head % G, c0 = (tiles - 1 - m) * 128;
    if (threadIdx.x == 0) {
        bar_init(kv_full, 1);
        for (int i = 0; i < KV_STAGES; i++) {
            bar_init(full + 8 * i, 32);
            bar_init(empty + 8 * i, 256);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x >= 32) return;
        if (lane == 0) {
            bar_expect(kv_full, 2 * T_BYTES);
            for (int x = 0; x < HB; x++) {
                copy_box(ks + x * 16384, &mk, kv_full, 64 * x, c0, g, b);
                copy_box(vs + x * 16384, &mv, kv_full, 64 * x, c0, g, b);
            }
        }
        int stage = 0, phase = 0, end = T;
        if (window < T && c0 + 127 + window < T) end = c0 + 127 + window;
        // Tiles with a query that sees one of the keys, one bit each, for as many tiles as there is room for.
        u32* seen_by = (u32*)(aux_at + KV_STAGES * AUX + 256);
        if (pos)
            for (int w = 0; w < 192 && c0 + w * 2048 < end; w++) {
                u32 bits = 0;
#pragma unroll 4
                for (int i = 0; i < 32; i++) {
                    int t = c0 + w * 2048 + i * 64 + lane;
                    bool sees = t < end && first_seen(t, pos, (i64)b * T + t, window) <= c0 + 127;
                    t += 32;
                    sees |= t < end && first_seen(t, pos, (i64)b * T + t, window) <= c0 + 127;
                    bits |= (u32)__any_sync(FULL, sees) << i;
                }
                if (lane == 0) seen_by[w] = bits;
            }
        __syncwarp();
        for (int h = g * (H / G); h < (g + 1) * (H / G); h++)
            for (int t0 = c0; t0 < end; t0 += 64) {
                int i = (t0 - c0) >> 6;
                if (pos && i < 192 * 32 && !(seen_by[i >> 5] >> (i & 31) & 1)) continue;
                int low[2], most = 0;
                float l[2], d[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int t = t0 + lane + 32 * i;
                    bool on = t < T;
                    i64 at = ((i64)b * H + h) * T + t;
                    low[i] = first_seen(t, on ? pos : 0, (i64)b * T + t, window);
                    l[i] = on ? lse[at] * LOG2E : INF;
                    d[i] = on ? delta[at] : 0.f;
                    most = max(most, low[i]);
                }
                most = __reduce_max_sync(FULL, most);
                bar_wait(empty + 8 * stage, phase ^ 1);
                float* to = (float*)(aux_at + stage * AUX);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    to[lane + 32 * i] = l[i];
                    to[64 + lane + 32 * i] = d[i];
                    ((int*)to)[128 + lane + 32 * i] = low[i];
                }
                if (lane == 0) {
                    ((int*)to)[192] = t0;
                    ((int*)to)[193] = most;
                    ((int*)to)[194] = h;
                    bar_expect(full + 8 * stage, 2 * W_BYTES);
                    for (int x = 0; x < HB; x++) {
                        copy_box(qs + stage * W_BYTES + x * 8192, &mq, full + 8 * stage, 64 * x, t0, h, b);
                        copy_box(os + stage * W_BYTES + x * 8192, &mo, full + 8 * stage, 64 * x, t0, h, b);
                    }
                } else bar_arrive(full + 8 * stage);
                if (++stage == KV_STAGES) { stage = 0; phase ^= 1; }
            }
        bar_wait(empty + 8 * stage, phase ^ 1);
        if (lane == 0) *(int*)(aux_at + stage * AUX + 768) = -1;
        bar_arrive(full + 8 * stage);
        return;
    }
    registers_more<232>();
    int w = group - 1, warp = (threadIdx.x >> 5) & 3, k0 = c0 + 64 * w + 16 * warp + (lane >> 2), k1 = k0 + 8;
    int least = c0 + 64 * w + 16 * warp, most = least + 15;
    float sl = scale * LOG2E, ak[32 * HB], av[32 * HB], s[32], dp[32];
    u32 pf[16], df[16];
#pragma unroll
    for (int x = 0; x < 32 * HB; x++) ak[x] = av[x] = 0;
    int stage = 0, phase = 0, turn = 0;
    auto scores = [&](int st) {
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(s, operand(ks + (kk >> 2) * 16384 + w * 8192 + (kk & 3) * 32), operand(qs + st * W_BYTES + (kk >> 2) * 8192 + (kk & 3) * 32), kk > 0);
    };
    bar_wait(kv_full, 0);
    for (;;) {
        bar_wait(full + 8 * stage, phase);
        int t0 = *(int*)(aux_at + stage * AUX + 768);
        if (t0 < 0) break;
        mma_begin();
        scores(stage);
        mma_commit();
        const float* of = (const float*)(aux_at + stage * AUX) + 2 * (lane & 3);
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(dp, operand(vs + (kk >> 2) * 16384 + w * 8192 + (kk & 3) * 32), operand(os + stage * W_BYTES + (kk >> 2) * 8192 + (kk & 3) * 32), kk > 0);
        mma_commit();
        mma_wait<1>();
        pin(s);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            float2 l = *(const float2*)(of + 8 * x);
            s[4 * x] = exp2_fast(fmaf(s[4 * x], sl, -l.x));
            s[4 * x + 1] = exp2_fast(fmaf(s[4 * x + 1], sl, -l.y));
            s[4 * x + 2] = exp2_fast(fmaf(s[4 * x + 2], sl, -l.x));
            s[4 * x + 3] = exp2_fast(fmaf(s[4 * x + 3], sl, -l.y));
        }
        if (t0 < most || ((const int*)(aux_at + stage * AUX))[193] > least) {
#pragma unroll
            for (int x = 0; x < 8; x++) {
                int2 from = *(const int2*)(of + 128 + 8 * x);
                int t = t0 + 8 * x + 2 * (lane & 3);
                if (t < k0 || from.x > k0) s[4 * x] = 0.f;
                if (t + 1 < k0 || from.y > k0) s[4 * x + 1] = 0.f;
                if (t < k1 || from.x > k1) s[4 * x + 2] = 0.f;
                if (t + 1 < k1 || from.y > k1) s[4 * x + 3] = 0.f;
            }
        }
        to_operand(pf, s);
        pin(pf);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<1>(av, pf + 4 * kk, operand(os + stage * W_BYTES + kk * 2048, 8192), 1);
        mma_commit();
        mma_wait<1>();
        pin(dp);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            float2 d = *(const float2*)(of + 64 + 8 * x);
            df[2 * x] = pack(low(pf[2 * x]) * (dp[4 * x] - d.x), high(pf[2 * x]) * (dp[4 * x + 1] - d.y));
            df[2 * x + 1] = pack(low(pf[2 * x + 1]) * (dp[4 * x + 2] - d.x), high(pf[2 * x + 1]) * (dp[4 * x + 3] - d.y));
        }
        pin(df);
#ifdef SUMS
        u32 buffer = shares + turn * 16384;
        turn ^= 1;
#pragma unroll
        for (int x = 0; x < 8; x++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = 64 * w + 16 * warp + (lane >> 2) + 8 * r;
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(buffer + row * 128 + ((x ^ (row & 7)) << 4) + (lane & 3) * 4), "r"(df[2 * x + r]) : "memory");
            }
        fence_shared();
        // What was sent for the tile before has been read. A buffer of shares is written again only after the barrier of the tile between,
        // which nobody passes before its products have ended.
        if ((threadIdx.x & 127) == 0) adds_read<0>();
        named_wait(1, 256);
        // dq before dk, so that dq's way to memory is covered by the products of dk.
        float dq[32];
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 8; kk++) mma<1, 1>(dq, operand(buffer + kk * 2048), operand(ks + w * 16384 + kk * 2048), kk > 0);
        mma_commit();
#else
        mma_begin();
#endif
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<1>(ak, df + 4 * kk, operand(qs + stage * W_BYTES + kk * 2048, 8192), 1);
        mma_commit();
#ifdef SUMS
        mma_wait<1>();
        pin(dq);
#pragma unroll
        for (int x = 0; x < 8; x++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(sent + w * 16384 + x * 2048 + (threadIdx.x & 127) * 16), "f"(dq[4 * x]), "f"(dq[4 * x + 1]), "f"(dq[4 * x + 2]), "f"(dq[4 * x + 3]) : "memory");
        fence_shared();
        named_wait(2 + w, 128);
        int h = ((const int*)(aux_at + stage * AUX))[194];
        if ((threadIdx.x & 127) == 0) add_floats(sums + ((((i64)b * H + h) * ((T + 63) / 64) + t0 / 64) * 2 + w) * 4096, sent + w * 16384, 16384);
#endif
        mma_wait<0>();
        pin(ak);
        pin(av);
        bar_arrive(empty + 8 * stage);
        if (++stage == KV_STAGES) { stage = 0; phase ^= 1; }
    }
    i64 at = (((i64)b * T + k0) * G + g) * P;
    store_rows(dk + at, (i64)G * P, ak, scale, scale, k0 < T, k1 < T, P);
    store_rows(dv + at, (i64)G * P, av, 1.f, 1.f, k0 < T, k1 < T, P);
#ifdef SUMS
    if ((threadIdx.x & 127) == 0) adds_done();
#endif
}
#ifdef SUMS
// One warp 16 rows of one block of columns.
KERNEL attn_scale_tc(const float* sums, bf16* dq, int B, int T, int H, float scale) {
    i64 i = global_thread() >> 5;
    int warp = i & 3, w = i >> 2 & 1, tiles = (T + 63) / 64, lane = threadIdx.x & 31;
    i64 tile = i >> 3, head = tile / tiles;
    if (head >= (i64)B * H) return;
    int t = (int)(tile % tiles) * 64 + 16 * warp + (lane >> 2);
    const float4* from = (const float4*)(sums + (i >> 2) * 4096) + warp * 32 + lane;
    float d[32];
#pragma unroll
    for (int x = 0; x < 8; x++) {
        float4 v = from[x * 128];
        d[4 * x] = v.x, d[4 * x + 1] = v.y, d[4 * x + 2] = v.z, d[4 * x + 3] = v.w;
    }
    store_rows(dq + ((head / H * T + t) * H + head % H) * P + 64 * w, (i64)H * P, d, scale, scale, t < T, t + 8 < T, P - 64 * w);
}
#endif
#endif
#endif
