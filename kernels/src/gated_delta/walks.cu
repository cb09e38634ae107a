#if TILED
// A warp holds 16 columns p of the state as rows of an accumulator, s[4 j + e] as the tiles of 8 keys are numbered.
__device__ __forceinline__ void load_state(float* s, const float* from, int p, int N, int P) {
    int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
    for (int j = 0; j < NN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int n = j * 8 + t * 2 + (e & 1), c = p + g + (e >> 1) * 8;
            s[4 * j + e] = from && n < N && c < P ? from[(i64)n * P + c] : 0.f;
        }
}
__device__ __forceinline__ void store_state(const float* s, float* to, int p, int N, int P) {
    int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
    if (N == NN && p + 16 <= P) {
        to += (i64)(t * 2) * P + p + g;
#pragma unroll
        for (int j = 0; j < NN / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[(j * 8 + (e & 1)) * P + (e >> 1) * 8] = s[4 * j + e];
        return;
    }
#pragma unroll
    for (int j = 0; j < NN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int n = j * 8 + t * 2 + (e & 1), c = p + g + (e >> 1) * 8;
            if (n < N && c < P) to[(i64)n * P + c] = s[4 * j + e];
        }
}
// to[p][NN] in bf16.
__device__ __forceinline__ void narrow_state(const float (&s)[NN / 2], bf16* to, int p, int P) {
    int g = threadIdx.x >> 2 & 7;
    store_rows(to + (i64)(p + g) * NN, (i64)NN, s, 1.f, 1.f, p + g < P, p + g + 8 < P, NN);
}
// r[16 Q] += s x', with rows of x those of a tile [Q][NN].
__device__ __forceinline__ void read_state(float (*r)[4], const float* s, u32 x) {
#pragma unroll
    for (int c = 0; c < NN / 16; c++) {
        const float* w = s + 8 * c;
        u32 a[4] = {pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7])};
#pragma unroll
        for (int u = 0; u < Q / 16; u++) {
            u32 f[4];
            ldsm4(f, frag_b<NN>(x, u * 16, c * 16));
            mma(r[2 * u], a, f);
            mma(r[2 * u + 1], a, f + 2);
        }
    }
}
// The same of two tiles at once.
__device__ __forceinline__ void read_state(float (*r)[4], float (*y)[4], const float* s, u32 x, u32 z) {
#pragma unroll
    for (int c = 0; c < NN / 16; c++) {
        const float* w = s + 8 * c;
        u32 a[4] = {pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7])};
#pragma unroll
        for (int u = 0; u < Q / 16; u++) {
            u32 f[4];
            ldsm4(f, frag_b<NN>(x, u * 16, c * 16));
            mma(r[2 * u], a, f);
            mma(r[2 * u + 1], a, f + 2);
            ldsm4(f, frag_b<NN>(z, u * 16, c * 16));
            mma(y[2 * u], a, f);
            mma(y[2 * u + 1], a, f + 2);
        }
    }
}
// s += a x, a[16 Q] as operands.
__device__ __forceinline__ void add_state(float* s, const u32 (*a)[4], u32 x) {
#pragma unroll
    for (int c = 0; c < Q / 16; c++)
#pragma unroll
        for (int j = 0; j < NN / 16; j++) {
            u32 f[4];
            ldsm4t(f, frag_b_across<NN>(x, j * 16, c * 16));
            mma(s + 8 * j, a[c], f);
            mma(s + 8 * j + 4, a[c], f + 2);
        }
}
// r += a m' (or a m, BACK), m a lower triangle [Q][Q].
template <bool BACK> __device__ __forceinline__ void triangle(float (*r)[4], const u32 (*a)[4], u32 m) {
#pragma unroll
    for (int c = 0; c < Q / 16; c++)
#pragma unroll
        for (int u = 0; u < Q / 16; u++) {
            if (BACK ? c < u : c > u) continue;
            u32 f[4];
            if (BACK) ldsm4t(f, frag_b_across<Q>(m, u * 16, c * 16));
            else ldsm4(f, frag_b<Q>(m, u * 16, c * 16));
            mma(r[2 * u], a[c], f);
            mma(r[2 * u + 1], a[c], f + 2);
        }
}
// Rows of an accumulator [16 Q] as operands; what stands at element e of step c is row g + 8 (e & 1), tokens 16 c + 8 (e >> 1) + 2 t and
// the next, and f maps it and the token.
template <class F> __device__ __forceinline__ void operand(u32 (*a)[4], const float (*r)[4], F f) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int c = 0; c < Q / 16; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float* w = r[2 * c + (e >> 1)] + (e & 1) * 2;
            int i = c * 16 + (e >> 1) * 8 + t * 2;
            a[c][e] = pack(f(w[0], i), f(w[1], i + 1));
        }
}
__device__ __forceinline__ void columns(u32 (*a)[4], u32 tile_, int p) {
#pragma unroll
    for (int c = 0; c < Q / 16; c++) ldsm4t(a[c], frag_a_across<PB>(tile_, p, c * 16));
}
// Into columns p.. of a tile [Q][PB].
__device__ __forceinline__ void put_columns(u32 tile_, int p, const u32 (*a)[4]) {
    int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < Q / 16; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) sts32(tile_ + tile<PB>(c * 16 + (e >> 1) * 8 + g, p + (e & 1) * 8 + t * 2), transposed(a[c][e]));
}
#define WALKERS (2 * PB)
#define PT (Q * PB * 2)
#define ENDS (2 * Q * 4)
struct Own { // the columns of a head that a block walks with
    int h, group, p0;
    __device__ Own(int G, int H, int P) {
        int slices = (P + PB - 1) / PB;
        h = blockIdx.x / slices;
        p0 = blockIdx.x % slices * PB;
        group = h / (H / G);
    }
};
// OUT: o and the states before chunks, all tiles in order. Otherwise the tiles of chunk blockIdx.y from its state: D and the states before
// tiles. Grid (heads and slices, 1 or chunks, B).
template <bool OUT> __device__ __forceinline__ void walk(const bf16* q, const bf16* k, const bf16* v, const bf16* inv, const bf16* mix, const float* ends, bf16* o, const float* init, float* fin, float* saved, bf16* states, int T, int G, int H, int N, int P, int chunk) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(G, H, P);
    i64 b = blockIdx.z;
    Tiles tiles(T, chunk);
    int from = OUT ? 0 : blockIdx.y * tiles.per, to = OUT ? tiles.all : from + tiles.per, p = warp * 16;
    while (to > from && tiles.at(to - 1).len <= 0) to--;
    constexpr u32 STAGE = KT + PT + QT + ENDS;
    u32 base = shared_address(shared), qtile = base + 2 * STAGE, mtile = qtile + KT;
    i64 NP = (i64)N * P;
    auto issue = [&](int i, const Tile& x) {
        u32 stage = (i - from & 1) * STAGE;
        i64 row = b * T + x.start, place = (b * tiles.all + i) * H + own.h;
        fetch<NN, Q, WALKERS>(base + stage, k + (row * G + own.group) * N, (i64)G * N, x.len, N);
        fetch<PB, Q, WALKERS>(base + stage + KT, v + (row * H + own.h) * P + own.p0, (i64)H * P, x.len, P - own.p0);
        fetch<Q, Q, WALKERS, true>(base + stage + KT + PT, inv + place * Q * Q, Q, Q, Q);
        fetch_floats<2 * Q, WALKERS>(shared + stage + KT + PT + QT, ends + place * 4 * Q);
    };
    auto issue_q = [&](int i, const Tile& x) {
        fetch<NN, Q, WALKERS>(qtile, q + ((b * T + x.start) * G + own.group) * N, (i64)G * N, x.len, N);
        fetch<Q, Q, WALKERS, true>(mtile, mix + ((b * tiles.all + i) * H + own.h) * Q * Q, Q, Q, Q);
    };
    float s[NN / 2];
    if (init) init += OUT ? (b * H + own.h) * NP : ((b * tiles.chunks + blockIdx.y) * H + own.h) * NP;
    load_state(s, init, own.p0 + p, N, P);
    Tile x = tiles.at(from), next;
    if (from < to) {
        issue(from, x);
        if (OUT) issue_q(from, x);
    }
    cp_commit();
    for (int i = from; i < to; i++, x = next) {
        next = tiles.after(x);
        u32 stage = (i - from & 1) * STAGE, ktile = base + stage, vtile = ktile + KT, itile = vtile + PT;
        const float *in = (const float*)(shared + stage + KT + PT + QT), *out = in + Q;
        cp_wait<0>();
        __syncthreads();
        if (i + 1 < to) issue(i + 1, next);
        cp_commit();
        if (OUT) {
            if (saved && x.nth == 0) store_state(s, saved + ((b * tiles.chunks + x.chunk) * H + own.h) * NP, own.p0 + p, N, P);
        } else {
            narrow_state(s, states + ((b * tiles.all + i) * H + own.h) * P * NN, own.p0 + p, P);
        }
        u32 a[Q / 16][4], last[Q / 16][4];
        float y[Q / 8][4] = {};
        {
            float r[Q / 8][4] = {}, d[Q / 8][4] = {};
            if (OUT) read_state(r, y, s, ktile, qtile);
            else read_state(r, s, ktile);
            u32 u[Q / 16][4];
            columns(u, vtile, p);
#pragma unroll
            for (int c = 0; c < Q / 16; c++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float* w = r[2 * c + (e >> 1)] + (e & 1) * 2;
                    float2 f = *(const float2*)(in + c * 16 + (e >> 1) * 8 + t * 2);
                    a[c][e] = pack(low(u[c][e]) - f.x * w[0], high(u[c][e]) - f.y * w[1]);
                }
            triangle<false>(d, a, itile);
            operand(a, d, [](float w, int) { return w; });
            operand(last, d, [&](float w, int j) { return w * out[j]; });
        }
        if (OUT) {
#pragma unroll
            for (int j = 0; j < Q / 8; j++) {
                float2 f = *(const float2*)(in + j * 8 + t * 2);
                y[j][0] *= f.x, y[j][1] *= f.y, y[j][2] *= f.x, y[j][3] *= f.y;
            }
            triangle<false>(y, a, mtile);
            operand(a, y, [](float w, int) { return w; });
        }
        // The warp's own columns of v are in registers: o or D takes their place.
        put_columns(vtile, p, a);
        __syncthreads();
        if (OUT && i + 1 < to) issue_q(i + 1, next);
        cp_commit();
        put<PB, Q, WALKERS>(o + ((b * T + x.start) * H + own.h) * P + own.p0, (i64)H * P, vtile, x.len, P - own.p0);
        float decay = in[Q - 1];
#pragma unroll
        for (int j = 0; j < NN / 2; j++) s[j] *= decay;
        add_state(s, last, ktile);
    }
    if (fin) store_state(s, fin + (b * H + own.h) * NP, own.p0 + p, N, P);
}
#if !GRADS
KERNEL __launch_bounds__(WALKERS) delta_tiles(const bf16* q, const bf16* k, const bf16* v, const bf16* inv, const bf16* mix, const float* ends, bf16* o, float* state, float* saved, int T, int G, int H, int N, int P, int chunk) {
    walk<true>(q, k, v, inv, mix, ends, o, state, state, saved, (bf16*)0, T, G, H, N, P, chunk);
}
#else
KERNEL __launch_bounds__(WALKERS) delta_states(const bf16* k, const bf16* v, const bf16* inv, const float* ends, const float* saved, bf16* written, bf16* states, int T, int G, int H, int N, int P, int chunk) {
    walk<false>((const bf16*)0, k, v, inv, (const bf16*)0, ends, written, saved, (float*)0, (float*)0, states, T, G, H, N, P, chunk);
}
// dv and the gradients of the states after tiles, all tiles in reverse. Grid (heads and slices, 1, B).
KERNEL __launch_bounds__(WALKERS) delta_dstates(const bf16* q, const bf16* k, const bf16* dout, const bf16* inv, const bf16* mix, const float* ends, bf16* dv, bf16* dstates, int T, int G, int H, int N, int P, int chunk) {
    DYNAMIC_SHARED(shared);
    LANE
    Own own(G, H, P);
    i64 b = blockIdx.z;
    Tiles tiles(T, chunk);
    int n = tiles.all, p = warp * 16;
    while (n > 0 && tiles.at(n - 1).len <= 0) n--;
    constexpr u32 STAGE = 2 * KT + PT + ENDS;
    u32 base = shared_address(shared), mtile = base + 2 * STAGE, itile = mtile + QT;
    auto issue = [&](int i, const Tile& tile_) {
        u32 stage = (i & 1) * STAGE;
        i64 row = b * T + tile_.start, key = (row * G + own.group) * N;
        fetch<NN, Q, WALKERS>(base + stage, k + key, (i64)G * N, tile_.len, N);
        fetch<NN, Q, WALKERS>(base + stage + KT, q + key, (i64)G * N, tile_.len, N);
        fetch<PB, Q, WALKERS>(base + stage + 2 * KT, dout + (row * H + own.h) * P + own.p0, (i64)H * P, tile_.len, P - own.p0);
        fetch_floats<2 * Q, WALKERS>(shared + stage + 2 * KT + PT, ends + ((b * tiles.all + i) * H + own.h) * 4 * Q);
    };
    auto issue_m = [&](int i) {
        i64 place = ((b * tiles.all + i) * H + own.h) * Q * Q;
        fetch<Q, Q, WALKERS, true>(mtile, mix + place, Q, Q, Q);
        fetch<Q, Q, WALKERS, true>(itile, inv + place, Q, Q, Q);
    };
    float s[NN / 2] = {};
    Tile tile_ = tiles.at(n - 1), next;
    if (n > 0) {
        issue(n - 1, tile_);
        issue_m(n - 1);
    }
    cp_commit();
    for (int i = n - 1; i >= 0; i--, tile_ = next) {
        next = tiles.before(tile_);
        u32 stage = (i & 1) * STAGE, ktile = base + stage, qtile = ktile + KT, otile = qtile + KT;
        const float *in = (const float*)(shared + stage + 2 * KT + PT), *out = in + Q;
        cp_wait<0>();
        __syncthreads();
        if (i > 0) issue(i - 1, next);
        cp_commit();
        narrow_state(s, dstates + ((b * tiles.all + i) * H + own.h) * P * NN, own.p0 + p, P);
        u32 x[Q / 16][4], a[Q / 16][4];
        columns(x, otile, p);
        {
            float r[Q / 8][4] = {}, z[Q / 8][4] = {};
            read_state(r, s, ktile);
#pragma unroll
            for (int j = 0; j < Q / 8; j++) {
                float2 f = *(const float2*)(out + j * 8 + t * 2);
                r[j][0] *= f.x, r[j][1] *= f.y, r[j][2] *= f.x, r[j][3] *= f.y;
            }
            triangle<true>(r, x, mtile);
            operand(a, r, [](float w, int) { return w; });
            triangle<true>(z, a, itile);
            operand(a, z, [](float w, int) { return w; });
            put_columns(otile, p, a);
            operand(a, z, [&](float w, int j) { return -in[j] * w; });
        }
        __syncthreads();
        if (i > 0) issue_m(i - 1);
        cp_commit();
        put<PB, Q, WALKERS>(dv + ((b * T + tile_.start) * H + own.h) * P + own.p0, (i64)H * P, otile, tile_.len, P - own.p0);
#pragma unroll
        for (int c = 0; c < Q / 16; c++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float2 f = *(const float2*)(in + c * 16 + (e >> 1) * 8 + t * 2);
                x[c][e] = pack(f.x * low(x[c][e]), f.y * high(x[c][e]));
            }
        float decay = in[Q - 1];
#pragma unroll
        for (int j = 0; j < NN / 2; j++) s[j] *= decay;
        add_state(s, x, qtile);
        add_state(s, a, ktile);
    }
}
#endif
#endif
