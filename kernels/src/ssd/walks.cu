#if TILED && !GRADS
#if !WG
#define WALK_BOUNDS __launch_bounds__(WALKERS, 2)
#define MT (R / 64)
__device__ __forceinline__ void fetch_scalars(Scalars* to, const float* cum, const float* key, const int* first, i64 b, int h0, int H, int tiles, int k) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        i64 at = ((b * tiles + k) * H + h0 + h) * Q;
        fetch_row<WALKERS>(to->cum[h], cum + at, threadIdx.x);
        fetch_row<WALKERS>(to->key[h], key + at, threadIdx.x);
    }
    fetch_row<WALKERS>(to->first, first + (b * tiles + k) * Q, threadIdx.x);
}
// Between the registers of a warp (an accumulator of MT x NN/8 tiles) and f32 rows [H P N] of memory.
__device__ __forceinline__ void load_state(float (*s)[NN / 8][4], const float* from, int row0, int P, int N, const Own& own) {
    LANE
    int r0 = row0 % PS;
    i64 base = ((i64)(own.h0 + row0 / PS) * P + own.p0) * N;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < NN / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int p = r0 + m * 16 + g + (e >> 1) * 8, n = j * 8 + t * 2 + (e & 1);
                s[m][j][e] = from && own.p0 + p < P && n < N ? from[base + (i64)p * N + n] : 0.f;
            }
}
__device__ __forceinline__ void store_state(float (*s)[NN / 8][4], float* to, int row0, int P, int N, const Own& own) {
    LANE
    int r0 = row0 % PS + g;
    to += ((i64)(own.h0 + row0 / PS) * P + own.p0 + r0) * N + t * 2;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (own.p0 + r0 + m * 16 + half * 8 >= P) continue;
            float* q = to + (m * 16 + half * 8) * N;
#pragma unroll
            for (int j = 0; j < NN / 8; j++) {
                if (NN > 64 && N == NN || j * 8 + t * 2 < N) {
#if VEC
                    *(float2*)(q + j * 8) = make_float2(s[m][j][half * 2], s[m][j][half * 2 + 1]);
#else
                    q[j * 8] = s[m][j][half * 2];
                    if (j * 8 + t * 2 + 1 < N) q[j * 8 + 1] = s[m][j][half * 2 + 1];
#endif
                }
            }
        }
}
// s = decay s + (weighted rows of u)' v over the Q tokens of a tile; v lies in shared memory as [Q][NN].
template <class W> __device__ __forceinline__ void advance(float (*s)[NN / 8][4], float decay, u32 v, const u32 (*u)[Q / 16][4], W weight) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < NN / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][j][e] *= decay;
#pragma unroll
    for (int k = 0; k < Q / 16; k++) {
        u32 a[MT][4];
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            int q = k * 16 + t * 2 + e * 4;
            u32 w = pack(weight(q), weight(q + 1));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                a[m][e] = times(u[m][k][e], w);
                a[m][e + 1] = times(u[m][k][e + 1], w);
            }
        }
#pragma unroll
        for (int j = 0; j < NN / 16; j++) {
            u32 b[4];
            ldsm4t(b, frag_b_across<NN>(v, j * 16, k * 16));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(s[m][2 * j], a[m], b);
                mma(s[m][2 * j + 1], a[m], b + 2);
            }
        }
    }
}
// The states alone. Forward: u = x, v = b, tiles in order. Back: u = dy, v = c, tiles in reverse, and what is carried is the gradient of
// the state. Each part of the chunks starts from one of init[B][init_all][H][P][N], init_step apart (or zero); out[B][tiles][H][rows][NN] gets the state before each
// tile, fin[B][parts][H][P][N] the last one and total[B][parts][H] the product of the decays. Grid (heads and slices, parts, B).
template <bool BACK> __device__ __forceinline__ void walk(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows, int init_all, int init_step) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(H, P, G);
    i64 b = blockIdx.z;
    int per = (chunk + Q - 1) / Q, chunks = (T + chunk - 1) / chunk, tiles = chunks * per, parts = gridDim.y;
    Tiles at = {T, chunk, per};
    int from = blockIdx.y * part_chunks * per, to = from + part_chunks * per;
    to = to < tiles ? to : tiles;
    while (to > from && at.len(to - 1) <= 0) to--;
    u32 base = shared_address(shared);
    constexpr u32 V = Q * NN * 2, U = Q * R * 2;
    u32 stage_out = base + 2 * (V + U);
    Scalars* scalars = (Scalars*)(shared + 2 * (V + U) + R * NN * 2);
    auto issue = [&](int i) {
        int k = BACK ? from + to - 1 - i : i, s = (i - from) & 1, t0 = at.start(k), len = at.len(k);
        i64 row = b * T + t0;
        fetch<NN, Q, NN, WALKERS>(base + s * (V + U), 0, v + (row * G + own.group) * N, (i64)G * N, len, N);
#pragma unroll
        for (int h = 0; h < HEADS; h++) fetch<R, Q, PS, WALKERS>(base + s * (V + U) + V, h * PS, u + (row * H + own.h0 + h) * P + own.p0, (i64)H * P, len, P - own.p0);
        fetch_scalars(scalars + s, cum, key, first, b, own.h0, H, tiles, k);
    };
    int row0 = warp * MT * 16, head = row0 / PS;
    float s[MT][NN / 8][4], product = 1;
    load_state(s, init ? init + (b * init_all + blockIdx.y * init_step) * H * P * N : init, row0, P, N, own);
    if (from < to) issue(from);
    cp_commit();
    for (int i = from; i < to; i++) {
        cp_wait<0>();
        __syncthreads();
        if (i + 1 < to) issue(i + 1);
        cp_commit();
        int k = BACK ? from + to - 1 - i : i, st = (i - from) & 1;
        if (out) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int j = 0; j < NN / 8; j++)
#pragma unroll
                    for (int half = 0; half < 2; half++) sts32(stage_out + tile<NN>(row0 + m * 16 + g + half * 8, j * 8 + t * 2), pack(s[m][j][half * 2], s[m][j][half * 2 + 1]));
            __syncwarp();
            bf16* o = out + (((b * tiles + k) * H + own.h0 + head) * rows + own.p0) * NN;
            constexpr int C = NN / 8, STEP = 32 / C;
            int c = lane % C * 8, pr = row0 % PS + lane / C;
            o += (i64)pr * NN + c;
#pragma unroll
            for (int e = 0; e < MT * 16 / STEP; e++) {
                uint4 x = lds128(stage_out + tile<NN>(row0 + lane / C + e * STEP, c));
                if (own.p0 + pr + e * STEP < rows) *(uint4*)(o + e * STEP * NN) = x;
            }
            __syncwarp();
        }
        const Scalars& sc = scalars[st];
        const float *cm = sc.cum[head], *ky = sc.key[head];
        int start = sc.first[Q - 1];
        float last = cm[Q - 1], decay = start < 0 ? exp2_fast(last) : 0.f;
        product *= decay;
        u32 x[MT][Q / 16][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int kk = 0; kk < Q / 16; kk++) ldsm4t(x[m][kk], frag_a_across<R>(base + st * (V + U) + V, row0 + m * 16, kk * 16));
        advance(s, decay, base + st * (V + U), x, [&](int q) {
            if (BACK) return sc.first[q] < 0 ? exp2_fast(cm[q]) : 0.f;
            return q >= start ? exp2_fast(last - ky[q]) : 0.f;
        });
    }
    if (fin) store_state(s, fin + (b * parts + blockIdx.y) * H * P * N, row0, P, N, own);
    if (total && lane == 0 && own.p0 == 0 && row0 % PS == 0) total[(b * parts + blockIdx.y) * H + own.h0 + head] = product;
}
// Row and column of block `i` of the lower triangle.
__device__ __forceinline__ void block_of(int i, int& row, int& col) {
    row = i < 1 ? 0 : i < 3 ? 1 : i < 6 ? 2 : 3;
    col = i - row * (row + 1) / 2;
}
// y. Each warp holds MT x 16 rows p of the state in registers and makes y' = S c' decayed + x' m', where m[q][s] = (c.b) decay dt + d at the
// diagonal is made once a tile for each head.
KERNEL __launch_bounds__(WALKERS, 2) ssd_tiles(const bf16* x, const bf16* b, const bf16* c, const TA5* d, const float* cum, const float* key, const int* first, bf16* y, const float* init, float* fin, float* saved, int T, int H, int P, int G, int N, int chunk, int part_chunks) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(H, P, G);
    i64 bi = blockIdx.z;
    int per = (chunk + Q - 1) / Q, chunks = (T + chunk - 1) / chunk, tiles = chunks * per, parts = gridDim.y;
    Tiles at = {T, chunk, per};
    int from = blockIdx.y * part_chunks * per, to = from + part_chunks * per;
    to = to < tiles ? to : tiles;
    while (to > from && at.len(to - 1) <= 0) to--;
    u32 base = shared_address(shared);
    constexpr u32 V = Q * NN * 2, U = Q * R * 2;
    u32 ctile = base + 2 * (V + U), mtile = ctile + V;
    Scalars* scalars = (Scalars*)(shared + 2 * (V + U) + V + HEADS * Q * Q * 2);
    auto issue = [&](int k) {
        int s = (k - from) & 1, len = at.len(k);
        i64 row = bi * T + at.start(k);
        fetch<NN, Q, NN, WALKERS>(base + s * (V + U), 0, b + (row * G + own.group) * N, (i64)G * N, len, N);
#pragma unroll
        for (int h = 0; h < HEADS; h++) fetch<R, Q, PS, WALKERS>(base + s * (V + U) + V, h * PS, x + (row * H + own.h0 + h) * P + own.p0, (i64)H * P, len, P - own.p0);
        fetch_scalars(scalars + s, cum, key, first, bi, own.h0, H, tiles, k);
    };
    auto issue_c = [&](int k) { fetch<NN, Q, NN, WALKERS>(ctile, 0, c + ((bi * T + at.start(k)) * G + own.group) * N, (i64)G * N, at.len(k), N); };
    int row0 = warp * MT * 16, head = row0 / PS;
    float skip[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) skip[h] = d ? ld(d, own.h0 + h) : 0.f;
    float s[MT][NN / 8][4];
    load_state(s, init ? init + (bi * parts + blockIdx.y) * H * P * N : init, row0, P, N, own);
    if (from < to) {
        issue(from);
        issue_c(from);
    }
    cp_commit();
    for (int k = from; k < to; k++) {
        int st = (k - from) & 1, len = at.len(k);
        u32 btile = base + st * (V + U), xtile = btile + V;
        const Scalars& sc = scalars[st];
        cp_wait<0>();
        __syncthreads();
        if (k + 1 < to) issue(k + 1);
        cp_commit();
        if (saved && k % per == 0) store_state(s, saved + (bi * chunks + k / per) * H * P * N, row0, P, N, own);
        int start = sc.first[Q - 1];
        {
            constexpr int WARPS = WALKERS / 32, BW = (TRIANGLE + WARPS - 1) / WARPS;
            float cb[BW][2][4] = {};
            int bq[BW], bs[BW];
#pragma unroll
            for (int i = 0; i < BW; i++) block_of(warp + WARPS * i < TRIANGLE ? warp + WARPS * i : 0, bq[i], bs[i]);
#pragma unroll
            for (int kk = 0; kk < NN / 16; kk++)
#pragma unroll
                for (int i = 0; i < BW; i++) {
                    u32 fa[4], fb[4];
                    ldsm4(fa, frag_a<NN>(ctile, bq[i] * 16, kk * 16));
                    ldsm4(fb, frag_b<NN>(btile, bs[i] * 16, kk * 16));
                    mma(cb[i][0], fa, fb);
                    mma(cb[i][1], fa, fb + 2);
                }
#pragma unroll
            for (int i = 0; i < BW; i++) {
                if (warp + WARPS * i >= TRIANGLE) continue;
                bool whole = bq[i] != bs[i] && start < 0;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int q = bq[i] * 16 + g + half * 8, col = bs[i] * 16 + t * 2, begin = start < 0 ? 0 : sc.first[q];
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        float top = sc.cum[h][q];
#pragma unroll
                        for (int u = 0; u < 2; u++) {
                            float2 ky = *(const float2*)&sc.key[h][col + u * 8];
                            float m0 = cb[i][u][half * 2] * exp2_fast(top - ky.x), m1 = cb[i][u][half * 2 + 1] * exp2_fast(top - ky.y);
                            if (!whole) {
                                int ss = col + u * 8;
                                m0 = ss <= q && ss >= begin ? m0 : 0.f;
                                m1 = ss + 1 <= q && ss + 1 >= begin ? m1 : 0.f;
                                if (ss == q) m0 += skip[h];
                                if (ss + 1 == q) m1 += skip[h];
                            }
                            sts32(mtile + h * (Q * Q * 2) + tile<Q>(q, col + u * 8), pack(m0, m1));
                        }
                    }
                }
            }
        }
        u32 xa[MT][Q / 16][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int kk = 0; kk < Q / 16; kk++) ldsm4t(xa[m][kk], frag_a_across<R>(xtile, row0 + m * 16, kk * 16));
        __syncthreads();
        const float *cm = sc.cum[head], *ky = sc.key[head];
#pragma unroll
        for (int hq = 0; hq < Q / 32; hq++) {
            float ya[MT][4][4] = {};
#pragma unroll
            for (int kk = 0; kk < NN / 16; kk++) {
                u32 a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    a[m][0] = pack(s[m][2 * kk][0], s[m][2 * kk][1]);
                    a[m][1] = pack(s[m][2 * kk][2], s[m][2 * kk][3]);
                    a[m][2] = pack(s[m][2 * kk + 1][0], s[m][2 * kk + 1][1]);
                    a[m][3] = pack(s[m][2 * kk + 1][2], s[m][2 * kk + 1][3]);
                }
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    u32 f[4];
                    ldsm4(f, frag_b<NN>(ctile, hq * 32 + u * 16, kk * 16));
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(ya[m][2 * u], a[m], f);
                        mma(ya[m][2 * u + 1], a[m], f + 2);
                    }
                }
            }
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int q = hq * 32 + u * 8 + t * 2 + e;
                    float w = start < 0 || sc.first[q] < 0 ? exp2_fast(cm[q]) : 0.f;
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        ya[m][u][e] *= w;
                        ya[m][u][e + 2] *= w;
                    }
                }
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int kk = 0; kk <= hq * 2 + u; kk++) {
                    u32 f[4];
                    ldsm4(f, frag_b<Q>(mtile + head * (Q * Q * 2), hq * 32 + u * 16, kk * 16));
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(ya[m][2 * u], xa[m][kk], f);
                        mma(ya[m][2 * u + 1], xa[m][kk], f + 2);
                    }
                }
            // The warp's own columns of x are in registers: y takes their place.
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int half = 0; half < 2; half++) sts32(xtile + tile<R>(hq * 32 + u * 8 + g, row0 + m * 16 + half * 8 + t * 2), transposed(pack(ya[m][u][half * 2], ya[m][u][half * 2 + 1])));
        }
        __syncthreads();
        if (k + 1 < to) issue_c(k + 1);
        cp_commit();
        {
            bf16* o = y + ((bi * T + at.start(k)) * H + own.h0 + head) * P + own.p0 + row0 % PS;
            constexpr int STEP = 32 / (MT * 2);
            int q = lane / (MT * 2), p = lane % (MT * 2) * 8, left = P - own.p0 - row0 % PS - p;
            o += (i64)q * H * P + p;
            u32 at_ = xtile + tile<R>(q, row0 + p);
#pragma unroll
            for (int e = 0; e < Q / STEP; e++, o += (i64)STEP * H * P)
                if (q + e * STEP < len) put8(o, at_ + e * STEP * R * 2, left);
        }
        float last = cm[Q - 1];
        advance(s, start < 0 ? exp2_fast(last) : 0.f, btile, xa, [&](int q) { return q >= start ? exp2_fast(last - ky[q]) : 0.f; });
    }
    if (fin && blockIdx.y == parts - 1) store_state(s, fin + bi * H * P * N, row0, P, N, own);
}
#endif
KERNEL WALK_BOUNDS ssd_states(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows, int init_all, int init_step) {
    walk<false>(u, v, cum, key, first, init, fin, total, out, T, H, P, G, N, chunk, part_chunks, rows, init_all, init_step);
}
KERNEL WALK_BOUNDS ssd_dstates(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows, int init_all, int init_step) {
    walk<true>(u, v, cum, key, first, init, fin, total, out, T, H, P, G, N, chunk, part_chunks, rows, init_all, init_step);
}
#endif
