// Two neighbouring lanes share two channels: each keeps the states of half of the n for both, makes the step and the gate of its own channel
// and gives them to the other. CHANNELS threads a block, one a channel, within a group. Time may be cut into parts of whole chunks: their
// ends from zero, joined, then everything from the right starts. A reset is a step of 1e30 in the exponent.
#ifndef STATES
#define STATES 16
#endif
#ifndef VEC
#define VEC 0
#endif
#ifndef EVEN
#define EVEN 0
#endif
#define NH (((STATES + 1) / 2 + 3) / 4 * 4)
#define CHANNELS 128
#define TT 16
#define DEEP 3
#define BATCH 4
#define LOG2E 1.4426950408889634f
// Where the block's channels lie. Grid (blocks of a group, G parts, B).
struct Place {
    int c0, count, group, part, parts;
    i64 b;
    __device__ Place(int I, int G) {
        int per = I / G, at = blockIdx.x * CHANNELS;
        group = blockIdx.y % G;
        part = blockIdx.y / G;
        parts = gridDim.y / G;
        c0 = group * per + at;
        count = per - at < CHANNELS ? per - at : CHANNELS;
        b = blockIdx.z;
    }
};
// Rows of CHANNELS elements into shared memory; zeros where there are none.
template <int ROWS, class E> __device__ __forceinline__ void rows_in(E* to, const E* from, i64 stride, int rows, int count) {
#if VEC
    constexpr int PER = 16 / sizeof(E), C = CHANNELS / PER;
#pragma unroll
    for (int e = threadIdx.x; e < ROWS * C; e += CHANNELS) {
        int r = e / C, c = e % C * PER;
        bool on = r < rows && c < count;
        cp16(shared_address(to + r * CHANNELS + c), on ? from + r * stride + c : from, on ? 16 : 0);
    }
#else
    for (int r = 0; r < ROWS; r++) {
        if (r < rows && threadIdx.x < count) to[r * CHANNELS + threadIdx.x] = from[r * stride + threadIdx.x];
        else st(to, r * CHANNELS + threadIdx.x, 0.f);
    }
#endif
}
// b and c of ROWS tokens as [row][b, c][2 NH], each half of the n padded with zeros.
template <int ROWS> struct Narrow {
    static constexpr int EACH = (ROWS * 4 * NH + CHANNELS - 1) / CHANNELS;
    float v[EACH];
    __device__ __forceinline__ void get(const TA3* b, const TA4* c, i64 row, int G, int group, int rows) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int e = threadIdx.x + k * CHANNELS, r = e / (4 * NH), j = e % (2 * NH), half = (STATES + 1) / 2;
            int n = j < NH ? j : half + j - NH;
            bool on = r < rows && (j < NH ? j < half : n < STATES);
            i64 m = ((row + r) * G + group) * STATES + n;
            v[k] = !on ? 0.f : e % (4 * NH) < 2 * NH ? ld(b, m) : ld(c, m);
        }
    }
    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (threadIdx.x + k * CHANNELS < ROWS * 4 * NH) to[threadIdx.x + k * CHANNELS] = v[k];
    }
};
// The first n of a lane and how many it has.
__device__ __forceinline__ int first_n() { return threadIdx.x & 1 ? (STATES + 1) / 2 : 0; }
__device__ __forceinline__ int have_n() { return threadIdx.x & 1 ? STATES / 2 : (STATES + 1) / 2; }
// States of this lane's half of channel `c`: `from` may be absent.
__device__ __forceinline__ void states_in(float* h, const float* from, i64 c, bool on) {
#pragma unroll
    for (int n = 0; n < NH; n++) h[n] = from && on && n < have_n() ? from[c * STATES + first_n() + n] : 0.f;
}
__device__ __forceinline__ void states_out(float* to, i64 c, const float* h, bool on) {
    if (!on) return;
    if (STATES % 8 == 0) {
#pragma unroll
        for (int n = 0; n < NH; n += 4) *(float4*)(to + c * STATES + first_n() + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
    } else {
#pragma unroll
        for (int n = 0; n < NH; n++)
            if (n < have_n()) to[c * STATES + first_n() + n] = h[n];
    }
}
// LOCAL: the states alone, from saved or zero starts; `saved` then gets the state before each chunk of `fine` tokens of the part, ends the last
// one and total the sum of the steps (1e30 with a reset).
template <bool LOCAL> __device__ __forceinline__ void scan(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* state, TR0* y, float* saved, int T, int I, int G, int chunk, int part_tokens, int fine) {
    DYNAMIC_SHARED(shared);
    Place at(I, G);
    TA0* xs = (TA0*)shared;
    TA1* ds = (TA1*)(xs + DEEP * TT * CHANNELS);
    TA7* zs = (TA7*)(ds + DEEP * TT * CHANNELS);
    float* bc = (float*)(zs + (z && !LOCAL ? DEEP * TT * CHANNELS : 0));
    int ch = at.c0 + threadIdx.x, other = at.c0 + (threadIdx.x ^ 1);
    bool on = threadIdx.x < at.count, on2 = (threadIdx.x ^ 1) < at.count;
    int from = at.part * part_tokens, to = from + part_tokens < T ? from + part_tokens : T;
    i64 base = at.b * T;
    float h[NH], g[NH], ah[NH], ag[NH];
#pragma unroll
    for (int n = 0; n < NH; n++) {
        ah[n] = on && n < have_n() ? ld(a, (i64)ch * STATES + first_n() + n) * LOG2E : 0.f;
        ag[n] = on2 && n < have_n() ? ld(a, (i64)other * STATES + first_n() + n) * LOG2E : 0.f;
    }
    const float* init = starts ? starts + (start_parts > 1 ? (at.b * at.parts + at.part) * I * STATES : at.b * I * STATES) : starts;
    states_in(h, init, ch, on);
    states_in(g, init, other, on2);
    float skip = d && on ? ld(d, ch) : 0.f, bias = dt_bias && on ? ld(dt_bias, ch) : 0.f, sum = 0;
    int tiles = (to - from + TT - 1) / TT;
    auto issue = [&](int k) {
        int t0 = from + k * TT, rows = to - t0;
        i64 e = (base + t0) * I + at.c0;
        int s = k % DEEP * TT * CHANNELS;
        rows_in<TT>(xs + s, x + e, I, rows, at.count);
        rows_in<TT>(ds + s, dt + e, I, rows, at.count);
        if (z && !LOCAL) rows_in<TT>(zs + s, z + e, I, rows, at.count);
    };
    Narrow<TT> narrow;
    narrow.get(b, c, base + from, G, at.group, to - from);
    narrow.put(bc);
#pragma unroll
    for (int k = 0; k < DEEP - 1; k++) {
        if (k < tiles) issue(k);
        cp_commit();
    }
    int chunks = (T + chunk - 1) / chunk, fine_chunks = (chunk + fine - 1) / fine;
    for (int k = 0; k < tiles; k++) {
        cp_wait<DEEP - 2>();
        __syncthreads();
        if (k + DEEP - 1 < tiles) issue(k + DEEP - 1);
        cp_commit();
        if (k + 1 < tiles) narrow.get(b, c, base + from + (k + 1) * TT, G, at.group, to - from - (k + 1) * TT);
        const float* bk = bc + (k & 1) * TT * 4 * NH + (threadIdx.x & 1) * NH;
        const TA0* xk = xs + k % DEEP * TT * CHANNELS + threadIdx.x;
        const TA1* dk = ds + k % DEEP * TT * CHANNELS + threadIdx.x;
        const TA7* zk = zs + k % DEEP * TT * CHANNELS + threadIdx.x;
        for (int i = 0; i < TT; i += BATCH) {
            float xv[BATCH], step[BATCH], in[BATCH], power[BATCH], mine[BATCH], theirs[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; u++) {
                int t = from + k * TT + i + u;
                xv[u] = ld(xk, (i + u) * CHANNELS);
                step[u] = t < to ? softplus_fast(ld(dk, (i + u) * CHANNELS) + bias) : 0.f;
                in[u] = step[u] * xv[u];
                power[u] = pos && t < to && pos[base + t] == 0 ? 1e30f : step[u];
                if (LOCAL) sum += power[u];
            }
#pragma unroll
            for (int u = 0; u < BATCH; u++) {
                // A branch here keeps the tokens apart; when runs begin at whole batches it is needed once.
                if (saved && (u == 0 || !EVEN)) {
                    int t = from + k * TT + i + u;
                    if (t < to && t % chunk % fine == 0) {
                        i64 p = ((at.b * chunks + t / chunk) * fine_chunks + t % chunk / fine) * I;
                        states_out(saved, p + ch, h, on);
                        states_out(saved, p + other, g, on2);
                    }
                }
                float q = __shfl_xor_sync(FULL, in[u], 1), pw = __shfl_xor_sync(FULL, power[u], 1);
                const float* row = bk + (i + u) * 4 * NH;
                float s = 0, r = 0;
#pragma unroll
                for (int n = 0; n < NH; n += 4) {
                    float4 bv = *(const float4*)(row + n), cv = LOCAL ? bv : *(const float4*)(row + 2 * NH + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        h[n + e] = exp2_fast(power[u] * ah[n + e]) * h[n + e] + in[u] * bb[e];
                        g[n + e] = exp2_fast(pw * ag[n + e]) * g[n + e] + q * bb[e];
                        s += cc[e] * h[n + e];
                        r += cc[e] * g[n + e];
                    }
                }
                mine[u] = s;
                theirs[u] = r;
            }
            if (!LOCAL)
#pragma unroll
                for (int u = 0; u < BATCH; u++) {
                    int t = from + k * TT + i + u;
                    float v = mine[u] + __shfl_xor_sync(FULL, theirs[u], 1) + skip * xv[u];
                    if (z) {
                        float zv = ld(zk, (i + u) * CHANNELS);
                        v *= zv * sigmoid_fast(zv);
                    }
                    if (on && t < to) st(y, (base + t) * I + ch, v);
                }
        }
        if (k + 1 < tiles) narrow.put(bc + ((k + 1) & 1) * TT * 4 * NH);
    }
    i64 p = LOCAL ? (at.b * at.parts + at.part) * I : at.b * I;
    float* last = LOCAL ? ends : at.part == at.parts - 1 ? state : (float*)0;
    if (last) {
        states_out(last, p + ch, h, on);
        states_out(last, p + other, g, on2);
    }
    if (LOCAL && total && on) total[p + ch] = sum;
}
KERNEL __launch_bounds__(CHANNELS, 2) scan_fwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* state, TR0* y, float* saved, int T, int I, int G, int chunk, int part_tokens) {
    scan<false>(x, dt, a, b, c, d, dt_bias, z, pos, starts, start_parts, (float*)0, (float*)0, state, y, saved, T, I, G, chunk, part_tokens, chunk);
}
KERNEL __launch_bounds__(CHANNELS, 2) scan_states(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA6* dt_bias, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* saved, int T, int I, int G, int chunk, int part_tokens, int fine) {
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
#ifndef FINE
#define FINE 64
#endif
#define SUB 8
// Sums over the pairs of a warp of dc and db, scattered: a lane ends with the sums of `most(NH / 8, 1)` n of one of the two.
__device__ __forceinline__ void scatter(float* dc, const float* db, float* red) {
    int lane = threadIdx.x & 31, at = 0;
    bool bit = lane & 16;
#pragma unroll
    for (int n = 0; n < NH; n++) dc[n] = (bit ? db[n] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : db[n], 16);
    constexpr int M1 = NH / 2, M2 = NH / 4, M3 = NH / 8;
    bit = lane & 8;
    at += bit ? M1 : 0;
#pragma unroll
    for (int n = 0; n < M1; n++) dc[n] = (bit ? dc[n + M1] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : dc[n + M1], 8);
    bit = lane & 4;
    at += bit ? M2 : 0;
#pragma unroll
    for (int n = 0; n < M2; n++) dc[n] = (bit ? dc[n + M2] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : dc[n + M2], 4);
    bit = lane & 2;
    if (NH % 8 == 0) {
        at += bit ? M3 : 0;
#pragma unroll
        for (int n = 0; n < M3; n++) dc[n] = (bit ? dc[n + M3] : dc[n]) + __shfl_xor_sync(FULL, bit ? dc[n] : dc[n + M3], 2);
    } else {
#pragma unroll
        for (int n = 0; n < M2; n++) dc[n] += __shfl_xor_sync(FULL, dc[n], 2);
    }
    red += (lane >> 4) * 2 * NH + (lane & 1) * NH + at;
#pragma unroll
    for (int n = 0; n < (NH % 8 ? M2 : M3); n++) red[n] = dc[n];
}
// Runs of at most FINE tokens in reverse, each between two saved states. In a run: states every SUB tokens, then, from the last SUB on,
// their states in registers and the way back. What decayed into a state is the state less what came in. db and dc are sums over the
// channels of a block: narrow[block of the group][B T G][b, c][n]. part[B][I (STATES + 2)]: da, dd, ddt_bias.
KERNEL __launch_bounds__(CHANNELS, 2) scan_bwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* saved, const TA10* dy, TR0* dx, TR1* ddt, TA7* dz, float* narrow_part, float* part, int T, int I, int G, int chunk, int fine) {
    DYNAMIC_SHARED(shared);
    Place at(I, G);
    constexpr int VECS = NH / 2, KEPT = FINE / SUB - 2;
    float4* kept = (float4*)shared;
    float* bc = (float*)(kept + (KEPT > 0 ? KEPT : 0) * VECS * CHANNELS);
    float* red = bc + FINE * 4 * NH;
    TA0* xs = (TA0*)(red + CHANNELS / 32 * SUB * 4 * NH);
    TA1* ds = (TA1*)(xs + FINE * CHANNELS);
    TA10* ys = (TA10*)(ds + FINE * CHANNELS);
    TA7* zs = (TA7*)(ys + SUB * CHANNELS);
    int lane = threadIdx.x, warp = lane >> 5;
    int ch = at.c0 + lane, other = at.c0 + (lane ^ 1);
    bool on = lane < at.count, on2 = (lane ^ 1) < at.count;
    i64 base = at.b * T;
    float h[NH], g[NH], ah[NH], ag[NH], dh[NH], dg[NH], da[NH], dag[NH];
#pragma unroll
    for (int n = 0; n < NH; n++) {
        ah[n] = on && n < have_n() ? ld(a, (i64)ch * STATES + first_n() + n) * LOG2E : 0.f;
        ag[n] = on2 && n < have_n() ? ld(a, (i64)other * STATES + first_n() + n) * LOG2E : 0.f;
        dh[n] = dg[n] = da[n] = dag[n] = 0;
    }
    float skip = d && on ? ld(d, ch) : 0.f, bias = dt_bias && on ? ld(dt_bias, ch) : 0.f, dd = 0, dbias = 0;
    int runs_each = (chunk + fine - 1) / fine, runs = (T + chunk - 1) / chunk * runs_each;
    const float* mine = bc + (lane & 1) * NH;
    for (int f = runs - 1; f >= 0; f--) {
        int t0 = f / runs_each * chunk + f % runs_each * fine, len = chunk - f % runs_each * fine;
        len = len < fine ? len : fine;
        len = len < T - t0 ? len : T - t0;
        if (len <= 0) continue;
        const float* start = saved + (at.b * runs + f) * I * STATES;
        __syncthreads();
        i64 e0 = (base + t0) * I + at.c0;
        rows_in<FINE>(xs, x + e0, I, len, at.count);
        rows_in<FINE>(ds, dt + e0, I, len, at.count);
        cp_commit();
        for (int r = 0; r < len; r += TT) {
            Narrow<TT> narrow;
            narrow.get(b, c, base + t0 + r, G, at.group, len - r);
            narrow.put(bc + r * 4 * NH);
        }
        states_in(h, start, ch, on);
        states_in(g, start, other, on2);
        cp_wait<0>();
        __syncthreads();
        auto step_of = [&](int i) { return i < len ? softplus_fast(ld(ds, i * CHANNELS + lane) + bias) : 0.f; };
        auto power_of = [&](int i, float step) { return pos && i < len && pos[base + t0 + i] == 0 ? 1e30f : step; };
        auto advance = [&](int i, float step) {
            float in = step * ld(xs, i * CHANNELS + lane), power = power_of(i, step);
            float q = __shfl_xor_sync(FULL, in, 1), pw = __shfl_xor_sync(FULL, power, 1);
            const float* row = mine + i * 4 * NH;
#pragma unroll
            for (int n = 0; n < NH; n += 4) {
                float4 bv = *(const float4*)(row + n);
                const float bb[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    h[n + e] = exp2_fast(power * ah[n + e]) * h[n + e] + in * bb[e];
                    g[n + e] = exp2_fast(pw * ag[n + e]) * g[n + e] + q * bb[e];
                }
            }
        };
        int subs = (len + SUB - 1) / SUB;
        for (int s = 0; s + 1 < subs; s++) {
            if (s > 0)
#pragma unroll
                for (int v = 0; v < VECS; v++) {
                    const float* o = v < VECS / 2 ? h + v * 4 : g + (v - VECS / 2) * 4;
                    kept[((s - 1) * VECS + v) * CHANNELS + lane] = make_float4(o[0], o[1], o[2], o[3]);
                }
#pragma unroll
            for (int i = 0; i < SUB; i++) advance(s * SUB + i, step_of(s * SUB + i));
        }
        for (int s = subs - 1; s >= 0; s--) {
            i64 es = e0 + (i64)s * SUB * I;
            rows_in<SUB>(ys, dy + es, I, len - s * SUB, at.count);
            if (z) rows_in<SUB>(zs, z + es, I, len - s * SUB, at.count);
            cp_commit();
            if (s < subs - 1) {
                if (s > 0) {
#pragma unroll
                    for (int v = 0; v < VECS; v++) {
                        float* o = v < VECS / 2 ? h + v * 4 : g + (v - VECS / 2) * 4;
                        float4 w = kept[((s - 1) * VECS + v) * CHANNELS + lane];
                        o[0] = w.x, o[1] = w.y, o[2] = w.z, o[3] = w.w;
                    }
                } else {
                    states_in(h, start, ch, on);
                    states_in(g, start, other, on2);
                }
            }
            float hs[SUB][NH], gs[SUB][NH], steps[SUB];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                steps[i] = step_of(s * SUB + i);
                advance(s * SUB + i, steps[i]);
#pragma unroll
                for (int n = 0; n < NH; n++) {
                    hs[i][n] = h[n];
                    gs[i][n] = g[n];
                }
            }
            cp_wait<0>();
            __syncthreads();
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                int at_ = s * SUB + i;
                float xv = ld(xs, at_ * CHANNELS + lane), step = steps[i], in = step * xv, power = power_of(at_, step);
                float g0 = ld(ys, i * CHANNELS + lane), zv = z ? ld(zs, i * CHANNELS + lane) : 0.f, sz = z ? sigmoid_fast(zv) : 0.f;
                float gy = z ? g0 * zv * sz : g0;
                float q = __shfl_xor_sync(FULL, in, 1), pw = __shfl_xor_sync(FULL, power, 1), gq = __shfl_xor_sync(FULL, gy, 1), st2 = __shfl_xor_sync(FULL, step, 1);
                const float* row = mine + at_ * 4 * NH;
                float sum = 0, sum2 = 0, dstep = 0, dstep2 = 0, db_ = 0, db2 = 0, dc[NH], db[NH];
#pragma unroll
                for (int n = 0; n < NH; n += 4) {
                    float4 bv = *(const float4*)(row + n), cv = *(const float4*)(row + 2 * NH + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int k = n + e;
                        sum += cc[e] * hs[i][k];
                        sum2 += cc[e] * gs[i][k];
                        dh[k] += cc[e] * gy;
                        dg[k] += cc[e] * gq;
                        dc[k] = gy * hs[i][k] + gq * gs[i][k];
                        db[k] = dh[k] * in + dg[k] * q;
                        float u = dh[k] * (hs[i][k] - in * bb[e]), u2 = dg[k] * (gs[i][k] - q * bb[e]);
                        dstep += ah[k] * u;
                        dstep2 += ag[k] * u2;
                        da[k] += step * u;
                        dag[k] += st2 * u2;
                        db_ += dh[k] * bb[e];
                        db2 += dg[k] * bb[e];
                        dh[k] *= exp2_fast(power * ah[k]);
                        dg[k] *= exp2_fast(pw * ag[k]);
                    }
                }
                sum += __shfl_xor_sync(FULL, sum2, 1);
                dstep += __shfl_xor_sync(FULL, dstep2, 1);
                db_ += __shfl_xor_sync(FULL, db2, 1);
                scatter(dc, db, red + (warp * SUB + i) * 4 * NH);
                if (on && at_ < len) {
                    i64 o = es + (i64)i * I + lane;
                    float raw = ld(ds, at_ * CHANNELS + lane) + bias, draw = (dstep * 0.69314718056f + xv * db_) * sigmoid_fast(raw);
                    st(dx, o, step * db_ + skip * gy);
                    st(ddt, o, draw);
                    if (dz) st(dz, o, g0 * (sum + skip * xv) * sz * (1.f + zv * (1.f - sz)));
                    dd += gy * xv;
                    dbias += draw;
                }
            }
            __syncthreads();
            for (int e = lane; e < SUB * 4 * NH; e += CHANNELS) {
                int i = e / (4 * NH), j = e % (2 * NH), n = j < NH ? j : (STATES + 1) / 2 + j - NH;
                bool is_b = e % (4 * NH) >= 2 * NH;
                float v = 0;
#pragma unroll
                for (int w = 0; w < CHANNELS / 32; w++) v += red[(w * SUB) * 4 * NH + e];
                if (s * SUB + i < len && (j < NH ? j < (STATES + 1) / 2 : n < STATES)) {
                    i64 row = (((i64)blockIdx.x * gridDim.z * T + base + t0 + s * SUB + i) * G + at.group) * 2;
                    narrow_part[(row + (is_b ? 0 : 1)) * STATES + n] = v;
                }
            }
        }
    }
    float* p = part + at.b * I * (STATES + 2);
    states_out(p, ch, da, on);
    states_out(p, other, dag, on2);
    if (on) {
        p[(i64)I * STATES + ch] = dd;
        p[(i64)I * (STATES + 1) + ch] = dbias;
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
