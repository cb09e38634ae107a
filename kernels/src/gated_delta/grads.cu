#if TILED && GRADS
#define GRADERS 512
#define GW (GRADERS / 32)
#define WM (Q / 16)
#define WN (GW / WM)
#define NB (NN / 8 / WN)
#define EIGHTHS (Q / 16 * (Q / 16 + 1))
#define BG ((EIGHTHS + GW - 1) / GW)
// Parts of the sums over a tile of one head, by the warps that make them: of decays within the tile, by row and by column, of those from
// before and to after it; products of dv and D at the diagonal, and of the state and its gradient.
struct Sums {
    float rows[Q / 8][Q], cols[Q / 16][Q], before[WN][Q], after[WN][Q], diagonal[Q], through[GW];
};
// Row of 16 and column of 8 of tile `i` of the lower triangle.
__device__ __forceinline__ void eighth_of(int i, int& row, int& col) {
    row = i < 2 ? 0 : i < 6 ? 1 : i < 12 ? 2 : 3;
    col = i - row * (row + 1);
}
// What is left of the gradients of a tile, with D, dv, the state before it and the gradient after it:
//   dq = in do S' + E k, E[t][s] = decay(t, s) do[t].D[s]
//   dk = out D dS' - in dv S' + E' q + (F + F') k, F[t][s] = -decay(t, s) dv[t].D[s] for s < t
//   dbeta = dv[t].D[t] / beta[t]^2; dg from the products of all decays and their gradients
// Grid (tiles, G splits, B): a block takes the heads of its share of the group one after the other, PP columns at a time, and keeps the sums
// of dq and dk. Parts of the splits go to [B T][G][splits][N].
KERNEL __launch_bounds__(GRADERS, 1) delta_grads(const bf16* q, const bf16* k, const int* pos, const float* ends, const bf16* dout, const bf16* written, const bf16* dv, const bf16* states, const bf16* dstates, bf16* dq, bf16* dk, float* dg, float* dbeta, float* dq_part, float* dk_part, int T, int G, int H, int N, int P, int chunk, int splits) {
    DYNAMIC_SHARED(shared);
    __shared__ u32 bits[2];
    LANE
    i64 b = blockIdx.z;
    int tile_ = blockIdx.x, tiles = gridDim.x, group = blockIdx.y / splits, split = blockIdx.y % splits;
    int each = H / G, h_from = group * each + each * split / splits, h_to = group * each + each * (split + 1) / splits;
    Tile at = Tiles(T, chunk).at(tile_);
    int len = at.len;
    if (len <= 0) return;
    constexpr u32 X = Q * PP * 2, SS = PP * NN * 2, STAGE = 3 * X + 2 * SS;
    u32 base = shared_address(shared), ktile = base + STAGES * STAGE, qtile = ktile + KT;
    float* scalars = (float*)(shared + STAGES * STAGE + 2 * KT);
    Sums* sums = (Sums*)(scalars + 4 * 4 * Q);
    i64 row = b * T + at.start;
    u64 starts = starts_of(pos, row, len, bits);
    int slices = (P + PP - 1) / PP, n_it = (h_to - h_from) * slices;
    auto issue = [&](int it) {
        int h = h_from + it / slices, p0 = it % slices * PP;
        u32 to = base + it % STAGES * STAGE;
        i64 token = (row * H + h) * P + p0, place = (b * tiles + tile_) * H + h, state = (place * P + p0) * NN;
        fetch<PP, Q, GRADERS>(to, dout + token, (i64)H * P, len, P - p0);
        fetch<PP, Q, GRADERS>(to + X, written + token, (i64)H * P, len, P - p0);
        fetch<PP, Q, GRADERS>(to + 2 * X, dv + token, (i64)H * P, len, P - p0);
        fetch<NN, PP, GRADERS, true>(to + 3 * X, states + state, NN, P - p0, NN);
        fetch<NN, PP, GRADERS, true>(to + 3 * X + SS, dstates + state, NN, P - p0, NN);
        fetch_floats<4 * Q, GRADERS>(scalars + it % 4 * 4 * Q, ends + place * 4 * Q);
    };
    i64 key = (row * G + group) * N;
    fetch<NN, Q, GRADERS>(ktile, k + key, (i64)G * N, len, N);
    fetch<NN, Q, GRADERS>(qtile, q + key, (i64)G * N, len, N);
    issue(0);
    cp_commit();
    cp_wait<0>();
    __syncthreads();
    // Products of keys and queries in the tiles of the triangle that this warp takes.
    int wm = warp % WM, wn = warp / WM, n0 = wn * NB * 8, m0 = wm * 16;
    float qk[BG][4] = {}, kk[BG][4] = {}, ee[BG][4] = {}, ff[BG][4] = {};
    int bq[BG], bs[BG];
#pragma unroll
    for (int i = 0; i < BG; i++) {
        eighth_of(warp + GW * i < EIGHTHS ? warp + GW * i : 0, bq[i], bs[i]);
#pragma unroll
        for (int c = 0; c < NN / 32; c++) {
            u32 fa[4], fb[4];
            ldsm4(fb, frag_b2<NN>(ktile, bs[i] * 8, c * 32));
#pragma unroll
            for (int two = 0; two < 2; two++) {
                ldsm4(fa, frag_a<NN>(qtile, bq[i] * 16, c * 32 + two * 16));
                mma(qk[i], fa, fb + 2 * two);
                ldsm4(fa, frag_a<NN>(ktile, bq[i] * 16, c * 32 + two * 16));
                mma(kk[i], fa, fb + 2 * two);
            }
        }
    }
    float gq[NB][4] = {}, gk[NB][4] = {};
    // The gradients of the scalars of one head, by one warp, from the parts of its sums.
    auto finish = [&](int it) {
        int h = h_from + it / slices;
        const float* sc = scalars + it % 4 * 4 * Q;
        const Sums& su = sums[it / slices % STAGES];
        float across = 0;
#pragma unroll
        for (int w = 0; w < GW; w++) across += su.through[w];
        across *= sc[Q - 1];
        constexpr int E = Q / 32;
        float up[E], down[E], mine = 0, before = 0;
#pragma unroll
        for (int e = E - 1; e >= 0; e--) {
            int i = lane * E + e;
            for (int j = 0; j < i / 16 * 2 + 2; j++) mine += su.rows[j][i];
            for (int j = i / 16; j < Q / 16; j++) mine -= su.cols[j][i];
#pragma unroll
            for (int j = 0; j < WN; j++) mine += su.before[j][i];
            up[e] = mine;
        }
#pragma unroll
        for (int e = 0; e < E; e++) {
            down[e] = before;
#pragma unroll
            for (int j = 0; j < WN; j++) before += su.after[j][lane * E + e];
        }
        float u = mine, v = before;
#pragma unroll
        for (int m = 1; m < 32; m <<= 1) {
            float above = __shfl_down_sync(FULL, u, m), below = __shfl_up_sync(FULL, v, m);
            if (lane + m < 32) u += above;
            if (lane >= m) v += below;
        }
        u -= mine;
        v -= before;
#pragma unroll
        for (int e = 0; e < E; e++) {
            int i = lane * E + e;
            if (i < len) {
                float bv = sc[3 * Q + i];
                dg[(row + i) * H + h] = begin_of(starts, i) == i ? 0.f : across + (up[e] + u) + (down[e] + v);
                // D and dv go with beta, which in f32 may be too small to be divided by.
                dbeta[(row + i) * H + h] = bv > 1e-18f ? su.diagonal[i] / bv / bv : 0.f;
            }
        }
    };
    for (int it = 0; it < n_it; it++) {
        int sl = it % slices;
        u32 otile = base + it % STAGES * STAGE, dtile = otile + X, ztile = dtile + X, stile = ztile + X, gtile = stile + SS;
        if (it > 0) {
            cp_wait<0>();
            __syncthreads();
        }
        if (STAGES > 1) {
            if (it + 1 < n_it) issue(it + 1);
            cp_commit();
            // The warps from 4 on have fewer tiles of the triangle.
            if (it > 0 && sl == 0 && warp == 4 + it / slices % (GW - 4)) finish(it - 1);
        }
        const float *in = scalars + it % 4 * 4 * Q, *out = in + Q, *cum = in + 2 * Q;
        Sums& su = sums[it / slices % STAGES];
        auto add = [&](float& to, float v) { to = sl == 0 ? v : to + v; };
#pragma unroll
        for (int i = 0; i < BG; i++) {
            if (warp + GW * i >= EIGHTHS) continue;
            float od[4] = {}, zd[4] = {};
#pragma unroll
            for (int c = 0; c < PP / 32; c++) {
                u32 fa[4], fb[4];
                ldsm4(fb, frag_b2<PP>(dtile, bs[i] * 8, c * 32));
#pragma unroll
                for (int two = 0; two < 2; two++) {
                    ldsm4(fa, frag_a<PP>(otile, bq[i] * 16, c * 32 + two * 16));
                    mma(od, fa, fb + 2 * two);
                    ldsm4(fa, frag_a<PP>(ztile, bq[i] * 16, c * 32 + two * 16));
                    mma(zd, fa, fb + 2 * two);
                }
            }
            int col = bs[i] * 8 + t * 2;
            float cs[2] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int to = bq[i] * 16 + g + half * 8, from = begin_of(starts, to);
                float top = cum[to], rs = 0;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int s = col + e, x = half * 2 + e;
                    float d = s <= to && s >= from ? exp2_fast(top - cum[s]) : 0.f;
                    float ev = od[x] * d, fv = s < to ? -zd[x] * d : 0.f, both = s < to ? ev * qk[i][x] + fv * kk[i][x] : 0.f;
                    ee[i][x] += ev;
                    ff[i][x] += fv;
                    rs += both;
                    cs[e] += both;
                    if (s == to) add(su.diagonal[s], zd[x]);
                }
                rs += __shfl_xor_sync(FULL, rs, 1);
                rs += __shfl_xor_sync(FULL, rs, 2);
                if (t == 0) add(su.rows[bs[i]][to], rs);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int m = 4; m < 32; m <<= 1) cs[e] += __shfl_xor_sync(FULL, cs[e], m);
                if (g == 0) add(su.cols[bq[i]][col + e], cs[e]);
            }
        }
        {
            float ts[NB][4] = {}, tz[NB][4] = {};
#pragma unroll
            for (int c = 0; c < PP / 16; c++) {
                u32 fo[4], fz[4];
                ldsm4(fo, frag_a<PP>(otile, m0, c * 16));
                ldsm4(fz, frag_a<PP>(ztile, m0, c * 16));
#pragma unroll
                for (int u = 0; u < NB / 2; u++) {
                    u32 f[4];
                    ldsm4t(f, frag_b_across<NN>(stile, n0 + u * 16, c * 16));
                    mma(ts[2 * u], fo, f);
                    mma(ts[2 * u + 1], fo, f + 2);
                    mma(tz[2 * u], fz, f);
                    mma(tz[2 * u + 1], fz, f + 2);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int i = m0 + g + half * 8;
                float w = in[i], dot = 0;
#pragma unroll
                for (int j = 0; j < NB; j++) {
                    u32 place = tile<NN>(i, n0 + j * 8 + t * 2), qw = lds32(qtile + place), kw = lds32(ktile + place);
                    const float *x = ts[j] + half * 2, *y = tz[j] + half * 2;
                    dot += x[0] * low(qw) + x[1] * high(qw) - y[0] * low(kw) - y[1] * high(kw);
                    gq[j][half * 2] += w * x[0];
                    gq[j][half * 2 + 1] += w * x[1];
                    gk[j][half * 2] -= w * y[0];
                    gk[j][half * 2 + 1] -= w * y[1];
                }
                dot += __shfl_xor_sync(FULL, dot, 1);
                dot += __shfl_xor_sync(FULL, dot, 2);
                if (t == 0) add(su.before[wn][i], w * dot);
            }
        }
        {
            float td[NB][4] = {}, through = 0;
#pragma unroll
            for (int c = 0; c < PP / 16; c++) {
                u32 fd[4];
                ldsm4(fd, frag_a<PP>(dtile, m0, c * 16));
#pragma unroll
                for (int u = 0; u < NB / 2; u++) {
                    u32 f[4];
                    ldsm4t(f, frag_b_across<NN>(gtile, n0 + u * 16, c * 16));
                    mma(td[2 * u], fd, f);
                    mma(td[2 * u + 1], fd, f + 2);
                    if (wm == c % WM) {
                        u32 fs[4];
                        ldsm4t(fs, frag_b_across<NN>(stile, n0 + u * 16, c * 16));
#pragma unroll
                        for (int e = 0; e < 4; e++) through += low(fs[e]) * low(f[e]) + high(fs[e]) * high(f[e]);
                    }
                }
            }
            through = warp_sum(through);
            if (lane == 0) add(su.through[warp], through);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int i = m0 + g + half * 8;
                float w = out[i], dot = 0;
#pragma unroll
                for (int j = 0; j < NB; j++) {
                    u32 kw = lds32(ktile + tile<NN>(i, n0 + j * 8 + t * 2));
                    const float* x = td[j] + half * 2;
                    dot += x[0] * low(kw) + x[1] * high(kw);
                    gk[j][half * 2] += w * x[0];
                    gk[j][half * 2 + 1] += w * x[1];
                }
                dot += __shfl_xor_sync(FULL, dot, 1);
                dot += __shfl_xor_sync(FULL, dot, 2);
                if (t == 0) add(su.after[wn][i], w * dot);
            }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (it + 1 < n_it) issue(it + 1);
            cp_commit();
            if (it + 1 < n_it && sl == slices - 1 && warp == 4) finish(it);
        }
    }
    __syncthreads();
    if (warp == 4) finish(n_it - 1);
    // Within the tile, with E and F summed over the heads: E below the diagonal and F with its mirror image, in the place of the stages.
    u32 etile = base, ftile = base + QT;
#pragma unroll
    for (int i = 0; i < BG; i++) {
        if (warp + GW * i >= EIGHTHS) continue;
        int col = bs[i] * 8 + t * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = bq[i] * 16 + half * 8;
            u32 f = pack(ff[i][half * 2], ff[i][half * 2 + 1]), mirror = transposed(f);
            sts32(etile + tile<Q>(r + g, col), pack(ee[i][half * 2], ee[i][half * 2 + 1]));
            if (r < bs[i] * 8) continue;
            if (r == bs[i] * 8) {
                sts32(ftile + tile<Q>(r + g, col), f | mirror);
            } else {
                sts32(ftile + tile<Q>(r + g, col), f);
                sts32(ftile + tile<Q>(bs[i] * 8 + g, r + t * 2), mirror);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < Q / 16; c++) {
        u32 fe[4], ft[4], ff_[4];
        ldsm4(ff_, frag_a<Q>(ftile, m0, c * 16));
        if (c <= wm) ldsm4(fe, frag_a<Q>(etile, m0, c * 16));
        if (c >= wm) ldsm4t(ft, frag_a_across<Q>(etile, m0, c * 16));
#pragma unroll
        for (int u = 0; u < NB / 2; u++) {
            u32 f[4];
            ldsm4t(f, frag_b_across<NN>(ktile, n0 + u * 16, c * 16));
            mma(gk[2 * u], ff_, f);
            mma(gk[2 * u + 1], ff_, f + 2);
            if (c <= wm) {
                mma(gq[2 * u], fe, f);
                mma(gq[2 * u + 1], fe, f + 2);
            }
            if (c >= wm) {
                ldsm4t(f, frag_b_across<NN>(qtile, n0 + u * 16, c * 16));
                mma(gk[2 * u], ft, f);
                mma(gk[2 * u + 1], ft, f + 2);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NB; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = m0 + g + half * 8, n = n0 + j * 8 + t * 2;
            if (i >= len || n >= N) continue;
            i64 o = (row + i) * G + group;
            const float *x = gq[j] + half * 2, *y = gk[j] + half * 2;
            if (splits > 1) {
                o = (o * splits + split) * N + n;
                dq_part[o] = x[0], dk_part[o] = y[0];
                if (n + 1 < N) dq_part[o + 1] = x[1], dk_part[o + 1] = y[1];
                continue;
            }
            o = o * N + n;
#if VEC
            *(u32*)(dq + o) = pack(x[0], x[1]);
            *(u32*)(dk + o) = pack(y[0], y[1]);
#else
            st(dq, o, x[0]);
            st(dk, o, y[0]);
            if (n + 1 < N) {
                st(dq, o + 1, x[1]);
                st(dk, o + 1, y[1]);
            }
#endif
        }
}
#endif
