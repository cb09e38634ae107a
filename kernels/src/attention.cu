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

