// The same on sm_90a in bf16: warpgroup products, tiles brought by the copy engine. Head widths are multiples of 8, filled up with zeros to
// HB blocks of 64. Warpgroup 0 brings tiles, the others compute.
#if defined(TENSOR) && defined(HOPPER)
#define HB ((P + 63) / 64)
// Rows of a tile of queries, and of the tiles of keys it walks.
#define QM 128
#define KN (HB > 2 ? 64 : 128)

template <int N> __device__ __forceinline__ void to_operand(u32 (&a)[N / 2], const float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) a[i] = pack(d[2 * i], d[2 * i + 1]);
}

#define STAGES 2
#define Q_BYTES (HB * QM * 128)
#define K_BYTES (HB * KN * 128)
// Tiles in order: sections of heads whose keys stay in the cache; within one the longest tiles first.
__device__ __forceinline__ void tile_of(int i, int tiles, int heads, int section, int& m, int& head) {
    int s = i / (section * tiles), r = i - s * section * tiles, n = min(section, heads - s * section);
    m = tiles - 1 - r / n;
    head = s * section + r % n;
}
extern "C" __global__ void __launch_bounds__(384, 1) attn_fwd_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const int* pos, const int* slot, bf16* out, float* lse, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 qs = base, ks = qs + Q_BYTES, vs = ks + STAGES * K_BYTES, bars = vs + STAGES * K_BYTES;
    u32 q_full = bars, q_empty = bars + 8, k_full = bars + 16, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, s0 = slot ? slot[0] : 0, tiles = (T + QM - 1) / QM, all = tiles * B * H;
    if (threadIdx.x == 0) {
        bar_init(q_full, 1);
        bar_init(q_empty, 8);
        for (int i = 0; i < STAGES; i++) {
            bar_init(k_full + 8 * i, 1);
            bar_init(k_empty + 8 * i, 8);
            bar_init(v_full + 8 * i, 1);
            bar_init(v_empty + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x >= 32) return;
        int n = 0, stage = 0, phase = 0;
        for (int i = blockIdx.x; i < all; i += gridDim.x, n++) {
            int m, head;
            tile_of(i, tiles, B * H, section, m, head);
            int b = head / H, h = head % H, g = h / (H / G), t0 = m * QM;
            int last = (s0 + min(t0 + QM, T) - 1) / KN, first = first_of_tile(s0, t0, QM, T, pos, (i64)b * T, window) / KN;
            if (lane == 0) {
                bar_wait(q_empty, (n & 1) ^ 1);
                bar_expect(q_full, Q_BYTES);
                for (int x = 0; x < HB; x++) copy_box(qs + x * QM * 128, &mq, q_full, 64 * x, t0, h, b);
                for (int j = last; j >= first; j--) {
                    bar_wait(k_empty + 8 * stage, phase ^ 1);
                    bar_expect(k_full + 8 * stage, K_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(ks + stage * K_BYTES + x * KN * 128, &mk, k_full + 8 * stage, 64 * x, j * KN, g, b);
                    bar_wait(v_empty + 8 * stage, phase ^ 1);
                    bar_expect(v_full + 8 * stage, K_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(vs + stage * K_BYTES + x * KN * 128, &mv, v_full + 8 * stage, 64 * x, j * KN, g, b);
                    if (++stage == STAGES) { stage = 0; phase ^= 1; }
                }
            }
            __syncwarp();
        }
        return;
    }
    registers_more<232>();
    int w = uniform(group - 1), warp = (threadIdx.x >> 5) & 3, row = 64 * w + 16 * warp + (lane >> 2);
    float sl = scale * LOG2E;
#if HB > 2
    u64 qd = operand(qs + w * 8192);
#endif
    // Whose turn it is to issue products: a warpgroup computes its softmax under the products of the other.
    if (w == 1) named_arrive(1, 256);
    int n = 0, stage = 0, phase = 0;
    for (int i = blockIdx.x; i < all; i += gridDim.x, n++) {
        int m_tile, head;
        tile_of(i, tiles, B * H, section, m_tile, head);
        int b = head / H, h = head % H, t0 = m_tile * QM;
        int last = (s0 + min(t0 + QM, T) - 1) / KN, first = first_of_tile(s0, t0, QM, T, pos, (i64)b * T, window) / KN;
        int t = t0 + row, q0 = s0 + t, q1 = q0 + 8;
        int lo0 = first_seen(q0, t < T ? pos : 0, (i64)b * T + t, window), lo1 = first_seen(q1, t + 8 < T ? pos : 0, (i64)b * T + t + 8, window);
        // Keys that every row of this warp sees lie between the two.
        int sure_from = __reduce_max_sync(FULL, max(lo0, lo1)), sure_to = s0 + t0 + 64 * w + 16 * warp;
        float o[32 * HB], s[KN / 2], top[2] = {-INF, -INF}, sum[2] = {0, 0}, fix[2];
        u32 p[KN / 4];
#if HB <= 2
        u32 qf[16 * HB];
#endif
        auto scores = [&](int st) {
            u64 kd = operand(ks + st * K_BYTES);
#pragma unroll
            for (int kk = 0; kk < 4 * HB; kk++) {
#if HB <= 2
                mma<0>(s, qf + 4 * kk, along(kd, (kk >> 2) * KN * 128 + (kk & 3) * 32), kk > 0);
#else
                mma<0, 0>(s, along(qd, (kk >> 2) * QM * 128 + (kk & 3) * 32), along(kd, (kk >> 2) * KN * 128 + (kk & 3) * 32), kk > 0);
#endif
            }
        };
        // Slots after those of the queries may hold anything, which no share of 0 makes 0: each warpgroup clears them for itself.
        auto clear = [&](int st, int j) {
            int rows = s0 + min(t0 + QM, T) - j * KN;
            if (!slot || rows >= KN) return;
            for (int x = threadIdx.x & 127; x < (KN - rows) * 8 * HB; x += 128) {
                u32 at = vs + st * K_BYTES + (x >> 3) % HB * KN * 128 + (rows + (x >> 3) / HB) * 128 + (x & 7) * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
            }
            fence_shared();
            named_wait(3 + w, 128);
        };
        auto values = [&](int st, int add) {
            u64 vd = operand(vs + st * K_BYTES, KN * 128);
#pragma unroll
            for (int kk = 0; kk < KN / 16; kk++) mma<1>(o, p + 4 * kk, along(vd, kk * 2048), add || kk > 0);
        };
        auto softmax = [&](int j) {
            int c0 = j * KN;
            if (c0 + KN - 1 > sure_to || c0 < sure_from) mask_rows(s, c0, -INF, q0, lo0, q1, lo1);
            soften(s, top, sum, fix, sl);
        };
        bar_wait(q_full, n & 1);
#if HB <= 2
        // Queries as operands in registers: a third less is read from shared memory for the scores.
        u32 q_row = qs + (64 * w + 16 * warp + (lane & 15)) * 128;
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(qf[4 * kk]), "=r"(qf[4 * kk + 1]), "=r"(qf[4 * kk + 2]), "=r"(qf[4 * kk + 3]) : "r"(q_row + (kk >> 2) * QM * 128 + (((kk & 3) * 2 + (lane >> 4) ^ lane & 7) << 4)) : "memory");
        warp_arrive(q_empty);
        pin(qf);
#endif
        bar_wait(k_full + 8 * stage, phase);
        named_wait(1 + w, 256);
        mma_begin();
        scores(stage);
        mma_commit();
        named_arrive(2 - w, 256);
        mma_wait<0>();
        pin(s);
        warp_arrive(k_empty + 8 * stage);
        softmax(last);
        to_operand(p, s);
        int add = 0;
        for (int j = last - 1; j >= first; j--) {
            int before = stage, before_phase = phase;
            if (++stage == STAGES) { stage = 0; phase ^= 1; }
            bar_wait(k_full + 8 * stage, phase);
            named_wait(1 + w, 256);
            pin(p);
            pin(s);
            pin(o);
            mma_begin();
            scores(stage);
            mma_commit();
            bar_wait(v_full + 8 * before, before_phase);
            clear(before, j + 1);
            values(before, add);
            add = 1;
            mma_commit();
            named_arrive(2 - w, 256);
            mma_wait<1>();
            pin(s);
            warp_arrive(k_empty + 8 * stage);
            softmax(j);
            mma_wait<0>();
            pin(o);
            warp_arrive(v_empty + 8 * before);
            to_operand(p, s);
#pragma unroll
            for (int x = 0; x < 8 * HB; x++) {
                o[4 * x] *= fix[0];
                o[4 * x + 1] *= fix[0];
                o[4 * x + 2] *= fix[1];
                o[4 * x + 3] *= fix[1];
            }
        }
#if HB > 2
        warp_arrive(q_empty);
#endif
        bar_wait(v_full + 8 * stage, phase);
        clear(stage, first);
        pin(p);
        pin(o);
        mma_begin();
        values(stage, add);
        mma_commit();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        }
        mma_wait<0>();
        pin(o);
        warp_arrive(v_empty + 8 * stage);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
        float f0 = sum[0] > 0 ? 1.f / sum[0] : 0.f, f1 = sum[1] > 0 ? 1.f / sum[1] : 0.f;
        if ((lane & 3) == 0) {
            if (t < T) lse[(i64)head * T + t] = top[0] * scale + logf(sum[0]);
            if (t + 8 < T) lse[(i64)head * T + t + 8] = top[1] * scale + logf(sum[1]);
        }
        store_rows(out + (((i64)b * T + t) * H + h) * P, (i64)H * P, o, f0, f1, t < T, t + 8 < T, P);
    }
    if (w == 0) named_wait(1, 256);
}

// One warp 32 / L rows, L lanes a row, 8 elements a lane.
#define DELTA_LANES (P > 128 ? 32 : P > 64 ? 16 : P > 32 ? 8 : 4)
KERNEL attn_delta_tc(const bf16* out, const bf16* dout, float* delta, i64 rows, int T, int H) {
    i64 row = global_thread() / DELTA_LANES;
    int c = threadIdx.x % DELTA_LANES * 8;
    float s = 0;
    if (row < rows && c < P) {
        uint4 x = *(const uint4*)(out + row * P + c), y = *(const uint4*)(dout + row * P + c);
        u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            s += __uint_as_float(xs[i] << 16) * __uint_as_float(ys[i] << 16) + __uint_as_float(xs[i] & 0xffff0000u) * __uint_as_float(ys[i] & 0xffff0000u);
    }
#pragma unroll
    for (int m = DELTA_LANES / 2; m; m >>= 1) s += __shfl_xor_sync(FULL, s, m);
    if (row < rows && threadIdx.x % DELTA_LANES == 0) {
        i64 bt = row / H;
        delta[(bt / T * H + row % H) * T + bt % T] = s;
    }
}

#if HB <= 2
// dq: blocks of 128 queries over tiles of 128 keys.
#define T_BYTES (HB * 128 * 128)
extern "C" __global__ void __launch_bounds__(384, 1) attn_dq_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const __grid_constant__ TensorMap mo, const int* pos, const float* lse, const float* delta, bf16* dq, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 qs = base, os = qs + T_BYTES, ks = os + T_BYTES, vs = ks + 2 * T_BYTES, bars = vs + 2 * T_BYTES;
    u32 q_full = bars, k_full = bars + 8, k_empty = bars + 24, v_full = bars + 40, v_empty = bars + 56;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, tiles = (T + 127) / 128, m, head;
    tile_of(blockIdx.x, tiles, B * H, section, m, head);
    int b = head / H, h = head % H, g = h / (H / G), t0 = m * 128;
    int last = (min(t0 + 128, T) - 1) / 128, first = first_of_tile(0, t0, 128, T, pos, (i64)b * T, window) / 128;
    if (threadIdx.x == 0) {
        bar_init(q_full, 1);
        for (int i = 0; i < 2; i++) {
            bar_init(k_full + 8 * i, 1);
            bar_init(k_empty + 8 * i, 8);
            bar_init(v_full + 8 * i, 1);
            bar_init(v_empty + 8 * i, 8);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<40>();
        if (threadIdx.x != 0) return;
        bar_expect(q_full, 2 * T_BYTES);
        for (int x = 0; x < HB; x++) {
            copy_box(qs + x * 16384, &mq, q_full, 64 * x, t0, h, b);
            copy_box(os + x * 16384, &mo, q_full, 64 * x, t0, h, b);
        }
        int stage = 0, phase = 0;
        for (int j = last; j >= first; j--) {
            bar_wait(k_empty + 8 * stage, phase ^ 1);
            bar_expect(k_full + 8 * stage, T_BYTES);
            for (int x = 0; x < HB; x++) copy_box(ks + stage * T_BYTES + x * 16384, &mk, k_full + 8 * stage, 64 * x, j * 128, g, b);
            bar_wait(v_empty + 8 * stage, phase ^ 1);
            bar_expect(v_full + 8 * stage, T_BYTES);
            for (int x = 0; x < HB; x++) copy_box(vs + stage * T_BYTES + x * 16384, &mv, v_full + 8 * stage, 64 * x, j * 128, g, b);
            if (++stage == 2) { stage = 0; phase ^= 1; }
        }
        return;
    }
    registers_more<232>();
    int w = uniform(group - 1), warp = (threadIdx.x >> 5) & 3, q0 = t0 + 64 * w + 16 * warp + (lane >> 2), q1 = q0 + 8;
    float sl = scale * LOG2E, ls[2], dl[2];
    i64 at = (i64)head * T + q0;
    ls[0] = q0 < T ? lse[at] * LOG2E : INF;
    ls[1] = q1 < T ? lse[at + 8] * LOG2E : INF;
    dl[0] = q0 < T ? delta[at] : 0.f;
    dl[1] = q1 < T ? delta[at + 8] : 0.f;
    int lo0 = first_seen(q0, q0 < T ? pos : 0, (i64)b * T + q0, window), lo1 = first_seen(q1, q1 < T ? pos : 0, (i64)b * T + q1, window);
    int sure_from = __reduce_max_sync(FULL, max(lo0, lo1)), sure_to = t0 + 64 * w + 16 * warp;
    float o[32 * HB], s[64], dp[64];
    u32 df[32];
#pragma unroll
    for (int x = 0; x < 32 * HB; x++) o[x] = 0;
    u64 qd = operand(qs + w * 8192), od = operand(os + w * 8192);
    int stage = 0, phase = 0;
    bar_wait(q_full, 0);
    for (int j = last; j >= first; j--) {
        u32 pf[32];
        u64 kd = operand(ks + stage * T_BYTES), vd = operand(vs + stage * T_BYTES), kd_across = operand(ks + stage * T_BYTES, 16384);
        bar_wait(k_full + 8 * stage, phase);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(s, along(qd, (kk >> 2) * 16384 + (kk & 3) * 32), along(kd, (kk >> 2) * 16384 + (kk & 3) * 32), kk > 0);
        mma_commit();
        bar_wait(v_full + 8 * stage, phase);
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(dp, along(od, (kk >> 2) * 16384 + (kk & 3) * 32), along(vd, (kk >> 2) * 16384 + (kk & 3) * 32), kk > 0);
        mma_commit();
        mma_wait<1>();
        pin(s);
        int c0 = j * 128;
#pragma unroll
        for (int x = 0; x < 16; x++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int y = 0; y < 2; y++) s[4 * x + 2 * r + y] = exp2_fast(fmaf(s[4 * x + 2 * r + y], sl, -ls[r]));
        if (c0 + 127 > sure_to || c0 < sure_from) mask_rows(s, c0, 0.f, q0, lo0, q1, lo1);
        to_operand(pf, s);
        mma_wait<0>();
        pin(dp);
        warp_arrive(v_empty + 8 * stage);
#pragma unroll
        for (int x = 0; x < 32; x++) df[x] = pack(low(pf[x]) * (dp[2 * x] - dl[x & 1]), high(pf[x]) * (dp[2 * x + 1] - dl[x & 1]));
        pin(df);
        pin(o);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 8; kk++) mma<1>(o, df + 4 * kk, along(kd_across, kk * 2048), 1);
        mma_commit();
        mma_wait<0>();
        pin(o);
        warp_arrive(k_empty + 8 * stage);
        if (++stage == 2) { stage = 0; phase ^= 1; }
    }
    store_rows(dq + (((i64)b * T + q0) * H + h) * P, (i64)H * P, o, scale, scale, q0 < T, q1 < T, P);
}

// dk, dv: blocks of 128 keys of one group over tiles of 64 queries of each of its heads; the products are transposed, so that keys are
// rows. The warp that brings tiles also writes each query's log-sum-exp, delta and first key, and says where the tile begins; -1 ends.
// With SUMS, heads of two blocks of 64: the block's share of dq, unscaled, is added to sums too, in whatever order blocks run. Each
// warpgroup adds one block of 64 columns, from shares that both have written to shared memory, keys as rows; a tile later, so that neither
// waits for the other, and one multiplies while the other does not. The layout of sums is [B H tile column-block warp] and then that of the
// registers of a warp, which go there by way of shared memory.
#define Q_STAGES 3
#define O_STAGES 2
#define W_BYTES (HB * 64 * 128)
#define AUX 1024
extern "C" __global__ void __launch_bounds__(384, 1) attn_dkv_tc(const __grid_constant__ TensorMap mq, const __grid_constant__ TensorMap mk, const __grid_constant__ TensorMap mv, const __grid_constant__ TensorMap mo, const int* pos, const float* lse, const float* delta, bf16* dk, bf16* dv, float* sums, int B, int T, int H, int G, float scale, int window, int section) {
    u32 base = (shared_address(smem) + 1023) & ~1023u;
    u32 ks = base, vs = ks + T_BYTES, qs = vs + T_BYTES, os = qs + Q_STAGES * W_BYTES, aux = os + O_STAGES * W_BYTES, bars = aux + Q_STAGES * AUX, shares = bars + 1024, sent = shares + 32768;
    char* aux_at = (char*)smem + (aux - shared_address(smem));
    u32 kv_full = bars, q_full = bars + 8, q_empty = q_full + 8 * Q_STAGES, o_full = q_empty + 8 * Q_STAGES, o_empty = o_full + 8 * O_STAGES, shares_full = o_empty + 8 * O_STAGES, shares_empty = shares_full + 16;
    int group = threadIdx.x >> 7, lane = threadIdx.x & 31, tiles = (T + 127) / 128, m, head;
    tile_of(blockIdx.x, tiles, B * G, section, m, head);
    int b = head / G, g = head % G, c0 = (tiles - 1 - m) * 128;
    if (threadIdx.x == 0) {
        bar_init(kv_full, 1);
        for (int i = 0; i < Q_STAGES; i++) {
            bar_init(q_full + 8 * i, 32);
            bar_init(q_empty + 8 * i, 256);
        }
        for (int i = 0; i < O_STAGES; i++) {
            bar_init(o_full + 8 * i, 1);
            bar_init(o_empty + 8 * i, 256);
            bar_init(shares_full + 8 * i, 256);
            bar_init(shares_empty + 8 * i, 256);
        }
        bar_init_done();
    }
    __syncthreads();
    if (group == 0) {
        registers_less<24>();
        if (threadIdx.x >= 32) return;
        if (lane == 0) {
            bar_expect(kv_full, 2 * T_BYTES);
            for (int x = 0; x < HB; x++) {
                copy_box(ks + x * 16384, &mk, kv_full, 64 * x, c0, g, b);
                copy_box(vs + x * 16384, &mv, kv_full, 64 * x, c0, g, b);
            }
        }
        int stage = 0, phase = 0, o_stage = 0, o_phase = 0, end = T;
        if (window < T && c0 + 127 + window < T) end = c0 + 127 + window;
        // Tiles with a query that sees one of the keys, one bit each, for as many tiles as there is room for.
        u32* seen_by = (u32*)(aux_at + Q_STAGES * AUX + 256);
        if (pos)
            for (int w = 0; w < 192 && c0 + w * 2048 < end; w++) {
                u32 bits = 0;
#pragma unroll 4
                for (int i = 0; i < 32; i++) {
                    int t = c0 + w * 2048 + i * 64 + lane;
                    bool sees = t < end && first_seen(t, pos, (i64)b * T + t, window) <= c0 + 127;
                    t += 32;
                    sees |= t < end && first_seen(t, pos, (i64)b * T + t, window) <= c0 + 127;
                    bits |= (u32)__any_sync(FULL, sees) << i;
                }
                if (lane == 0) seen_by[w] = bits;
            }
        __syncwarp();
        for (int h = g * (H / G); h < (g + 1) * (H / G); h++)
            for (int t0 = c0; t0 < end; t0 += 64) {
                int i = (t0 - c0) >> 6;
                if (pos && i < 192 * 32 && !(seen_by[i >> 5] >> (i & 31) & 1)) continue;
                int low[2], most = 0;
                float l[2], d[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int t = t0 + lane + 32 * i;
                    bool on = t < T;
                    i64 at = ((i64)b * H + h) * T + t;
                    low[i] = first_seen(t, on ? pos : 0, (i64)b * T + t, window);
                    l[i] = on ? lse[at] * LOG2E : INF;
                    d[i] = on ? delta[at] : 0.f;
                    most = max(most, low[i]);
                }
                most = __reduce_max_sync(FULL, most);
                bar_wait(q_empty + 8 * stage, phase ^ 1);
                float* to = (float*)(aux_at + stage * AUX);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    to[lane + 32 * i] = l[i];
                    to[64 + lane + 32 * i] = d[i];
                    ((int*)to)[128 + lane + 32 * i] = low[i];
                }
                if (lane == 0) {
                    ((int*)to)[192] = t0;
                    ((int*)to)[193] = most;
                    ((int*)to)[194] = h;
                    bar_expect(q_full + 8 * stage, W_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(qs + stage * W_BYTES + x * 8192, &mq, q_full + 8 * stage, 64 * x, t0, h, b);
                    bar_wait(o_empty + 8 * o_stage, o_phase ^ 1);
                    bar_expect(o_full + 8 * o_stage, W_BYTES);
                    for (int x = 0; x < HB; x++) copy_box(os + o_stage * W_BYTES + x * 8192, &mo, o_full + 8 * o_stage, 64 * x, t0, h, b);
                } else bar_arrive(q_full + 8 * stage);
                __syncwarp();
                if (++stage == Q_STAGES) { stage = 0; phase ^= 1; }
                if (++o_stage == O_STAGES) { o_stage = 0; o_phase ^= 1; }
            }
        bar_wait(q_empty + 8 * stage, phase ^ 1);
        if (lane == 0) *(int*)(aux_at + stage * AUX + 768) = -1;
        bar_arrive(q_full + 8 * stage);
        return;
    }
    registers_more<240>();
    int w = uniform(group - 1), warp = (threadIdx.x >> 5) & 3, k0 = c0 + 64 * w + 16 * warp + (lane >> 2), k1 = k0 + 8;
    int least = c0 + 64 * w + 16 * warp, most = least + 15;
    float sl = scale * LOG2E, ak[32 * HB], av[32 * HB];
    u32 df[16];
#pragma unroll
    for (int x = 0; x < 32 * HB; x++) ak[x] = av[x] = 0;
#pragma unroll
    for (int x = 0; x < 16; x++) df[x] = 0;
    u64 kd = operand(ks + w * 8192), vd = operand(vs + w * 8192);
    int stage = 0, phase = 0, before = -1, o_stage = 0, o_phase = 0;
#ifdef SUMS
    // Tile n's shares lie in buffer n & 1, in rows of keys; this lane names the row of one of four blocks of 8 x 8: two of rows, two of columns.
    int n = 0, place = 0;
    u32 own_row = (64 * w + 16 * warp + (lane & 15)) * 128 + ((lane >> 4 ^ lane & 7) << 4);
    auto shares_of = [&](int n) { return shares + (n & 1) * 16384; };
    u64 kd_across = operand(ks + w * 16384);
    auto dq_products = [&](float (&dq)[32], int n) {
        u64 sd = operand(shares_of(n));
#pragma unroll
        for (int kk = 0; kk < 8; kk++) mma<1, 1>(dq, along(sd, kk * 2048), along(kd_across, kk * 2048), kk > 0);
    };
    // Each warp sends its own rows.
    auto send = [&](const float (&dq)[32], bool on) {
        u32 to = sent + w * 16384 + warp * 4096;
        if (lane == 0) adds_read<0>();
        __syncwarp();
#pragma unroll
        for (int x = 0; x < 8; x++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + x * 512 + lane * 16), "f"(dq[4 * x]), "f"(dq[4 * x + 1]), "f"(dq[4 * x + 2]), "f"(dq[4 * x + 3]) : "memory");
        fence_shared();
        __syncwarp();
        if (on && lane == 0) add_floats(sums + ((i64)place * 2 + w) * 4096 + warp * 1024, to, 4096);
    };
#endif
    bar_wait(kv_full, 0);
    bar_wait(q_full, 0);
    int t0 = *(const int*)(aux_at + 768);
    do {
        // Products that begin at 0 take variables of their own, so that what was in them before takes no registers.
        float s[32], dp[32];
        u32 pf[16];
        const float* of = (const float*)(aux_at + stage * AUX) + 2 * (lane & 3);
        u64 qd = operand(qs + stage * W_BYTES), od = operand(os + o_stage * W_BYTES), qd_across = operand(qs + stage * W_BYTES, 8192), od_across = operand(os + o_stage * W_BYTES, 8192);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(s, along(kd, (kk >> 2) * 16384 + (kk & 3) * 32), along(qd, (kk >> 2) * 8192 + (kk & 3) * 32), kk > 0);
        mma_commit();
        // The last products of the tile before have ended.
        mma_wait<1>();
        pin(df);
        pin(ak);
        if (before >= 0) bar_arrive(q_empty + 8 * before);
        bar_wait(o_full + 8 * o_stage, o_phase);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4 * HB; kk++) mma<0, 0>(dp, along(vd, (kk >> 2) * 16384 + (kk & 3) * 32), along(od, (kk >> 2) * 8192 + (kk & 3) * 32), kk > 0);
        mma_commit();
        mma_wait<1>();
        pin(s);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            float2 l = *(const float2*)(of + 8 * x);
            s[4 * x] = exp2_fast(fmaf(s[4 * x], sl, -l.x));
            s[4 * x + 1] = exp2_fast(fmaf(s[4 * x + 1], sl, -l.y));
            s[4 * x + 2] = exp2_fast(fmaf(s[4 * x + 2], sl, -l.x));
            s[4 * x + 3] = exp2_fast(fmaf(s[4 * x + 3], sl, -l.y));
        }
        if (t0 < most || ((const int*)(aux_at + stage * AUX))[193] > least) {
#pragma unroll
            for (int x = 0; x < 8; x++) {
                int2 from = *(const int2*)(of + 128 + 8 * x);
                int t = t0 + 8 * x + 2 * (lane & 3);
                if (t < k0 || from.x > k0) s[4 * x] = 0.f;
                if (t + 1 < k0 || from.y > k0) s[4 * x + 1] = 0.f;
                if (t < k1 || from.x > k1) s[4 * x + 2] = 0.f;
                if (t + 1 < k1 || from.y > k1) s[4 * x + 3] = 0.f;
            }
        }
        to_operand(pf, s);
        pin(pf);
        mma_begin();
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<1>(av, pf + 4 * kk, along(od_across, kk * 2048), 1);
        mma_commit();
        mma_wait<1>();
        pin(dp);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            float2 d = *(const float2*)(of + 64 + 8 * x);
            df[2 * x] = pack(low(pf[2 * x]) * (dp[4 * x] - d.x), high(pf[2 * x]) * (dp[4 * x + 1] - d.y));
            df[2 * x + 1] = pack(low(pf[2 * x + 1]) * (dp[4 * x + 2] - d.x), high(pf[2 * x + 1]) * (dp[4 * x + 3] - d.y));
        }
        pin(df);
#ifdef SUMS
        // Shares of this tile for both warpgroups; the buffer has been read for the tile two before.
        bar_wait(shares_empty + 8 * (n & 1), (n >> 1 & 1) ^ 1);
#pragma unroll
        for (int x = 0; x < 4; x++)
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shares_of(n) + (own_row ^ x << 5)), "r"(df[4 * x]), "r"(df[4 * x + 1]), "r"(df[4 * x + 2]), "r"(df[4 * x + 3]) : "memory");
        fence_shared();
        bar_arrive(shares_full + 8 * (n & 1));
#endif
        mma_wait<0>();
        pin(av);
        pin(pf);
        bar_arrive(o_empty + 8 * o_stage);
        if (++o_stage == O_STAGES) { o_stage = 0; o_phase ^= 1; }
#ifdef SUMS
        // dq of the tile before, for which the other warpgroup had a whole tile's time; of the first tile's nobody reads what comes of it.
        float dq[32];
        if (n > 0) bar_wait(shares_full + 8 * (n - 1 & 1), n - 1 >> 1 & 1);
        mma_begin();
        dq_products(dq, n - 1);
        mma_commit();
#else
        mma_begin();
#endif
#pragma unroll
        for (int kk = 0; kk < 4; kk++) mma<1>(ak, df + 4 * kk, along(qd_across, kk * 2048), 1);
        mma_commit();
#ifdef SUMS
        mma_wait<1>();
        pin(dq);
        if (n > 0) bar_arrive(shares_empty + 8 * (n - 1 & 1));
        send(dq, n > 0);
        place = (b * H + ((const int*)(aux_at + stage * AUX))[194]) * ((T + 63) / 64) + t0 / 64;
        n++;
#endif
        before = stage;
        if (++stage == Q_STAGES) { stage = 0; phase ^= 1; }
        bar_wait(q_full + 8 * stage, phase);
        t0 = *(const int*)(aux_at + stage * AUX + 768);
    } while (t0 >= 0);
#ifdef SUMS
    float dq[32];
    bar_wait(shares_full + 8 * (n - 1 & 1), n - 1 >> 1 & 1);
    mma_begin();
    dq_products(dq, n - 1);
    mma_commit();
    mma_wait<0>();
    pin(dq);
    send(dq, true);
#else
    mma_wait<0>();
#endif
    pin(df);
    pin(ak);
    i64 at = (((i64)b * T + k0) * G + g) * P;
    store_rows(dk + at, (i64)G * P, ak, scale, scale, k0 < T, k1 < T, P);
    store_rows(dv + at, (i64)G * P, av, 1.f, 1.f, k0 < T, k1 < T, P);
#ifdef SUMS
    if (lane == 0) adds_done();
#endif
}
#ifdef SUMS
// One warp 16 rows of one block of columns.
KERNEL attn_scale_tc(const float* sums, bf16* dq, int B, int T, int H, float scale) {
    i64 i = global_thread() >> 5;
    int warp = i & 3, w = i >> 2 & 1, tiles = (T + 63) / 64, lane = threadIdx.x & 31;
    i64 tile = i >> 3, head = tile / tiles;
    if (head >= (i64)B * H) return;
    int t = (int)(tile % tiles) * 64 + 16 * warp + (lane >> 2);
    const float4* from = (const float4*)(sums + (i >> 2) * 4096 + warp * 1024) + lane;
    float d[32];
#pragma unroll
    for (int x = 0; x < 8; x++) {
        float4 v = from[x * 32];
        d[4 * x] = v.x, d[4 * x + 1] = v.y, d[4 * x + 2] = v.z, d[4 * x + 3] = v.w;
    }
    store_rows(dq + ((head / H * T + t) * H + head % H) * P + 64 * w, (i64)H * P, d, scale, scale, t < T, t + 8 < T, P - 64 * w);
}
#endif
#endif
#endif
