// A launch takes a table of tensors by value; grid (blocks, tensors).
#define TABLE 40
// copy: p in another type, or null.
struct Tensors { u64 p[TABLE]; u64 g[TABLE]; u64 m[TABLE]; u64 v[TABLE]; u64 copy[TABLE]; i64 n[TABLE]; float decay[TABLE]; float lr[TABLE]; };
struct Grads { u64 g[TABLE]; i64 n[TABLE]; };
KERNEL adamw(const __grid_constant__ Tensors t, const float* lr, const float* step, const float* norm, double b1, double b2, float eps, float clip) {
    int k = blockIdx.y;
    if ((i64)blockIdx.x * blockDim.x >= t.n[k]) return;
    // Powers of doubles take long: once a block.
    __shared__ float shared_c1, shared_c2;
    if (threadIdx.x == 0) {
        shared_c1 = (float)(1. - pow(b1, (double)step[0]));
        shared_c2 = (float)(1. - pow(b2, (double)step[0]));
    }
    __syncthreads();
    TA0* p = (TA0*)t.p[k];
    TR0* copy = (TR0*)t.copy[k];
    const float* g = (const float*)t.g[k];
    float *m = (float*)t.m[k], *v = (float*)t.v[k];
    float rate = lr[0] * t.lr[k], decay = t.decay[k], c1 = shared_c1, c2 = shared_c2;
    float f1 = (float)b1, f2 = (float)b2, o1 = (float)(1. - b1), o2 = (float)(1. - b2);
    float f = clip > 0.f ? fminf(1.f, clip / norm[0]) : 1.f;
    // A norm that is no number leaves everything as it was; the caller stops.
    if (!(norm[0] < INF)) return;
    float u1 = 1.f / c1, u2 = 1.f / c2;
    // The new p of one element; its moments change.
    auto update = [&](float g, float& m, float& v, float p) {
        g *= f;
        m = f1 * m + o1 * g;
        v = f2 * v + o2 * g * g;
        return p - rate * (m * u1 / (sqrtf(v * u2) + eps) + decay * p);
    };
    // Vectors of 16 bytes, neighbours of those of neighbouring threads; two at a time, so that eight loads are under way.
    const int W = 4, U = 2;
    i64 n = t.n[k], wide = (t.p[k] | t.g[k] | t.m[k] | t.v[k] | t.copy[k]) % 16 ? 0 : n / W * W, stride = W * all_threads();
    for (i64 i = W * global_thread(); i < wide; i += U * stride) {
        float gv[U][W], mv[U][W], vv[U][W], pv[U][W];
#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * stride < wide) {
                i64 at = i + u * stride;
                load<W>(gv[u], g + at);
                load<W>(mv[u], m + at);
                load<W>(vv[u], v + at);
                load<W>(pv[u], p + at);
            }
#pragma unroll
        for (int u = 0; u < U; u++)
            if (i + u * stride < wide) {
                i64 at = i + u * stride;
#pragma unroll
                for (int e = 0; e < W; e++) pv[u][e] = update(gv[u][e], mv[u][e], vv[u][e], pv[u][e]);
                store<W>(m + at, mv[u]);
                store<W>(v + at, vv[u]);
                store<W>(p + at, pv[u]);
                if (copy) store<W>(copy + at, pv[u]);
            }
    }
    for (i64 i = wide + global_thread(); i < n; i += all_threads()) {
        float mv = m[i], vv = v[i], pv = update(g[i], mv, vv, ld(p, i));
        m[i] = mv;
        v[i] = vv;
        st(p, i, pv);
        if (copy) st(copy, i, pv);
    }
}
KERNEL square_parts(const __grid_constant__ Grads t, double* part) {
    const TA0* g = (const TA0*)t.g[blockIdx.y];
    double s = 0;
    i64 n = t.n[blockIdx.y], wide = t.g[blockIdx.y] % 16 ? 0 : n / 8 * 8;
    for (i64 i = 8 * global_thread(); i < wide; i += 8 * all_threads()) {
        float v[8], run = 0;
        ld8(g, i, v);
#pragma unroll
        for (int e = 0; e < 8; e++) run += v[e] * v[e];
        s += run;
    }
    for (i64 i = wide + global_thread(); i < n; i += all_threads()) {
        float v = ld(g, i);
        s += v * v;
    }
    s = block_sum(s);
    if (threadIdx.x == 0) part[blockIdx.y * gridDim.x + blockIdx.x] = s;
}
