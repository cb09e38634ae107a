#if TILED
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
#endif
