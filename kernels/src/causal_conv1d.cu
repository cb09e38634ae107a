// A thread has V neighbouring channels and walks over a run of L tokens with the last K-1 inputs in registers, STEP tokens at a time. The
// loads of the next tokens are under way while these are computed. Grid (channels, runs, B).
#ifndef K
#define K 4
#endif
#ifndef V
#define V 1
#endif
// Whether SiLU follows.
#ifndef ACT
#define ACT 0
#endif
#ifndef STEP
#define STEP 4
#endif
#define PAST (K > 1 ? K - 1 : 1)
// V elements as they lie in memory, at a multiple of their size; zeros where there are none.
template <class T> struct Raw {
    static constexpr int BYTES = V * sizeof(T), WORDS = (BYTES + 3) / 4;
    u32 w[WORDS];
    __device__ __forceinline__ void take(const T* p, bool on) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) w[i] = 0;
        if (!on) return;
        if constexpr (BYTES % 16 == 0)
#pragma unroll
            for (int i = 0; i < WORDS; i += 4) {
                uint4 a = *(const uint4*)((const u32*)p + i);
                w[i] = a.x, w[i + 1] = a.y, w[i + 2] = a.z, w[i + 3] = a.w;
            }
        else if constexpr (BYTES == 8) {
            uint2 a = *(const uint2*)p;
            w[0] = a.x, w[1] = a.y;
        } else if constexpr (BYTES == 4) w[0] = *(const u32*)p;
        else w[0] = *(const u16*)p;
    }
    __device__ __forceinline__ float get(int v) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(w[v]);
        else {
            T e = {(u16)(w[v / 2] >> v % 2 * 16)};
            return widen(e);
        }
    }
    __device__ __forceinline__ void open(float* to) const {
#pragma unroll
        for (int v = 0; v < V; v++) to[v] = get(v);
    }
};
template <class T> __device__ __forceinline__ void put(T* to, const float* v) {
    if constexpr (V == 2 && sizeof(T) == 2) {
        T e[2];
        st(e, 0, v[0]);
        st(e, 1, v[1]);
        *(u32*)to = e[0].x | (u32)e[1].x << 16;
    } else store<V>(to, v);
}
// The input at t, from the state where t is before the sequence.
__device__ __forceinline__ void input(float* to, const TA0* x, const TA4* state, i64 b, int t, int c, int T, int I) {
    Raw<TA0> r;
    r.take(x + (b * T + t) * I + c, t >= 0 && t < T);
    r.open(to);
    if (t < 0 && state && t + K - 1 >= 0)
#pragma unroll
        for (int v = 0; v < V; v++) to[v] = ld(state, (b * (K - 1) + K - 1 + t) * I + c + v);
}
// w[j] multiplies the input j tokens back.
__device__ __forceinline__ void taps(float (*w)[V], float* bias, const TA1* weight, const TA2* b, int c) {
#pragma unroll
    for (int v = 0; v < V; v++) {
        bias[v] = b ? ld(b, c + v) : 0.f;
#pragma unroll
        for (int j = 0; j < K; j++) w[j][v] = ld(weight, (i64)(c + v) * K + K - 1 - j);
    }
}
KERNEL conv(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* state, TR0* y, int T, int I, int L) {
    early();
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * V, from = blockIdx.y * L, to = from + L < T ? from + L : T;
    if (c >= I || from >= T) return;
    i64 b = blockIdx.z;
    const TA0* rows = x + b * T * I + c;
    float wt[K][V], bs[V], h[PAST + STEP][V];
    Raw<TA0> next[STEP];
    int reach[STEP], far[STEP];
    auto load = [&](int t0, bool inside) {
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            bool on = inside || t0 + u < to;
            next[u].take(rows + (i64)(t0 + u) * I, on);
            far[u] = pos && on ? pos[b * T + t0 + u] : K;
        }
    };
    auto fetch = [&](int t0) {
        if (t0 + STEP <= to) load(t0, true);
        else load(t0, false);
    };
    fetch(from);
    taps(wt, bs, w, bias, c);
#pragma unroll
    for (int j = 0; j < K - 1; j++) input(h[PAST - 1 - j], x, state, b, from - 1 - j, c, T, I);
    // Inside a run, and where no document begins within reach, nothing is asked of single tokens; all threads of a block agree on that.
    auto walk = [&](int t0, bool inside) {
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            float s[V];
#pragma unroll
            for (int v = 0; v < V; v++) s[v] = bs[v];
#pragma unroll
            for (int j = 0; j < K; j++)
                if (inside || j <= reach[u])
#pragma unroll
                    for (int v = 0; v < V; v++) s[v] += wt[j][v] * h[PAST + u - j][v];
            if (ACT)
#pragma unroll
                for (int v = 0; v < V; v++) s[v] *= sigmoid_fast(s[v]);
            if (inside || t0 + u < to) put(y + (b * T + t0 + u) * I + c, s);
        }
    };
    for (int t0 = from; t0 < to; t0 += STEP) {
        bool whole = t0 + STEP <= to;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            next[u].open(h[PAST + u]);
            reach[u] = far[u];
            whole = whole && reach[u] >= K - 1;
        }
        fetch(t0 + STEP);
        if (whole) walk(t0, true);
        else walk(t0, false);
#pragma unroll
        for (int j = 0; j < PAST; j++)
#pragma unroll
            for (int v = 0; v < V; v++) h[j][v] = h[STEP + j][v];
    }
}
// The last K-1 inputs become the state; ascending, so that older entries are read before they are overwritten.
KERNEL conv_state(const TA0* x, TA4* state, int B, int T, int I) {
    early();
    i64 e = global_thread();
    if (e >= (i64)B * I) return;
    i64 b = e / I;
    int c = e % I;
    for (int k = 0; k < K - 1; k++) {
        int s = T - (K - 1) + k;
        float v = s >= 0 ? ld(x, (b * T + s) * I + c) : ld(state, (b * (K - 1) + K - 1 + s) * I + c);
        st(state, (b * (K - 1) + k) * I + c, v);
    }
}
// One pass: the gradient d of what enters the activation is made again for the K-1 tokens after the run, whose share of dx belongs to it.
// part[run of B][I (K + 1)]: dw, then db.
KERNEL conv_bwd(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* dy, TR0* dx, float* part, int T, int I, int L) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * V, from = blockIdx.y * L, to = from + L < T ? from + L : T;
    if (c >= I) return;
    i64 b = blockIdx.z;
    const i64 base = b * T * I + c;
    const int end = to + K - 1 < T ? to + K - 1 : T;
    // g[PAST + u - j]: the gradient of the input at t0 + u - j.
    float wt[K][V], bs[V], h[PAST + STEP][V], g[PAST + STEP][V], dw[K][V] = {}, db[V] = {};
    Raw<TA0> next[STEP];
    Raw<TA4> grad[STEP];
    int far[STEP];
    auto load = [&](int t0, bool inside) {
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            bool on = inside || t0 + u < end;
            next[u].take(x + base + (i64)(t0 + u) * I, on);
            grad[u].take(dy + base + (i64)(t0 + u) * I, on);
            far[u] = pos && on ? pos[b * T + t0 + u] : K;
        }
    };
    auto fetch = [&](int t0) {
        if (t0 + STEP <= end) load(t0, true);
        else load(t0, false);
    };
    fetch(from);
    taps(wt, bs, w, bias, c);
#pragma unroll
    for (int j = 0; j < PAST + STEP; j++)
#pragma unroll
        for (int v = 0; v < V; v++) h[j][v] = g[j][v] = 0;
#pragma unroll
    for (int j = 0; j < K - 1; j++) input(h[PAST - 1 - j], x, (const TA4*)0, b, from - 1 - j, c, T, I);
    auto walk = [&](int t0, const int* reach, float (*d)[V], bool inside) {
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            int t = t0 + u;
            if (ACT) {
                float s[V];
#pragma unroll
                for (int v = 0; v < V; v++) s[v] = bs[v];
#pragma unroll
                for (int j = 0; j < K; j++)
                    if (inside || j <= reach[u])
#pragma unroll
                        for (int v = 0; v < V; v++) s[v] += wt[j][v] * h[PAST + u - j][v];
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float sg = sigmoid_fast(s[v]);
                    d[u][v] *= sg * (1.f + s[v] * (1.f - sg));
                }
            }
#pragma unroll
            for (int j = 0; j < K; j++)
                if (inside || j <= reach[u])
#pragma unroll
                    for (int v = 0; v < V; v++) g[PAST + u - j][v] += wt[j][v] * d[u][v];
            if (inside || t < to) {
#pragma unroll
                for (int v = 0; v < V; v++) db[v] += d[u][v];
#pragma unroll
                for (int j = 0; j < K; j++)
                    if (inside || j <= reach[u])
#pragma unroll
                        for (int v = 0; v < V; v++) dw[j][v] += d[u][v] * h[PAST + u - j][v];
            }
            // What the token K-1 back gets is complete.
            int done = t - (K - 1);
            if (inside || (done >= from && done < to)) put(dx + base + (i64)done * I, g[PAST + u - (K - 1)]);
        }
    };
    for (int t0 = from; t0 < to + K - 1; t0 += STEP) {
        float d[STEP][V];
        int reach[STEP];
        bool whole = t0 >= from + K - 1 && t0 + STEP <= to;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            next[u].open(h[PAST + u]);
            grad[u].open(d[u]);
            reach[u] = far[u];
            whole = whole && reach[u] >= K - 1;
        }
        fetch(t0 + STEP);
        if (whole) walk(t0, reach, d, true);
        else walk(t0, reach, d, false);
#pragma unroll
        for (int j = 0; j < PAST; j++)
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[j][v] = h[STEP + j][v];
                g[j][v] = g[STEP + j][v];
            }
#pragma unroll
        for (int j = PAST; j < PAST + STEP; j++)
#pragma unroll
            for (int v = 0; v < V; v++) g[j][v] = 0;
    }
    float* p = part + (i64)(b * gridDim.y + blockIdx.y) * I * (K + 1);
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int j = 0; j < K; j++) p[(i64)(c + v) * K + K - 1 - j] = dw[j][v];
        p[(i64)I * K + c + v] = db[v];
    }
}
// One token a sequence, which also becomes the last of the state; a thread a channel.
KERNEL conv_step(const TA0* x, const TA1* w, const TA2* bias, const int* pos, TA4* state, TR0* y, i64 n, int I, int act) {
    early();
    i64 e = global_thread();
    if (e >= n) return;
    int c = e % I, reach = pos ? pos[e / I] : K;
    TA4* past = state + e / I * (K - 1) * I + c;
    float now = ld(x, e), s = (bias ? ld(bias, c) : 0.f) + ld(w, (i64)c * K + K - 1) * now, h[K];
#pragma unroll
    for (int j = 1; j < K; j++) h[j] = ld(past, (i64)(K - 1 - j) * I);
#pragma unroll
    for (int j = 1; j < K; j++)
        if (j <= reach) s += ld(w, (i64)c * K + K - 1 - j) * h[j];
    st(y, e, act ? s * sigmoid_fast(s) : s);
#pragma unroll
    for (int j = 1; j < K; j++) st(past, (i64)(K - 1 - j) * I, j == 1 ? now : h[j - 1]);
}
