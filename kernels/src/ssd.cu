// Two forms. Token by token, for every element type and for few tokens; and, when TILED, in tiles of Q tokens on tensor cores.
#if !TILED
// The scan as four runs of one recurrence over (own, other) pairs: s[other] = decay s[other] + u[own] v[other], out[own] = s . w.
// y: own p, other n. dc: own n, other p. dx and db the same two, backwards in time. L lanes share an own index; each keeps S of its others.
#ifndef LN
#define LN 1
#define SN 16
#define LP 1
#define SP 16
#endif
// decay is 0 at the first token of a document.
KERNEL ssd_dt(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, float* dts, float* decay, i64 n, int H, float lo, float hi) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        int h = e % H;
        float v = fminf(fmaxf(softplus(ld(dt, e) + (dt_bias ? ld(dt_bias, h) : 0.f)), lo), hi);
        dts[e] = v;
        decay[e] = pos && pos[e / H] == 0 ? 0.f : expf(v * ld(a, h));
    }
}
// F is double where the result enters the gradient of the decays, which is a difference of sums over all tokens.
template <int L, int S, bool BACK, class F, class TU, class TV, class TW, class TE, class Out>
__device__ __forceinline__ void run(const TU* u, i64 us, const TV* v, i64 vs, const TW* w, i64 ws, const TE* e, i64 es, const float* dts, const float* decay, double* dot, float* state, float* saved, int T, int H, int own, int others, int chunk, Out out) {
    int lane = threadIdx.x % L, o = (blockIdx.x * blockDim.x + threadIdx.x) / L;
    bool on = o < own;
    int oc = on ? o : 0;
    i64 h = blockIdx.y, b = blockIdx.z, bh = b * H + h;
    F s[S];
#pragma unroll
    for (int k = 0; k < S; k++) {
        int q = lane + L * k;
        s[k] = state && on && q < others ? state[(bh * own + oc) * others + q] : 0.f;
    }
    int chunks = chunk ? (T + chunk - 1) / chunk : 0;
    float next = 0;
#pragma unroll 2
    for (int i = 0; i < T; i++) {
        int t = BACK ? T - 1 - i : i;
        i64 row = b * T + t, th = row * H + h;
        if (!BACK && saved && t % chunk == 0)
#pragma unroll
            for (int k = 0; k < S; k++) {
                int q = lane + L * k;
                if (on && q < others) saved[(((b * chunks + t / chunk) * H + h) * own + oc) * others + q] = s[k];
            }
        float dv = dts[th], dec = BACK ? next : decay[th], raw = ld(u, row * us + oc);
        F uv = BACK ? F(raw) : F(raw) * F(dv), r = 0;
        if (BACK) next = decay[th];
#pragma unroll
        for (int k = 0; k < S; k++) {
            int q = lane + L * k;
            if (q < others) {
                s[k] = dec * s[k] + uv * ld(v, row * vs + q);
                r += s[k] * ld(w, row * ws + q);
            }
        }
#pragma unroll
        for (int m = L / 2; m; m >>= 1) r += __shfl_xor_sync(FULL, r, m);
        if (dot) {
            double p = warp_sum(on && lane == 0 ? (double)r * ld(e, row * es + oc) : 0.);
            if ((threadIdx.x & 31) == 0) dot[(i64)((blockIdx.x * blockDim.x + threadIdx.x) >> 5) * gridDim.z * T * H + th] = p;
        }
        if (on && lane == 0) out(row, oc, raw, (float)(BACK ? r * dv : r));
    }
    if (state)
#pragma unroll
        for (int k = 0; k < S; k++) {
            int q = lane + L * k;
            if (on && q < others) state[(bh * own + oc) * others + q] = s[k];
        }
}
#define PLACE i64 h = blockIdx.y; int g = h / (H / G); (void)g;
KERNEL ssd_y(const TA0* x, const TA3* b, const TA4* c, const TA5* d, const float* dts, const float* decay, TR0* y, float* state, float* saved, int T, int H, int P, int G, int N, int chunk) {
    PLACE
    float skip = d ? ld(d, h) : 0.f;
    run<LN, SN, false, float>(x + h * P, (i64)H * P, b + g * N, (i64)G * N, c + g * N, (i64)G * N, (const float*)0, 0, dts, decay, (double*)0, state, saved, T, H, P, N, chunk,
        [=](i64 row, int o, float raw, float r) { st(y, (row * H + h) * P + o, r + skip * raw); });
}
KERNEL ssd_dc(const TA0* x, const TA3* b, const TA4* c, const TA9* dy, const float* dts, const float* decay, float* dc, double* dot, int T, int H, int P, int G, int N) {
    PLACE
    run<LP, SP, false, double>(b + g * N, (i64)G * N, x + h * P, (i64)H * P, dy + h * P, (i64)H * P, c + g * N, (i64)G * N, dts, decay, dot, (float*)0, (float*)0, T, H, N, P, 0,
        [=](i64 row, int o, float, float r) { dc[(row * H + h) * N + o] = r; });
}
KERNEL ssd_dx(const TA0* x, const TA3* b, const TA4* c, const TA5* d, const TA9* dy, const float* dts, const float* decay, TR0* dx, double* dot, int T, int H, int P, int G, int N) {
    PLACE
    float skip = d ? ld(d, h) : 0.f;
    run<LN, SN, true, double>(dy + h * P, (i64)H * P, c + g * N, (i64)G * N, b + g * N, (i64)G * N, x + h * P, (i64)H * P, dts, decay, dot, (float*)0, (float*)0, T, H, P, N, 0,
        [=](i64 row, int o, float raw, float r) { st(dx, (row * H + h) * P + o, r + skip * raw); });
}
KERNEL ssd_db(const TA0* x, const TA4* c, const TA9* dy, const float* dts, const float* decay, float* db, int T, int H, int P, int G, int N) {
    PLACE
    run<LP, SP, true, float>(c + g * N, (i64)G * N, dy + h * P, (i64)H * P, x + h * P, (i64)H * P, (const float*)0, 0, dts, decay, (double*)0, (float*)0, (float*)0, T, H, N, P, 0,
        [=](i64 row, int o, float, float r) { db[(row * H + h) * N + o] = r; });
}
// The gradient of the log decays: G[t] = G[t+1] + dy[t].(S[t] c[t]) - dt' x[t].(dS[t] b[t]), zero at the first token of a document.
// yc and xb come in parts of the own dimension. part[B][2 H]: da, ddt_bias.
KERNEL ssd_ddt(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, const float* dts, const double* yc, const double* xb, TR1* ddt, float* part, int yc_parts, int xb_parts, int B, int T, int H, float lo, float hi) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= B * H) return;
    int h = e % H;
    i64 b = e / H;
    float av = ld(a, h), bias = dt_bias ? ld(dt_bias, h) : 0.f;
    double G = 0, da = 0, dbias = 0;
    for (int t = T - 1; t >= 0; t--) {
        i64 th = (b * T + t) * H + h;
        float dv = dts[th];
        double y = 0, x = 0;
        for (int k = 0; k < yc_parts; k++) y += yc[(i64)k * B * T * H + th];
        for (int k = 0; k < xb_parts; k++) x += xb[(i64)k * B * T * H + th];
        G = pos && pos[b * T + t] == 0 ? 0. : G + (y - dv * x);
        da += dv * G;
        float raw = ld(dt, th) + bias, sp = softplus(raw);
        float d = sp < lo || sp > hi ? 0.f : (float)(av * G + x) * sigmoid(raw);
        dbias += d;
        st(ddt, th, d);
    }
    part[b * 2 * H + h] = da;
    part[b * 2 * H + H + h] = dbias;
}
// dd[h] = sum x dy: one block a head.
KERNEL ssd_dd(const TA0* x, const TA9* dy, float* dd, i64 rows, int H, int P) {
    float s = 0;
    for (i64 i = threadIdx.x; i < rows * P; i += blockDim.x) {
        i64 e = (i / P * H + blockIdx.x) * P + i % P;
        s += ld(x, e) * ld(dy, e);
    }
    s = block_sum(s);
    if (threadIdx.x == 0) dd[blockIdx.x] = s;
}
// out[row][g][n] = sum over the group's heads of part[row][h][n].
KERNEL ssd_heads(const float* part, TR3* out, i64 n, int H, int G, int N) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = e / ((i64)G * N);
        int g = e / N % G, per = H / G;
        const float* p = part + (row * H + (i64)g * per) * N + e % N;
        float s = 0;
        for (int k = 0; k < per; k++) s += p[(i64)k * N];
        st(out, e, s);
    }
}
#else
// A chunk is cut into tiles of at most Q tokens: `per` a chunk, `tiles` in all. For each (batch, head, tile): dts and cum, the running sum of
// the log decays in powers of two, and key, with dts exp2(-cum) = exp2(-key); for each (batch, tile): first, the last token up to this one in the tile at which a document began, or
// -1. Decays within a tile are exp2(cum[q] - cum[s]) where first[q] <= s <= q. What lies beyond the end of a tile is zero.
// The host sets Q, the padded width of the state NN, the rows of a walk's block R = HEADS * PS, and the width PP of a slice in backward.
struct Tiles {
    int T, chunk, per;
    __device__ int start(int tile) const { return tile / per * chunk + tile % per * Q; }
    __device__ int len(int tile) const {
        int left = chunk - tile % per * Q, rest = T - start(tile);
        left = left < rest ? left : rest;
        return left < Q ? left : Q;
    }
};
// One block a tile of SPAN heads: four threads a head, each a quarter of the tokens. key = cum - log2 dts.
#define SPAN 32
KERNEL ssd_prepare(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, float* dts, float* cum, float* key, int* first, int T, int H, int chunk, int per, int tiles, float lo, float hi) {
    __shared__ float ends[4][SPAN];
    constexpr int M = Q / 4;
    int h = blockIdx.x * SPAN + threadIdx.x % SPAN, part = threadIdx.x / SPAN, k = blockIdx.y;
    i64 b = blockIdx.z;
    Tiles at = {T, chunk, per};
    int t0 = at.start(k), len = at.len(k);
    bool on = h < H;
    float rate = on ? ld(a, h) * 1.4426950408889634f : 0.f, bias = on && dt_bias ? ld(dt_bias, h) : 0.f, d[M], s[M];
#pragma unroll
    for (int i = 0; i < M; i++) d[i] = on && part * M + i < len ? ld(dt, (b * T + t0 + part * M + i) * H + h) : 0.f;
#pragma unroll
    for (int i = 0; i < M; i++) {
        d[i] = part * M + i < len ? fminf(fmaxf(softplus(d[i] + bias), lo), hi) : 0.f;
        s[i] = (i ? s[i - 1] : 0.f) + d[i] * rate;
    }
    ends[part][threadIdx.x % SPAN] = s[M - 1];
    __syncthreads();
    float before = 0;
    for (int i = 0; i < part; i++) before += ends[i][threadIdx.x % SPAN];
    if (on) {
        i64 out = ((b * tiles + k) * H + h) * Q + part * M;
#pragma unroll
        for (int i = 0; i < M; i += 4) {
            float e[4], l[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                e[j] = before + s[i + j];
                l[j] = e[j] - log2_fast(d[i + j]);
            }
            *(float4*)(dts + out + i) = make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]);
            *(float4*)(cum + out + i) = make_float4(e[0], e[1], e[2], e[3]);
            *(float4*)(key + out + i) = make_float4(l[0], l[1], l[2], l[3]);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        int from = -1;
        for (int i = 0; i < Q; i++) {
            if (i < len && pos && pos[b * T + t0 + i] == 0) from = i;
            first[(b * tiles + k) * Q + i] = from;
        }
    }
}
// Rows of a matrix in memory into columns col.. of a tile with rows of W; zeros beyond `rows` and `cols`.
template <int W, int ROWS, int COLS, int THREADS, bool WHOLE = VEC> __device__ __forceinline__ void fetch(u32 to, int col, const bf16* from, i64 stride, int rows, int cols) {
    constexpr int C = COLS / 8, STEP = THREADS / C;
    int r = threadIdx.x / C, c = threadIdx.x % C * 8;
    u32 at = to + tile<W>(r, col + c);
    const bf16* p = from + r * stride + c;
    stride *= STEP;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, r += STEP, p += stride) {
        if (STEP % 8) at = to + tile<W>(r, col + c);
        if constexpr (WHOLE) {
            cp16(at, p, r < rows && c < cols ? 16 : 0);
        } else {
            u32 w[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 lo = r < rows && c + 2 * e < cols ? p[2 * e].x : 0, hi = r < rows && c + 2 * e + 1 < cols ? p[2 * e + 1].x : 0;
                w[e] = lo | hi << 16;
            }
            sts128(at, uint4{w[0], w[1], w[2], w[3]});
        }
        at += STEP * W * 2;
    }
}
// The other way round, of 8 columns.
__device__ __forceinline__ void put8(bf16* to, u32 from, int cols) {
    uint4 v = lds128(from);
#if VEC
    if (cols > 0) *(uint4*)to = v;
#else
    u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 8; e++)
        if (e < cols) to[e].x = (u16)(w[e / 2] >> (e & 1) * 16);
#endif
}
// Q numbers of 4 bytes.
template <int THREADS> __device__ __forceinline__ void fetch_row(void* to, const void* from, int lane) {
    for (int i = lane; i < Q / 4; i += THREADS) cp16(shared_address(to) + i * 16, (const char*)from + i * 16, 16);
}
#define WALKERS 128
#define MT (R / 64)
#define LANE int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3; (void)g; (void)t; (void)lane; (void)warp;
struct Own { // the rows of the state that a block holds: HEADS heads, PS rows each; a warp's are of one head
    int h0, p0, group;
    __device__ Own(int H, int P, int G) {
        int slices = (P + PS - 1) / PS;
        h0 = blockIdx.x / slices * HEADS;
        p0 = blockIdx.x % slices * PS;
        group = h0 / (H / G);
    }
};
struct Scalars {
    float cum[HEADS][Q], key[HEADS][Q];
    int first[Q];
};
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
// the state. Each part of the chunks starts from init[B][parts][H][P][N] (or zero); out[B][tiles][H][rows][NN] gets the state before each
// tile, fin[B][parts][H][P][N] the last one and total[B][parts][H] the product of the decays. Grid (heads and slices, parts, B).
template <bool BACK> __device__ __forceinline__ void walk(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows) {
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
    load_state(s, init ? init + (b * parts + blockIdx.y) * H * P * N : init, row0, P, N, own);
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
KERNEL __launch_bounds__(WALKERS, 2) ssd_states(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows) {
    walk<false>(u, v, cum, key, first, init, fin, total, out, T, H, P, G, N, chunk, part_chunks, rows);
}
KERNEL __launch_bounds__(WALKERS, 2) ssd_dstates(const bf16* u, const bf16* v, const float* cum, const float* key, const int* first, const float* init, float* fin, float* total, bf16* out, int T, int H, int P, int G, int N, int chunk, int part_chunks, int rows) {
    walk<true>(u, v, cum, key, first, init, fin, total, out, T, H, P, G, N, chunk, part_chunks, rows);
}
// Ends of parts become their starts: s[part] <- what comes in, in order or in reverse.
KERNEL ssd_join(float* s, const float* total, const float* init, int B, int parts, int H, i64 PN, int back) {
    for (i64 e = global_thread(); e < (i64)B * H * PN; e += all_threads()) {
        i64 b = e / (H * PN), r = e % (H * PN);
        float v = init ? init[e] : 0.f;
        for (int i = 0; i < parts; i++) {
            i64 k = b * parts + (back ? parts - 1 - i : i);
            float end = s[k * H * PN + r];
            s[k * H * PN + r] = v;
            v = end + total[k * H + r / PN] * v;
        }
    }
}
// Row and column of block `i` of the lower triangle.
__device__ __forceinline__ void block_of(int i, int& row, int& col) {
    row = i < 1 ? 0 : i < 3 ? 1 : i < 6 ? 2 : 3;
    col = i - row * (row + 1) / 2;
}
#define TRIANGLE (Q / 16 * (Q / 16 + 1) / 2)
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
#if GRADS
#define GRADERS 256
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
KERNEL __launch_bounds__(GRADERS, 1) ssd_grads(const bf16* x, const TA2* a, const bf16* b, const bf16* c, const TA5* d, const bf16* dy, const float* dts, const float* cum, const int* first, const bf16* s, const bf16* ds, bf16* dx, TR1* ddt, float* part, bf16* db, bf16* dc, float* db_part, float* dc_part, int T, int H, int P, int G, int N, int chunk, int rows, int splits, float lo, float hi) {
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
// Sums of the splits.
KERNEL ssd_merge(const float* part, bf16* out, int splits, i64 n) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        float s = 0;
        for (int k = 0; k < splits; k++) s += part[k * n + e];
        st(out, e, s);
    }
}
#endif
// out[h] = sum over the rows of part[rows][3 H] of column h + skip: one block a head.
KERNEL ssd_total(const float* part, float* out, int rows, int stride, int skip) {
    float s = 0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) s += part[(i64)i * stride + skip + blockIdx.x];
    s = block_sum(s);
    if (threadIdx.x == 0) out[blockIdx.x] = s;
}
#endif
