// Any sizes and addresses. gate: 0 none, 1 before, 2 after. A row is one group of `group` elements; `wlen` is the length of w (0: none).
KERNEL rms_norm(const TA0* x, const TA1* w, const TA2* z, TR0* y, float* rstd, int group, int wlen, float eps, int zero_centered, int gate) {
    early();
    i64 base = (i64)blockIdx.x * group;
    float s = 0;
    for (int i = threadIdx.x; i < group; i += blockDim.x) {
        float v = ld(x, base + i);
        if (gate == 1) v *= silu(ld(z, base + i));
        s += v * v;
    }
    s = block_sum(s);
    float r = 1.f / sqrtf(s / group + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    i64 wbase = wlen ? base % wlen : 0;
    for (int i = threadIdx.x; i < group; i += blockDim.x) {
        float v = ld(x, base + i);
        if (gate == 1) v *= silu(ld(z, base + i));
        v *= r;
        if (wlen) v *= ld(w, wbase + i) + zero_centered;
        if (gate == 2) v *= silu(ld(z, base + i));
        st(y, base + i, v);
    }
}

KERNEL rms_norm_dx(const TA0* x, const TA1* w, const TA2* z, const float* rstd, const TA4* dy, const TA5* add, TR0* dx, TA2* dz, int group, int wlen, int zero_centered, int gate) {
    i64 base = (i64)blockIdx.x * group;
    i64 wbase = wlen ? base % wlen : 0;
    float r = rstd[blockIdx.x], s = 0;
    for (int i = threadIdx.x; i < group; i += blockDim.x) {
        float v = ld(x, base + i), g = ld(dy, base + i);
        if (gate == 1) v *= silu(ld(z, base + i));
        if (wlen) g *= ld(w, wbase + i) + zero_centered;
        if (gate == 2) g *= silu(ld(z, base + i));
        s += g * v * r;
    }
    s = block_sum(s) / group;
    for (int i = threadIdx.x; i < group; i += blockDim.x) {
        float xv = ld(x, base + i), v = xv, g = ld(dy, base + i), zv = gate ? ld(z, base + i) : 0.f;
        if (gate == 1) v *= silu(zv);
        if (wlen) g *= ld(w, wbase + i) + zero_centered;
        float n = v * r;
        if (gate == 2) {
            st(dz, base + i, g * n * dsilu(zv));
            g *= silu(zv);
        }
        float dv = r * (g - n * s);
        if (gate == 1) {
            st(dz, base + i, dv * xv * dsilu(zv));
            dv *= silu(zv);
        }
        st(dx, base + i, add ? dv + ld(add, base + i) : dv);
    }
}

// part[chunk][wlen]: sums over the rows (of wlen elements) of each chunk.
KERNEL rms_norm_dw(const TA0* x, const TA2* z, const float* rstd, const TA4* dy, float* part, int group, int wlen, i64 rows, int gate) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= wlen) return;
    i64 per = (rows + gridDim.y - 1) / gridDim.y, from = blockIdx.y * per, to = from + per < rows ? from + per : rows;
    float s = 0;
    for (i64 row = from; row < to; row++) {
        i64 e = row * wlen + c;
        float v = ld(x, e) * rstd[e / group] * ld(dy, e);
        if (gate) v *= silu(ld(z, e));
        s += v;
    }
    part[(i64)blockIdx.y * wlen + c] = s;
}

// The same in one pass: a row of `group` elements is held by the TEAM threads that share it, NV vectors of 8 elements each, and the next
// row's loads are under way meanwhile. TEAM is a power of two up to 32, or a whole block of warps. group is a multiple of 8, all addresses
// are of 16 bytes, and the number of teams is a multiple of the rows that a weight has: a thread meets the same weights in all its rows.
#ifndef TEAM
#define TEAM 32
#endif
#ifndef NV
#define NV 1
#endif
#ifndef GATE
#define GATE 0
#endif
#define BLOCK (TEAM > 32 ? TEAM : 256)
// Blocks of a multiprocessor that registers are to suffice for; 0: whatever comes out.
#ifndef HOLD
#define HOLD 0
#endif
template <class T> struct Raw {
    uint4 a;
    __device__ __forceinline__ void take(const T* p, i64 i) { a = *(const uint4*)(p + i); }
    __device__ __forceinline__ void open(float* r) const { ld8((const T*)&a, 0, r); }
};
template <> struct Raw<float> {
    float4 a, b;
    __device__ __forceinline__ void take(const float* p, i64 i) { a = *(const float4*)(p + i); b = *(const float4*)(p + i + 4); }
    __device__ __forceinline__ void open(float* r) const {
        r[0] = a.x; r[1] = a.y; r[2] = a.z; r[3] = a.w; r[4] = b.x; r[5] = b.y; r[6] = b.z; r[7] = b.w;
    }
};
// Every thread of a team gets the sum; `part` is another one in the next call.
__device__ __forceinline__ float team_sum(float v, float* part) {
#pragma unroll
    for (int m = (TEAM < 32 ? TEAM : 32) / 2; m; m >>= 1) v += __shfl_xor_sync(FULL, v, m);
    if (TEAM > 32) {
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
        __syncthreads();
        v = 0;
#pragma unroll
        for (int i = 0; i < TEAM / 32; i++) v += part[i];
    }
    return v;
}
KERNEL __launch_bounds__(BLOCK, HOLD) rms_norm_rows(const TA0* x, const TA1* w, const TA2* z, TR0* y, float* rstd, i64 rows, int group, int wlen, float eps, int zero_centered) {
    early();
    __shared__ float part[2][32];
    const int teams = blockDim.x / TEAM, team = threadIdx.x / TEAM, first = threadIdx.x % TEAM * 8;
    const i64 step = (i64)gridDim.x * teams;
    i64 row = (i64)blockIdx.x * teams + team;
    const int wbase = wlen ? row * group % wlen : 0;
    Raw<TA0> xr[NV];
    Raw<TA2> zr[NV];
    auto fetch = [&](i64 row) {
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            if (row < rows && c < group) {
                xr[k].take(x, row * group + c);
                if (GATE) zr[k].take(z, row * group + c);
            }
        }
    };
    fetch(row);
    for (int turn = 0; row - team < rows; row += step, turn ^= 1) {
        float v[NV][8], zv[NV][8], s = 0;
#pragma unroll
        for (int k = 0; k < NV; k++) {
            bool on = row < rows && first + k * TEAM * 8 < group;
            xr[k].open(v[k]);
            if (GATE) zr[k].open(zv[k]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                if (GATE) zv[k][e] *= sigmoid_fast(zv[k][e]);
                if (GATE == 1) v[k][e] *= zv[k][e];
                s += on ? v[k][e] * v[k][e] : 0.f;
            }
        }
        fetch(row + step);
        s = team_sum(s, part[turn]);
        float r = 1.f / sqrtf(s / group + eps);
        if (row < rows && first == 0) rstd[row] = r;
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            if (row < rows && c < group) {
                float wv[8];
                if (wlen) ld8(w, wbase + c, wv);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    v[k][e] *= r;
                    if (wlen) v[k][e] *= wv[e] + zero_centered;
                    if (GATE == 2) v[k][e] *= zv[k][e];
                }
                st8(y, row * group + c, v[k]);
            }
        }
    }
}
// Rows of the backward pass are brought ahead into shared memory, each thread's own vectors by its own copies, so that neither registers
// nor barriers are needed for them: STAGES rows are there or under way. 0: the next row is brought ahead into registers.
#ifndef STAGES
#define STAGES 0
#endif
// Whether dx has `add` added to it.
#ifndef ADDED
#define ADDED 0
#endif
// Words of 16 bytes of 8 elements.
template <class T> constexpr int PIECES = sizeof(T) / 2;
// A thread's vectors of one row of one tensor. In shared memory, `at` is its first word; the words of all threads of a block follow each other.
template <class T> struct Held {
    Raw<T> now[NV], next[NV];
    __device__ __forceinline__ void bring(uint4* at, int k, const T* from) {
        if (STAGES == 0) next[k].take(from, 0);
        else
#pragma unroll
            for (int i = 0; i < PIECES<T>; i++) cp16(shared_address(at + (k * PIECES<T> + i) * BLOCK), (const uint4*)from + i, 16);
    }
    __device__ __forceinline__ void turn() {
#pragma unroll
        for (int k = 0; k < NV; k++) now[k] = next[k];
    }
    __device__ __forceinline__ void open(const uint4* at, int k, float* to) const {
        if (STAGES == 0) return now[k].open(to);
        uint4 a[2];
#pragma unroll
        for (int i = 0; i < PIECES<T>; i++) a[i] = at[(k * PIECES<T> + i) * BLOCK];
        ld8((const T*)a, 0, to);
    }
};
// part[team][group]: what the rows of each team give to dw.
KERNEL __launch_bounds__(BLOCK, HOLD) rms_norm_bwd_rows(const TA0* x, const TA1* w, const TA2* z, const float* rstd, const TA4* dy, const TA5* add, TR0* dx, TA2* dz, float* part, i64 rows, int group, int wlen, int zero_centered) {
    extern __shared__ uint4 ring[];
    __shared__ float sums[2][32];
    constexpr int AT_DY = NV * PIECES<TA0>, AT_Z = AT_DY + NV * PIECES<TA4>, AT_ADD = AT_Z + (GATE ? NV * PIECES<TA2> : 0), ALL = AT_ADD + (ADDED ? NV * PIECES<TA5> : 0);
    const int teams = blockDim.x / TEAM, team = threadIdx.x / TEAM, first = threadIdx.x % TEAM * 8;
    const i64 step = (i64)gridDim.x * teams, own = (i64)blockIdx.x * teams + team;
    const int wbase = wlen ? own * group % wlen : 0;
    Held<TA0> hx;
    Held<TA4> hy;
    Held<TA2> hz;
    Held<TA5> ha;
    float next = 0, dw[NV][8] = {};
    auto place = [&](int stage) { return ring + stage * ALL * BLOCK + threadIdx.x; };
    auto fetch = [&](i64 row, int stage) {
        uint4* to = place(stage);
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            i64 at = row * group + c;
            if (row < rows && c < group) {
                hx.bring(to, k, x + at);
                hy.bring(to + AT_DY * BLOCK, k, dy + at);
                if (GATE) hz.bring(to + AT_Z * BLOCK, k, z + at);
                if (ADDED && STAGES) ha.bring(to + AT_ADD * BLOCK, k, add + at);
            }
        }
        if (STAGES) cp_commit();
    };
    auto factor = [&](i64 row) {
        if (row < rows) next = rstd[row];
    };
    factor(own);
    const int ahead = STAGES ? STAGES - 1 : 1;
#pragma unroll
    for (int s = 0; s < ahead; s++) fetch(own + s * step, s);
    int stage = 0, turn = 0;
    for (i64 row = own; row - team < rows; row += step, turn ^= 1) {
        float r = next, s = 0;
        if (STAGES) cp_wait<(STAGES > 2 ? STAGES - 2 : 0)>();
        else {
            hx.turn();
            hy.turn();
            if (GATE) hz.turn();
            if (ADDED)
#pragma unroll
                for (int k = 0; k < NV; k++) {
                    int c = first + k * TEAM * 8;
                    if (row < rows && c < group) ha.now[k].take(add, row * group + c);
                }
        }
        // What is written over was read in the turn before.
        fetch(row + ahead * step, stage ? stage - 1 : STAGES - 1);
        factor(row + step);
        const uint4* here = place(stage);
        if (++stage >= STAGES) stage = 0;
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            if (row < rows && c < group) {
                float xv[8], g[8], zv[8], wv[8];
                hx.open(here, k, xv);
                hy.open(here + AT_DY * BLOCK, k, g);
                if (GATE) hz.open(here + AT_Z * BLOCK, k, zv);
                if (wlen) ld8(w, wbase + c, wv);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    float n = xv[e] * r;
                    if (GATE) n *= zv[e] * sigmoid_fast(zv[e]);
                    n *= g[e];
                    dw[k][e] += n;
                    s += wlen ? n * (wv[e] + zero_centered) : n;
                }
            }
        }
        s = team_sum(s, sums[turn]) / group;
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            if (row < rows && c < group) {
                float xv[8], g[8], zv[8], wv[8];
                hx.open(here, k, xv);
                hy.open(here + AT_DY * BLOCK, k, g);
                if (GATE) hz.open(here + AT_Z * BLOCK, k, zv);
                if (wlen) ld8(w, wbase + c, wv);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    float sg = GATE ? sigmoid_fast(zv[e]) : 0.f, gate = zv[e] * sg, slope = sg + gate * (1.f - sg);
                    if (wlen) g[e] *= wv[e] + zero_centered;
                    float n = xv[e] * r;
                    if (GATE == 1) n *= gate;
                    if (GATE == 2) {
                        zv[e] = g[e] * n * slope;
                        g[e] *= gate;
                    }
                    float d = r * (g[e] - n * s);
                    if (GATE == 1) {
                        zv[e] = d * xv[e] * slope;
                        d *= gate;
                    }
                    xv[e] = d;
                }
                if (ADDED) {
                    ha.open(here + AT_ADD * BLOCK, k, g);
#pragma unroll
                    for (int e = 0; e < 8; e++) xv[e] += g[e];
                }
                i64 at = row * group + c;
                if (GATE) st8(dz, at, zv);
                st8(dx, at, xv);
            }
        }
    }
    if (part)
#pragma unroll
        for (int k = 0; k < NV; k++) {
            int c = first + k * TEAM * 8;
            if (c < group) st8(part, own * group + c, dw[k]);
        }
}
