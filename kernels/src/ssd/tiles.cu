#if TILED
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
// A tile among those of its chunk, without divisions on the way to the next.
struct Cursor {
    Tiles at;
    int inner, begin;
    __device__ Cursor(const Tiles& at, int k) : at(at), inner(k % at.per), begin(k / at.per * at.chunk) {}
    __device__ void next() {
        if (++inner == at.per) {
            inner = 0;
            begin += at.chunk;
        }
    }
    __device__ int start() const { return begin + inner * Q; }
    __device__ int len() const { return min(min(at.chunk - inner * Q, at.T - start()), Q); }
};
// Rows of a matrix in memory into columns col.. of a tile with rows of W; zeros beyond `rows` and `cols`.
template <int W, int ROWS, int COLS, int THREADS, bool WHOLE = VEC> __device__ __forceinline__ void fetch(u32 to, int col, const bf16* from, i64 stride, int rows, int cols) {
    constexpr int C = COLS / 8, STEP = THREADS / C;
    int r = threadIdx.x % THREADS / C, c = threadIdx.x % C * 8;
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
#define TRIANGLE (Q / 16 * (Q / 16 + 1) / 2)
#define LANE int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3; (void)g; (void)t; (void)lane; (void)warp;
#if WG
// Tiles of sm_90a's forms are [64][64] with swizzled rows in shared memory; wider ones lie side by side.
#define BLOCKS (NN / 64)
#define PLANE 8192
// A walk around N stages of shared memory, which some threads fill and others read: barriers at `bars` say of each stage that it is full and
// that it is free; here is where one of the threads stands.
template <int N> struct Ring {
    u32 bars;
    int stage = 0, round = 0;
    __device__ Ring(const u64* at, int fillers, int readers) : bars(shared_address(at)) {
        if (threadIdx.x) return;
        for (int i = 0; i < N; i++) {
            bar_init(bars + 8 * i, fillers);
            bar_init(bars + 8 * (N + i), readers);
        }
        bar_init_done();
    }
    __device__ void next() {
        if (++stage == N) {
            stage = 0;
            round ^= 1;
        }
    }
    __device__ void wait_full() const { bar_wait(bars + 8 * stage, round); }
    // Whether what was here before may be written over, in the first round at once; whether what is here now may be.
    __device__ bool is_free() const { return bar_test(bars + 8 * (N + stage), round ^ 1); }
    __device__ void wait_free() const { bar_wait(bars + 8 * (N + stage), round ^ 1); }
    __device__ void wait_freed() const { bar_wait(bars + 8 * (N + stage), round); }
    __device__ Ring before() const {
        Ring r = *this;
        if (r.stage-- == 0) {
            r.stage = N - 1;
            r.round ^= 1;
        }
        return r;
    }
    __device__ void filled() const { bar_arrive(bars + 8 * stage); }
    __device__ void freed() const { bar_arrive(bars + 8 * (N + stage)); }
};
// Fills a ring with n things, of which `bring(i, stage)` starts the copies. What is under way is handed over before a wait for room, and one
// behind otherwise; `after(i)` is called when copies of i have been started.
template <int N, class Bring, class After> __device__ __forceinline__ void fill(Ring<N> ring, int n, Bring bring, After after) {
    Ring<N> landed = ring;
    bool under_way = false;
    auto land = [&] {
        fence_shared();
        landed.filled();
        landed.next();
    };
    for (int i = 0; i < n; i++, ring.next()) {
        if (under_way && !__any_sync(FULL, ring.is_free())) {
            cp_wait<0>();
            land();
            under_way = false;
        }
        ring.wait_free();
        bring(i, ring.stage);
        cp_commit();
        if (under_way) {
            cp_wait<1>();
            land();
        }
        under_way = true;
        after(i);
    }
    if (under_way) {
        cp_wait<0>();
        land();
    }
}
// This warp's 16 rows of a tile [64][16 COUNT] in registers, as an operand and as accumulators lie.
template <int COUNT> __device__ __forceinline__ void get_rows(u32* v, u32 from) {
    int wr = (threadIdx.x >> 5 & 3) * 16;
#pragma unroll
    for (int j = 0; j < COUNT; j++) ldsm4(*(u32(*)[4])(v + 4 * j), frag_a<64>(from + (j >> 2) * PLANE, wr, (j & 3) * 16));
}
__device__ __forceinline__ void stsm4(u32 at, u32 a, u32 b, u32 c, u32 d) { asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory"); }
// This warp's 16 rows of an accumulator [64][16 COUNT], as pairs of bf16.
template <int COUNT> __device__ __forceinline__ void put_pairs(u32 to, const u32* v) {
    int lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
    to += row * 128;
#pragma unroll
    for (int j = 0; j < COUNT; j++) stsm4(to + (j / 4) * PLANE + (((j % 4) * 2 + (lane >> 4)) ^ (row & 7)) * 16, v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
}
template <int COUNT> __device__ __forceinline__ void put_rows(u32 to, const float* v) {
    u32 pairs[4 * COUNT];
#pragma unroll
    for (int i = 0; i < 4 * COUNT; i++) pairs[i] = pack(v[2 * i], v[2 * i + 1]);
    put_pairs<COUNT>(to, pairs);
}
#endif
// What walks over tiles is compiled apart from the gradients.
#if !GRADS
// One block a tile of SPAN heads: four threads a head, each a quarter of the tokens. key = cum - log2 dts.
#define SPAN 32
KERNEL ssd_prepare(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, float* dts, float* cum, float* key, int* first, int T, int H, int chunk, int per, int tiles, float lo, float hi) {
    // Rows of heads, four words longer than a tile, so that threads of neighbouring heads write to all banks.
    __shared__ __align__(16) float rows[3][SPAN][Q + 4];
    __shared__ float ends[4][SPAN];
    __shared__ u32 begun[Q / 32];
    constexpr int M = Q / 4;
    int own = threadIdx.x % SPAN, h = blockIdx.x * SPAN + own, part = threadIdx.x / SPAN, k = blockIdx.y;
    i64 b = blockIdx.z;
    Tiles at = {T, chunk, per};
    int t0 = at.start(k), len = at.len(k);
    bool on = h < H;
    float rate = on ? ld(a, h) * 1.4426950408889634f : 0.f, bias = on && dt_bias ? ld(dt_bias, h) : 0.f, d[M], s[M];
#pragma unroll
    for (int i = 0; i < M; i++) d[i] = on && part * M + i < len ? ld(dt, (b * T + t0 + part * M + i) * H + h) : 0.f;
    if (blockIdx.x == 0 && threadIdx.x < Q) {
        u32 bits = __ballot_sync(FULL, pos && (int)threadIdx.x < len && pos[b * T + t0 + threadIdx.x] == 0);
        if ((threadIdx.x & 31) == 0) begun[threadIdx.x >> 5] = bits;
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        d[i] = part * M + i < len ? fminf(fmaxf(softplus(d[i] + bias), lo), hi) : 0.f;
        s[i] = (i ? s[i - 1] : 0.f) + d[i] * rate;
    }
    ends[part][own] = s[M - 1];
    __syncthreads();
    float before = 0;
    for (int i = 0; i < part; i++) before += ends[i][own];
#pragma unroll
    for (int i = 0; i < M; i += 4) {
        float e[4], l[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            e[j] = before + s[i + j];
            l[j] = e[j] - log2_fast(d[i + j]);
        }
        *(float4*)&rows[0][own][part * M + i] = make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]);
        *(float4*)&rows[1][own][part * M + i] = make_float4(e[0], e[1], e[2], e[3]);
        *(float4*)&rows[2][own][part * M + i] = make_float4(l[0], l[1], l[2], l[3]);
    }
    __syncthreads();
    i64 out = ((b * tiles + k) * H + blockIdx.x * SPAN) * Q;
#pragma unroll
    for (int i = 0; i < SPAN * Q / 4 / 128; i++) {
        int e = threadIdx.x + i * 128, r = e / (Q / 4), c = e % (Q / 4) * 4;
        if (blockIdx.x * SPAN + r >= H) continue;
        *(float4*)(dts + out + e * 4) = *(const float4*)&rows[0][r][c];
        *(float4*)(cum + out + e * 4) = *(const float4*)&rows[1][r][c];
        *(float4*)(key + out + e * 4) = *(const float4*)&rows[2][r][c];
    }
    if (blockIdx.x == 0 && threadIdx.x < Q) {
        int word = threadIdx.x >> 5, from = -1;
        u32 bits = begun[word] & (0xffffffffu >> (31 - (threadIdx.x & 31)));
        for (;; bits = begun[word]) {
            if (bits) from = word * 32 + 31 - __clz(bits);
            if (bits || --word < 0) break;
        }
        first[(b * tiles + k) * Q + threadIdx.x] = from;
    }
}
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
// Sums over the rows of part[rows][3 H]; a result may be absent. One block a head.
KERNEL ssd_total(const float* part, float* da, float* dbias, float* dd, int rows, int H) {
    float s[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
#pragma unroll
        for (int k = 0; k < 3; k++) s[k] += part[((i64)i * 3 + k) * H + blockIdx.x];
#pragma unroll
    for (int k = 0; k < 3; k++) {
        float v = block_sum(s[k]);
        float* to = k == 0 ? da : k == 1 ? dbias : dd;
        if (to && threadIdx.x == 0) to[blockIdx.x] = v;
    }
}
#else
// Sums of the splits.
KERNEL ssd_merge(const float* part, bf16* out, int splits, i64 n) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        float s = 0;
        for (int k = 0; k < splits; k++) s += part[k * n + e];
        st(out, e, s);
    }
}
#endif
#endif
