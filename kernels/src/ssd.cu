// Two forms. Token by token, here, for every element type and for few tokens; and, when TILED, in tiles of Q tokens on tensor cores: what
// those have in common, the walks over tiles and the gradients of a tile, the latter two once for any device and once for sm_90a (WG).
#if !TILED
// The scan as four runs of one recurrence over (own, other) pairs: s[other] = decay s[other] + u[own] v[other], out[own] = s . w.
// y: own p, other n. dc: own n, other p. dx and db the same two, backwards in time. L lanes share an own index; each keeps S of its others.
#ifndef LN
#define LN 1
#define SN 16
#define LP 1
#define SP 16
#endif
// decay is 0 at the first token of a document.
KERNEL ssd_dt(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, float* dts, float* decay, i64 n, int H, float lo, float hi) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        int h = e % H;
        float v = fminf(fmaxf(softplus(ld(dt, e) + (dt_bias ? ld(dt_bias, h) : 0.f)), lo), hi);
        dts[e] = v;
        decay[e] = pos && pos[e / H] == 0 ? 0.f : expf(v * ld(a, h));
    }
}
// F is double where the result enters the gradient of the decays, which is a difference of sums over all tokens.
template <int L, int S, bool BACK, class F, class TU, class TV, class TW, class TE, class Out>
__device__ __forceinline__ void run(const TU* u, i64 us, const TV* v, i64 vs, const TW* w, i64 ws, const TE* e, i64 es, const float* dts, const float* decay, double* dot, float* state, float* saved, int T, int H, int own, int others, int chunk, Out out) {
    int lane = threadIdx.x % L, o = (blockIdx.x * blockDim.x + threadIdx.x) / L;
    bool on = o < own;
    int oc = on ? o : 0;
    i64 h = blockIdx.y, b = blockIdx.z, bh = b * H + h;
    F s[S];
#pragma unroll
    for (int k = 0; k < S; k++) {
        int q = lane + L * k;
        s[k] = state && on && q < others ? state[(bh * own + oc) * others + q] : 0.f;
    }
    int chunks = chunk ? (T + chunk - 1) / chunk : 0;
    float next = 0;
#pragma unroll 2
    for (int i = 0; i < T; i++) {
        int t = BACK ? T - 1 - i : i;
        i64 row = b * T + t, th = row * H + h;
        if (!BACK && saved && t % chunk == 0)
#pragma unroll
            for (int k = 0; k < S; k++) {
                int q = lane + L * k;
                if (on && q < others) saved[(((b * chunks + t / chunk) * H + h) * own + oc) * others + q] = s[k];
            }
        float dv = dts[th], dec = BACK ? next : decay[th], raw = ld(u, row * us + oc);
        F uv = BACK ? F(raw) : F(raw) * F(dv), r = 0;
        if (BACK) next = decay[th];
#pragma unroll
        for (int k = 0; k < S; k++) {
            int q = lane + L * k;
            if (q < others) {
                s[k] = dec * s[k] + uv * ld(v, row * vs + q);
                r += s[k] * ld(w, row * ws + q);
            }
        }
#pragma unroll
        for (int m = L / 2; m; m >>= 1) r += __shfl_xor_sync(FULL, r, m);
        if (dot) {
            double p = warp_sum(on && lane == 0 ? (double)r * ld(e, row * es + oc) : 0.);
            if ((threadIdx.x & 31) == 0) dot[(i64)((blockIdx.x * blockDim.x + threadIdx.x) >> 5) * gridDim.z * T * H + th] = p;
        }
        if (on && lane == 0) out(row, oc, raw, (float)(BACK ? r * dv : r));
    }
    if (state)
#pragma unroll
        for (int k = 0; k < S; k++) {
            int q = lane + L * k;
            if (on && q < others) state[(bh * own + oc) * others + q] = s[k];
        }
}
#define PLACE i64 h = blockIdx.y; int g = h / (H / G); (void)g;
KERNEL ssd_y(const TA0* x, const TA3* b, const TA4* c, const TA5* d, const float* dts, const float* decay, TR0* y, float* state, float* saved, int T, int H, int P, int G, int N, int chunk) {
    early();
    PLACE
    float skip = d ? ld(d, h) : 0.f;
    run<LN, SN, false, float>(x + h * P, (i64)H * P, b + g * N, (i64)G * N, c + g * N, (i64)G * N, (const float*)0, 0, dts, decay, (double*)0, state, saved, T, H, P, N, chunk,
        [=](i64 row, int o, float raw, float r) { st(y, (row * H + h) * P + o, r + skip * raw); });
}
KERNEL ssd_dc(const TA0* x, const TA3* b, const TA4* c, const TA9* dy, const float* dts, const float* decay, float* dc, double* dot, int T, int H, int P, int G, int N) {
    PLACE
    run<LP, SP, false, double>(b + g * N, (i64)G * N, x + h * P, (i64)H * P, dy + h * P, (i64)H * P, c + g * N, (i64)G * N, dts, decay, dot, (float*)0, (float*)0, T, H, N, P, 0,
        [=](i64 row, int o, float, float r) { dc[(row * H + h) * N + o] = r; });
}
KERNEL ssd_dx(const TA0* x, const TA3* b, const TA4* c, const TA5* d, const TA9* dy, const float* dts, const float* decay, TR0* dx, double* dot, int T, int H, int P, int G, int N) {
    PLACE
    float skip = d ? ld(d, h) : 0.f;
    run<LN, SN, true, double>(dy + h * P, (i64)H * P, c + g * N, (i64)G * N, b + g * N, (i64)G * N, x + h * P, (i64)H * P, dts, decay, dot, (float*)0, (float*)0, T, H, P, N, 0,
        [=](i64 row, int o, float raw, float r) { st(dx, (row * H + h) * P + o, r + skip * raw); });
}
KERNEL ssd_db(const TA0* x, const TA4* c, const TA9* dy, const float* dts, const float* decay, float* db, int T, int H, int P, int G, int N) {
    PLACE
    run<LP, SP, true, float>(c + g * N, (i64)G * N, dy + h * P, (i64)H * P, x + h * P, (i64)H * P, (const float*)0, 0, dts, decay, (double*)0, (float*)0, (float*)0, T, H, N, P, 0,
        [=](i64 row, int o, float, float r) { db[(row * H + h) * N + o] = r; });
}
// The gradient of the log decays: G[t] = G[t+1] + dy[t].(S[t] c[t]) - dt' x[t].(dS[t] b[t]), zero at the first token of a document.
// yc and xb come in parts of the own dimension. part[B][2 H]: da, ddt_bias.
KERNEL ssd_ddt(const TA1* dt, const TA2* a, const TA6* dt_bias, const int* pos, const float* dts, const double* yc, const double* xb, TR1* ddt, float* part, int yc_parts, int xb_parts, int B, int T, int H, float lo, float hi) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= B * H) return;
    int h = e % H;
    i64 b = e / H;
    float av = ld(a, h), bias = dt_bias ? ld(dt_bias, h) : 0.f;
    double G = 0, da = 0, dbias = 0;
    for (int t = T - 1; t >= 0; t--) {
        i64 th = (b * T + t) * H + h;
        float dv = dts[th];
        double y = 0, x = 0;
        for (int k = 0; k < yc_parts; k++) y += yc[(i64)k * B * T * H + th];
        for (int k = 0; k < xb_parts; k++) x += xb[(i64)k * B * T * H + th];
        G = pos && pos[b * T + t] == 0 ? 0. : G + (y - dv * x);
        da += dv * G;
        float raw = ld(dt, th) + bias, sp = softplus(raw);
        float d = sp < lo || sp > hi ? 0.f : (float)(av * G + x) * sigmoid(raw);
        dbias += d;
        st(ddt, th, d);
    }
    part[b * 2 * H + h] = da;
    part[b * 2 * H + H + h] = dbias;
}
// dd[h] = sum x dy: one block a head.
KERNEL ssd_dd(const TA0* x, const TA9* dy, float* dd, i64 rows, int H, int P) {
    float s = 0;
    for (i64 i = threadIdx.x; i < rows * P; i += blockDim.x) {
        i64 e = (i / P * H + blockIdx.x) * P + i % P;
        s += ld(x, e) * ld(dy, e);
    }
    s = block_sum(s);
    if (threadIdx.x == 0) dd[blockIdx.x] = s;
}
// out[row][g][n] = sum over the group's heads of part[row][h][n].
KERNEL ssd_heads(const float* part, TR3* out, i64 n, int H, int G, int N) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = e / ((i64)G * N);
        int g = e / N % G, per = H / G;
        const float* p = part + (row * H + (i64)g * per) * N + e % N;
        float s = 0;
        for (int k = 0; k < per; k++) s += p[(i64)k * N];
        st(out, e, s);
    }
}
#endif
