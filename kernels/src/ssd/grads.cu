#if TILED && !WG && GRADS
#define GW (GRADERS / 32)
#define DXM (Q / 16)
#define DXN (GW / DXM)
#define WM (GW / 4)
#define DXT (PP / DXN / 8)
#define MB (Q / 16 / WM)
#define NB (NN / 32)
#define EIGHTHS (2 * TRIANGLE)
#define BG ((EIGHTHS + GW - 1) / GW)
// Parts of the sums over rows and columns of a tile for one head, by the warps that make them.
struct Sums {
    float rows[Q / 8][Q], cols[Q / 16][Q], yc[4][Q], xb[DXN][Q], through[GW], dd[GW];
};
struct Steps {
    float cum[Q], dts[Q];
};
// Row of 16 and column of 8 of tile `i` of the lower triangle.
__device__ __forceinline__ void eighth_of(int i, int& row, int& col) {
    row = i < 2 ? 0 : i < 6 ? 1 : i < 12 ? 2 : 3;
    col = i - row * (row + 1);
}
// All gradients of a tile, the states before it and the gradients after it being there. Grid (tiles, G splits, B): a block takes the heads of
// its share of the group one after the other and keeps the sums of db and dc. part[B tiles][3 H]: da, ddt_bias, dd.
KERNEL __launch_bounds__(GRADERS, 1) ssd_grads(const bf16* x, const TA2* a, const bf16* b, const bf16* c, const TA5* d, const bf16* dy, const float* dts, const float* cum, const float*, const int* first, const bf16* s, const bf16* ds, bf16* dx, TR1* ddt, float* part, bf16* db, bf16* dc, float* db_part, float* dc_part, int T, int H, int P, int G, int N, int chunk, int rows, int splits, float lo, float hi) {
    DYNAMIC_SHARED(shared);
    LANE
    i64 bi = blockIdx.z;
    int k = blockIdx.x, tiles = gridDim.x, group = blockIdx.y / splits, split = blockIdx.y % splits;
    int each = H / G, h_from = group * each + each * split / splits, h_to = group * each + each * (split + 1) / splits;
    Tiles at = {T, chunk, (chunk + Q - 1) / Q};
    int t0 = at.start(k), len = at.len(k);
    if (len <= 0) {
        for (int i = threadIdx.x; i < 3 * (h_to - h_from); i += GRADERS) part[(bi * tiles + k) * 3 * H + i / (h_to - h_from) * H + h_from + i % (h_to - h_from)] = 0;
        return;
    }
    constexpr u32 X = Q * PP * 2, SS = PP * NN * 2, STAGE = 2 * X + 2 * SS, V = Q * NN * 2;
    u32 base = shared_address(shared), btile = base + STAGES * STAGE, mtile = btile + V, otile = mtile + Q * Q * 2;
    Steps* steps = (Steps*)(shared + STAGES * STAGE + V + Q * Q * 2 + X);
    Sums* sums = (Sums*)(steps + 4);
    int* begin = (int*)(sums + 2);
    i64 row = bi * T + t0;
    int slices = rows / PP, n_it = (h_to - h_from) * slices;
    auto issue = [&](int it) {
        int h = h_from + it / slices, p0 = it % slices * PP;
        u32 to = base + it % STAGES * STAGE;
        fetch<PP, Q, PP, GRADERS>(to, 0, x + (row * H + h) * P + p0, (i64)H * P, len, P - p0);
        fetch<PP, Q, PP, GRADERS>(to + X, 0, dy + (row * H + h) * P + p0, (i64)H * P, len, P - p0);
        i64 from = (((bi * tiles + k) * H + h) * rows + p0) * NN;
        fetch<NN, PP, NN, GRADERS, true>(to + 2 * X, 0, s + from, NN, PP, NN);
        fetch<NN, PP, NN, GRADERS, true>(to + 2 * X + SS, 0, ds + from, NN, PP, NN);
        i64 sc = ((bi * tiles + k) * H + h) * Q;
        fetch_row<GRADERS>(steps[it & 3].cum, cum + sc, threadIdx.x);
        fetch_row<GRADERS>(steps[it & 3].dts, dts + sc, threadIdx.x ^ 128);
    };
    auto fetch_c = [&]() { fetch<NN, Q, NN, GRADERS>(base, 0, c + (row * G + group) * N, (i64)G * N, len, N); };
    fetch<NN, Q, NN, GRADERS>(btile, 0, b + (row * G + group) * N, (i64)G * N, len, N);
    fetch_c();
    fetch_row<GRADERS>(begin, first + (bi * tiles + k) * Q, threadIdx.x);
    cp_commit();
    cp_wait<0>();
    __syncthreads();
    // What does not depend on the head: c.b in the tiles of the triangle that this warp takes, and its part of c.
    int wm = warp % WM, wn = warp / WM, n0 = wn * (NN / 4), m0 = wm * MB * 16;
    float cb[BG][4] = {}, ee[BG][4] = {};
    u32 cw[MB][NB][2];
    int bq[BG], bs[BG];
#pragma unroll
    for (int i = 0; i < BG; i++) {
        eighth_of(warp + GW * i < EIGHTHS ? warp + GW * i : 0, bq[i], bs[i]);
#pragma unroll
        for (int kk = 0; kk < NN / 32; kk++) {
            u32 fa[4], fb[4];
            ldsm4(fb, frag_b2<NN>(btile, bs[i] * 8, kk * 32));
            ldsm4(fa, frag_a<NN>(base, bq[i] * 16, kk * 32));
            mma(cb[i], fa, fb);
            ldsm4(fa, frag_a<NN>(base, bq[i] * 16, kk * 32 + 16));
            mma(cb[i], fa, fb + 2);
        }
    }
#pragma unroll
    for (int m = 0; m < MB; m++)
#pragma unroll
        for (int j = 0; j < NB; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) cw[m][j][half] = lds32(base + tile<NN>(m0 + m * 16 + g + half * 8, n0 + j * 8 + t * 2));
    __syncthreads();
    int start = begin[Q - 1];
    float gb[MB][NB][4] = {}, gc[MB][NB][4] = {};
    // The gradient of the steps of one head, by one warp, from the parts of its sums.
    auto finish = [&](int it) {
        int h = h_from + it / slices;
        const Steps& st_ = steps[it & 3];
        const Sums& su = sums[(it / slices) & 1];
        float av = ld(a, h), across = 0, dd = 0, da = 0, bias = 0;
#pragma unroll
        for (int w = 0; w < GW; w++) {
            across += su.through[w];
            dd += su.dd[w];
        }
        across *= start < 0 ? exp2_fast(st_.cum[Q - 1]) : 0.f;
        constexpr int E = Q / 32;
        float up[E], down[E], xb[E], dv[E];
#pragma unroll
        for (int e = 0; e < E; e++) {
            int q = lane * E + e;
            dv[e] = st_.dts[q];
            float r = 0, l = 0, yc = 0, xo = 0;
            for (int j = 0; j < q / 16 * 2 + 2; j++) r += su.rows[j][q];
            for (int j = q / 16; j < Q / 16; j++) l += su.cols[j][q];
#pragma unroll
            for (int j = 0; j < 4; j++) yc += su.yc[j][q];
#pragma unroll
            for (int j = 0; j < DXN; j++) xo += su.xb[j][q];
            up[e] = r - dv[e] * l + yc;
            down[e] = dv[e] * xo;
            xb[e] = l + xo;
        }
        float mine = 0, before = 0;
#pragma unroll
        for (int e = E - 1; e >= 0; e--) up[e] = mine += up[e];
#pragma unroll
        for (int e = 0; e < E; e++) {
            float v = down[e];
            down[e] = before;
            before += v;
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
            int q = lane * E + e;
            if (q < len) {
                float big = begin[q] == q ? 0.f : across + (up[e] + u) + (down[e] + v);
                bool held = (lo > 0.f && dv[e] == lo) || dv[e] == hi;
                float out = held ? 0.f : -(av * big + xb[e]) * expm1f(-dv[e]);
                st(ddt, (row + q) * H + h, out);
                da += dv[e] * big;
                bias += out;
            }
        }
        da = warp_sum(da);
        bias = warp_sum(bias);
        if (lane == 0) {
            float* p = part + (bi * tiles + k) * 3 * H + h;
            p[0] = da;
            p[H] = bias;
            p[2 * H] = dd;
        }
    };
    issue(0);
    cp_commit();
    for (int it = 0; it < n_it; it++) {
        int h = h_from + it / slices, sl = it % slices, p0 = sl * PP;
        u32 xt = base + it % STAGES * STAGE, dyt = xt + X, st_ = dyt + X, dst = st_ + SS;
        cp_wait<0>();
        __syncthreads();
        if (STAGES > 1) {
            if (it + 1 < n_it) issue(it + 1);
            cp_commit();
        }
        // The warps from 4 on have fewer tiles of the triangle.
        if (it > 0 && sl == 0 && warp == 4 + (it / slices) % (GW - 4)) finish(it - 1);
        const float *cm = steps[it & 3].cum, *dv = steps[it & 3].dts;
        Sums& su = sums[(it / slices) & 1];
        auto add = [&](float& to, float v) { to = sl == 0 ? v : to + v; };
        float diag = 0;
#pragma unroll
        for (int i = 0; i < BG; i++) {
            if (warp + GW * i >= EIGHTHS) continue;
            float dm[4] = {};
#pragma unroll
            for (int kk = 0; kk < PP / 32; kk++) {
                u32 fa[4], fb[4];
                ldsm4(fb, frag_b2<PP>(xt, bs[i] * 8, kk * 32));
                ldsm4(fa, frag_a<PP>(dyt, bq[i] * 16, kk * 32));
                mma(dm, fa, fb);
                ldsm4(fa, frag_a<PP>(dyt, bq[i] * 16, kk * 32 + 16));
                mma(dm, fa, fb + 2);
            }
            int col = bs[i] * 8 + t * 2;
            float2 cs = {0.f, 0.f}, bottom = *(const float2*)&cm[col], dt_ = *(const float2*)&dv[col];
            bool whole = bs[i] < 2 * bq[i] && start < 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int q = bq[i] * 16 + g + half * 8;
                float top = cm[q], l0 = exp2_fast(top - bottom.x), l1 = exp2_fast(top - bottom.y);
                if (!whole) {
                    int from = start < 0 ? 0 : begin[q];
                    l0 = col <= q && col >= from ? l0 : 0.f;
                    l1 = col + 1 <= q && col + 1 >= from ? l1 : 0.f;
                    if (col == q) diag += dm[half * 2];
                    if (col + 1 == q) diag += dm[half * 2 + 1];
                }
                float r0 = dm[half * 2] * l0, r1 = dm[half * 2 + 1] * l1;
                ee[i][half * 2] += r0 * dt_.x;
                ee[i][half * 2 + 1] += r1 * dt_.y;
                r0 *= cb[i][half * 2];
                r1 *= cb[i][half * 2 + 1];
                cs.x += r0;
                cs.y += r1;
                sts32(mtile + tile<Q>(q, col), pack(l0 * cb[i][half * 2], l1 * cb[i][half * 2 + 1]));
                float rs = r0 * dt_.x + r1 * dt_.y;
                rs += __shfl_xor_sync(FULL, rs, 1);
                rs += __shfl_xor_sync(FULL, rs, 2);
                if (t == 0) add(su.rows[bs[i]][q], rs);
            }
#pragma unroll
            for (int m = 4; m < 32; m <<= 1) {
                cs.x += __shfl_xor_sync(FULL, cs.x, m);
                cs.y += __shfl_xor_sync(FULL, cs.y, m);
            }
            if (g == 0) {
                add(su.cols[bq[i]][col], cs.x);
                add(su.cols[bq[i]][col + 1], cs.y);
            }
        }
        diag = warp_sum(diag);
        if (lane == 0) add(su.dd[warp], diag);
        __syncthreads();
        float last = cm[Q - 1];
        {
            // dx = dt (decay b dS' + m' dy) + d dy, rows s.
            int ms = warp % DXM * 16, part_n = warp / DXM, pn = part_n * (PP / DXN);
            float acc[DXT][4] = {};
#pragma unroll
            for (int kk = 0; kk < NN / 16; kk++) {
                u32 fa[4];
                ldsm4(fa, frag_a<NN>(btile, ms, kk * 16));
#pragma unroll
                for (int u = 0; u < DXT / 2; u++) {
                    u32 fb[4];
                    ldsm4(fb, frag_b<NN>(dst, pn + u * 16, kk * 16));
                    mma(acc[2 * u], fa, fb);
                    mma(acc[2 * u + 1], fa, fb + 2);
                }
            }
            float left[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int ss = ms + g + half * 8;
                left[half] = ss >= start ? exp2_fast(last - cm[ss]) : 0.f;
                float dot = 0;
#pragma unroll
                for (int u = 0; u < DXT; u++) {
                    u32 w = lds32(xt + tile<PP>(ss, pn + u * 8 + t * 2));
                    dot += acc[u][half * 2] * low(w) + acc[u][half * 2 + 1] * high(w);
                    acc[u][half * 2] *= left[half];
                    acc[u][half * 2 + 1] *= left[half];
                }
                dot += __shfl_xor_sync(FULL, dot, 1);
                dot += __shfl_xor_sync(FULL, dot, 2);
                if (t == 0) add(su.xb[part_n][ss], dot * left[half]);
            }
            for (int kk = ms / 16; kk < Q / 16; kk++) {
                u32 fa[4];
                ldsm4t(fa, frag_a_across<Q>(mtile, ms, kk * 16));
#pragma unroll
                for (int u = 0; u < DXT / 2; u++) {
                    u32 fb[4];
                    ldsm4t(fb, frag_b_across<PP>(dyt, pn + u * 16, kk * 16));
                    mma(acc[2 * u], fa, fb);
                    mma(acc[2 * u + 1], fa, fb + 2);
                }
            }
            float skip = d ? ld(d, h) : 0.f;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int ss = ms + g + half * 8;
#pragma unroll
                for (int u = 0; u < DXT; u++) {
                    u32 at_ = tile<PP>(ss, pn + u * 8 + t * 2), w = lds32(dyt + at_);
                    sts32(otile + at_, pack(dv[ss] * acc[u][half * 2] + skip * low(w), dv[ss] * acc[u][half * 2 + 1] + skip * high(w)));
                }
            }
            __syncwarp();
            constexpr int CH = PP / DXN / 8;
            for (int e = lane; e < 16 * CH; e += 32) {
                int ss = ms + e / CH, p = pn + e % CH * 8;
                if (ss < len) put8(dx + ((row + ss) * H + h) * P + p0 + p, otile + tile<PP>(ss, p), P - p0 - p);
            }
        }
        {
            // dc += decay dy S, db += (decay dt x) dS: rows m0.., columns n0...
            float th[MB][NB][4] = {}, across = 0, wq[MB][2];
            u32 ws[MB][2];
#pragma unroll
            for (int m = 0; m < MB; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int q = m0 + m * 16 + g + half * 8;
                    wq[m][half] = begin[q] < 0 ? exp2_fast(cm[q]) : 0.f;
                    float w = q >= start ? exp2_fast(last - cm[q]) * dv[q] : 0.f;
                    ws[m][half] = pack(w, w);
                }
#pragma unroll
            for (int kk = 0; kk < PP / 16; kk++) {
                u32 fy[MB][4], fx[MB][4];
#pragma unroll
                for (int m = 0; m < MB; m++) {
                    ldsm4(fy[m], frag_a<PP>(dyt, m0 + m * 16, kk * 16));
                    ldsm4(fx[m], frag_a<PP>(xt, m0 + m * 16, kk * 16));
#pragma unroll
                    for (int e = 0; e < 4; e++) fx[m][e] = times(fx[m][e], ws[m][e & 1]);
                }
#pragma unroll
                for (int u = 0; u < NB / 2; u++) {
                    u32 fs[4], fd[4];
                    ldsm4t(fs, frag_b_across<NN>(st_, n0 + u * 16, kk * 16));
                    ldsm4t(fd, frag_b_across<NN>(dst, n0 + u * 16, kk * 16));
#pragma unroll
                    for (int m = 0; m < MB; m++) {
                        mma(th[m][2 * u], fy[m], fs);
                        mma(th[m][2 * u + 1], fy[m], fs + 2);
                        mma(gb[m][2 * u], fx[m], fd);
                        mma(gb[m][2 * u + 1], fx[m], fd + 2);
                    }
                    if (wm == kk % WM)
#pragma unroll
                        for (int e = 0; e < 4; e++) across += low(fs[e]) * low(fd[e]) + high(fs[e]) * high(fd[e]);
                }
            }
            across = warp_sum(across);
            if (lane == 0) add(su.through[warp], across);
#pragma unroll
            for (int m = 0; m < MB; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float dot = 0;
#pragma unroll
                    for (int j = 0; j < NB; j++) {
                        float *v = th[m][j] + half * 2, *o = gc[m][j] + half * 2;
                        dot += v[0] * low(cw[m][j][half]) + v[1] * high(cw[m][j][half]);
                        o[0] += wq[m][half] * v[0];
                        o[1] += wq[m][half] * v[1];
                    }
                    dot += __shfl_xor_sync(FULL, dot, 1);
                    dot += __shfl_xor_sync(FULL, dot, 2);
                    if (t == 0) add(su.yc[wn][m0 + m * 16 + g + half * 8], dot * wq[m][half]);
                }
        }
        if (STAGES == 1) {
            __syncthreads();
            if (it + 1 < n_it) issue(it + 1);
            cp_commit();
        }
    }
    __syncthreads();
    if (warp == 0) finish(n_it - 1);
    // Within the tile: dc += e b, db += e' c, with e summed over the heads.
#pragma unroll
    for (int i = 0; i < BG; i++)
        if (warp + GW * i < EIGHTHS)
#pragma unroll
            for (int half = 0; half < 2; half++) sts32(mtile + tile<Q>(bq[i] * 16 + g + half * 8, bs[i] * 8 + t * 2), pack(ee[i][half * 2], ee[i][half * 2 + 1]));
    fetch_c();
    cp_commit();
    cp_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MB; m++) {
        int mi = wm * MB + m;
        for (int kk = 0; kk < Q / 16; kk++) {
            u32 fa[4];
            if (kk <= mi) ldsm4(fa, frag_a<Q>(mtile, mi * 16, kk * 16));
#pragma unroll
            for (int u = 0; u < NB / 2; u++)
                if (kk <= mi) {
                    u32 fb[4];
                    ldsm4t(fb, frag_b_across<NN>(btile, n0 + u * 16, kk * 16));
                    mma(gc[m][2 * u], fa, fb);
                    mma(gc[m][2 * u + 1], fa, fb + 2);
                }
            if (kk >= mi) ldsm4t(fa, frag_a_across<Q>(mtile, mi * 16, kk * 16));
#pragma unroll
            for (int u = 0; u < NB / 2; u++)
                if (kk >= mi) {
                    u32 fb[4];
                    ldsm4t(fb, frag_b_across<NN>(base, n0 + u * 16, kk * 16));
                    mma(gb[m][2 * u], fa, fb);
                    mma(gb[m][2 * u + 1], fa, fb + 2);
                }
        }
    }
    i64 own = (i64)split * gridDim.z * T * G * N;
#pragma unroll
    for (int m = 0; m < MB; m++)
#pragma unroll
        for (int j = 0; j < NB; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int q = m0 + m * 16 + g + (e >> 1) * 8, n = n0 + j * 8 + t * 2 + (e & 1);
                if (q >= len || n >= N) continue;
                i64 o = ((row + q) * G + group) * N + n;
                if (splits == 1) {
                    st(db, o, gb[m][j][e]);
                    st(dc, o, gc[m][j][e]);
                } else {
                    db_part[own + o] = gb[m][j][e];
                    dc_part[own + o] = gc[m][j][e];
                }
            }
}
#endif
