#if TILED && WG && !GRADS
// The walks on sm_90a: a warpgroup a head (or 64 rows of one) with the state [64][NN] in its accumulators. One more warpgroup brings what
// they read.
static_assert(WALKERS == (HEADS + 1) * 128);
// Between accumulators and f32 rows [P N] of memory.
__device__ __forceinline__ void load_rows(float (&s)[NN / 2], const float* from, int p0, int P, int N) {
    LANE
#pragma unroll
    for (int i = 0; i < NN / 2; i++) {
        int p = (warp & 3) * 16 + g + (i >> 1 & 1) * 8, n = i / 4 * 8 + t * 2 + (i & 1);
        s[i] = from && p0 + p < P && n < N ? from[(i64)(p0 + p) * N + n] : 0.f;
    }
}
__device__ __forceinline__ void save_rows(const float (&s)[NN / 2], float* to, int p0, int P, int N) {
    LANE
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int p = p0 + (warp & 3) * 16 + g + half * 8;
        if (p >= P) continue;
        float* q = to + (i64)p * N + t * 2;
#pragma unroll
        for (int j = 0; j < NN / 8; j++) {
            if (NN > 64 && N == NN || j * 8 + t * 2 < N) {
#if VEC
                *(float2*)(q + j * 8) = make_float2(s[4 * j + half * 2], s[4 * j + half * 2 + 1]);
#else
                q[j * 8] = s[4 * j + half * 2];
                if (j * 8 + t * 2 + 1 < N) q[j * 8 + 1] = s[4 * j + half * 2 + 1];
#endif
            }
        }
    }
}
__device__ __forceinline__ void crew_scalars(Scalars* to, const float* cum, const float* key, const int* first, i64 b, int h0, int H, int tiles, int k) {
    int row = threadIdx.x >> 4 & 7, c = (threadIdx.x & 15) * 4;
    i64 at = ((b * tiles + k) * H + h0 + (row >> 1)) * Q + c;
    if (row < 2 * HEADS) cp16(shared_address(row & 1 ? to->key[row >> 1] + c : to->cum[row >> 1] + c), (row & 1 ? key : cum) + at, 16);
    else if (row == 2 * HEADS) cp16(shared_address(to->first + c), first + (b * tiles + k) * Q + c, 16);
}
// This warp's rows p of a tile u[64 tokens][64 p] as an operand, each token times its weight.
template <class W> __device__ __forceinline__ void weighted_rows(u32 (&v)[16], u32 u, W weight) {
    int lane = threadIdx.x & 31, wr = (threadIdx.x >> 5 & 3) * 16;
    u32 pair = pack(weight(lane * 2), weight(lane * 2 + 1));
#pragma unroll
    for (int kk = 0; kk < Q / 16; kk++) {
        ldsm4t(*(u32(*)[4])(v + 4 * kk), frag_a_across<64>(u, wr, kk * 16));
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            u32 w = __shfl_sync(FULL, pair, kk * 8 + (lane & 3) + e * 2);
            v[4 * kk + e] = times(v[4 * kk + e], w);
            v[4 * kk + e + 1] = times(v[4 * kk + e + 1], w);
        }
    }
}
// The states alone, as the form for any device.
template <bool BACK> __device__ __forceinline__ void walk(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows, int init_all, int init_step) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(H, P, G);
    i64 b = blockIdx.z;
    int per = (chunk + Q - 1) / Q, chunks = (T + chunk - 1) / chunk, tiles = chunks * per, parts = gridDim.y, w = uniform(threadIdx.x >> 7);
    warp = uniform(warp);
    Tiles at = {T, chunk, per};
    int from = blockIdx.y * part_chunks * per, to = from + part_chunks * per;
    to = to < tiles ? to : tiles;
    while (to > from && at.len(to - 1) <= 0) to--;
    constexpr u32 STAGE = (BLOCKS + HEADS) * PLANE, FIXED = HEADS * BLOCKS * PLANE;
    u32 pad = -shared_address(shared) & 1023, base = shared_address(shared) + pad, stile = base + WALK_STAGES * STAGE + w * BLOCKS * PLANE;
    Scalars* scalars = (Scalars*)(shared + pad + WALK_STAGES * STAGE + FIXED);
    __shared__ __align__(8) u64 bars[2 * WALK_STAGES];
    Ring<WALK_STAGES> ring(bars, 128, HEADS * 128);
    __syncthreads();
    auto bring = [&](int i, int stage) {
        int k = BACK ? to - 1 - i : from + i, len = at.len(k);
        i64 row = b * T + at.start(k);
        u32 dst = base + stage * STAGE;
#pragma unroll
        for (int x = 0; x < BLOCKS; x++) fetch<64, Q, 64, 128>(dst + x * PLANE, 0, v + (row * G + own.group) * N + x * 64, (i64)G * N, len, N - x * 64);
#pragma unroll
        for (int h = 0; h < HEADS; h++) fetch<64, Q, 64, 128>(dst + (BLOCKS + h) * PLANE, 0, u + (row * H + own.h0 + h) * P + own.p0, (i64)H * P, len, P - own.p0);
        crew_scalars(scalars + stage, cum, key, first, b, own.h0, H, tiles, k);
    };
    if (w == HEADS) return fill(ring, to - from, bring, [](int) {});
    float s[NN / 2], product = 1;
    load_rows(s, init ? init + ((b * init_all + blockIdx.y * init_step) * H + own.h0 + w) * P * N : init, own.p0, P, N);
    for (int i = from; i < to; i++, ring.next()) {
        ring.wait_full();
        int k = BACK ? from + to - 1 - i : i;
        const Scalars& sc = scalars[ring.stage];
        const float *cm = sc.cum[w], *ky = sc.key[w];
        u32 vtile = base + ring.stage * STAGE, x[16];
        int start = sc.first[Q - 1];
        float last = cm[Q - 1], decay = start < 0 ? exp2_fast(last) : 0.f;
        weighted_rows(x, vtile + (BLOCKS + w) * PLANE, [&](int q) {
            if (BACK) return sc.first[q] < 0 ? exp2_fast(cm[q]) : 0.f;
            return q >= start ? exp2_fast(last - ky[q]) : 0.f;
        });
        if (out) put_rows<NN / 16>(stile, s);
        product *= decay;
#pragma unroll
        for (int e = 0; e < NN / 2; e++) s[e] *= decay;
        pin(x);
        pin(s);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < Q / 16; kk++) mma<1>(s, x + 4 * kk, along(operand(vtile, PLANE), kk * 2048), 1);
        mma_commit();
        if (out) {
            __syncwarp();
            bf16* o = out + (((b * tiles + k) * H + own.h0 + w) * rows + own.p0) * NN;
            constexpr int C = NN / 8, STEP = 32 / C;
            int c = lane % C, pr = (warp & 3) * 16 + lane / C;
#pragma unroll
            for (int e = 0; e < 16 / STEP; e++, pr += STEP)
                if (own.p0 + pr < rows) *(uint4*)(o + (i64)pr * NN + c * 8) = lds128(stile + (c >> 3) * PLANE + tile<64>(pr, (c & 7) * 8));
            __syncwarp();
        }
        mma_wait<0>();
        pin(x);
        pin(s);
        ring.freed();
    }
    if (fin) save_rows(s, fin + ((b * parts + blockIdx.y) * H + own.h0 + w) * P * N, own.p0, P, N);
    if (total && (threadIdx.x & 127) == 0 && own.p0 == 0) total[(b * parts + blockIdx.y) * H + own.h0 + w] = product;
}
KERNEL __launch_bounds__(WALKERS, 1) ssd_tiles(const bf16* x, const bf16* b, const bf16* c, const TA5* d, const float* cum, const float* key, const int* first, bf16* y, const float* init, float* fin, float* saved, int T, int H, int P, int G, int N, int chunk, int part_chunks) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(H, P, G);
    i64 bi = blockIdx.z;
    int per = (chunk + Q - 1) / Q, chunks = (T + chunk - 1) / chunk, tiles = chunks * per, parts = gridDim.y, w = uniform(threadIdx.x >> 7);
    warp = uniform(warp);
    Tiles at = {T, chunk, per};
    int from = blockIdx.y * part_chunks * per, to = from + part_chunks * per;
    to = to < tiles ? to : tiles;
    while (to > from && at.len(to - 1) <= 0) to--;
    constexpr u32 STAGE = (2 * BLOCKS + HEADS) * PLANE, FIXED = HEADS * (BLOCKS + 1) * PLANE;
    u32 pad = -shared_address(shared) & 1023, base = shared_address(shared) + pad, stile = base + TILE_STAGES * STAGE + w * BLOCKS * PLANE, ytile = base + TILE_STAGES * STAGE + (HEADS * BLOCKS + w) * PLANE;
    Scalars* scalars = (Scalars*)(shared + pad + TILE_STAGES * STAGE + FIXED);
    // Each warpgroup waits for what it reads, not for the other ones: one may compute while the other multiplies.
    __shared__ __align__(8) u64 bars[2 * TILE_STAGES];
    Ring<TILE_STAGES> ring(bars, 128, HEADS * 128);
    __syncthreads();
    auto bring = [&](int i, int stage) {
        int k = from + i, len = at.len(k);
        i64 row = bi * T + at.start(k);
        u32 dst = base + stage * STAGE;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            fetch<64, Q, 64, 128>(dst + i * PLANE, 0, b + (row * G + own.group) * N + i * 64, (i64)G * N, len, N - i * 64);
            fetch<64, Q, 64, 128>(dst + (BLOCKS + i) * PLANE, 0, c + (row * G + own.group) * N + i * 64, (i64)G * N, len, N - i * 64);
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) fetch<64, Q, 64, 128>(dst + (2 * BLOCKS + h) * PLANE, 0, x + (row * H + own.h0 + h) * P + own.p0, (i64)H * P, len, P - own.p0);
        crew_scalars(scalars + stage, cum, key, first, bi, own.h0, H, tiles, k);
    };
    if (w == HEADS) {
        if (HEADS == 2) registers_less<40>();
        return fill(ring, to - from, bring, [](int) {});
    }
    if (HEADS == 2) registers_more<232>();
    int wr = (warp & 3) * 16, q0 = wr + g;
    float s[NN / 2], skip = d ? ld(d, own.h0 + w) : 0.f;
    load_rows(s, init ? init + ((bi * parts + blockIdx.y) * H + own.h0 + w) * P * N : init, own.p0, P, N);
    put_rows<NN / 16>(stile, s);
    // Outputs leave shared memory while the products of the next tile are under way.
    bf16* to_y = y;
    int on_y = 0;
    auto leave = [&] {
        int q = wr + (lane >> 3), p = (lane & 7) * 8;
        bf16* o = to_y;
#pragma unroll
        for (int e = 0; e < 4; e++, q += 4, o += (i64)4 * H * P)
            if (q < on_y) put8(o, ytile + tile<64>(q, p), P - own.p0 - p);
    };
    Cursor cursor(at, from);
    i64 chunk_at = bi * chunks + from / per;
    for (int k = from; k < to; k++, cursor.next(), ring.next()) {
        fence_shared();
        named_wait(1 + w, 128);
        ring.wait_full();
        u32 btile = base + ring.stage * STAGE, ctile = btile + BLOCKS * PLANE, xtile = ctile + (BLOCKS + w) * PLANE;
        const Scalars& sc = scalars[ring.stage];
        const float *cm = sc.cum[w], *ky = sc.key[w];
        int start = sc.first[Q - 1];
        float cb[32], ya[32];
#if NN <= 128
        // As an operand of both products.
        u32 cr[NN / 4];
        get_rows<NN / 16>(cr, ctile);
#endif
        if (saved && cursor.inner == 0) save_rows(s, saved + (chunk_at++ * H + own.h0 + w) * P * N, own.p0, P, N);
        // No branches while products are under way: the compiler would wait for each of them.
        pin(cb);
        pin(ya);
#if NN <= 128
        pin(cr);
#define MMA_C(d, kk, b) mma<0>(d, cr + 4 * (kk), b, (kk) > 0)
#else
#define MMA_C(d, kk, b) mma<0, 0>(d, along(operand(ctile), ((kk) >> 2) * PLANE + ((kk) & 3) * 32), b, (kk) > 0)
#endif
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < NN / 16; kk++) MMA_C(cb, kk, along(operand(btile), (kk >> 2) * PLANE + (kk & 3) * 32));
        mma_commit();
#pragma unroll
        for (int kk = 0; kk < NN / 16; kk++) MMA_C(ya, kk, along(operand(stile), (kk >> 2) * PLANE + (kk & 3) * 32));
        mma_commit();
        leave();
        float last = cm[Q - 1], decay = start < 0 ? exp2_fast(last) : 0.f;
        u32 xw[16];
        weighted_rows(xw, xtile, [&](int q) { return q >= start ? exp2_fast(last - ky[q]) : 0.f; });
        // What precedes this warp's rows: the decay up to them times the decay from there on.
        float c0 = cm[q0], c1 = cm[q0 + 8], ref = wr ? cm[wr - 1] : 0.f, f0 = exp2_fast(c0 - ref), f1 = exp2_fast(c1 - ref);
        int b0 = start < 0 ? 0 : sc.first[q0], b1 = start < 0 ? 0 : sc.first[q0 + 8];
        mma_wait<1>();
        pin(cb);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int col = j * 8 + t * 2;
            float* m = cb + 4 * j;
            if (j * 8 < wr) {
                float2 kj = *(const float2*)&ky[col];
                float e0 = exp2_fast(ref - kj.x), e1 = exp2_fast(ref - kj.y);
                m[0] *= f0 * e0;
                m[1] *= f0 * e1;
                m[2] *= f1 * e0;
                m[3] *= f1 * e1;
                if (start >= 0) {
                    m[0] = col >= b0 ? m[0] : 0.f;
                    m[1] = col + 1 >= b0 ? m[1] : 0.f;
                    m[2] = col >= b1 ? m[2] : 0.f;
                    m[3] = col + 1 >= b1 ? m[3] : 0.f;
                }
            } else if (j * 8 < wr + 16) {
                float2 kj = *(const float2*)&ky[col];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int q = q0 + (e >> 1) * 8, ss = col + (e & 1);
                    float v = m[e] * exp2_fast((e >> 1 ? c1 : c0) - (e & 1 ? kj.y : kj.x));
                    m[e] = ss <= q && ss >= (e >> 1 ? b1 : b0) ? v : 0.f;
                    if (ss == q) m[e] += skip;
                }
            } else {
                m[0] = m[1] = m[2] = m[3] = 0;
            }
        }
        u32 m[16];
#pragma unroll
        for (int i = 0; i < 16; i++) m[i] = pack(cb[2 * i], cb[2 * i + 1]);
        float w0 = start < 0 || sc.first[q0] < 0 ? exp2_fast(c0) : 0.f, w1 = start < 0 || sc.first[q0 + 8] < 0 ? exp2_fast(c1) : 0.f;
        mma_wait<0>();
        pin(ya);
#if NN <= 128
        pin(cr);
#endif
#pragma unroll
        for (int i = 0; i < 32; i++) ya[i] *= i & 2 ? w1 : w0;
#pragma unroll
        for (int e = 0; e < NN / 2; e++) s[e] *= decay;
        pin(m);
        pin(xw);
        pin(ya);
        pin(s);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < Q / 16; kk++) mma<1>(ya, m + 4 * kk, along(operand(xtile), kk * 2048), 1);
        mma_commit();
#pragma unroll
        for (int kk = 0; kk < Q / 16; kk++) mma<1>(s, xw + 4 * kk, along(operand(btile, PLANE), kk * 2048), 1);
        mma_commit();
        mma_wait<1>();
        pin(ya);
        pin(m);
        __syncwarp();
        put_rows<4>(ytile, ya);
        on_y = cursor.len();
        to_y = y + ((bi * T + cursor.start() + wr + (lane >> 3)) * H + own.h0 + w) * P + own.p0 + (lane & 7) * 8;
        mma_wait<0>();
        pin(xw);
        pin(s);
        ring.freed();
        // All warps have read what is written over here.
        named_wait(1 + w, 128);
        put_rows<NN / 16>(stile, s);
    }
    __syncwarp();
    leave();
    if (fin && blockIdx.y == parts - 1) save_rows(s, fin + (bi * H + own.h0 + w) * P * N, own.p0, P, N);
}
#define WALK_BOUNDS __launch_bounds__(WALKERS, 1)
#endif
