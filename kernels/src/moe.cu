// Sorting by expert: one warp an expert counts and then places its choices in order, so the result is stable and needs no atomics.
KERNEL expert_count(const int* experts, int* counts, int R) {
    int c = 0;
    for (int i = threadIdx.x; i < R; i += 32) c += experts[i] == blockIdx.x;
    c = warp_sum(c);
    if (threadIdx.x == 0) counts[blockIdx.x] = c;
}
KERNEL expert_offsets(const int* counts, int* offsets, int E) {
    int s = 0;
    for (int e = 0; e < E; e++) {
        offsets[e] = s;
        s += counts[e];
    }
    offsets[E] = s;
}
KERNEL expert_place(const int* experts, const int* offsets, int* order, int* slot, int R) {
    int at = offsets[blockIdx.x];
    for (int i = 0; i < R; i += 32) {
        int f = i + threadIdx.x;
        bool mine = f < R && experts[f] == blockIdx.x;
        u32 all = __ballot_sync(FULL, mine);
        if (mine) {
            int r = at + __popc(all & ((1u << threadIdx.x) - 1));
            order[r] = f;
            slot[f] = r;
        }
        at += __popc(all);
    }
}
KERNEL gather_rows(const TA0* x, const int* order, TR0* y, i64 n, int D, int K) {
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(x, (i64)(order[e / D] / K) * D + e % D));
}
KERNEL combine(const TA0* y, const int* slot, const TA3* weights, TR0* x, i64 n, int D, int K) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 f = e / D * K;
        int d = e % D;
        float s = 0;
        for (int k = 0; k < K; k++) s += (weights ? ld(weights, f + k) : 1.f) * ld(y, (i64)slot[f + k] * D + d);
        st(x, e, s);
    }
}
// One block a routed row.
KERNEL combine_bwd(const TA0* y, const int* order, const TA3* weights, const TA4* dx, TR0* dy, TR1* dweights, int D, int K) {
    i64 r = blockIdx.x, f = order[r], token = f / K;
    float w = ld(weights, f), s = 0;
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float g = ld(dx, token * D + d);
        s += g * ld(y, r * D + d);
        st(dy, r * D + d, w * g);
    }
    s = block_sum(s);
    if (threadIdx.x == 0) st(dweights, f, s);
}

// Products with one matrix per expert, in tiles of 64 x 64 over 16, 256 threads with 4 x 4 results each. Rows r0..r1 belong to expert e; the
// block finds them itself, so nothing waits for the host: grid (columns / 64, rows / 64 + experts).
__device__ __forceinline__ bool rows_of(const int* offsets, int E, int tile, int& e, int& r0, int& r1) {
    for (e = 0; e < E; e++) {
        int from = offsets[e], to = offsets[e + 1], n = (to - from + 63) / 64;
        if (tile < n) {
            r0 = from + tile * 64;
            r1 = r0 + 64 < to ? r0 + 64 : to;
            return true;
        }
        tile -= n;
    }
    return false;
}
template <class FA, class FB, class FC> __device__ __forceinline__ void product(int depth, FA a, FB b, FC c) {
    __shared__ float as[16][65], bs[16][65];
    float acc[4][4] = {};
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    for (int k0 = 0; k0 < depth; k0 += 16) {
        __syncthreads();
        for (int i = threadIdx.x; i < 1024; i += 256) {
            a(as, k0, i);
            b(bs, k0, i);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++) {
            float x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = as[k][ty + 16 * i];
                y[i] = bs[k][tx + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] += x[i] * y[j];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) c(ty + 16 * i, tx + 16 * j, acc[i][j]);
}
// y[r,n] = sum_k x[r,k] w[e,n,k]
KERNEL grouped_linear(const TA0* x, const TA1* w, const int* offsets, TR0* y, int E, int N, int K) {
    int e, r0, r1, n0 = blockIdx.x * 64;
    if (!rows_of(offsets, E, blockIdx.y, e, r0, r1)) return;
    const TA1* we = w + (i64)e * N * K;
    product(K,
        [&](float (*s)[65], int k0, int i) { int r = r0 + i / 16, k = k0 + i % 16; s[i % 16][i / 16] = r < r1 && k < K ? ld(x, (i64)r * K + k) : 0.f; },
        [&](float (*s)[65], int k0, int i) { int n = n0 + i / 16, k = k0 + i % 16; s[i % 16][i / 16] = n < N && k < K ? ld(we, (i64)n * K + k) : 0.f; },
        [&](int i, int j, float v) { if (r0 + i < r1 && n0 + j < N) st(y, (i64)(r0 + i) * N + n0 + j, v); });
}
// dx[r,k] = sum_n dy[r,n] w[e,n,k]
KERNEL grouped_linear_dx(const TA0* dy, const TA1* w, const int* offsets, TR0* dx, int E, int N, int K) {
    int e, r0, r1, c0 = blockIdx.x * 64;
    if (!rows_of(offsets, E, blockIdx.y, e, r0, r1)) return;
    const TA1* we = w + (i64)e * N * K;
    product(N,
        [&](float (*s)[65], int k0, int i) { int r = r0 + i / 16, n = k0 + i % 16; s[i % 16][i / 16] = r < r1 && n < N ? ld(dy, (i64)r * N + n) : 0.f; },
        [&](float (*s)[65], int k0, int i) { int n = k0 + i / 64, k = c0 + i % 64; s[i / 64][i % 64] = n < N && k < K ? ld(we, (i64)n * K + k) : 0.f; },
        [&](int i, int j, float v) { if (r0 + i < r1 && c0 + j < K) st(dx, (i64)(r0 + i) * K + c0 + j, v); });
}
// dw[e,n,k] = beta dw + sum_r dy[r,n] x[r,k]; beta absent: 0. Grid (K / 64, N / 64, E).
KERNEL grouped_linear_dw(const TA0* x, const TA1* dy, const int* offsets, const float* beta, float* dw, int N, int K) {
    int e = blockIdx.z, from = offsets[e], to = offsets[e + 1], n0 = blockIdx.y * 64, c0 = blockIdx.x * 64;
    float bt = beta ? beta[0] : 0.f;
    product(to - from,
        [&](float (*s)[65], int k0, int i) { int r = from + k0 + i / 64, n = n0 + i % 64; s[i / 64][i % 64] = r < to && n < N ? ld(dy, (i64)r * N + n) : 0.f; },
        [&](float (*s)[65], int k0, int i) { int r = from + k0 + i / 64, k = c0 + i % 64; s[i / 64][i % 64] = r < to && k < K ? ld(x, (i64)r * K + k) : 0.f; },
        [&](int i, int j, float v) {
            if (n0 + i < N && c0 + j < K) {
                float* p = dw + ((i64)e * N + n0 + i) * K + c0 + j;
                *p = bt == 0.f ? v : bt * *p + v;
            }
        });
}
