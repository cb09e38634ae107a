// A thread has V neighbouring channels and walks over a run of L tokens with the last K-1 inputs in registers, STEP tokens at a time, while
// the next (AHEAD - 1) STEP tokens are under way. Grid (channels, runs, B).
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
#ifndef AHEAD
#define AHEAD 4
#endif
#define PAST (K > 1 ? K - 1 : 1)
template <class T> __device__ __forceinline__ void put(T* to, const float* v) {
    if constexpr (V == 2 && sizeof(T) == 2) {
        T e[2];
        st(e, 0, v[0]);
        st(e, 1, v[1]);
        *(u32*)to = e[0].x | (u32)e[1].x << 16;
    } else store<V>(to, v);
}
// Tokens of one thread that are under way to shared memory, which no other thread reads: STEP in a group, AHEAD groups in turn. Registers
// would hold too few of them to keep the memory busy.
template <class T> struct Ring {
    static constexpr int BYTES = V * sizeof(T), SIZE = AHEAD * STEP * BYTES;
    unsigned char* own;
    __device__ __forceinline__ void init(unsigned char* shared) { own = shared + threadIdx.x * BYTES; }
    __device__ __forceinline__ T* slot(int g, int u) const { return (T*)(own + (g % AHEAD * STEP + u) * blockDim.x * BYTES); }
    // V elements, or zeros.
    __device__ __forceinline__ void ask(int g, int u, const T* p, bool on) {
        T* to = slot(g, u);
        u32 at = shared_address(to);
        if constexpr (BYTES % 16 == 0)
#pragma unroll
            for (int i = 0; i < BYTES; i += 16) cp16(at + i, (const char*)p + i, on ? 16 : 0);
        else if constexpr (BYTES == 4 || BYTES == 8)
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(__cvta_generic_to_global(p)), "n"(BYTES), "r"(on ? BYTES : 0) : "memory");
        else
#pragma unroll
            for (int v = 0; v < V; v++) to[v] = on ? p[v] : T{};
    }
    __device__ __forceinline__ void take(float* to, int g, int u) const { load<V>(to, slot(g, u)); }
};
// The input at t, from the state where t is before the sequence.
__device__ __forceinline__ void input(float* to, const TA0* x, const TA4* state, i64 b, int t, int c, int T, int I) {
#pragma unroll
    for (int v = 0; v < V; v++) to[v] = 0;
    if (t >= 0 && t < T) load<V>(to, x + (b * T + t) * I + c);
    if (t < 0 && state && t + K - 1 >= 0)
#pragma unroll
        for (int v = 0; v < V; v++) to[v] = ld(state, (b * (K - 1) + K - 1 + t) * I + c + v);
}
// w[j] multiplies the input j tokens back. The weights of neighbouring channels lie beside each other.
__device__ __forceinline__ void taps(float (*w)[V], float* bias, const TA1* weight, const TA2* b, int c) {
    constexpr int W = V > 1 ? V * K : 1;
    float all[V * K];
#pragma unroll
    for (int i = 0; i < V * K; i += W) load<W>(all + i, weight + (i64)c * K + i);
#pragma unroll
    for (int v = 0; v < V; v++) bias[v] = 0;
    if (b) load<V>(bias, b + c);
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
        for (int j = 0; j < K; j++) w[j][v] = all[v * K + K - 1 - j];
}
KERNEL conv(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* state, TR0* y, int T, int I, int L) {
    early();
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * V, from = blockIdx.y * L, to = from + L < T ? from + L : T;
    if (c >= I || from >= T) return;
    i64 b = blockIdx.z;
    const TA0* rows = x + b * T * I + c;
    float wt[K][V], bs[V], h[PAST + STEP][V];
    DYNAMIC_SHARED(shared);
    Ring<TA0> ring;
    ring.init(shared);
    int reach[STEP], far[STEP];
    auto fetch = [&](int g) {
        int t0 = from + g * STEP;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            bool on = t0 + u < to;
            ring.ask(g, u, on ? rows + (i64)(t0 + u) * I : rows, on);
        }
        cp_commit();
    };
    auto look = [&](int t0) {
#pragma unroll
        for (int u = 0; u < STEP; u++) far[u] = pos && t0 + u < to ? pos[b * T + t0 + u] : K;
    };
#pragma unroll
    for (int g = 0; g < AHEAD - 1; g++) fetch(g);
    look(from);
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
    for (int t0 = from, g = 0; t0 < to; t0 += STEP, g++) {
        bool whole = t0 + STEP <= to;
        cp_wait<AHEAD - 2>();
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            ring.take(h[PAST + u], g, u);
            reach[u] = far[u];
            whole = whole && reach[u] >= K - 1;
        }
        fetch(g + AHEAD - 1);
        look(t0 + STEP);
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
    DYNAMIC_SHARED(shared);
    Ring<TA0> next;
    Ring<TA4> grad;
    next.init(shared);
    grad.init(shared + blockDim.x * Ring<TA0>::SIZE);
    int far[STEP];
    auto fetch = [&](int g) {
        int t0 = from + g * STEP;
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            bool on = t0 + u < end;
            i64 i = base + (on ? (i64)(t0 + u) * I : 0);
            next.ask(g, u, x + i, on);
            grad.ask(g, u, dy + i, on);
        }
        cp_commit();
    };
    auto look = [&](int t0) {
#pragma unroll
        for (int u = 0; u < STEP; u++) far[u] = pos && t0 + u < end ? pos[b * T + t0 + u] : K;
    };
#pragma unroll
    for (int g = 0; g < AHEAD - 1; g++) fetch(g);
    look(from);
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
    for (int t0 = from, n = 0; t0 < to + K - 1; t0 += STEP, n++) {
        float d[STEP][V];
        int reach[STEP];
        bool whole = t0 >= from + K - 1 && t0 + STEP <= to;
        cp_wait<AHEAD - 2>();
#pragma unroll
        for (int u = 0; u < STEP; u++) {
            next.take(h[PAST + u], n, u);
            grad.take(d[u], n, u);
            reach[u] = far[u];
            whole = whole && reach[u] >= K - 1;
        }
        fetch(n + AHEAD - 1);
        look(t0 + STEP);
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
    float *p = part + (i64)(b * gridDim.y + blockIdx.y) * I * (K + 1), *pw = p + (i64)c * K, *pb = p + (i64)I * K + c;
    constexpr int W = V > 1 ? V * K : 1;
    float all[V * K];
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
        for (int j = 0; j < K; j++) all[v * K + K - 1 - j] = dw[j][v];
#pragma unroll
    for (int i = 0; i < V * K; i += W) store<W>(pw + i, all + i);
    store<V>(pb, db);
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
