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
// The same for many rows at once, in chunks of 256 choices: how many of each expert a chunk has, where each chunk begins within its experts,
// and the place of each choice, by its rank among the equal choices of its warp and the warps before.
KERNEL expert_tally(const int* experts, int* tally, int R, int E) {
    extern __shared__ int count[];
    for (int e = threadIdx.x; e < E; e += 256) count[e] = 0;
    __syncthreads();
    int f = blockIdx.x * 256 + threadIdx.x;
    if (f < R) atomicAdd(count + experts[f], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += 256) tally[blockIdx.x * E + e] = count[e];
}
KERNEL expert_bases(int* tally, int* offsets, int chunks, int E) {
    extern __shared__ int count[];
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        int s = 0;
#pragma unroll 8
        for (int c = 0; c < chunks; c++) {
            int v = tally[c * E + e];
            tally[c * E + e] = s;
            s += v;
        }
        count[e] = s;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int s = 0;
        for (int e = 0; e < E; e++) {
            offsets[e] = s;
            s += count[e];
        }
        offsets[E] = s;
    }
}
KERNEL expert_sort(const int* experts, const int* tally, const int* offsets, int* order, int* slot, int R, int E) {
    extern __shared__ int count[];
    for (int e = threadIdx.x; e < 8 * E; e += 256) count[e] = 0;
    __syncthreads();
    int f = blockIdx.x * 256 + threadIdx.x, w = threadIdx.x >> 5, e = f < R ? experts[f] : -1;
    u32 same = __match_any_sync(FULL, e);
    int rank = __popc(same & ((1u << (threadIdx.x & 31)) - 1));
    if (e >= 0 && rank == 0) count[w * E + e] = __popc(same);
    __syncthreads();
    if (e < 0) return;
    int r = offsets[e] + tally[blockIdx.x * E + e] + rank;
    for (int i = 0; i < w; i++) r += count[i * E + e];
    order[r] = f;
    slot[f] = r;
}
// Rows of whole 16 bytes: one block a row.
KERNEL gather_rows_16(const uint4* x, const int* order, uint4* y, int n, int K) {
    i64 from = (i64)(order[blockIdx.x] / K) * n, to = (i64)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[to + i] = x[from + i];
}
struct Eight { float v[8]; };
__device__ __forceinline__ Eight eight(const bf16* p) {
    uint4 x = *(const uint4*)p;
    u32 w[4] = {x.x, x.y, x.z, x.w};
    Eight r;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        r.v[2 * i] = __uint_as_float(w[i] << 16);
        r.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
    return r;
}
__device__ __forceinline__ void put(bf16* p, const Eight& r) { *(uint4*)p = make_uint4(pack(r.v[0], r.v[1]), pack(r.v[2], r.v[3]), pack(r.v[4], r.v[5]), pack(r.v[6], r.v[7])); }
// One block a token.
KERNEL combine_16(const bf16* y, const int* slot, const float* weights, bf16* x, int D, int K) {
    i64 f = (i64)blockIdx.x * K;
    for (int d = threadIdx.x * 8; d < D; d += blockDim.x * 8) {
        Eight s = {};
        for (int k = 0; k < K; k++) {
            float w = weights ? weights[f + k] : 1.f;
            Eight v = eight(y + (i64)slot[f + k] * D + d);
#pragma unroll
            for (int i = 0; i < 8; i++) s.v[i] += w * v.v[i];
        }
        put(x + (i64)blockIdx.x * D + d, s);
    }
}
// One block a routed row.
KERNEL combine_bwd_16(const bf16* y, const int* order, const float* weights, const bf16* dx, bf16* dy, float* dweights, int D, int K) {
    i64 r = blockIdx.x, f = order[r], token = f / K;
    float w = weights[f], s = 0;
    for (int d = threadIdx.x * 8; d < D; d += blockDim.x * 8) {
        Eight g = eight(dx + token * D + d), v = eight(y + r * D + d);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            s += g.v[i] * v.v[i];
            g.v[i] *= w;
        }
        put(dy + r * D + d, g);
    }
    s = block_sum(s);
    if (threadIdx.x == 0) dweights[f] = s;
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
__device__ __forceinline__ bool rows_of(const int* offsets, int E, int tile, int tall, int& e, int& r0, int& r1) {
    for (e = 0; e < E; e++) {
        int from = offsets[e], to = offsets[e + 1], n = (to - from + tall - 1) / tall;
        if (tile < n) {
            r0 = from + tile * tall;
            r1 = r0 + tall < to ? r0 + tall : to;
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
    if (!rows_of(offsets, E, blockIdx.y, 64, e, r0, r1)) return;
    const TA1* we = w + (i64)e * N * K;
    product(K,
        [&](float (*s)[65], int k0, int i) { int r = r0 + i / 16, k = k0 + i % 16; s[i % 16][i / 16] = r < r1 && k < K ? ld(x, (i64)r * K + k) : 0.f; },
        [&](float (*s)[65], int k0, int i) { int n = n0 + i / 16, k = k0 + i % 16; s[i % 16][i / 16] = n < N && k < K ? ld(we, (i64)n * K + k) : 0.f; },
        [&](int i, int j, float v) { if (r0 + i < r1 && n0 + j < N) st(y, (i64)(r0 + i) * N + n0 + j, v); });
}
// dx[r,k] = sum_n dy[r,n] w[e,n,k]
KERNEL grouped_linear_dx(const TA0* dy, const TA1* w, const int* offsets, TR0* dx, int E, int N, int K) {
    int e, r0, r1, c0 = blockIdx.x * 64;
    if (!rows_of(offsets, E, blockIdx.y, 64, e, r0, r1)) return;
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

// The same in bf16 with products of warps, for every architecture: tiles of 128 x 128 over 32, 8 warps of 32 x 64 each. An operand is stored
// by its own rows, or (TA, TB) by rows of what is summed over. WHOLE: all rows are words of 16 bytes.
#ifdef WARPS
#define WT 128
struct Stored { const bf16* at; i64 stride; int rows, columns; };
__device__ __forceinline__ uint4 fetch(const Stored& s, int r, int c) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (r >= s.rows) return v;
    const bf16* p = s.at + r * s.stride + c;
#ifdef WHOLE
    if (c < s.columns) v = *(const uint4*)p;
#else
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = (c + 2 * i < s.columns ? p[2 * i].x : 0) | (u32)(c + 2 * i + 1 < s.columns ? p[2 * i + 1].x : 0) << 16;
    v = make_uint4(w[0], w[1], w[2], w[3]);
#endif
    return v;
}
template <int T> __device__ __forceinline__ void fetch_tile(uint4 (&v)[2], const Stored& s, int k0) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int e = threadIdx.x + 256 * i;
        v[i] = T ? fetch(s, k0 + e / 16, e % 16 * 8) : fetch(s, e / 4, k0 + e % 4 * 8);
    }
}
template <int T> __device__ __forceinline__ void put_tile(bf16* to, const uint4 (&v)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int e = threadIdx.x + 256 * i;
        *(uint4*)(to + (T ? e / 16 * (WT + 8) + e % 16 * 8 : e / 4 * 40 + e % 4 * 8)) = v[i];
    }
}
// done(row, column, value) for rows and columns of the tile.
template <int TA, int TB, class Done> __device__ __forceinline__ void warp_product(int depth, const Stored& a, const Stored& b, Done done) {
    __shared__ __align__(16) bf16 as[WT * 40], bs[WT * 40];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = (warp & 3) * 32, column = (warp >> 2) * 64;
    float d[2][32];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int x = 0; x < 32; x++) d[i][x] = 0;
    uint4 va[2], vb[2];
    fetch_tile<TA>(va, a, 0);
    fetch_tile<TB>(vb, b, 0);
    for (int k0 = 0; k0 < depth; k0 += 32) {
        __syncthreads();
        put_tile<TA>(as, va);
        put_tile<TB>(bs, vb);
        __syncthreads();
        if (k0 + 32 < depth) {
            fetch_tile<TA>(va, a, k0 + 32);
            fetch_tile<TB>(vb, b, k0 + 32);
        }
#pragma unroll
        for (int k = 0; k < 32; k += 16) {
            u32 x[2][4], y[4];
            load_a<TA>(x[0], as, TA ? WT + 8 : 40, row, k);
            load_a<TA>(x[1], as, TA ? WT + 8 : 40, row + 16, k);
#pragma unroll
            for (int n = 0; n < 64; n += 16) {
                load_b<TB>(y, bs, TB ? WT + 8 : 40, column + n, k);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma(d[i] + n / 2, x[i], y);
                    mma(d[i] + n / 2 + 4, x[i], y + 2);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int x = 0; x < 32; x++) done(row + 16 * i + (lane >> 2) + 8 * (x >> 1 & 1), column + 8 * (x >> 2) + 2 * (lane & 3) + (x & 1), d[i][x]);
}
KERNEL grouped_linear_warps(const bf16* x, const bf16* w, const int* offsets, bf16* y, int E, int N, int K) {
    int e, r0, r1, n0 = blockIdx.x * WT;
    if (!rows_of(offsets, E, blockIdx.y, WT, e, r0, r1)) return;
    Stored a = {x + (i64)r0 * K, K, r1 - r0, K}, b = {w + ((i64)e * N + n0) * K, K, N - n0, K};
    warp_product<0, 0>(K, a, b, [&](int i, int j, float v) { if (r0 + i < r1 && n0 + j < N) st(y, (i64)(r0 + i) * N + n0 + j, v); });
}
KERNEL grouped_linear_dx_warps(const bf16* dy, const bf16* w, const int* offsets, bf16* dx, int E, int N, int K) {
    int e, r0, r1, c0 = blockIdx.x * WT;
    if (!rows_of(offsets, E, blockIdx.y, WT, e, r0, r1)) return;
    Stored a = {dy + (i64)r0 * N, N, r1 - r0, N}, b = {w + (i64)e * N * K + c0, K, N, K - c0};
    warp_product<0, 1>(N, a, b, [&](int i, int j, float v) { if (r0 + i < r1 && c0 + j < K) st(dx, (i64)(r0 + i) * K + c0 + j, v); });
}
KERNEL grouped_linear_dw_warps(const bf16* x, const bf16* dy, const int* offsets, const float* beta, float* dw, int N, int K) {
    int e = blockIdx.z, from = offsets[e], rows = offsets[e + 1] - from, n0 = blockIdx.y * WT, c0 = blockIdx.x * WT;
    float bt = beta ? beta[0] : 0.f;
    Stored a = {dy + (i64)from * N + n0, N, rows, N - n0}, b = {x + (i64)from * K + c0, K, rows, K - c0};
    warp_product<1, 1>(rows, a, b, [&](int i, int j, float v) {
        if (n0 + i < N && c0 + j < K) {
            float* p = dw + ((i64)e * N + n0 + i) * K + c0 + j;
            *p = bt == 0.f ? v : bt * *p + v;
        }
    });
}
#endif

// The same on sm_90a in bf16: persistent blocks over a list of tiles of 128 x 256 that each block makes up from the offsets; warpgroup 0
// brings tiles by the copy engine, two warpgroups multiply. Sizes are multiples of 8.
#if defined(TENSOR) && defined(HOPPER)
#define TM 128
#define TN 256
#define STAGES 4
#define A_BYTES (TM * 128)
#define B_BYTES (TN * 128)
// Tiles of rows that go together over all tiles of columns.
#define BAND 16
extern __shared__ float smem[];

struct Tile { int e, m, n; };
// Tile i: cum[e] tiles come before expert e, and it has rows of tiles of its own.
__device__ __forceinline__ Tile tile_at(int i, const int* cum, int& e, int columns) {
    while (i >= cum[e + 1]) e++;
    int r = i - cum[e], rows = (cum[e + 1] - cum[e]) / columns, band = r / (BAND * columns), in = min(BAND, rows - band * BAND);
    r -= band * BAND * columns;
    Tile t = {e, band * BAND + r % in, r / in};
    return t;
}
// One stage of products: 64 of the sum. TA, TB: operands stored across the sum.
template <int TA, int TB> __device__ __forceinline__ void stage_products(float (&d)[128], u32 a, u32 b, int w, int add) {
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
        mma<TA, TB>(d, operand(a + w * 8192 + (TA ? kk * 2048 : kk * 32)), operand(b + (TB ? kk * 2048 : kk * 32), 8192), add || kk > 0);
}
// load(tile, step, stage's a, stage's b, barrier), depth(tile): steps, clear(tile, step): rows of the stage that count, done(tile, d, warpgroup).
template <int TA, int TB, class Load, class Depth, class Clear, class Done>
__device__ __forceinline__ void grouped(const int* cum, int columns, int all, Load load, Depth depth, Clear clear, Done done) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 as = base, bs = as + STAGES * A_BYTES, full = bs + STAGES * B_BYTES, empty = full + 8 * STAGES;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            bar_init(full + 8 * i, 1);
            bar_init(empty + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();
    int e = 0, stage = 0, phase = 0;
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x != 0) return;
        for (int i = blockIdx.x; i < all; i += gridDim.x) {
            Tile t = tile_at(i, cum, e, columns);
            for (int k = 0, n = depth(t); k < n; k++) {
                bar_wait(empty + 8 * stage, phase ^ 1);
                bar_expect(full + 8 * stage, A_BYTES + B_BYTES);
                load(t, k, as + stage * A_BYTES, bs + stage * B_BYTES, full + 8 * stage);
                if (++stage == STAGES) { stage = 0; phase ^= 1; }
            }
        }
        return;
    }
    registers_more<232>();
    int w = group - 1;
    for (int i = blockIdx.x; i < all; i += gridDim.x) {
        Tile t = tile_at(i, cum, e, columns);
        float d[128];
        int n = depth(t), before = 0;
        if (n == 0) {
#pragma unroll
            for (int x = 0; x < 128; x++) d[x] = 0;
        }
        for (int k = 0; k < n; k++) {
            bar_wait(full + 8 * stage, phase);
            int rows = clear(t, k);
            if (rows < 64) {
                // Rows that belong to the next expert: 16 bytes a thread, in all blocks of 64 columns of both operands.
                for (int x = threadIdx.x - 128; x < (64 - rows) * 48; x += 256) {
                    int r = rows + x / 48, c = x % 48, block = c >> 3;
                    u32 at = (block < 2 ? as + stage * A_BYTES + block * 8192 : bs + stage * B_BYTES + (block - 2) * 8192) + r * 128 + (c & 7) * 16;
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
                }
                fence_shared();
                named_wait(1, 256);
            }
            mma_begin();
            stage_products<TA, TB>(d, as + stage * A_BYTES, bs + stage * B_BYTES, w, k > 0);
            mma_commit();
            if (k > 0) {
                mma_wait<1>();
                warp_arrive(empty + 8 * before);
            }
            before = stage;
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        mma_wait<0>();
        pin(d);
        if (n > 0) warp_arrive(empty + 8 * before);
        done(t, d, w);
    }
}
// Tiles before each expert, from its rows; E + 1 numbers after the stages. Returns their place and how many tiles there are.
__device__ __forceinline__ int* list(const int* offsets, int E, int tiles_per_row_tile, int uniform, int& all, int*& from) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    int* cum = (int*)((char*)smem + (base - shared_address(smem)) + STAGES * (A_BYTES + B_BYTES) + 128);
    from = cum + E + 1;
    for (int i = threadIdx.x; i <= E; i += blockDim.x) from[i] = offsets[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        int s = 0;
        for (int e = 0; e < E; e++) {
            cum[e] = s;
            s += (uniform ? uniform : (from[e + 1] - from[e] + TM - 1) / TM) * tiles_per_row_tile;
        }
        cum[E] = s;
    }
    __syncthreads();
    all = cum[E];
    return cum;
}
__device__ __forceinline__ void store_tile(bf16* y, int r0, int r1, int n0, int N, const float (&d)[128], int w) {
    int r = r0 + 64 * w + ((threadIdx.x >> 5) & 3) * 16 + ((threadIdx.x & 31) >> 2);
    store_rows(y + (i64)r * N + n0, N, d, 1.f, 1.f, r < r1, r + 8 < r1, N - n0);
}
#define GROUPED extern "C" __global__ void __launch_bounds__(384, 1)
// mx: [K R], mw: [K N E]
GROUPED grouped_linear_tc(const __grid_constant__ TensorMap mx, const __grid_constant__ TensorMap mw, const int* offsets, bf16* y, int E, int N, int K) {
    int all, *from, columns = (N + TN - 1) / TN, *cum = list(offsets, E, columns, 0, all, from);
    grouped<0, 0>(cum, columns, all,
        [&](Tile t, int k, u32 a, u32 b, u32 bar) {
            copy_box(a, &mx, bar, 64 * k, from[t.e] + t.m * TM, 0);
            copy_box(b, &mw, bar, 64 * k, t.n * TN, t.e);
        },
        [&](Tile) { return (K + 63) / 64; }, [&](Tile, int) { return 64; },
        [&](Tile t, float (&d)[128], int w) { store_tile(y, from[t.e] + t.m * TM, from[t.e + 1], t.n * TN, N, d, w); });
}
// my: [N R], mw: [K N E] in boxes of 64 x 64
GROUPED grouped_linear_dx_tc(const __grid_constant__ TensorMap my, const __grid_constant__ TensorMap mw, const int* offsets, bf16* dx, int E, int N, int K) {
    int all, *from, columns = (K + TN - 1) / TN, *cum = list(offsets, E, columns, 0, all, from);
    grouped<0, 1>(cum, columns, all,
        [&](Tile t, int k, u32 a, u32 b, u32 bar) {
            copy_box(a, &my, bar, 64 * k, from[t.e] + t.m * TM, 0);
            for (int x = 0; x < 4; x++) copy_box(b + x * 8192, &mw, bar, t.n * TN + 64 * x, 64 * k, t.e);
        },
        [&](Tile) { return (N + 63) / 64; }, [&](Tile, int) { return 64; },
        [&](Tile t, float (&d)[128], int w) { store_tile(dx, from[t.e] + t.m * TM, from[t.e + 1], t.n * TN, K, d, w); });
}
// mx: [K R], my: [N R], both in boxes of 64 x 64. dw = beta dw + dy' x
GROUPED grouped_linear_dw_tc(const __grid_constant__ TensorMap mx, const __grid_constant__ TensorMap my, const int* offsets, const float* beta, float* dw, int E, int N, int K) {
    int all, *from, columns = (K + TN - 1) / TN, *cum = list(offsets, E, columns, (N + TM - 1) / TM, all, from);
    float bt = beta ? beta[0] : 0.f;
    grouped<1, 1>(cum, columns, all,
        [&](Tile t, int k, u32 a, u32 b, u32 bar) {
            int r = from[t.e] + 64 * k;
            for (int x = 0; x < 2; x++) copy_box(a + x * 8192, &my, bar, t.m * TM + 64 * x, r, 0);
            for (int x = 0; x < 4; x++) copy_box(b + x * 8192, &mx, bar, t.n * TN + 64 * x, r, 0);
        },
        [&](Tile t) { return (from[t.e + 1] - from[t.e] + 63) / 64; }, [&](Tile t, int k) { return min(64, from[t.e + 1] - from[t.e] - 64 * k); },
        [&](Tile t, float (&d)[128], int w) {
            // Neighbouring lanes exchange halves of two groups of 8 columns, so that each stores 16 bytes.
            int l = threadIdx.x & 3, r = t.m * TM + 64 * w + ((threadIdx.x >> 5) & 3) * 16 + ((threadIdx.x & 31) >> 2), c = t.n * TN + 8 * (l & 1) + 4 * (l >> 1);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float* row = dw + ((i64)t.e * N + r + 8 * half) * K + c;
#pragma unroll
                for (int x = 0; x < 16; x++) {
                    float4 v = make_float4(d[8 * x + 2 * half], d[8 * x + 2 * half + 1], d[8 * x + 4 + 2 * half], d[8 * x + 5 + 2 * half]);
                    quad_swap(v.x, v.z, l & 1, 1);
                    quad_swap(v.y, v.w, l & 1, 1);
                    if (r + 8 * half < N && c + 16 * x < K) {
                        if (bt != 0.f) {
                            float4 old = *(const float4*)(row + 16 * x);
                            v.x += bt * old.x;
                            v.y += bt * old.y;
                            v.z += bt * old.z;
                            v.w += bt * old.w;
                        }
                        *(float4*)(row + 16 * x) = v;
                    }
                }
            }
        });
}
#endif
