// A thread has V neighbouring channels and walks over a run of L tokens with the last K-1 inputs in registers, U tokens at a time so that
// their loads are in flight together. Grid (channels, runs, B).
#ifndef K
#define K 4
#endif
#ifndef V
#define V 1
#endif
#define U 4
#define PAST (K > 1 ? K - 1 : 1)
__device__ __forceinline__ void input(float* to, const TA0* x, const TA4* state, i64 b, int t, int c, int T, int I) {
    if (t >= 0 && t < T) return load<V>(to, x + (b * T + t) * I + c);
#pragma unroll
    for (int v = 0; v < V; v++) to[v] = t < 0 && state && t + K - 1 >= 0 ? ld(state, (b * (K - 1) + K - 1 + t) * I + c + v) : 0.f;
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
KERNEL conv(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* state, TR0* y, int T, int I, int act, int L) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * V, from = blockIdx.y * L, to = from + L < T ? from + L : T;
    if (c >= I) return;
    i64 b = blockIdx.z;
    float wt[K][V], bs[V], h[PAST + U][V];
    taps(wt, bs, w, bias, c);
#pragma unroll
    for (int j = 0; j < K - 1; j++) input(h[PAST - 1 - j], x, state, b, from - 1 - j, c, T, I);
    for (int t0 = from; t0 < to; t0 += U) {
        int reach[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            input(h[PAST + u], x, (const TA4*)0, b, t0 + u, c, T, I);
            reach[u] = pos && t0 + u < to ? pos[b * T + t0 + u] : K;
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            float s[V];
#pragma unroll
            for (int v = 0; v < V; v++) s[v] = bs[v];
#pragma unroll
            for (int j = 0; j < K; j++)
                if (j <= reach[u])
#pragma unroll
                    for (int v = 0; v < V; v++) s[v] += wt[j][v] * h[PAST + u - j][v];
            if (act)
#pragma unroll
                for (int v = 0; v < V; v++) s[v] *= sigmoid_fast(s[v]);
            if (t0 + u < to) store<V>(y + (b * T + t0 + u) * I + c, s);
        }
#pragma unroll
        for (int j = 0; j < PAST; j++)
#pragma unroll
            for (int v = 0; v < V; v++) h[j][v] = h[U + j][v];
    }
}
// The last K-1 inputs become the state; ascending, so that older entries are read before they are overwritten.
KERNEL conv_state(const TA0* x, TA4* state, int B, int T, int I) {
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
KERNEL conv_bwd(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* dy, TR0* dx, float* part, int T, int I, int act, int L) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * V, from = blockIdx.y * L, to = from + L < T ? from + L : T;
    if (c >= I) return;
    i64 b = blockIdx.z;
    // g[PAST + u - j]: the gradient of the input at t0 + u - j.
    float wt[K][V], bs[V], h[PAST + U][V], g[PAST + U][V], dw[K][V] = {}, db[V] = {};
    taps(wt, bs, w, bias, c);
#pragma unroll
    for (int j = 0; j < PAST + U; j++)
#pragma unroll
        for (int v = 0; v < V; v++) h[j][v] = g[j][v] = 0;
#pragma unroll
    for (int j = 0; j < K - 1; j++) input(h[PAST - 1 - j], x, (const TA4*)0, b, from - 1 - j, c, T, I);
    for (int t0 = from; t0 < to + K - 1; t0 += U) {
        float d[U][V];
        int reach[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int t = t0 + u;
            bool on = t < to + K - 1 && t < T;
            input(h[PAST + u], x, (const TA4*)0, b, on ? t : T, c, T, I);
            if (on) load<V>(d[u], dy + (b * T + t) * I + c);
            else
#pragma unroll
                for (int v = 0; v < V; v++) d[u][v] = 0;
            reach[u] = pos && on ? pos[b * T + t] : K;
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int t = t0 + u;
            if (act) {
                float s[V];
#pragma unroll
                for (int v = 0; v < V; v++) s[v] = bs[v];
#pragma unroll
                for (int j = 0; j < K; j++)
                    if (j <= reach[u])
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
                if (j <= reach[u])
#pragma unroll
                    for (int v = 0; v < V; v++) g[PAST + u - j][v] += wt[j][v] * d[u][v];
            if (t < to) {
#pragma unroll
                for (int v = 0; v < V; v++) db[v] += d[u][v];
#pragma unroll
                for (int j = 0; j < K; j++)
                    if (j <= reach[u])
#pragma unroll
                        for (int v = 0; v < V; v++) dw[j][v] += d[u][v] * h[PAST + u - j][v];
            }
            // What the token K-1 back gets is complete.
            int done = t - (K - 1);
            if (done >= from && done < to) store<V>(dx + (b * T + done) * I + c, g[PAST + u - (K - 1)]);
        }
#pragma unroll
        for (int j = 0; j < PAST; j++)
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[j][v] = h[U + j][v];
                g[j][v] = g[U + j][v];
            }
#pragma unroll
        for (int j = PAST; j < PAST + U; j++)
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
