#ifndef STATES
#define STATES 16
#endif
// One thread a channel, its STATES states in registers. Blocks lie within a group: grid (ceil(I/G/blockDim), G, B).
KERNEL scan_fwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, float* state, TR0* y, float* saved, int T, int I, int G, int chunk) {
    int per = I / G, at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= per) return;
    int g = blockIdx.y, i = g * per + at;
    i64 bi = blockIdx.z;
    int chunks = (T + chunk - 1) / chunk;
    float h[STATES], av[STATES];
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        h[n] = state ? state[(bi * I + i) * STATES + n] : 0.f;
        av[n] = ld(a, (i64)i * STATES + n);
    }
    float skip = d ? ld(d, i) : 0.f, bias = dt_bias ? ld(dt_bias, i) : 0.f;
    for (int t = 0; t < T; t++) {
        i64 row = bi * T + t, e = row * I + i, m = (row * G + g) * STATES;
        if (saved && t % chunk == 0)
#pragma unroll
            for (int n = 0; n < STATES; n++) saved[((bi * chunks + t / chunk) * I + i) * STATES + n] = h[n];
        bool reset = pos && pos[row] == 0;
        float xv = ld(x, e), dv = softplus(ld(dt, e) + bias), s = skip * xv;
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            h[n] = (reset ? 0.f : expf(dv * av[n]) * h[n]) + dv * ld(b, m + n) * xv;
            s += ld(c, m + n) * h[n];
        }
        st(y, e, z ? s * silu(ld(z, e)) : s);
    }
    if (state)
#pragma unroll
        for (int n = 0; n < STATES; n++) state[(bi * I + i) * STATES + n] = h[n];
}

// Chunks in reverse; the states of a chunk are recomputed into hist[chunk][STATES][B I]. db and dc are summed over the channels of a warp, then
// by atomic adds. part[B][I (STATES + 2)]: da, dd, ddt_bias.
KERNEL scan_bwd(const TA0* x, const TA1* dt, const TA2* a, const TA3* b, const TA4* c, const TA5* d, const TA6* dt_bias, const TA7* z, const int* pos, const float* saved, const TA10* dy, TR0* dx, TR1* ddt, float* db, float* dc, TA7* dz, float* hist, float* part, int T, int I, int G, int chunk) {
    int per = I / G, at = blockIdx.x * blockDim.x + threadIdx.x;
    bool on = at < per;
    int g = blockIdx.y, i = g * per + (on ? at : 0);
    i64 bi = blockIdx.z, plane = (i64)gridDim.z * I, own = bi * I + i;
    int chunks = (T + chunk - 1) / chunk;
    float av[STATES], dh[STATES], da[STATES];
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        av[n] = ld(a, (i64)i * STATES + n);
        dh[n] = 0;
        da[n] = 0;
    }
    float skip = d ? ld(d, i) : 0.f, bias = dt_bias ? ld(dt_bias, i) : 0.f, dd = 0, dbias = 0;
    for (int k = chunks - 1; k >= 0; k--) {
        int from = k * chunk, to = from + chunk < T ? from + chunk : T;
        const float* first = saved + ((bi * chunks + k) * I + i) * STATES;
        if (on) {
            float h[STATES];
#pragma unroll
            for (int n = 0; n < STATES; n++) h[n] = first[n];
            for (int t = from; t < to; t++) {
                i64 row = bi * T + t, e = row * I + i, m = (row * G + g) * STATES;
                bool reset = pos && pos[row] == 0;
                float xv = ld(x, e), dv = softplus(ld(dt, e) + bias);
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    h[n] = (reset ? 0.f : expf(dv * av[n]) * h[n]) + dv * ld(b, m + n) * xv;
                    hist[((i64)(t - from) * STATES + n) * plane + own] = h[n];
                }
            }
        }
        for (int t = to - 1; t >= from; t--) {
            i64 row = bi * T + t, e = row * I + i, m = (row * G + g) * STATES;
            bool reset = pos && pos[row] == 0;
            float xv = ld(x, e), raw = ld(dt, e) + bias, dv = softplus(raw), g0 = on ? ld(dy, e) : 0.f;
            float zv = z ? ld(z, e) : 0.f, gy = z ? g0 * silu(zv) : g0, s = skip * xv, ddv = 0, dxv = skip * gy;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                float h = on ? hist[((i64)(t - from) * STATES + n) * plane + own] : 0.f;
                float hp = !on || reset ? 0.f : (t == from ? first[n] : hist[((i64)(t - from - 1) * STATES + n) * plane + own]);
                float bv = ld(b, m + n), cv = ld(c, m + n), ev = reset ? 0.f : expf(dv * av[n]);
                s += cv * h;
                dh[n] += cv * gy;
                float dcn = warp_sum(gy * h), dbn = warp_sum(on ? dh[n] * dv * xv : 0.f);
                if ((threadIdx.x & 31) == 0) {
                    atomicAdd(dc + m + n, dcn);
                    atomicAdd(db + m + n, dbn);
                }
                ddv += dh[n] * (av[n] * ev * hp + bv * xv);
                da[n] += dh[n] * dv * ev * hp;
                dxv += dh[n] * dv * bv;
                dh[n] *= ev;
            }
            dd += gy * xv;
            float draw = ddv * sigmoid(raw);
            dbias += draw;
            if (on) {
                st(dx, e, dxv);
                st(ddt, e, draw);
                if (dz) st(dz, e, g0 * s * dsilu(zv));
            }
        }
    }
    if (on) {
        float* p = part + bi * I * (STATES + 2);
#pragma unroll
        for (int n = 0; n < STATES; n++) p[(i64)i * STATES + n] = da[n];
        p[(i64)I * STATES + i] = dd;
        p[(i64)I * (STATES + 1) + i] = dbias;
    }
}
