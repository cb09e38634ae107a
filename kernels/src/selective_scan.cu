// Threads hold a few n of two channels each. Channels and blocks stay within a group. Time may be cut into parts of whole chunks: their ends
// from zero, joined, then everything from the right starts. A reset is a step of 1e30 in the exponent.
#ifndef STATES
#define STATES 16
#endif
#ifndef VEC
#define VEC 0
#endif
#ifndef EVEN
#define EVEN 0
#endif
#ifndef CHANNELS
#define CHANNELS 128
#endif
#define TT 16
#define BATCH 16
#define LOG2E 1.4426950408889634f
// Where the block's channels lie. Grid (blocks of a group, G parts, B).
template <int CHANNELS_> struct Place {
    int c0, count, group, part, parts;
    i64 b;
    __device__ Place(int I, int G) {
        int per = I / G, at = blockIdx.x * CHANNELS_;
        group = blockIdx.y % G;
        part = blockIdx.y / G;
        parts = gridDim.y / G;
        c0 = group * per + at;
        count = per - at < CHANNELS_ ? per - at : CHANNELS_;
        b = blockIdx.z;
    }
};
// Forward, LANES threads share two channels and divide the n: each keeps HELD states of either. Steps, inputs and the gate are made for whole
// tiles, eight neighbouring channels a thread; in between, states take them from shared memory.
#define LANES 4
#define HELD (((STATES + LANES - 1) / LANES + 3) / 4 * 4)
#define WIDE (2 * THREADS_FWD / LANES)
#define THREADS_FWD 128
#define YROW (WIDE + 16)
#ifndef POLY
#define POLY 0
#endif
// 2^x by a polynomial, for units that special functions leave idle.
__device__ __forceinline__ float exp2_poly(float x) {
    x = fmaxf(x, -126.f);
    float r = x + 12582912.f, f = x - (r - 12582912.f);
    float p = 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    return __int_as_float(__float_as_int(p) + (__float_as_int(r) << 23));
}
// COUNT neighbouring elements; those from `have` on are zeros.
template <class E, int COUNT> struct Some {
    u32 w[COUNT * sizeof(E) / 4];
    __device__ __forceinline__ void get(const E* p, int have) {
#if VEC
        if constexpr (COUNT * sizeof(E) == 8) {
            uint2 v = have > 0 ? *(const uint2*)p : uint2{0, 0};
            w[0] = v.x, w[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < COUNT * sizeof(E) / 16; i++) {
                uint4 v = have > 0 ? *((const uint4*)p + i) : uint4{0, 0, 0, 0};
                w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
            }
        }
#else
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            u32 v = 0;
            if (i < have) {
                if constexpr (sizeof(E) == 4) v = *(const u32*)(p + i);
                else v = *(const u16*)(p + i);
            }
            if (sizeof(E) == 4) w[i] = v;
            else w[i / 2] = i & 1 ? w[i / 2] | v << 16 : v;
        }
#endif
    }
    __device__ __forceinline__ float at(int i) const {
        if constexpr (sizeof(E) == 4) {
            return __uint_as_float(w[i]);
        } else {
            E e;
            e.x = (u16)(w[i / 2] >> (i & 1) * 16);
            return widen(e);
        }
    }
};
// An element as it is, to be widened when it is there.
template <class E> __device__ __forceinline__ u32 raw(const E* p) {
    if constexpr (sizeof(E) == 4) return *(const u32*)p;
    else return *(const u16*)p;
}
template <class E> __device__ __forceinline__ float widened(u32 v) {
    if constexpr (sizeof(E) == 4) return __uint_as_float(v);
    else return widen(E{(u16)v});
}
// Forward and backward, which has FINE, are compiled apart.
#ifndef FINE
// LOCAL: the states alone, from saved or zero starts; `saved` then gets the state before each chunk of `fine` tokens of the part, ends the last
// one and total the sum of the steps (1e30 with a reset).
template <bool LOCAL> __device__ __forceinline__ void scan(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* state, TR0* y, float* saved, int T, int I, int G, int chunk, int part_tokens, int fine) {
    __shared__ __align__(16) float2 ps[2][TT][WIDE]; // power, input; words of 16 bytes turned within rows
    __shared__ __align__(16) float ys[LOCAL ? 1 : 2][LOCAL ? 1 : TT][YROW], bc[2][TT][2 * LANES * HELD];
    Place<WIDE> at(I, G);
    int sub = threadIdx.x % LANES, own = threadIdx.x / LANES * 2 + (sub & 1), ch = at.c0 + own, other = ch ^ 1;
    // Channels come in twos from the block's first on.
    other = at.c0 + (own ^ 1);
    bool on = own < at.count, on2 = (own ^ 1) < at.count;
    int from = at.part * part_tokens, to = from + part_tokens < T ? from + part_tokens : T, n0 = sub * HELD;
    i64 base = at.b * T;
    float h[HELD], g[HELD], ah[HELD], ag[HELD];
    const float* init = starts ? starts + (start_parts > 1 ? (at.b * at.parts + at.part) * I * STATES : at.b * I * STATES) : starts;
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        bool have = n0 + n < STATES;
        i64 i = (i64)ch * STATES + n0 + n, j = (i64)other * STATES + n0 + n;
        ah[n] = on && have ? ld(a, i) * LOG2E : 0.f;
        ag[n] = on2 && have ? ld(a, j) * LOG2E : 0.f;
        h[n] = init && on && have ? init[i] : 0.f;
        g[n] = init && on2 && have ? init[j] : 0.f;
    }
    auto save = [&](float* p, i64 row) {
#pragma unroll
        for (int n = 0; n < HELD; n += 4) {
            float* q = p + (row + ch) * STATES + n0 + n;
            float* r = p + (row + other) * STATES + n0 + n;
            if (STATES % 4 == 0) {
                if (on && n0 + n < STATES) *(float4*)q = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
                if (on2 && n0 + n < STATES) *(float4*)r = make_float4(g[n], g[n + 1], g[n + 2], g[n + 3]);
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (on && n0 + n + e < STATES) q[e] = h[n + e];
                    if (on2 && n0 + n + e < STATES) r[e] = g[n + e];
                }
            }
        }
    };
    // The eighths of a tile: ROUNDS tokens of eight channels a thread.
    constexpr int OCTETS = WIDE / 8, STEP = THREADS_FWD / OCTETS, ROUNDS = TT / STEP;
    int oc = threadIdx.x % OCTETS, or_ = threadIdx.x / OCTETS, c8 = oc * 8, have8 = at.count - c8;
    int turned = oc >> 1 & 3;
    __shared__ __align__(16) float skips[WIDE], biases[WIDE];
    if (threadIdx.x < WIDE) {
        bool there = threadIdx.x < at.count;
        skips[threadIdx.x] = d && there ? ld(d, at.c0 + threadIdx.x) : 0.f;
        biases[threadIdx.x] = dt_bias && there ? ld(dt_bias, at.c0 + threadIdx.x) : 0.f;
    }
    __syncthreads();
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = 0;
    Some<TA0, 8> xv[ROUNDS];
    Some<TA1, 8> dv[ROUNDS];
    auto fetch = [&](int k) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int t = from + k * TT + or_ + r * STEP, have = t < to ? have8 : 0;
            i64 e = (base + t) * I + at.c0 + c8;
            xv[r].get(x + e, have);
            dv[r].get(dt + e, have);
        }
    };
    auto prepare = [&](int k) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int row = or_ + r * STEP, t = from + k * TT + row;
            bool cut = pos && t < to && pos[base + t] == 0;
            float bias[8];
            load<8>(bias, biases + c8);
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                float4 v;
                float s0 = softplus_fast(dv[r].at(i) + bias[i]), s1 = softplus_fast(dv[r].at(i + 1) + bias[i + 1]);
                if (t >= to) s0 = s1 = 0;
                v.x = cut ? 1e30f : s0;
                v.y = s0 * xv[r].at(i);
                v.z = cut ? 1e30f : s1;
                v.w = s1 * xv[r].at(i + 1);
                if (LOCAL) {
                    sums[i] += v.x;
                    sums[i + 1] += v.z;
                }
                *(float4*)&ps[k & 1][row][c8 + ((i / 2) ^ turned) * 2] = v;
            }
        }
    };
    Some<TA0, 8> xo[ROUNDS];
    Some<TA7, 8> zo[ROUNDS];
    auto fetch_out = [&](int k) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int t = from + k * TT + or_ + r * STEP, have = t < to ? have8 : 0;
            i64 e = (base + t) * I + at.c0 + c8;
            if (d) xo[r].get(x + e, have);
            if (z) zo[r].get(z + e, have);
        }
    };
    // The outputs of tile k from what its states gave.
    auto finish = [&](int k) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            int row = or_ + r * STEP, t = from + k * TT + row;
            if (t >= to || have8 <= 0) continue;
            i64 e = (base + t) * I + at.c0 + c8;
            float v[8], skip[8];
            load<8>(v, &ys[k & 1][row][c8]);
            load<8>(skip, skips + c8);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (d) v[i] += skip[i] * xo[r].at(i);
                if (z) {
                    float zv = zo[r].at(i);
                    v[i] *= zv * sigmoid_fast(zv);
                }
            }
#if VEC
            store<8>(y + e, v);
#else
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < have8) st(y, e + i, v[i]);
#endif
        }
    };
    constexpr int EACH = (TT * 2 * LANES * HELD + THREADS_FWD - 1) / THREADS_FWD;
    u32 nv[EACH];
    auto fetch_narrow = [&](int k) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int e = threadIdx.x + i * THREADS_FWD, r = e / (2 * LANES * HELD), n = e % (LANES * HELD), t = from + k * TT + r;
            bool have = r < TT && t < to && n < STATES;
            i64 m = ((base + t) * G + at.group) * STATES + n;
            nv[i] = !have ? 0 : e % (2 * LANES * HELD) < LANES * HELD ? raw(b + m) : raw(c + m);
        }
    };
    auto put_narrow = [&](int k) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int e = threadIdx.x + i * THREADS_FWD;
            if (TT * 2 * LANES * HELD % THREADS_FWD == 0 || e < TT * 2 * LANES * HELD) bc[k & 1][0][e] = e % (2 * LANES * HELD) < LANES * HELD ? widened<TA3>(nv[i]) : widened<TA4>(nv[i]);
        }
    };
    int tiles = (to - from + TT - 1) / TT;
    // Where the next state is saved; parts begin with chunks.
    int mark = saved ? from : T, chunk_end = from + chunk;
    i64 slot = (at.b * ((T + chunk - 1) / chunk) + from / chunk) * ((chunk + fine - 1) / fine);
    if (tiles > 0) {
        fetch(0);
        fetch_narrow(0);
        prepare(0);
        put_narrow(0);
        fetch(1);
        fetch_narrow(1);
    }
    auto word = [&](int c_) { return (c_ & ~7) + (((c_ >> 1 & 3) ^ (c_ >> 4 & 3)) << 1) + (c_ & 1); };
    int mine_at = word(own), other_at = word(own ^ 1);
    for (int k = 0; k < tiles; k++) {
        __syncthreads();
        if (!LOCAL) {
            if (k > 0) finish(k - 1);
            fetch_out(k);
        }
        if (k + 1 < tiles) {
            prepare(k + 1);
            put_narrow(k + 1);
            fetch(k + 2);
            fetch_narrow(k + 2);
        }
        for (int i = 0; i < TT; i += BATCH) {
            float mine[BATCH], theirs[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; u++) {
                int row = i + u;
                // A branch here keeps the tokens apart; when runs begin at whole batches it is needed once.
                if ((u == 0 || !EVEN) && from + k * TT + row == mark && mark < to) {
                    save(saved, slot * I);
                    slot++;
                    mark += fine;
                    if (mark >= chunk_end) {
                        mark = chunk_end;
                        chunk_end += chunk;
                    }
                }
                float2 p = ps[k & 1][row][mine_at], q = ps[k & 1][row][other_at];
                const float* bk = &bc[k & 1][row][n0];
                float v = 0, w = 0;
#pragma unroll
                for (int n = 0; n < HELD; n += 4) {
                    float4 bv = *(const float4*)(bk + n), cv = LOCAL ? bv : *(const float4*)(bk + LANES * HELD + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float xh = p.x * ah[n + e], xg = q.x * ag[n + e];
                        float eh = e * 2 < POLY ? exp2_poly(xh) : exp2_fast(xh), eg = e * 2 + 1 < POLY ? exp2_poly(xg) : exp2_fast(xg);
                        h[n + e] = eh * h[n + e] + p.y * bb[e];
                        g[n + e] = eg * g[n + e] + q.y * bb[e];
                        v += cc[e] * h[n + e];
                        w += cc[e] * g[n + e];
                    }
                }
                mine[u] = v;
                theirs[u] = w;
            }
            if (!LOCAL) {
#pragma unroll
                for (int u = 0; u < BATCH; u++) mine[u] += __shfl_xor_sync(FULL, theirs[u], 1);
#pragma unroll
                for (int u = 0; u < BATCH; u += 2) {
                    bool upper = sub & 2;
                    float keep = upper ? mine[u + 1] : mine[u], give = upper ? mine[u] : mine[u + 1];
                    keep += __shfl_xor_sync(FULL, give, 2);
                    ys[k & 1][i + u + (upper ? 1 : 0)][own] = keep;
                }
            }
        }
    }
    if (!LOCAL && tiles > 0) {
        __syncthreads();
        finish(tiles - 1);
    }
    i64 p = LOCAL ? (at.b * at.parts + at.part) * I : at.b * I;
    float* last = LOCAL ? ends : at.part == at.parts - 1 ? state : (float*)0;
    if (last) save(last, p);
    if (LOCAL && total) {
        // Threads of one octet hold the sums of their tokens.
        __syncthreads();
        float* all = (float*)ps;
#pragma unroll
        for (int i = 0; i < 8; i++) all[or_ * WIDE + c8 + i] = sums[i];
        __syncthreads();
        if (threadIdx.x < WIDE && threadIdx.x < at.count) {
            float v = 0;
            for (int r = 0; r < STEP; r++) v += all[r * WIDE + threadIdx.x];
            total[p + at.c0 + threadIdx.x] = v;
        }
    }
}
#define FWD_BOUNDS __launch_bounds__(THREADS_FWD, HELD > 8 ? 2 : 4)
KERNEL FWD_BOUNDS scan_fwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* state, TR0* y, float* saved, int T, int I, int G, int chunk, int part_tokens) {
    scan<false>(x, dt, a, b, c, d, dt_bias, z, pos, starts, start_parts, (float*)0, (float*)0, state, y, saved, T, I, G, chunk, part_tokens, chunk);
}
KERNEL FWD_BOUNDS scan_states(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA6* dt_bias, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* saved, int T, int I, int G, int chunk, int part_tokens, int fine) {
    scan<true>(x, dt, a, b, c, (const TA5*)0, dt_bias, (const TA7*)0, pos, starts, start_parts, ends, total, (float*)0, (TR0*)0, saved, T, I, G, chunk, part_tokens, fine);
}
// Ends of parts become their starts, in order or in reverse.
KERNEL scan_join(float* s, const float* total, const TA2* a, const float* init, int B, int parts, i64 I, int back) {
    for (i64 e = global_thread(); e < (i64)B * I * STATES; e += all_threads()) {
        i64 b = e / (I * STATES), r = e % (I * STATES), i = r / STATES;
        float v = init ? init[e] : 0.f, rate = ld(a, r) * LOG2E;
        for (int k = 0; k < parts; k++) {
            i64 p = b * parts + (back ? parts - 1 - k : k);
            float end = s[p * I * STATES + r];
            s[p * I * STATES + r] = v;
            v = end + exp2_fast(total[p * I + i] * rate) * v;
        }
    }
}
#else
#define SUB 8
#define STAGED 16
#define THREADS_BWD (2 * CHANNELS)
#define ROW (2 * LANES * HELD)
// Sums over the channels of a warp of dc and db, scattered: a lane ends with the sums of HELD / 4 n of one of the two.
__device__ __forceinline__ void scatter(float* dc, const float* db, float* red) {
    int lane = threadIdx.x & 31;
    constexpr int M1 = HELD / 2, M2 = HELD / 4;
    bool bit = lane & 16;
#pragma unroll
    for (int n = 0; n < HELD; n++) dc[n] = (bit ? db[n] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : db[n], 16);
    bit = lane & 8;
#pragma unroll
    for (int n = 0; n < M1; n++) dc[n] = (bit ? dc[n + M1] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : dc[n + M1], 8);
    bit = lane & 4;
#pragma unroll
    for (int n = 0; n < M2; n++) dc[n] = (bit ? dc[n + M2] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : dc[n + M2], 4);
    red += (lane >> 4) * LANES * HELD + (lane & 3) * HELD + (lane & 8 ? M1 : 0) + (lane & 4 ? M2 : 0);
#pragma unroll
    for (int n = 0; n < M2; n++) red[n] = dc[n];
}
// Backward, the same division among threads. Runs of at most FINE tokens in reverse, each between two saved states. In a run: states every SUB
// tokens, then, from the last SUB on, their states in registers and the way back; steps and inputs lie in shared memory for STAGED tokens. What
// decayed into a state is the state less what came in. What a channel needs besides its states is made by threads of four channels and one token.
// db and dc are sums over the channels of a block: narrow[block of the group][B T G][b, c][n]. part[B][I (STATES + 2)], rows filled up to a
// multiple of 4: da, dd, ddt_bias.
KERNEL __launch_bounds__(THREADS_BWD, HELD > 4 ? 1 : 2) scan_bwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* saved, const TA10* dy, TR0* dx, TR1* ddt, TA7* dz, float* narrow_part, float* part, int T, int I, int G, int chunk, int fine) {
    DYNAMIC_SHARED(shared);
    Place<CHANNELS> at(I, G);
    constexpr int KEPT = FINE / SUB > 2 ? FINE / SUB - 2 : 0, PLANE = SUB * CHANNELS;
    float4* kept = (float4*)shared;
    float2* ps = (float2*)(kept + KEPT * (HELD / 2) * THREADS_BWD);
    float* bc = (float*)(ps + STAGED * CHANNELS);
    float* red = bc + STAGED * ROW;
    float* plane = red + THREADS_BWD / 32 * SUB * ROW; // gradients before the gate, then outputs; gradients of powers; of inputs
    float* sums = plane + 3 * PLANE;                   // dd and ddt_bias of each token of SUB
    __shared__ __align__(16) float skips[CHANNELS], biases[CHANNELS];
    int sub = threadIdx.x % LANES, own = threadIdx.x / LANES * 2 + (sub & 1), ch = at.c0 + own, other = at.c0 + (own ^ 1), n0 = sub * HELD;
    bool on = own < at.count, on2 = (own ^ 1) < at.count;
    i64 base = at.b * T;
    if (threadIdx.x < CHANNELS) {
        bool there = threadIdx.x < at.count;
        skips[threadIdx.x] = d && there ? ld(d, at.c0 + threadIdx.x) : 0.f;
        biases[threadIdx.x] = dt_bias && there ? ld(dt_bias, at.c0 + threadIdx.x) : 0.f;
    }
    float h[HELD], g[HELD], ah[HELD], ag[HELD], dh[HELD], dg[HELD], da[HELD], dag[HELD];
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        bool have = n0 + n < STATES;
        ah[n] = on && have ? ld(a, (i64)ch * STATES + n0 + n) * LOG2E : 0.f;
        ag[n] = on2 && have ? ld(a, (i64)other * STATES + n0 + n) * LOG2E : 0.f;
        dh[n] = dg[n] = da[n] = dag[n] = 0;
    }
    // Four channels of a token.
    int c4 = threadIdx.x % (CHANNELS / 4) * 4, row4 = threadIdx.x / (CHANNELS / 4), have4 = at.count - c4;
    *(float4*)(sums + row4 * CHANNELS + c4) = *(float4*)(sums + PLANE + row4 * CHANNELS + c4) = make_float4(0.f, 0.f, 0.f, 0.f);
    auto word = [&](int c_) { return (c_ & ~7) + (((c_ >> 1 & 3) ^ (c_ >> 4 & 3)) << 1) + (c_ & 1); };
    int mine_at = word(own), other_at = word(own ^ 1);
    int runs_each = (chunk + fine - 1) / fine, runs = (T + chunk - 1) / chunk * runs_each;
    for (int f = runs - 1; f >= 0; f--) {
        int t0 = f / runs_each * chunk + f % runs_each * fine, len = chunk - f % runs_each * fine, staged = -1;
        len = len < fine ? len : fine;
        len = len < T - t0 ? len : T - t0;
        if (len <= 0) continue;
        const float* start = saved + (at.b * runs + f) * I * STATES;
        auto stage = [&](int k) {
            if (k == staged) return;
            staged = k;
            int c8 = threadIdx.x % (CHANNELS / 8) * 8, row = threadIdx.x / (CHANNELS / 8), i = k * STAGED + row, have = i < len ? at.count - c8 : 0;
            i64 e = (base + t0 + i) * I + at.c0 + c8;
            Some<TA0, 8> xv;
            Some<TA1, 8> dv;
            xv.get(x + e, have);
            dv.get(dt + e, have);
            bool cut = pos && i < len && pos[base + t0 + i] == 0;
            __syncthreads();
#pragma unroll
            for (int r = 0; r < (STAGED * ROW + THREADS_BWD - 1) / THREADS_BWD; r++) {
                int e = threadIdx.x + r * THREADS_BWD, i = e / ROW, n = e % (LANES * HELD), t = k * STAGED + i;
                bool there = i < STAGED && t < len && n < STATES;
                i64 m = ((base + t0 + t) * G + at.group) * STATES + n;
                if (i < STAGED) bc[e] = !there ? 0.f : e % ROW < LANES * HELD ? ld(b, m) : ld(c, m);
            }
            float bias[8];
            load<8>(bias, biases + c8);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                float s0 = softplus_fast(dv.at(j) + bias[j]), s1 = softplus_fast(dv.at(j + 1) + bias[j + 1]);
                if (i >= len) s0 = s1 = 0;
                *(float4*)&ps[row * CHANNELS + c8 + ((j / 2) ^ (c8 >> 4 & 3)) * 2] = make_float4(cut ? 1e30f : s0, s0 * xv.at(j), cut ? 1e30f : s1, s1 * xv.at(j + 1));
            }
            __syncthreads();
        };
        auto advance = [&](int row) {
            float2 p = ps[row * CHANNELS + mine_at], q = ps[row * CHANNELS + other_at];
#pragma unroll
            for (int n = 0; n < HELD; n += 4) {
                float4 bv = *(const float4*)(bc + row * ROW + n0 + n);
                const float bb[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    h[n + e] = exp2_fast(p.x * ah[n + e]) * h[n + e] + p.y * bb[e];
                    g[n + e] = exp2_fast(q.x * ag[n + e]) * g[n + e] + q.y * bb[e];
                }
            }
        };
        auto begin = [&]() {
#pragma unroll
            for (int n = 0; n < HELD; n++) {
                bool have = n0 + n < STATES;
                h[n] = on && have ? start[(i64)ch * STATES + n0 + n] : 0.f;
                g[n] = on2 && have ? start[(i64)other * STATES + n0 + n] : 0.f;
            }
        };
        begin();
        int subs = (len + SUB - 1) / SUB;
        for (int s = 0; s + 1 < subs; s++) {
            stage(s * SUB / STAGED);
            if (s > 0)
#pragma unroll
                for (int v = 0; v < HELD / 4; v++) {
                    kept[((s - 1) * (HELD / 2) + 2 * v) * THREADS_BWD + threadIdx.x] = make_float4(h[4 * v], h[4 * v + 1], h[4 * v + 2], h[4 * v + 3]);
                    kept[((s - 1) * (HELD / 2) + 2 * v + 1) * THREADS_BWD + threadIdx.x] = make_float4(g[4 * v], g[4 * v + 1], g[4 * v + 2], g[4 * v + 3]);
                }
#pragma unroll
            for (int i = 0; i < SUB; i++) advance(s * SUB % STAGED + i);
        }
        for (int s = subs - 1; s >= 0; s--) {
            stage(s * SUB / STAGED);
            i64 e4 = (base + t0 + s * SUB + row4) * I + at.c0 + c4;
            bool on4 = s * SUB + row4 < len;
            Some<TA10, 4> yv;
            Some<TA7, 4> zv;
            yv.get(dy + e4, on4 ? have4 : 0);
            if (z) zv.get(z + e4, on4 ? have4 : 0);
            if (s < subs - 1) {
                if (s > 0) {
#pragma unroll
                    for (int v = 0; v < HELD / 4; v++) {
                        float4 u = kept[((s - 1) * (HELD / 2) + 2 * v) * THREADS_BWD + threadIdx.x], w = kept[((s - 1) * (HELD / 2) + 2 * v + 1) * THREADS_BWD + threadIdx.x];
                        h[4 * v] = u.x, h[4 * v + 1] = u.y, h[4 * v + 2] = u.z, h[4 * v + 3] = u.w;
                        g[4 * v] = w.x, g[4 * v + 1] = w.y, g[4 * v + 2] = w.z, g[4 * v + 3] = w.w;
                    }
                } else {
                    begin();
                }
            }
            float hs[SUB][HELD], gs[SUB][HELD];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                advance(s * SUB % STAGED + i);
#pragma unroll
                for (int n = 0; n < HELD; n++) {
                    hs[i][n] = h[n];
                    gs[i][n] = g[n];
                }
            }
            {
                float v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float zi = z ? zv.at(i) : 0.f;
                    v[i] = z ? yv.at(i) * zi * sigmoid_fast(zi) : yv.at(i);
                }
                store<4>(plane + row4 * CHANNELS + c4, v);
            }
            __syncthreads();
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                int row = s * SUB % STAGED + i;
                float2 p = ps[row * CHANNELS + mine_at], q = ps[row * CHANNELS + other_at];
                float gy = plane[i * CHANNELS + own], gq = plane[i * CHANNELS + (own ^ 1)];
                // A reset lets nothing through.
                float sp = p.x > 1e29f ? 0.f : p.x, sq = q.x > 1e29f ? 0.f : q.x;
                float sum = 0, sum2 = 0, dstep = 0, dstep2 = 0, db_ = 0, db2 = 0, dc[HELD], db[HELD];
#pragma unroll
                for (int n = 0; n < HELD; n += 4) {
                    float4 bv = *(const float4*)(bc + row * ROW + n0 + n), cv = *(const float4*)(bc + row * ROW + LANES * HELD + n0 + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int k = n + e;
                        sum += cc[e] * hs[i][k];
                        sum2 += cc[e] * gs[i][k];
                        dh[k] += cc[e] * gy;
                        dg[k] += cc[e] * gq;
                        dc[k] = gy * hs[i][k] + gq * gs[i][k];
                        db[k] = dh[k] * p.y + dg[k] * q.y;
                        float u = dh[k] * (hs[i][k] - p.y * bb[e]), u2 = dg[k] * (gs[i][k] - q.y * bb[e]);
                        dstep += ah[k] * u;
                        dstep2 += ag[k] * u2;
                        da[k] += sp * u;
                        dag[k] += sq * u2;
                        db_ += dh[k] * bb[e];
                        db2 += dg[k] * bb[e];
                        dh[k] *= exp2_fast(p.x * ah[k]);
                        dg[k] *= exp2_fast(q.x * ag[k]);
                    }
                }
                scatter(dc, db, red + ((threadIdx.x >> 5) * SUB + i) * ROW);
                sum += __shfl_xor_sync(FULL, sum2, 1);
                dstep += __shfl_xor_sync(FULL, dstep2, 1);
                db_ += __shfl_xor_sync(FULL, db2, 1);
                sum += __shfl_xor_sync(FULL, sum, 2);
                dstep += __shfl_xor_sync(FULL, dstep, 2);
                db_ += __shfl_xor_sync(FULL, db_, 2);
                if (sub < 2) {
                    plane[i * CHANNELS + own] = sum;
                    plane[PLANE + i * CHANNELS + own] = dstep;
                    plane[2 * PLANE + i * CHANNELS + own] = db_;
                }
            }
            __syncthreads();
            if (on4 && have4 > 0) {
                Some<TA0, 4> xv;
                Some<TA1, 4> dv;
                xv.get(x + e4, have4);
                dv.get(dt + e4, have4);
                yv.get(dy + e4, have4);
                if (z) zv.get(z + e4, have4);
                float sum[4], dstep[4], db_[4], skip[4], bias[4], dd[4], dbias[4];
                int o = row4 * CHANNELS + c4;
                load<4>(sum, plane + o);
                load<4>(dstep, plane + PLANE + o);
                load<4>(db_, plane + 2 * PLANE + o);
                load<4>(skip, skips + c4);
                load<4>(bias, biases + c4);
                load<4>(dd, sums + o);
                load<4>(dbias, sums + PLANE + o);
                float rx[4], rd[4], rz[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float xi = xv.at(i), raw = dv.at(i) + bias[i], g0 = yv.at(i), zi = z ? zv.at(i) : 0.f, sz = z ? sigmoid_fast(zi) : 0.f, gy = z ? g0 * zi * sz : g0;
                    rd[i] = (dstep[i] * 0.69314718056f + xi * db_[i]) * sigmoid_fast(raw);
                    rx[i] = softplus_fast(raw) * db_[i] + skip[i] * gy;
                    rz[i] = g0 * (sum[i] + skip[i] * xi) * sz * (1.f + zi * (1.f - sz));
                    dd[i] += gy * xi;
                    dbias[i] += rd[i];
                }
                store<4>(sums + o, dd);
                store<4>(sums + PLANE + o, dbias);
#if VEC
                store<4>(dx + e4, rx);
                store<4>(ddt + e4, rd);
                if (dz) store<4>(dz + e4, rz);
#else
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < have4) {
                        st(dx, e4 + i, rx[i]);
                        st(ddt, e4 + i, rd[i]);
                        if (dz) st(dz, e4 + i, rz[i]);
                    }
#endif
            }
            for (int e = threadIdx.x; e < SUB * ROW; e += THREADS_BWD) {
                int i = e / ROW, n = e % (LANES * HELD);
                float v = 0;
#pragma unroll
                for (int w = 0; w < THREADS_BWD / 32; w++) v += red[w * SUB * ROW + e];
                if (s * SUB + i < len && n < STATES) {
                    i64 row = (((i64)blockIdx.x * gridDim.z * T + base + t0 + s * SUB + i) * G + at.group) * 2;
                    narrow_part[(row + (e % ROW < LANES * HELD ? 1 : 0)) * STATES + n] = v;
                }
            }
        }
    }
    float* p = part + at.b * (((i64)I * (STATES + 2) + 3) / 4 * 4);
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        if (on && n0 + n < STATES) p[(i64)ch * STATES + n0 + n] = da[n];
        if (on2 && n0 + n < STATES) p[(i64)other * STATES + n0 + n] = dag[n];
    }
    __syncthreads();
    if (threadIdx.x < CHANNELS && threadIdx.x < at.count) {
        float dd = 0, dbias = 0;
        for (int i = 0; i < SUB; i++) {
            dd += sums[i * CHANNELS + threadIdx.x];
            dbias += sums[PLANE + i * CHANNELS + threadIdx.x];
        }
        p[(i64)I * STATES + at.c0 + threadIdx.x] = dd;
        p[(i64)I * (STATES + 1) + at.c0 + threadIdx.x] = dbias;
    }
}
// db and dc: sums over the blocks of a group.
KERNEL scan_narrow(const float* part, TR3* db, TR4* dc, int blocks, i64 rows) {
    for (i64 e = global_thread(); e < rows * 2 * STATES; e += all_threads()) {
        float s = 0;
        for (int k = 0; k < blocks; k++) s += part[k * rows * 2 * STATES + e];
        i64 row = e / (2 * STATES);
        int n = e % (2 * STATES);
        if (n < STATES) st(db, row * STATES + n, s);
        else st(dc, row * STATES + n - STATES, s);
    }
}
#endif
