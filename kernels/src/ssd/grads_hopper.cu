#if TILED && WG && GRADS
// A warpgroup's sums over rows of b or c: as they are, or (splits) into this block's part.
__device__ __forceinline__ void give(const float (&v)[NN / 2], bf16* to, float* part, u32 through, int splits, i64 at, i64 stride, int len, int N) {
    LANE
    int wr = (warp & 3) * 16;
    if (splits == 1) {
        put_rows<NN / 16>(through, v);
        __syncwarp();
        constexpr int C = NN / 8, STEP = 32 / C;
        int n = lane % C * 8;
#pragma unroll
        for (int e = 0; e < 16 / STEP; e++) {
            int q = wr + lane / C + e * STEP;
            if (q < len) put8(to + at + q * stride + n, through + (n >> 6) * PLANE + tile<64>(q, n & 63), N - n);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < NN / 2; i++) {
        int q = wr + g + (i >> 1 & 1) * 8, n = i / 4 * 8 + t * 2 + (i & 1);
        if (q < len && n < N) part[at + q * stride + n] = v[i];
    }
}
// A number as a pair of bf16.
__device__ __forceinline__ u32 twice(float x) { return pack(x, x); }
// All gradients of a tile, the states before it and the gradients after it being there. Grid (tiles, G splits, B): a block takes the heads of
// its share of the group one after the other and keeps the sums of db and dc. The first warpgroup has rows of outputs: dy x', and from it what
// each token gives through the tile; dc. The second has rows of inputs: dx and db. The third brings what they read and makes the gradients of
// the steps.
// part[B tiles][3 H]: da, ddt_bias, dd.
static_assert(GRADERS == 384);
// Of a head: decay's gradients at outputs and at inputs, and parts of sums: x dy, states with their gradients, what enters the state.
struct Sums {
    float up[Q], down[Q], dd[4], across[4], into[4];
};
struct Steps {
    float cum[Q], key[Q], dts[Q];
};
KERNEL __launch_bounds__(GRADERS, 1) ssd_grads(const bf16* x, const TA2* a, const bf16* b, const bf16* c, const TA5* d, const bf16* dy, const float* dts, const float* cum, const float* key, const int* first, const bf16* s, const bf16* ds, bf16* dx, TR1* ddt, float* part, bf16* db, bf16* dc, float* db_part, float* dc_part, int T, int H, int P, int G, int N, int chunk, int rows, int splits, float lo, float hi) {
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
    constexpr u32 STAGE = (2 + 2 * BLOCKS) * PLANE;
    u32 pad = -shared_address(shared) & 1023, base = shared_address(shared) + pad, btile = base + STAGES * STAGE, ctile = btile + BLOCKS * PLANE;
    u32 mtiles = ctile + BLOCKS * PLANE, otile = mtiles + 2 * PLANE;
    Steps* steps = (Steps*)(shared + pad + STAGES * STAGE + (2 * BLOCKS + 3) * PLANE);
    Sums* sums = (Sums*)(steps + 4);
    int* begin = (int*)(sums + 4);
    i64 row = bi * T + t0;
    int slices = rows / 64, n_it = (h_to - h_from) * slices, w = uniform(threadIdx.x >> 7), local = threadIdx.x & 127;
    warp = uniform(warp);
    // Each warpgroup waits for what it reads and for room for what it writes, not for the other ones.
    __shared__ __align__(8) u64 bars[2 * STAGES + 4];
    Ring<STAGES> ring(bars, 128, 256);
    Ring<2> ms(bars + 2 * STAGES, 128, 128);
    __syncthreads();
    // A head, and which 64 of its rows.
    struct Place {
        int h, slice;
        __device__ void next(int slices) {
            if (++slice == slices) {
                slice = 0;
                h++;
            }
        }
    };
    auto bring = [&](int it, const Place& p, int stage) {
        int h = p.h, p0 = p.slice * 64;
        u32 to = base + stage * STAGE;
        fetch<64, Q, 64, 128>(to, 0, x + (row * H + h) * P + p0, (i64)H * P, len, P - p0);
        fetch<64, Q, 64, 128>(to + PLANE, 0, dy + (row * H + h) * P + p0, (i64)H * P, len, P - p0);
        i64 from = (((bi * tiles + k) * H + h) * rows + p0) * NN;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            fetch<64, 64, 64, 128, true>(to + (2 + i) * PLANE, 0, s + from + i * 64, NN, 64, 64);
            fetch<64, 64, 64, 128, true>(to + (2 + BLOCKS + i) * PLANE, 0, ds + from + i * 64, NN, 64, 64);
        }
        if (local < Q / 4) {
            i64 sc = ((bi * tiles + k) * H + h) * Q + local * 4;
            Steps& to = steps[it & 3];
            cp16(shared_address(to.cum + local * 4), cum + sc, 16);
            cp16(shared_address(to.key + local * 4), key + sc, 16);
            cp16(shared_address(to.dts + local * 4), dts + sc, 16);
        }
    };
    // The gradient of the steps of one head from its sums.
    auto finish = [&](int it, int h) {
        int start = begin[Q - 1];
        const Steps& st_ = steps[it & 3];
        const Sums& su = sums[(h - h_from) & 3];
        float av = ld(a, h), across = 0, into = 0, dd = 0, da = 0, bias = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            across += su.across[i];
            into += su.into[i];
            dd += su.dd[i];
        }
        across = into + (start < 0 ? across * exp2_fast(st_.cum[Q - 1]) : 0.f);
        constexpr int E = Q / 32;
        float up[E], mine = 0;
#pragma unroll
        for (int e = E - 1; e >= 0; e--) up[e] = mine += su.up[lane * E + e] - su.down[lane * E + e];
        float u = mine;
#pragma unroll
        for (int m = 1; m < 32; m <<= 1) {
            float above = __shfl_down_sync(FULL, u, m);
            if (lane + m < 32) u += above;
        }
        u -= mine;
#pragma unroll
        for (int e = 0; e < E; e++) {
            int q = lane * E + e;
            float dv = st_.dts[q];
            if (q < len) {
                float big = begin[q] == q ? 0.f : across + (up[e] + u);
                bool held = (lo > 0.f && dv == lo) || dv == hi;
                float out = held || dv == 0.f ? 0.f : -(av * big + su.down[q] / dv) * expm1f(-dv);
                st(ddt, (row + q) * H + h, out);
                da += dv * big;
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
    int wr = (warp & 3) * 16, q0 = wr + g;
    if (w == 2) {
        registers_less<56>();
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            fetch<64, Q, 64, 128>(btile + i * PLANE, 0, b + (row * G + group) * N + i * 64, (i64)G * N, len, N - i * 64);
            fetch<64, Q, 64, 128>(ctile + i * PLANE, 0, c + (row * G + group) * N + i * 64, (i64)G * N, len, N - i * 64);
        }
        if (local < Q / 4) cp16(shared_address(begin + local * 4), first + (bi * tiles + k) * Q + local * 4, 16);
        // One warp brings a head's steps and, once both have read its last rows, makes their gradients: it is done with them when it brings others.
        Place p = {h_from, 0}, read = p;
        Ring<STAGES> freed = ring;
        auto done = [&](int it) {
            freed.wait_freed();
            freed.next();
            if (warp == 8 && read.slice == slices - 1) finish(it, read.h);
            read.next(slices);
        };
        fill(
            ring, n_it,
            [&](int it, int stage) {
                bring(it, p, stage);
                p.next(slices);
            },
            [&](int it) {
                if (it >= STAGES) done(it - STAGES);
            });
        for (int it = max(n_it - STAGES, 0); it < n_it; it++) done(it);
        return;
    }
    registers_more<224>();
    if (w == 0) {
        float gc[NN / 2], cb[32], ee[32], before[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < NN / 2; i++) gc[i] = 0;
#pragma unroll
        for (int i = 0; i < 32; i++) ee[i] = 0;
        Place p = {h_from, 0};
        for (int it = 0; it < n_it; it++, p.next(slices), ring.next(), ms.next()) {
            ring.wait_full();
            u32 xt = base + ring.stage * STAGE, dyt = xt + PLANE, st_ = dyt + PLANE, mtile = mtiles + ms.stage * PLANE;
            const float *cm = steps[it & 3].cum, *ky = steps[it & 3].key;
            Sums& su = sums[(p.h - h_from) & 3];
            bool more = p.slice > 0;
            int start = begin[Q - 1];
            if (it == 0) {
                pin(cb);
                mma_begin();
#pragma unroll
                for (int kk = 0; kk < NN / 16; kk++) mma<0, 0>(cb, along(operand(ctile), (kk >> 2) * PLANE + (kk & 3) * 32), along(operand(btile), (kk >> 2) * PLANE + (kk & 3) * 32), kk > 0);
                mma_commit();
                mma_wait<0>();
                pin(cb);
            }
            float dm[32], c0 = cm[q0], c1 = cm[q0 + 8];
            u32 dyw[16], weighted[16], w0 = begin[q0] < 0 ? twice(exp2_fast(c0)) : 0, w1 = begin[q0 + 8] < 0 ? twice(exp2_fast(c1)) : 0;
            get_rows<4>(dyw, dyt);
#pragma unroll
            for (int i = 0; i < 16; i++) weighted[i] = times(dyw[i], i & 1 ? w1 : w0);
            pin(dm);
            pin(dyw);
            pin(weighted);
            pin(gc);
            mma_begin();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) mma<0>(dm, dyw + 4 * kk, along(operand(xt), kk * 32), kk > 0);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) mma<1>(gc, weighted + 4 * kk, along(operand(st_, PLANE), kk * 2048), 1);
            mma_commit();
            float ref = wr ? cm[wr - 1] : 0.f, f0 = exp2_fast(c0 - ref), f1 = exp2_fast(c1 - ref), r0 = 0, r1 = 0, diag = 0;
            int b0 = start < 0 ? 0 : begin[q0], b1 = start < 0 ? 0 : begin[q0 + 8];
            u32 pairs[16];
            mma_wait<0>();
            pin(dyw);
            pin(weighted);
            pin(dm);
            pin(gc);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                int col = j * 8 + t * 2;
                float* m = dm + 4 * j;
                float l[4];
                if (j * 8 >= wr + 16) {
                    pairs[2 * j] = pairs[2 * j + 1] = 0;
                    continue;
                }
                float2 kj = *(const float2*)&ky[col];
                if (j * 8 < wr) {
                    float e0 = exp2_fast(ref - kj.x), e1 = exp2_fast(ref - kj.y);
                    l[0] = f0 * e0;
                    l[1] = f0 * e1;
                    l[2] = f1 * e0;
                    l[3] = f1 * e1;
                    if (start >= 0) {
                        l[0] = col >= b0 ? l[0] : 0.f;
                        l[1] = col + 1 >= b0 ? l[1] : 0.f;
                        l[2] = col >= b1 ? l[2] : 0.f;
                        l[3] = col + 1 >= b1 ? l[3] : 0.f;
                    }
                } else {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int q = q0 + (e >> 1) * 8, ss = col + (e & 1);
                        float v = exp2_fast((e >> 1 ? c1 : c0) - (e & 1 ? kj.y : kj.x));
                        l[e] = ss <= q && ss >= (e >> 1 ? b1 : b0) ? v : 0.f;
                        if (ss == q) diag += m[e];
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int e = 4 * j + half * 2;
                    ee[e] += dm[e] * l[half * 2];
                    ee[e + 1] += dm[e + 1] * l[half * 2 + 1];
                    // m as it is rounded for dx: what a pair of tokens adds here it takes away there, and they cancel where both lie on one side of a token.
                    u32 pair = pairs[2 * j + half] = pack(l[half * 2] * cb[e], l[half * 2 + 1] * cb[e + 1]);
                    (half ? r1 : r0) += dm[e] * low(pair) + dm[e + 1] * high(pair);
                }
            }
            ms.wait_free();
            put_pairs<4>(mtile, pairs);
            fence_shared();
            ms.filled();
            diag = warp_sum(diag);
            if (lane == 0) su.dd[warp & 3] = more ? su.dd[warp & 3] + diag : diag;
            // What the states gave: c times what dc grew by.
            float now[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < NN / 16; j++) {
                u32 v[4];
                ldsm4(v, frag_a<64>(ctile + (j >> 2) * PLANE, wr, (j & 3) * 16));
#pragma unroll
                for (int i = 0; i < 4; i++) now[i & 1] += gc[8 * j + 2 * i] * low(v[i]) + gc[8 * j + 2 * i + 1] * high(v[i]);
            }
            r0 += now[0] - before[0];
            r1 += now[1] - before[1];
            before[0] = now[0];
            before[1] = now[1];
            r0 += __shfl_xor_sync(FULL, r0, 1);
            r1 += __shfl_xor_sync(FULL, r1, 1);
            r0 += __shfl_xor_sync(FULL, r0, 2);
            r1 += __shfl_xor_sync(FULL, r1, 2);
            if (t == 0) {
                su.up[q0] = more ? su.up[q0] + r0 : r0;
                su.up[q0 + 8] = more ? su.up[q0 + 8] + r1 : r1;
            }
            ring.freed();
        }
        // Within the tile: dc += e b, db += e' c, with e summed over the heads. The stages are free for the results.
        ring.before().wait_freed();
        put_rows<4>(mtiles + ms.stage * PLANE, ee);
        fence_shared();
        ms.filled();
        ms.wait_full();
        pin(gc);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<0, 1>(gc, along(operand(mtiles + ms.stage * PLANE), kk * 32), along(operand(btile, PLANE), kk * 2048), 1);
        mma_commit();
        mma_wait<0>();
        pin(gc);
        give(gc, dc, dc_part + (i64)split * gridDim.z * T * G * N, base, splits, (row * G + group) * N, (i64)G * N, len, N);
    } else {
        float gb[NN / 2];
#pragma unroll
        for (int i = 0; i < NN / 2; i++) gb[i] = 0;
        Place p = {h_from, 0};
        for (int it = 0; it < n_it; it++, p.next(slices), ring.next(), ms.next()) {
            ring.wait_full();
            u32 xt = base + ring.stage * STAGE, dyt = xt + PLANE, st_ = dyt + PLANE, dst = st_ + BLOCKS * PLANE, mtile = mtiles + ms.stage * PLANE;
            const float *cm = steps[it & 3].cum, *ky = steps[it & 3].key;
            Sums& su = sums[(p.h - h_from) & 3];
            bool more = p.slice > 0;
            int h = p.h, p0 = p.slice * 64, start = begin[Q - 1];
            float last = cm[Q - 1], skip = d ? ld(d, h) : 0.f, acc[32];
            float left0 = q0 >= start ? exp2_fast(last - ky[q0]) : 0.f, left1 = q0 + 8 >= start ? exp2_fast(last - ky[q0 + 8]) : 0.f;
            u32 xw[16], weighted[16], w0 = twice(left0), w1 = twice(left1);
            get_rows<4>(xw, xt);
#pragma unroll
            for (int i = 0; i < 16; i++) weighted[i] = times(xw[i], i & 1 ? w1 : w0);
            pin(acc);
            pin(weighted);
            pin(gb);
            mma_begin();
#pragma unroll
            for (int kk = 0; kk < NN / 16; kk++) mma<0, 0>(acc, along(operand(btile), (kk >> 2) * PLANE + (kk & 3) * 32), along(operand(dst), (kk >> 2) * PLANE + (kk & 3) * 32), kk > 0);
            mma_commit();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) mma<1>(gb, weighted + 4 * kk, along(operand(dst, PLANE), kk * 2048), 1);
            mma_commit();
            // The diagonal of s ds'.
            float upper[4] = {}, lower[4] = {};
#pragma unroll
            for (int kk = 0; kk < NN / 16; kk++) {
                u32 fa[4], fb[4];
                ldsm4(fa, frag_a<64>(st_ + (kk >> 2) * PLANE, wr, (kk & 3) * 16));
                ldsm4(fb, frag_b<64>(dst + (kk >> 2) * PLANE, wr, (kk & 3) * 16));
                mma(upper, fa, fb);
                mma(lower, fa, fb + 2);
            }
            float across = (t * 2 == g ? upper[0] + lower[2] : 0.f) + (t * 2 + 1 == g ? upper[1] + lower[3] : 0.f);
            mma_wait<1>();
            pin(acc);
            float into = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float *o = acc + 2 * i, l = i & 1 ? left1 : left0;
                o[0] *= l;
                o[1] *= l;
                into += o[0] * low(xw[i]) + o[1] * high(xw[i]);
            }
            ms.wait_full();
            pin(acc);
            mma_begin();
#pragma unroll
            for (int kk = 0; kk < 4; kk++) mma<1, 1>(acc, along(operand(mtile), kk * 2048), along(operand(dyt), kk * 2048), 1);
            mma_commit();
            across = warp_sum(across);
            into = warp_sum(into);
            if (lane == 0) {
                su.across[warp & 3] = more ? su.across[warp & 3] + across : across;
                su.into[warp & 3] = more ? su.into[warp & 3] + into : into;
            }
            mma_wait<0>();
            pin(acc);
            pin(gb);
            pin(weighted);
            ms.freed();
            float x0 = 0, x1 = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 v[4];
                ldsm4(v, frag_a<64>(dyt, wr, j * 16));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float *o = acc + 8 * j + 2 * i, r = o[0] * low(xw[4 * j + i]) + o[1] * high(xw[4 * j + i]);
                    if (i & 1) x1 += r;
                    else x0 += r;
                    o[0] += skip * low(v[i]);
                    o[1] += skip * high(v[i]);
                }
            }
            __syncwarp();
            put_rows<4>(otile, acc);
            x0 += __shfl_xor_sync(FULL, x0, 1);
            x1 += __shfl_xor_sync(FULL, x1, 1);
            x0 += __shfl_xor_sync(FULL, x0, 2);
            x1 += __shfl_xor_sync(FULL, x1, 2);
            if (t == 0) {
                su.down[q0] = more ? su.down[q0] + x0 : x0;
                su.down[q0 + 8] = more ? su.down[q0 + 8] + x1 : x1;
            }
            ring.freed();
            __syncwarp();
            int q = wr + (lane >> 3), col = (lane & 7) * 8, left = P - p0 - col;
            bf16* o = dx + ((row + q) * H + h) * P + p0 + col;
#pragma unroll
            for (int e = 0; e < 4; e++, q += 4, o += (i64)4 * H * P)
                if (q < len) put8(o, otile + tile<64>(q, col), left);
        }
        ring.before().wait_freed();
        ms.wait_full();
        pin(gb);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<1, 1>(gb, along(operand(mtiles + ms.stage * PLANE), kk * 2048), along(operand(ctile, PLANE), kk * 2048), 1);
        mma_commit();
        mma_wait<0>();
        pin(gb);
        give(gb, db, db_part + (i64)split * gridDim.z * T * G * N, base + BLOCKS * PLANE, splits, (row * G + group) * N, (i64)G * N, len, N);
    }
}
#endif
