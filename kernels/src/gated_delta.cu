// Two forms: token by token, for every element type and for few tokens; and, when TILED, in tiles of Q tokens on tensor cores.
// y[row][width] = the sum over `count` of part[row][count][width], in order.
KERNEL delta_fold(const float* part, TR0* y, i64 n, int count, int width) {
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        const float* p = part + i / width * count * width + i % width;
        float s = 0;
        for (int k = 0; k < count; k++) s += p[(i64)k * width];
        st(y, i, s);
    }
}

#if !TILED
// One column p of the state [N P] is shared by L lanes, each with S of its N rows. Grid (columns, H, B).
#ifndef L
#define L 1
#define S 16
#endif
__device__ __forceinline__ float lanes(float v) {
#pragma unroll
    for (int m = L / 2; m; m >>= 1) v += __shfl_xor_sync(FULL, v, m);
    return v;
}
KERNEL delta_fwd(const TA0* q, const TA1* k, const TA2* v, const TA3* g, const TA4* beta, const int* pos, float* state, TR0* o, float* saved, int T, int G, int H, int N, int P, int chunk) {
    int lane = threadIdx.x % L, at = (blockIdx.x * blockDim.x + threadIdx.x) / L;
    bool on = at < P;
    int p = on ? at : 0, kh = blockIdx.y / (H / G), chunks = (T + chunk - 1) / chunk;
    i64 b = blockIdx.z, h = blockIdx.y;
    float s[S];
#pragma unroll
    for (int j = 0; j < S; j++) {
        int n = lane + L * j;
        s[j] = state && n < N ? state[((b * H + h) * N + n) * P + p] : 0.f;
    }
    for (int t = 0; t < T; t++) {
        i64 row = b * T + t, th = row * H + h, kb = (row * G + kh) * N;
        if (saved && t % chunk == 0)
#pragma unroll
            for (int j = 0; j < S; j++) {
                int n = lane + L * j;
                if (on && n < N) saved[(((b * chunks + t / chunk) * H + h) * N + n) * P + p] = s[j];
            }
        float dec = pos && pos[row] == 0 ? 0.f : expf(ld(g, th)), r = 0, kv[S];
#pragma unroll
        for (int j = 0; j < S; j++) {
            int n = lane + L * j;
            kv[j] = n < N ? ld(k, kb + n) : 0.f;
            s[j] *= dec;
            r += kv[j] * s[j];
        }
        float delta = ld(beta, th) * (ld(v, th * P + p) - lanes(r)), y = 0;
#pragma unroll
        for (int j = 0; j < S; j++) {
            int n = lane + L * j;
            s[j] += kv[j] * delta;
            y += n < N ? s[j] * ld(q, kb + n) : 0.f;
        }
        y = lanes(y);
        if (on && lane == 0) st(o, th * P + p, y);
    }
    if (state)
#pragma unroll
        for (int j = 0; j < S; j++) {
            int n = lane + L * j;
            if (on && n < N) state[((b * H + h) * N + n) * P + p] = s[j];
        }
}

// States of a chunk are recomputed into hist[chunk][B H][N][P]. Sums over the columns of a block are made in a fixed order: each warp's by
// shuffles, then those of the warps one after the other, in shared memory of two tokens in turn. Of block x they go to dq and dk at
// [B T][H][x][N], to dg and dbeta at [B T][H][x].
KERNEL __launch_bounds__(512) delta_bwd(const TA0* q, const TA1* k, const TA2* v, const TA3* g, const TA4* beta, const int* pos, const float* saved, const TA7* dout, float* dq, float* dk, TR2* dv, float* dg, float* dbeta, float* hist, int T, int G, int H, int N, int P, int chunk) {
    int lane = threadIdx.x % L, at = (blockIdx.x * blockDim.x + threadIdx.x) / L;
    bool on = at < P;
    int p = on ? at : 0, kh = blockIdx.y / (H / G), chunks = (T + chunk - 1) / chunk;
    i64 b = blockIdx.z, h = blockIdx.y, plane = (i64)gridDim.z * H * N * P, own = (b * H + h) * N * P + p;
    extern __shared__ float shared[];
    const int width = 2 * N + 2, warps = blockDim.x / 32, warp = threadIdx.x / 32;
    float ds[S];
#pragma unroll
    for (int j = 0; j < S; j++) ds[j] = 0;
    for (int c = chunks - 1; c >= 0; c--) {
        int from = c * chunk, to = from + chunk < T ? from + chunk : T;
        const float* first = saved + ((b * chunks + c) * H + h) * N * P + p;
        float s[S];
#pragma unroll
        for (int j = 0; j < S; j++) {
            int n = lane + L * j;
            s[j] = n < N ? first[(i64)n * P] : 0.f;
        }
        for (int t = from; t < to; t++) {
            i64 row = b * T + t, th = row * H + h, kb = (row * G + kh) * N;
            float dec = pos && pos[row] == 0 ? 0.f : expf(ld(g, th)), r = 0;
#pragma unroll
            for (int j = 0; j < S; j++) {
                int n = lane + L * j;
                s[j] *= dec;
                r += n < N ? ld(k, kb + n) * s[j] : 0.f;
            }
            float delta = ld(beta, th) * (ld(v, th * P + p) - lanes(r));
#pragma unroll
            for (int j = 0; j < S; j++) {
                int n = lane + L * j;
                if (n < N) s[j] += ld(k, kb + n) * delta;
                if (on && n < N) hist[(t - from) * plane + own + (i64)n * P] = s[j];
            }
        }
        for (int t = to - 1; t >= from; t--) {
            i64 row = b * T + t, th = row * H + h, kb = (row * G + kh) * N;
            float dec = pos && pos[row] == 0 ? 0.f : expf(ld(g, th)), bv = ld(beta, th), r = 0, dd = 0;
            float od = on ? ld(dout, th * P + p) : 0.f, sp[S];
            float *sums = shared + (t & 1) * warps * width, *mine = sums + warp * width;
#pragma unroll
            for (int j = 0; j < S; j++) {
                int n = lane + L * j;
                float kv = n < N ? ld(k, kb + n) : 0.f, qv = n < N ? ld(q, kb + n) : 0.f;
                float prev = !on || n >= N ? 0.f : (t == from ? first[(i64)n * P] : hist[(t - from - 1) * plane + own + (i64)n * P]);
                sp[j] = dec * prev;
                r += kv * sp[j];
                ds[j] += qv * od;
                dd += ds[j] * kv;
            }
            r = lanes(r);
            dd = lanes(dd);
            float err = on ? ld(v, th * P + p) - r : 0.f, delta = bv * err, dr = -bv * dd, dgv = 0;
#pragma unroll
            for (int j = 0; j < S; j++) {
                int n = lane + L * j;
                float kv = n < N ? ld(k, kb + n) : 0.f;
                float now = sp[j] + kv * delta;
                float dqn = now * od, dkn = on ? ds[j] * delta + sp[j] * dr : 0.f;
#pragma unroll
                for (int m = L; m < 32; m <<= 1) {
                    dqn += __shfl_xor_sync(FULL, dqn, m);
                    dkn += __shfl_xor_sync(FULL, dkn, m);
                }
                if ((threadIdx.x & 31) < L && n < N) {
                    mine[n] = dqn;
                    mine[N + n] = dkn;
                }
                ds[j] += kv * dr;
                dgv += ds[j] * sp[j];
                ds[j] *= dec;
            }
            dgv = warp_sum(on ? dgv : 0.f);
            float dbv = warp_sum(on && lane == 0 ? dd * err : 0.f);
            if ((threadIdx.x & 31) == 0) {
                mine[2 * N] = dgv;
                mine[2 * N + 1] = dbv;
            }
            __syncthreads();
            for (int e = threadIdx.x; e < width; e += blockDim.x) {
                float sum = 0;
                for (int w = 0; w < warps; w++) sum += sums[w * width + e];
                i64 at_ = th * gridDim.x + blockIdx.x;
                if (e < N) dq[at_ * N + e] = sum;
                else if (e < 2 * N) dk[at_ * N + e - N] = sum;
                else (e == 2 * N ? dg : dbeta)[at_] = sum;
            }
            if (on && lane == 0) st(dv, th * P + p, bv * dd);
        }
    }
}
#endif
