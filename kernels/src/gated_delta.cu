// Two forms: token by token, for every element type and for few tokens; and, when TILED, in tiles of Q tokens on tensor cores.
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
#else
// A chunk is cut into tiles of at most Q tokens: `per` a chunk. With c the running sum of the log decays in a tile, S the state before it and
// D[t] = beta[t] (v[t] - S'[t] k[t]) what each token writes, all for one head:
//   decay(t, s) = exp(c[t] - c[s]) where no document begins after s up to t, else 0; in(t) the same from before the tile, out(s) to its end
//   D = inv (v - in k S), inv = (1 + A)^-1 diag(beta), A[t][s] = beta[t] decay(t, s) k[t].k[s] for s < t
//   o = in q S + mix D, mix[t][s] = decay(t, s) q[t].k[s] for s <= t
//   S' = in(last) S + k' out D
// and backward, with dS' the gradient of the state after the tile:
//   dD = mix' do + out k dS', dv = inv' dD, dS = in(last) dS' + q' in do - k' in dv
// What lies beyond the end of a tile is zero, and its beta too. For each (batch, tile, head): inv and mix [Q][Q], ends [4][Q] with in, out, c
// in powers of two and beta. States are kept by columns, [P][NN].
// The host sets Q, the padded width of keys NN, the columns PB of a walk's block and, with GRADS, the columns PP of a slice of the gradients.
struct Tile {
    int chunk, nth, start, len;
};
struct Tiles {
    int T, chunk, per, chunks, all;
    __device__ Tiles(int T, int chunk) : T(T), chunk(chunk), per((chunk + Q - 1) / Q), chunks((T + chunk - 1) / chunk), all(chunks * per) {}
    __device__ Tile at(int c, int nth) const {
        int left = chunk - nth * Q, start = c * chunk + nth * Q, rest = T - start;
        left = left < rest ? left : rest;
        return {c, nth, start, left < Q ? left : Q};
    }
    __device__ Tile at(int tile) const { return at(tile / per, tile % per); }
    __device__ Tile after(const Tile& x) const { return x.nth + 1 < per ? at(x.chunk, x.nth + 1) : at(x.chunk + 1, 0); }
    __device__ Tile before(const Tile& x) const { return x.nth > 0 ? at(x.chunk, x.nth - 1) : at(x.chunk - 1, per - 1); }
};
#define LANE int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3; (void)g; (void)t; (void)warp;
#define KT (Q * NN * 2)
#define QT (Q * Q * 2)
// One bit a token of a tile at which a document begins; by all threads of a block of at least Q.
__device__ __forceinline__ u64 starts_of(const int* pos, i64 row, int len, u32* bits) {
    int i = threadIdx.x;
    if (i < Q) {
        u32 found = __ballot_sync(FULL, pos && i < len && pos[row + i] == 0);
        if ((i & 31) == 0) bits[i / 32] = found;
        if (Q == 32 && i == 0) bits[1] = 0;
    }
    __syncthreads();
    return bits[0] | (u64)bits[1] << 32;
}
// The last token up to t at which one begins, or -1.
__device__ __forceinline__ int begin_of(u64 starts, int t) {
    u64 upto = starts << (63 - t);
    return upto ? t - __clzll(upto) : -1;
}
// Rows of a matrix in memory into a tile with rows of W; zeros beyond `rows` and `cols`.
template <int W, int ROWS, int THREADS, bool WHOLE = VEC> __device__ __forceinline__ void fetch(u32 to, const bf16* from, i64 stride, int rows, int cols) {
    constexpr int C = W / 8, STEP = THREADS / C;
    int r = threadIdx.x / C, c = threadIdx.x % C * 8;
    const bf16* p = from + r * stride + c;
    stride *= STEP;
#pragma unroll
    for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++, r += STEP, p += stride) {
        if (STEP > ROWS && r >= ROWS) continue;
        u32 at = to + tile<W>(r, c);
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
    }
}
template <int COUNT, int THREADS> __device__ __forceinline__ void fetch_floats(void* to, const float* from) {
    for (int i = threadIdx.x; i < COUNT / 4; i += THREADS) cp16(shared_address(to) + i * 16, from + i * 4, 16);
}
// The other way round.
template <int W, int ROWS, int THREADS> __device__ __forceinline__ void put(bf16* to, i64 stride, u32 from, int rows, int cols) {
    constexpr int C = W / 8, STEP = THREADS / C;
    int r = threadIdx.x / C, c = threadIdx.x % C * 8;
    bf16* p = to + r * stride + c;
    stride *= STEP;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, r += STEP, p += stride) {
        if (r >= rows || c >= cols) continue;
        uint4 v = lds128(from + tile<W>(r, c));
#if VEC
        *(uint4*)p = v;
#else
        u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (c + e < cols) p[e].x = (u16)(w[e / 2] >> (e & 1) * 16);
#endif
    }
}
// inv, mix and ends of all heads of a group, two heads at a time. The inverse is made in f32, a column a thread, by rows of 16: first less what
// the rows above add, then among themselves. A lies transposed, [s][t] for s < t, in rows of PAD; columns of the inverse take the other
// half, [t][s] for s < t, and its diagonal is 1. Grid (tiles, G, B).
#define PREPARERS (2 * Q)
#define PAD (Q + 4)
#if !GRADS
// acc -= rows r0.. of A, less the columns from s0 to s1, by column `col` of x.
__device__ __forceinline__ void less(float* acc, const float* x, int r0, int s0, int s1, int col) {
#pragma unroll 4
    for (int s = s0; s < s1; s++) {
        float xs = s > col ? x[s * PAD + col] : s == col ? 1.f : 0.f;
#pragma unroll
        for (int r = 0; r < 16; r += 4) {
            float4 w = *(const float4*)(x + s * PAD + r0 + r);
            acc[r] -= w.x * xs;
            acc[r + 1] -= w.y * xs;
            acc[r + 2] -= w.z * xs;
            acc[r + 3] -= w.w * xs;
        }
    }
}
__device__ __forceinline__ void among(float* acc, float* x, int r0, int col) {
#pragma unroll
    for (int s = 0; s < 16; s++) {
        const float* w = x + (r0 + s) * PAD + r0;
#pragma unroll
        for (int r = 0; r < 16; r += 4) {
            if (r > s) {
                float4 v = *(const float4*)(w + r);
                acc[r] -= v.x * acc[s];
                acc[r + 1] -= v.y * acc[s];
                acc[r + 2] -= v.z * acc[s];
                acc[r + 3] -= v.w * acc[s];
            } else {
#pragma unroll
                for (int j = r; j < r + 4; j++)
                    if (j > s) acc[j] -= w[j] * acc[s];
            }
        }
        if (r0 + s > col) x[(r0 + s) * PAD + col] = acc[s];
    }
}
KERNEL __launch_bounds__(PREPARERS, 3) delta_prepare(const bf16* q, const bf16* k, const float* gate, const float* beta, const int* pos, bf16* inv, bf16* mix, float* ends, int T, int G, int H, int N, int chunk) {
    DYNAMIC_SHARED(shared);
    __shared__ __align__(16) float cum[2][Q], bet[2][Q];
    __shared__ u32 bits[2];
    LANE
    Tile at = Tiles(T, chunk).at(blockIdx.x);
    int len = at.len, heads = H / G, first = blockIdx.y * heads, mine = threadIdx.x / Q, i = threadIdx.x % Q;
    if (len <= 0) return;
    i64 b = blockIdx.z, row = b * T + at.start, place = (b * gridDim.x + blockIdx.x) * H + first, key = (row * G + blockIdx.y) * N;
    u32 ktile = shared_address(shared), qtile = ktile + KT;
    float* a = (float*)(shared + 2 * KT);
    fetch<NN, Q, PREPARERS>(ktile, k + key, (i64)G * N, len, N);
    fetch<NN, Q, PREPARERS>(qtile, q + key, (i64)G * N, len, N);
    cp_commit();
    // Scalars of the next two heads are under way while the last two are worked on.
    float log_decay, factor;
    auto scalars = [&](int h0) {
        bool on = i < len && h0 + mine < heads;
        i64 e = (row + i) * H + first + h0 + mine;
        log_decay = on ? gate[e] * 1.4426950408889634f : 0.f;
        factor = on ? beta[e] : 0.f;
    };
    scalars(0);
    u64 starts = starts_of(pos, row, len, bits);
    int own_begin = begin_of(starts, i), last_begin = begin_of(starts, Q - 1);
    cp_wait<0>();
    __syncthreads();
    float kk[Q / 8][4] = {}, qk[Q / 8][4] = {};
#pragma unroll 2
    for (int c = 0; c < NN / 16; c++) {
        u32 fk[4], fq[4];
        ldsm4(fk, frag_a<NN>(ktile, warp * 16, c * 16));
        ldsm4(fq, frag_a<NN>(qtile, warp * 16, c * 16));
#pragma unroll
        for (int u = 0; u < Q / 16; u++) {
            if (u > warp) continue;
            u32 f[4];
            ldsm4(f, frag_b<NN>(ktile, u * 16, c * 16));
            mma(kk[2 * u], fk, f);
            mma(kk[2 * u + 1], fk, f + 2);
            mma(qk[2 * u], fq, f);
            mma(qk[2 * u + 1], fq, f + 2);
        }
    }
    for (int h0 = 0; h0 < heads; h0 += 2) {
        float v = own_begin == i ? 0.f : log_decay, bv = factor;
        if (h0 + 2 < heads) scalars(h0 + 2);
#pragma unroll
        for (int m = 1; m < 32; m <<= 1) {
            float w = __shfl_up_sync(FULL, v, m);
            if (lane >= m) v += w;
        }
        // Also the last use of keys, queries and what the heads before left.
        __syncthreads();
        cum[mine][i] = v;
        bet[mine][i] = bv;
        __syncthreads();
        if (i >= 32) v += cum[mine][31];
        __syncthreads();
        if (i >= 32) cum[mine][i] = v;
        __syncthreads();
        if (h0 + mine < heads) {
            float* e = ends + (place + h0 + mine) * 4 * Q + i;
            e[0] = own_begin < 0 ? exp2_fast(v) : 0.f;
            e[Q] = i >= last_begin ? exp2_fast(cum[mine][Q - 1] - v) : 0.f;
            e[2 * Q] = v;
            e[3 * Q] = bv;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int to = warp * 16 + g + half * 8, from = begin_of(starts, to);
#pragma unroll
            for (int two = 0; two < 2; two++) {
                float top = cum[two][to], bt = bet[two][to];
#pragma unroll
                for (int j = 0; j < Q / 8; j++) {
                    if (j > 2 * warp + 1) continue;
                    float m[2];
                    float2 low_ = *(const float2*)&cum[two][j * 8 + t * 2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int s = j * 8 + t * 2 + e;
                        float d = s <= to && s >= from ? exp2_fast(top - (e ? low_.y : low_.x)) : 0.f;
                        m[e] = d * qk[j][half * 2 + e];
                        if (s < to) a[(two * Q + s) * PAD + to] = d * bt * kk[j][half * 2 + e];
                    }
                    sts32(ktile + two * QT + tile<Q>(to, j * 8 + t * 2), pack(m[0], m[1]));
                }
            }
        }
        __syncthreads();
        {
            float* x = a + mine * Q * PAD;
            float acc[16];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int r0 = (i & ~31) + r * 16;
#pragma unroll
                for (int j = 0; j < 16; j++) acc[j] = r0 + j == i ? 1.f : 0.f;
                if (r) less(acc, x, r0, r0 - 16, r0, i);
                among(acc, x, r0, i);
            }
#if Q == 64
            // Rows from 32 on of the first 32 columns, 16 rows a warp.
            int r0 = 32 + (i >> 5) * 16;
#pragma unroll
            for (int j = 0; j < 16; j++) acc[j] = 0.f;
            __syncthreads();
            less(acc, x, r0, 0, 32, lane);
            if (i < 32) among(acc, x, r0, lane);
            __syncthreads();
            if (i >= 32) {
                less(acc, x, r0, 32, 48, lane);
                among(acc, x, r0, lane);
            }
#endif
        }
        __syncthreads();
#pragma unroll
        for (int two = 0; two < 2; two++) {
            if (h0 + two >= heads) continue;
            i64 out = (place + h0 + two) * Q * Q;
#pragma unroll 4
            for (int e = threadIdx.x; e < Q * Q / 4; e += PREPARERS) {
                int to = e / (Q / 4), s = e % (Q / 4) * 4;
                float4 x = *(const float4*)(a + (two * Q + to) * PAD + s), f = *(const float4*)&bet[two][s];
                auto at_ = [&](float v, int j) { return s + j < to ? v : s + j == to ? 1.f : 0.f; };
                u32 m = ktile + two * QT + tile<Q>(to, s);
                *(uint2*)(inv + out + e * 4) = uint2{pack(at_(x.x, 0) * f.x, at_(x.y, 1) * f.y), pack(at_(x.z, 2) * f.z, at_(x.w, 3) * f.w)};
                *(uint2*)(mix + out + e * 4) = s <= to ? uint2{lds32(m), lds32(m + 4)} : uint2{0, 0};
            }
        }
    }
}
#endif
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
#endif
// y[row][width] = the sum over `count` of part[row][count][width], in order.
KERNEL delta_fold(const float* part, TR0* y, i64 n, int count, int width) {
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        const float* p = part + i / width * count * width + i % width;
        float s = 0;
        for (int k = 0; k < count; k++) s += p[(i64)k * width];
        st(y, i, s);
    }
}
