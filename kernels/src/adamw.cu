// A launch takes a table of tensors by value; grid (blocks, tensors).
#define TABLE 40
struct Tensors { u64 p[TABLE]; u64 g[TABLE]; u64 m[TABLE]; u64 v[TABLE]; i64 n[TABLE]; float decay[TABLE]; float lr[TABLE]; };
struct Grads { u64 g[TABLE]; i64 n[TABLE]; };
KERNEL adamw(const __grid_constant__ Tensors t, const float* lr, const float* step, const float* norm, double b1, double b2, float eps, float clip) {
    int k = blockIdx.y;
    TA0* p = (TA0*)t.p[k];
    const float* g = (const float*)t.g[k];
    float *m = (float*)t.m[k], *v = (float*)t.v[k];
    float rate = lr[0] * t.lr[k], decay = t.decay[k], c1 = (float)(1. - pow(b1, (double)step[0])), c2 = (float)(1. - pow(b2, (double)step[0]));
    float f1 = (float)b1, f2 = (float)b2, o1 = (float)(1. - b1), o2 = (float)(1. - b2);
    float f = clip > 0.f ? fminf(1.f, clip / norm[0]) : 1.f;
    for (i64 i = global_thread(); i < t.n[k]; i += all_threads()) {
        float gv = g[i] * f, mv = f1 * m[i] + o1 * gv, vv = f2 * v[i] + o2 * gv * gv, pv = ld(p, i);
        m[i] = mv;
        v[i] = vv;
        st(p, i, pv - rate * (mv / c1 / (sqrtf(vv / c2) + eps) + decay * pv));
    }
}
KERNEL square_parts(const __grid_constant__ Grads t, double* part) {
    const TA0* g = (const TA0*)t.g[blockIdx.y];
    double s = 0;
    float run = 0;
    int in = 0;
    for (i64 i = global_thread(); i < t.n[blockIdx.y]; i += all_threads()) {
        float v = ld(g, i);
        run += v * v;
        if (++in == 16) {
            s += run;
            run = 0;
            in = 0;
        }
    }
    s = block_sum(s + run);
    if (threadIdx.x == 0) part[blockIdx.y * gridDim.x + blockIdx.x] = s;
}
