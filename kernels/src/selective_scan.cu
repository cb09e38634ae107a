// LANES threads share two channels and divide the n; each thread holds HELD states of either and makes the steps of one of the two, so that a
// warp needs nothing of another. Channels and blocks stay within a group. Time may be cut into parts of whole chunks: their ends from zero,
// joined, then everything from the right starts. A reset adds -1e30 to the exponents of a token.
#ifndef STATES
#define STATES 16
#endif
// Channels and groups.
#ifndef WIDTH
#define WIDTH 8192
#endif
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef EVEN
#define EVEN 0
#endif
// Whether addresses and rows of all channels are multiples of 16 bytes.
#ifndef VEC
#define VEC 0
#endif
#define LANES (STATES <= 16 ? 2 : STATES <= 32 ? 4 : STATES <= 64 ? 8 : STATES <= 128 ? 16 : 32)
#define HELD (((STATES + LANES - 1) / LANES + 3) / 4 * 4)
#define ROW (LANES * HELD)
#define RESET -1e30f
#define LOG2E 1.4426950408889634f
// Where a thread is: channels of a block from c0 on, of which `count` are there; its own channel of the two and the other. Grid (blocks of a
// group, G parts, B).
template <int THREADS> struct Place {
    static constexpr int CHANNELS = 2 * THREADS / LANES;
    int c0, count, group, part, parts, lane, warp, sub, n0, own, ch, other;
    bool on, on2, mine;
    i64 b;
    __device__ Place() {
        constexpr int G = GROUPS, per = WIDTH / G;
        int at = blockIdx.x * CHANNELS;
        group = blockIdx.y % G;
        part = blockIdx.y / G;
        parts = gridDim.y / G;
        c0 = group * per + at;
        count = per - at < CHANNELS ? per - at : CHANNELS;
        b = blockIdx.z;
        lane = threadIdx.x & 31;
        warp = threadIdx.x >> 5;
        sub = threadIdx.x % LANES;
        n0 = sub * HELD;
        own = threadIdx.x / LANES * 2 + (sub & 1);
        ch = c0 + own;
        other = c0 + (own ^ 1);
        on = own < count;
        on2 = (own ^ 1) < count;
        mine = on && sub < 2;
    }
};
// An element as it is, to be widened when it is there, or `none` unless i < count. Branches would keep tokens apart.
template <class E> __device__ __forceinline__ u32 raw(const E* p, int i, int count, u32 none = 0) {
    u32 v;
    if constexpr (sizeof(E) == 4) asm("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\nmov.b32 %0, %4;\n@p ld.global.nc.b32 %0, [%1];\n}" : "=r"(v) : "l"(__cvta_generic_to_global(p)), "r"(i), "r"(count), "r"(none));
    else asm("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\nmov.b32 %0, %4;\n@p ld.global.nc.u16 %0, [%1];\n}" : "=r"(v) : "l"(__cvta_generic_to_global(p)), "r"(i), "r"(count), "r"(none));
    return v;
}
// Of either.
template <class E, class F> __device__ __forceinline__ u32 raw(bool first, const E* p, const F* q, int i, int count) {
    if constexpr (sizeof(E) == sizeof(F)) return raw(first ? p : (const E*)q, i, count);
    else return raw(p, i, first ? count : 0) | raw(q, i, first ? 0 : count);
}
// A step of nothing: minus infinity.
template <class E> constexpr u32 NO_STEP = sizeof(E) == 4 ? 0xff800000u : 0xff80u;
template <> constexpr u32 NO_STEP<f16> = 0xfc00u;
__device__ __forceinline__ void store_if(int i, int count, float* p, float v) { asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %0, %1;\n@p st.global.f32 [%2], %3;\n}" ::"r"(i), "r"(count), "l"(__cvta_generic_to_global(p)), "f"(v)); }
template <class E> __device__ __forceinline__ void store_if(int i, int count, E* p, float v) {
    E e;
    st(&e, 0, v);
    asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %0, %1;\n@p st.global.b16 [%2], %3;\n}" ::"r"(i), "r"(count), "l"(__cvta_generic_to_global(p)), "h"(e.x));
}
__device__ __forceinline__ float choose(bool first, float a, float b) {
    float r;
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}" : "=f"(r) : "f"(a), "f"(b), "r"((int)first));
    return r;
}
// As softplus_fast, without a branch.
__device__ __forceinline__ float softplus_straight(float x) {
    float e = exp2_fast(LOG2E * x);
    float few = e * (1.f - e * (0.5f - e * (0.33333333f - e * (0.25f - e * 0.2f))));
    return choose(x > 20.f, x, choose(e < 0.0625f, few, 0.69314718056f * log2_fast(1.f + e)));
}
template <class E> __device__ __forceinline__ float widened(u32 v) {
    if constexpr (sizeof(E) == 4) return __uint_as_float(v);
    else return widen(E{(u16)v});
}
// Rows of the channels of a warp on their way to shared memory, zeros from `tokens` and `channels` on; there after cp_wait and __syncwarp.
template <int TOKENS, class E> __device__ __forceinline__ void bring(E* to, const E* from, int tokens, int channels, int lane) {
    constexpr int CW = 64 / LANES, COUNT = 16 / sizeof(E), PIECES = TOKENS * CW / COUNT;
    if constexpr (VEC && CW % COUNT == 0) {
#pragma unroll
        for (int i = 0; i < PIECES; i += 32) {
            int e = i + lane, row = e / (CW / COUNT), col = e % (CW / COUNT) * COUNT;
            if (PIECES % 32 == 0 || e < PIECES) cp16(shared_address(to + e * COUNT), from + row * (i64)WIDTH + col, row < tokens && col < channels ? 16 : 0);
        }
    } else {
        for (int e = lane; e < TOKENS * CW; e += 32) {
            E zero = {};
            to[e] = e / CW < tokens && e % CW < channels ? from[e / CW * (i64)WIDTH + e % CW] : zero;
        }
    }
}
// The same of four matrices, of which the second may be absent; their rows follow one another.
template <int TOKENS, class E, class F, class H, class K> __device__ __forceinline__ void bring(unsigned char* to, const E* p, const F* q, const H* r, const K* s, i64 from, int tokens, int channels, int lane) {
    constexpr int CW = 64 / LANES, COUNT = 16 / sizeof(E), PIECES = TOKENS * CW / COUNT, SIZE = TOKENS * CW;
    if constexpr (VEC && CW % COUNT == 0 && sizeof(E) == sizeof(F) && sizeof(E) == sizeof(H) && sizeof(E) == sizeof(K)) {
#pragma unroll
        for (int i = 0; i < 4 * PIECES; i += 32) {
            int e = i + lane, which = e / PIECES, row = e % PIECES / (CW / COUNT), col = e % (CW / COUNT) * COUNT;
            const E* base = which == 0 ? p : which == 1 ? (const E*)q : which == 2 ? (const E*)r : (const E*)s;
            bool have = row < tokens && col < channels && (which != 1 || q);
            if (4 * PIECES % 32 == 0 || e < 4 * PIECES) cp16(shared_address(to) + e * 16, base + (from + (row * WIDTH + col)), have ? 16 : 0);
        }
    } else {
        E* a = (E*)to;
        F* b = (F*)(a + SIZE);
        H* c = (H*)(b + SIZE);
        K* d = (K*)(c + SIZE);
        bring<TOKENS>(a, p + from, tokens, channels, lane);
        if (q) bring<TOKENS>(b, q + from, tokens, channels, lane);
        bring<TOKENS>(c, r + from, tokens, channels, lane);
        bring<TOKENS>(d, s + from, tokens, channels, lane);
    }
}
// b and c of TOKENS tokens to shared memory by THREADS threads, [token][b, c, STRIDE in all]: first into registers.
template <int TOKENS, int THREADS, int STRIDE> struct Narrow {
    static constexpr bool FAST = VEC && STATES == ROW && sizeof(TA3) == sizeof(TA4) && STATES * sizeof(TA3) % 16 == 0;
    static constexpr int COUNT = FAST ? 16 / sizeof(TA3) : 1, ALL = TOKENS * 2 * ROW / COUNT, EACH = (ALL + THREADS - 1) / THREADS;
    u32 v[EACH][FAST ? 4 : 1];
    __device__ __forceinline__ void get(const TA3* b, const TA4* c, int tokens, int thread) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int e = (thread + i * THREADS) * COUNT, r = e / (2 * ROW), n = e % ROW, m = r * GROUPS * STATES + n;
            bool first = e % (2 * ROW) < ROW, have = r < tokens && n < STATES && (ALL % THREADS == 0 || r < TOKENS);
            if constexpr (FAST) {
                uint4 u = {0, 0, 0, 0};
                if (have) u = *(const uint4*)(first ? b + m : (const TA3*)c + m);
                v[i][0] = u.x, v[i][1] = u.y, v[i][2] = u.z, v[i][3] = u.w;
            } else {
                v[i][0] = raw(first, b + m, c + m, 0, have ? 1 : 0);
            }
        }
    }
    __device__ __forceinline__ void put(float* to, int thread) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int e = (thread + i * THREADS) * COUNT, r = e / (2 * ROW), k = e % (2 * ROW);
            if (ALL % THREADS != 0 && r >= TOKENS) continue;
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                u32 w = COUNT <= 4 ? v[i][j] : v[i][j / 2] >> (j & 1) * 16;
                to[r * STRIDE + k + j] = k < ROW ? widened<TA3>(w) : widened<TA4>(w);
            }
        }
    }
};
// A channel's sum from the sums of the threads that share it: of the own channel, and of the other one.
__device__ __forceinline__ float shared_sum(float v, float other) {
    v += __shfl_xor_sync(FULL, other, 1);
#pragma unroll
    for (int m = 2; m < LANES; m *= 2) v += __shfl_xor_sync(FULL, v, m);
    return v;
}
// A thread's states of a channel from memory.
__device__ __forceinline__ void take(float* h, const float* from, int n0, bool on) {
#pragma unroll
    for (int n = 0; n < HELD; n += 4) {
        if (STATES % 4 == 0) {
            float4 v = from && on && n0 + n < STATES ? *(const float4*)(from + n0 + n) : make_float4(0.f, 0.f, 0.f, 0.f);
            h[n] = v.x, h[n + 1] = v.y, h[n + 2] = v.z, h[n + 3] = v.w;
        } else {
#pragma unroll
            for (int e = n; e < n + 4; e++) h[e] = from && on && n0 + e < STATES ? from[n0 + e] : 0.f;
        }
    }
}
__device__ __forceinline__ void put(float* to, const float* h, int n0, bool on) {
#pragma unroll
    for (int n = 0; n < HELD; n += 4) {
        if (STATES % 4 == 0) {
            if (on && n0 + n < STATES) *(float4*)(to + n0 + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
        } else {
#pragma unroll
            for (int e = n; e < n + 4; e++)
                if (on && n0 + e < STATES) to[n0 + e] = h[e];
        }
    }
}
// Forward and backward, which has FINE, are compiled apart.
#ifndef FINE
#define THREADS_FWD 128
// Tokens of a tile: their inputs are in registers a tile ahead, b and c of two tiles in shared memory for each warp.
#define TT (ROW <= 64 ? 8 : ROW <= 128 ? 4 : ROW <= 256 ? 2 : 1)
// LOCAL: the states alone, from saved or zero starts; `saved` then gets the state before each chunk of `fine` tokens of the part, ends the last
// one and total the sum of the steps (1e30 with a reset).
template <bool LOCAL> __device__ __forceinline__ void scan(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* state, TR0* y, float* saved, int T, int chunk, int part_tokens, int fine) {
    __shared__ __align__(16) float wide[THREADS_FWD / 32][2][TT][2 * ROW];
    constexpr i64 I = WIDTH;
    constexpr int G = GROUPS;
    Place<THREADS_FWD> at;
    auto& bc = wide[at.warp];
    int from = at.part * part_tokens, to = from + part_tokens < T ? from + part_tokens : T;
    i64 base = at.b * T;
    float h[HELD], g[HELD], ah[HELD], ag[HELD];
    const float* init = starts ? starts + (start_parts > 1 ? (at.b * at.parts + at.part) * I * STATES : at.b * I * STATES) : starts;
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        bool have = at.n0 + n < STATES;
        ah[n] = at.on && have ? ld(a, (i64)at.ch * STATES + at.n0 + n) * LOG2E : 0.f;
        ag[n] = at.on2 && have ? ld(a, (i64)at.other * STATES + at.n0 + n) * LOG2E : 0.f;
    }
    take(h, init ? init + (i64)at.ch * STATES : init, at.n0, at.on);
    take(g, init ? init + (i64)at.other * STATES : init, at.n0, at.on2);
    auto save = [&](float* p, i64 row) {
        put(p + (row + at.ch) * STATES, h, at.n0, at.on);
        put(p + (row + at.other) * STATES, g, at.n0, at.on2);
    };
    float skip = d && at.on ? ld(d, at.ch) : 0.f, bias = dt_bias && at.on ? ld(dt_bias, at.ch) : 0.f, sum = 0;
    constexpr int CW = 64 / LANES;
    __shared__ __align__(16) TA0 xs_[THREADS_FWD / 32][TT * CW];
    __shared__ __align__(16) TA1 ds_[THREADS_FWD / 32][TT * CW];
    __shared__ __align__(16) TA7 zs_[LOCAL ? 1 : THREADS_FWD / 32][LOCAL ? 8 : TT * CW];
    TA0* xr = xs_[at.warp];
    TA1* dr = ds_[at.warp];
    TA7* zr = zs_[LOCAL ? 0 : at.warp];
    int pv = 1, self = at.own - at.warp * CW, room = at.count - at.warp * CW;
    Narrow<TT, 32, 2 * ROW> narrow;
    auto fetch = [&](int k) {
        int t0 = from + k * TT, left = to - t0;
        i64 e = (base + t0) * I + at.c0 + at.warp * CW, m = ((base + t0) * G + at.group) * STATES;
        bring<TT>(xr, x + e, left, room, at.lane);
        bring<TT>(dr, dt + e, left, room, at.lane);
        if (!LOCAL && z) bring<TT>(zr, z + e, left, room, at.lane);
        cp_commit();
        if (pos) pv = at.lane < TT && at.lane < left ? pos[base + t0 + at.lane] : 1;
        narrow.get(b + m, c + m, left, at.lane);
    };
    int tiles = (to - from + TT - 1) / TT;
    // Where the next state is saved; parts begin with chunks.
    int mark = saved ? from : T, chunk_end = from + chunk;
    i64 slot = (at.b * ((T + chunk - 1) / chunk) + from / chunk) * ((chunk + fine - 1) / fine);
    if (tiles > 0) fetch(0);
    for (int k = 0; k < tiles; k++) {
        float step[TT], in[TT], xs[TT], gate[TT];
        u32 resets = __ballot_sync(FULL, pv == 0);
        int t0 = from + k * TT;
        cp_wait<0>();
        narrow.put(bc[k & 1][0], at.lane);
        __syncwarp();
#pragma unroll
        for (int u = 0; u < TT; u++) {
            xs[u] = ld(xr, u * CW + self);
            step[u] = softplus_straight(ld(dr, u * CW + self) + bias);
            if (!LOCAL) {
                float zf = z ? ld(zr, u * CW + self) : 0.f;
                gate[u] = choose(z != 0, zf * sigmoid_fast(zf), 1.f);
            }
        }
        if (t0 + TT > to)
#pragma unroll
            for (int u = 0; u < TT; u++)
                if (t0 + u >= to) step[u] = 0;
#pragma unroll
        for (int u = 0; u < TT; u++) {
            in[u] = step[u] * xs[u];
            if (LOCAL) sum += resets >> u & 1 ? 1e30f : step[u];
        }
        __syncwarp();
        if (k + 1 < tiles) fetch(k + 1);
        i64 e = (base + t0) * I + at.ch;
        int left = at.mine ? to - t0 : 0;
#pragma unroll
        for (int u = 0; u < TT; u++) {
            // A branch here keeps the tokens apart; when runs begin at whole tiles it is needed once.
            if ((u == 0 || !EVEN) && t0 + u == mark && mark < to) {
                save(saved, slot * I);
                slot++;
                mark += fine;
                if (mark >= chunk_end) {
                    mark = chunk_end;
                    chunk_end += chunk;
                }
            }
            float cut = resets >> u & 1 ? RESET : 0.f, v = 0, w = 0;
            float s2 = __shfl_xor_sync(FULL, step[u], 1), in2 = __shfl_xor_sync(FULL, in[u], 1);
            const float* bk = &bc[k & 1][u][at.n0];
#pragma unroll
            for (int n = 0; n < HELD; n += 4) {
                float4 bv = *(const float4*)(bk + n), cv = LOCAL ? bv : *(const float4*)(bk + ROW + n);
                const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    h[n + i] = exp2_fast(step[u] * ah[n + i] + cut) * h[n + i] + in[u] * bb[i];
                    g[n + i] = exp2_fast(s2 * ag[n + i] + cut) * g[n + i] + in2 * bb[i];
                    v += cc[i] * h[n + i];
                    w += cc[i] * g[n + i];
                }
            }
            if (!LOCAL) {
                v = (shared_sum(v, w) + skip * xs[u]) * gate[u];
                store_if(u, left, y + e + u * I, v);
            }
        }
    }
    i64 p = LOCAL ? (at.b * at.parts + at.part) * I : at.b * I;
    float* last = LOCAL ? ends : at.part == at.parts - 1 ? state : (float*)0;
    if (last) save(last, p);
    if (LOCAL && total && at.mine) total[p + at.ch] = sum;
}
#define FWD_BOUNDS __launch_bounds__(THREADS_FWD, 2)
KERNEL FWD_BOUNDS scan_fwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* starts, int start_parts, float* state, TR0* y, float* saved, int T, int chunk, int part_tokens) {
    scan<false>(x, dt, a, b, c, d, dt_bias, z, pos, starts, start_parts, (float*)0, (float*)0, state, y, saved, T, chunk, part_tokens, chunk);
}
KERNEL FWD_BOUNDS scan_states(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA6* dt_bias, const int* pos, const float* starts, int start_parts, float* ends, float* total, float* saved, int T, int chunk, int part_tokens, int fine) {
    scan<true>(x, dt, a, b, c, (const TA5*)0, dt_bias, (const TA7*)0, pos, starts, start_parts, ends, total, (float*)0, (TR0*)0, saved, T, chunk, part_tokens, fine);
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
#define SUB 4
#ifndef WARPS
#define WARPS 4
#endif
#define THREADS_BWD (32 * WARPS)
// Sums over the channels of a warp by tensor cores: a thread's values are the right operand as they are, and the left one, zeros and ones, says
// to which row a value goes. Row j KINDS + k of a result is the sum of value j of threads k, k + KINDS, ... of fours; its columns are fours.
#define KINDS (LANES < 4 ? LANES : 4)
#define COLUMNS (LANES <= 4 ? 4 : 8)
#define RED (KINDS * HELD * COLUMNS)
__device__ __forceinline__ void mma_tf32(float* c, const u32* a, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ float leading(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
__device__ __forceinline__ void gather(float2* sums, const float* v, const u32* one) {
    constexpr int PER = 8 / KINDS;
#pragma unroll
    for (int i = 0; i < HELD / PER; i++) {
        float d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int q = 0; q < PER; q += 2) {
            float v0 = v[i * PER + q], v1 = v[i * PER + q + 1];
            // The cores read 11 bits of a number; wide gradients take the rest apart.
            if (sizeof(TA3) == 4) mma_tf32(d, one + 2 * q, v0 - leading(v0), v1 - leading(v1));
            mma_tf32(d, one + 2 * q, sizeof(TA3) == 4 ? leading(v0) : v0, sizeof(TA3) == 4 ? leading(v1) : v1);
        }
        sums[i] = COLUMNS == 4 ? make_float2(d[0] + d[1], 0.f) : make_float2(d[0], d[1]);
    }
}
// Written for all tokens of a SUB at once: loads from shared memory do not pass stores.
__device__ __forceinline__ void scatter(float* red, const float2 (*sums)[HELD * KINDS / 8], int lane) {
#pragma unroll
    for (int t = 0; t < SUB; t++)
#pragma unroll
        for (int i = 0; i < HELD * KINDS / 8; i++) {
            int r = i * 8 + (lane >> 2);
            if (COLUMNS == 4) red[t * RED + r * 4 + (lane & 3)] = sums[t][i].x;
            else *(float2*)(red + t * RED + r * 8 + 2 * (lane & 3)) = sums[t][i];
        }
}
template <class E> __device__ __forceinline__ void prefetch(const E* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p))); }
// Backward, the same division among threads. Runs of at most FINE tokens in reverse, each between two saved states. In a run: steps and inputs of
// all its tokens, states every SUB tokens, then, from the last SUB on, their states and decays in registers and the way back.
// db and dc are sums over the channels of a block: narrow[block of the group][B T G][b, c][n]. part[B][I (STATES + 2)], rows filled up to a
// multiple of 4: da, dd, ddt_bias.
KERNEL __launch_bounds__(THREADS_BWD, WARPS > 4 ? 1 : 8 / WARPS) scan_bwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* saved, const TA10* dy, TR0* dx, TR1* ddt, TA7* dz, float* narrow_part, float* part, int T, int chunk, int fine) {
    DYNAMIC_SHARED(shared);
    constexpr i64 I = WIDTH;
    constexpr int G = GROUPS;
    Place<THREADS_BWD> at;
    constexpr int CHANNELS = Place<THREADS_BWD>::CHANNELS, KEPT = FINE / SUB > 2 ? FINE / SUB - 2 : 0, WIDE = 2 * ROW + 4;
    float4* kept = (float4*)shared;
    float* bc = (float*)(kept + KEPT * (HELD / 2) * THREADS_BWD); // b, c, what a reset adds
    float* red_c = bc + FINE * WIDE;
    float* red_b = red_c + WARPS * SUB * RED;
    float2* ps = (float2*)(red_b + WARPS * SUB * RED); // step, input
    // The next SUB's elements.
    constexpr int CW = 64 / LANES, PART = SUB * CW;
    unsigned char* next = (unsigned char*)(ps + FINE * CHANNELS) + at.warp * PART * (sizeof(TA10) + sizeof(TA7) + sizeof(TA0) + sizeof(TA1));
    TA10* yr = (TA10*)next;
    TA7* zr = (TA7*)(yr + PART);
    TA0* xr = (TA0*)(zr + PART);
    TA1* dr = (TA1*)(xr + PART);
    int self = at.own - at.warp * CW, room = at.count - at.warp * CW;
    i64 base = at.b * T;
    float h[HELD], g[HELD], ah[HELD], ag[HELD], dh[HELD], dg[HELD], da[HELD], dag[HELD];
#pragma unroll
    for (int n = 0; n < HELD; n++) {
        bool have = at.n0 + n < STATES;
        ah[n] = at.on && have ? ld(a, (i64)at.ch * STATES + at.n0 + n) * LOG2E : 0.f;
        ag[n] = at.on2 && have ? ld(a, (i64)at.other * STATES + at.n0 + n) * LOG2E : 0.f;
        dh[n] = dg[n] = da[n] = dag[n] = 0;
    }
    // By way of shared memory, so that the compiler does not make the zeros again for each product.
    u32 one[16 / KINDS];
#pragma unroll
    for (int q = 0; q < 16 / KINDS; q += 4) {
        u32* way = (u32*)shared + 4 * threadIdx.x;
        way[0] = at.lane >> 2 == q / 2 * KINDS + at.lane % KINDS ? 0x3f800000u : 0u;
        way[2] = at.lane >> 2 == (q / 2 + 1) * KINDS + at.lane % KINDS ? 0x3f800000u : 0u;
        way[1] = way[3] = 0;
        uint4 v = lds128(shared_address(way));
        one[q] = v.x, one[q + 1] = v.y, one[q + 2] = v.z, one[q + 3] = v.w;
    }
    float skip = d && at.on ? ld(d, at.ch) : 0.f, bias = dt_bias && at.on ? ld(dt_bias, at.ch) : 0.f, dd = 0, dbias = 0;
    // Sums over warps of dc or db of the tokens of a SUB.
    auto narrow = [&](const float* red, int start, int len, int which) {
        constexpr int ALL = SUB * ROW, EACH = (ALL + THREADS_BWD - 1) / THREADS_BWD;
        i64 first = (((i64)blockIdx.x * gridDim.z * T + base + start) * G + at.group) * (2 * STATES) + (which ? 0 : STATES);
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int o = (threadIdx.x + which * (THREADS_BWD / 2)) % THREADS_BWD + k * THREADS_BWD;
            if (o >= ALL) continue;
            int i = o / ROW, n = o % ROW, s = n / HELD, r = n % HELD * KINDS + s % KINDS;
            float v = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* p = red + (w * SUB + i) * RED + r * COLUMNS;
                if (COLUMNS == 4) {
                    float4 q = *(const float4*)p;
                    v += q.x + q.y + (q.z + q.w);
                } else {
#pragma unroll
                    for (int q = 0; q < 8; q += LANES / 4) v += p[q + s / 4];
                }
            }
            if (i < len && n < STATES) narrow_part[first + (i * (2 * G * STATES) + n)] = v;
        }
    };
    int runs_each = (chunk + fine - 1) / fine, runs = (T + chunk - 1) / chunk * runs_each;
    for (int f = runs - 1; f >= 0; f--) {
        int t0 = f / runs_each * chunk + f % runs_each * fine, len = chunk - f % runs_each * fine;
        len = len < fine ? len : fine;
        len = len < T - t0 ? len : T - t0;
        if (len <= 0) continue;
        const float* start = saved + (at.b * runs + f) * I * STATES;
        auto begin = [&]() {
            take(h, start + (i64)at.ch * STATES, at.n0, at.on);
            take(g, start + (i64)at.other * STATES, at.n0, at.on2);
        };
        int subs = (len + SUB - 1) / SUB;
        auto fetch = [&](int s) {
            bring<SUB>(next, dy, z, x, dt, (base + t0 + s * SUB) * I + at.c0 + at.warp * CW, len - s * SUB, room, at.lane);
            cp_commit();
        };
        fetch(subs - 1);
        {
            // All loads before their first use.
            Narrow<FINE, THREADS_BWD, WIDE> all;
            i64 first = ((base + t0) * G + at.group) * STATES, e = (base + t0) * I + at.ch;
            int left = at.on ? len : 0;
            u32 xv[FINE], dv[FINE];
            all.get(b + first, c + first, len, threadIdx.x);
#pragma unroll
            for (int i = 0; i < FINE; i++) {
                xv[i] = raw(x + e + i * I, i, left);
                dv[i] = raw(dt + e + i * I, i, left, NO_STEP<TA1>);
            }
            begin();
            all.put(bc, threadIdx.x);
            for (int i = threadIdx.x; i < FINE; i += THREADS_BWD) bc[i * WIDE + 2 * ROW] = pos && i < len && pos[base + t0 + i] == 0 ? RESET : 0.f;
#pragma unroll
            for (int i = 0; i < FINE; i++) {
                float s = softplus_straight(widened<TA1>(dv[i]) + bias);
                if (LANES == 2 || at.sub < 2) ps[i * CHANNELS + at.own] = make_float2(s, s * widened<TA0>(xv[i]));
            }
        }
        // What this run and the next one will ask for.
        if (at.lane < len && at.warp * (64 / LANES) < at.count) {
            i64 e = (base + t0 + at.lane) * I + at.c0 + at.warp * (64 / LANES);
#pragma unroll
            for (int k = 0; k < 64 / LANES; k += 32 / sizeof(TA10)) {
                prefetch(dy + e + k);
                if (z) prefetch(z + e + k);
            }
            if (f > 0) {
                prefetch(start - I * STATES + (i64)at.ch * STATES + at.n0);
                prefetch(start - I * STATES + (i64)at.other * STATES + at.n0);
            }
            if (t0 - fine + at.lane >= 0) {
                e -= fine * I;
#pragma unroll
                for (int k = 0; k < 64 / LANES; k += 32 / sizeof(TA0)) {
                    prefetch(x + e + k);
                    prefetch(dt + e + k);
                }
            }
        }
        __syncthreads();
        auto advance = [&](int row) {
            float2 p = ps[row * CHANNELS + at.own], q = ps[row * CHANNELS + (at.own ^ 1)];
            float cut = bc[row * WIDE + 2 * ROW];
#pragma unroll
            for (int n = 0; n < HELD; n += 4) {
                float4 bv = *(const float4*)(bc + row * WIDE + at.n0 + n);
                const float bb[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    h[n + e] = exp2_fast(p.x * ah[n + e] + cut) * h[n + e] + p.y * bb[e];
                    g[n + e] = exp2_fast(q.x * ag[n + e] + cut) * g[n + e] + q.y * bb[e];
                }
            }
        };
        for (int s = 0; s + 1 < subs; s++) {
            if (s > 0)
#pragma unroll
                for (int v = 0; v < HELD / 4; v++) {
                    kept[((s - 1) * (HELD / 2) + 2 * v) * THREADS_BWD + threadIdx.x] = make_float4(h[4 * v], h[4 * v + 1], h[4 * v + 2], h[4 * v + 3]);
                    kept[((s - 1) * (HELD / 2) + 2 * v + 1) * THREADS_BWD + threadIdx.x] = make_float4(g[4 * v], g[4 * v + 1], g[4 * v + 2], g[4 * v + 3]);
                }
#pragma unroll
            for (int i = 0; i < SUB; i++) advance(s * SUB + i);
        }
#pragma unroll 1
        for (int s = subs - 1; s >= 0; s--) {
            TA0 xv[SUB];
            TA1 dv[SUB];
            TA10 yv[SUB];
            TA7 zv[SUB];
            i64 e0 = (base + t0 + s * SUB) * I + at.ch;
            int left = at.mine ? len - s * SUB : 0, left_z = dz ? left : 0;
            cp_wait<0>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                yv[i] = yr[i * CW + self];
                if (z) zv[i] = zr[i * CW + self];
                xv[i] = xr[i * CW + self];
                dv[i] = dr[i * CW + self];
            }
            __syncwarp();
            if (s > 0) fetch(s - 1);
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
            // States before each token and decays of it.
            float hs[SUB][HELD], gs[SUB][HELD], eh[SUB][HELD], eg[SUB][HELD], gy[SUB];
            float2 sums[SUB][HELD * KINDS / 8];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                int row = s * SUB + i;
                float2 p = ps[row * CHANNELS + at.own], q = ps[row * CHANNELS + (at.own ^ 1)];
                float cut = bc[row * WIDE + 2 * ROW], g0 = widen(yv[i]), zf = z ? widen(zv[i]) : 0.f, sz = sigmoid_fast(zf), sum = 0, sum2 = 0, dc[HELD];
                gy[i] = z ? g0 * zf * sz : g0;
                float gq = __shfl_xor_sync(FULL, gy[i], 1);
#pragma unroll
                for (int n = 0; n < HELD; n += 4) {
                    float4 bv = *(const float4*)(bc + row * WIDE + at.n0 + n), cv = *(const float4*)(bc + row * WIDE + ROW + at.n0 + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int k = n + e;
                        hs[i][k] = h[k];
                        gs[i][k] = g[k];
                        eh[i][k] = exp2_fast(p.x * ah[k] + cut);
                        eg[i][k] = exp2_fast(q.x * ag[k] + cut);
                        h[k] = eh[i][k] * h[k] + p.y * bb[e];
                        g[k] = eg[i][k] * g[k] + q.y * bb[e];
                        sum += cc[e] * h[k];
                        sum2 += cc[e] * g[k];
                        dc[k] = gy[i] * h[k] + gq * g[k];
                    }
                }
                gather(sums[i], dc, one);
                float xf = widen(xv[i]);
                sum = shared_sum(sum, sum2) + skip * xf;
                dd += gy[i] * xf;
                store_if(i, left_z, dz + e0 + i * I, g0 * sum * sz * (1.f + zf * (1.f - sz)));
            }
            scatter(red_c + at.warp * SUB * RED, sums, at.lane);
            __syncthreads();
            narrow(red_c, t0 + s * SUB, len - s * SUB, 0);
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                int row = s * SUB + i;
                float2 p = ps[row * CHANNELS + at.own], q = ps[row * CHANNELS + (at.own ^ 1)];
                float gq = __shfl_xor_sync(FULL, gy[i], 1), dstep = 0, dstep2 = 0, din = 0, din2 = 0, db[HELD];
#pragma unroll
                for (int n = 0; n < HELD; n += 4) {
                    float4 bv = *(const float4*)(bc + row * WIDE + at.n0 + n), cv = *(const float4*)(bc + row * WIDE + ROW + at.n0 + n);
                    const float bb[4] = {bv.x, bv.y, bv.z, bv.w}, cc[4] = {cv.x, cv.y, cv.z, cv.w};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int k = n + e;
                        dh[k] += cc[e] * gy[i];
                        dg[k] += cc[e] * gq;
                        db[k] = dh[k] * p.y + dg[k] * q.y;
                        din += dh[k] * bb[e];
                        din2 += dg[k] * bb[e];
                        dh[k] *= eh[i][k];
                        dg[k] *= eg[i][k];
                        float u = dh[k] * hs[i][k], u2 = dg[k] * gs[i][k];
                        dstep += ah[k] * u;
                        dstep2 += ag[k] * u2;
                        da[k] += p.x * u;
                        dag[k] += q.x * u2;
                    }
                }
                gather(sums[i], db, one);
                dstep = shared_sum(dstep, dstep2);
                din = shared_sum(din, din2);
                float rd = (dstep * 0.69314718056f + widen(xv[i]) * din) * sigmoid_fast(widen(dv[i]) + bias);
                store_if(i, left, ddt + e0 + i * I, rd);
                store_if(i, left, dx + e0 + i * I, p.x * din + skip * gy[i]);
                dbias += row < len ? rd : 0.f;
            }
            scatter(red_b + at.warp * SUB * RED, sums, at.lane);
            __syncthreads();
            narrow(red_b, t0 + s * SUB, len - s * SUB, 1);
        }
    }
    float* p = part + at.b * ((I * (STATES + 2) + 3) / 4 * 4);
    put(p + (i64)at.ch * STATES, da, at.n0, at.on);
    put(p + (i64)at.other * STATES, dag, at.n0, at.on2);
    if (at.mine) {
        p[I * STATES + at.ch] = dd;
        p[I * (STATES + 1) + at.ch] = dbias;
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
