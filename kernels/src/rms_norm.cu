// gate: 0 none, 1 before, 2 after. A row is one group of `group` elements; `wlen` is the length of w (0: none).
KERNEL rms_norm(const TA0* x, const TA1* w, const TA2* z, TR0* y, float* rstd, int group, int wlen, float eps, int zero_centered, int gate) {
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

KERNEL rms_norm_dx(const TA0* x, const TA1* w, const TA2* z, const float* rstd, const TA4* dy, TR0* dx, TA2* dz, int group, int wlen, int zero_centered, int gate) {
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
        st(dx, base + i, dv);
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

// The same with 8 elements a thread at a time: group and wlen are multiples of 8, all addresses of 16 bytes.
KERNEL rms_norm8(const TA0* x, const TA1* w, const TA2* z, TR0* y, float* rstd, int group, int wlen, float eps, int zero_centered, int gate) {
    i64 base = (i64)blockIdx.x * group;
    float s = 0, xv[8], zv[8], wv[8];
    for (int i = 8 * threadIdx.x; i < group; i += 8 * blockDim.x) {
        ld8(x, base + i, xv);
        if (gate) ld8(z, base + i, zv);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (gate) zv[k] = silu(zv[k]);
            if (gate == 1) xv[k] *= zv[k];
            s += xv[k] * xv[k];
        }
    }
    s = block_sum(s);
    float r = 1.f / sqrtf(s / group + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    i64 wbase = wlen ? base % wlen : 0;
    // What was loaded last is still there: with as many threads as vectors, everything is read once.
    bool once = group <= 8 * blockDim.x;
    for (int i = 8 * threadIdx.x; i < group; i += 8 * blockDim.x) {
        if (!once) {
            ld8(x, base + i, xv);
            if (gate) ld8(z, base + i, zv);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                if (gate) zv[k] = silu(zv[k]);
                if (gate == 1) xv[k] *= zv[k];
            }
        }
        if (wlen) ld8(w, wbase + i, wv);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            xv[k] *= r;
            if (wlen) xv[k] *= wv[k] + zero_centered;
            if (gate == 2) xv[k] *= zv[k];
        }
        st8(y, base + i, xv);
    }
}

KERNEL rms_norm_dx8(const TA0* x, const TA1* w, const TA2* z, const float* rstd, const TA4* dy, TR0* dx, TA2* dz, int group, int wlen, int zero_centered, int gate) {
    i64 base = (i64)blockIdx.x * group;
    i64 wbase = wlen ? base % wlen : 0;
    float r = rstd[blockIdx.x], s = 0, xv[8], zv[8], gv[8], wv[8];
    for (int i = 8 * threadIdx.x; i < group; i += 8 * blockDim.x) {
        ld8(x, base + i, xv);
        ld8(dy, base + i, gv);
        if (gate) ld8(z, base + i, zv);
        if (wlen) ld8(w, wbase + i, wv);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float v = xv[k], g = gv[k];
            if (gate == 1) v *= silu(zv[k]);
            if (wlen) g *= wv[k] + zero_centered;
            if (gate == 2) g *= silu(zv[k]);
            s += g * v * r;
        }
    }
    s = block_sum(s) / group;
    bool once = group <= 8 * blockDim.x;
    for (int i = 8 * threadIdx.x; i < group; i += 8 * blockDim.x) {
        if (!once) {
            ld8(x, base + i, xv);
            ld8(dy, base + i, gv);
            if (gate) ld8(z, base + i, zv);
            if (wlen) ld8(w, wbase + i, wv);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float x0 = xv[k], v = x0, g = gv[k], zk = gate ? zv[k] : 0.f;
            if (gate == 1) v *= silu(zk);
            if (wlen) g *= wv[k] + zero_centered;
            float n = v * r;
            if (gate == 2) {
                zv[k] = g * n * dsilu(zk);
                g *= silu(zk);
            }
            float dv = r * (g - n * s);
            if (gate == 1) {
                zv[k] = dv * x0 * dsilu(zk);
                dv *= silu(zk);
            }
            xv[k] = dv;
        }
        if (gate) st8(dz, base + i, zv);
        st8(dx, base + i, xv);
    }
}

KERNEL rms_norm_dw8(const TA0* x, const TA2* z, const float* rstd, const TA4* dy, float* part, int group, int wlen, i64 rows, int gate) {
    int c = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (c >= wlen) return;
    i64 per = (rows + gridDim.y - 1) / gridDim.y, from = blockIdx.y * per, to = from + per < rows ? from + per : rows;
    int groups = wlen / group, mine = c / group;
    float s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (i64 row = from; row < to; row++) {
        float xv[8], gv[8], zv[8], r = rstd[row * groups + mine];
        ld8(x, row * wlen + c, xv);
        ld8(dy, row * wlen + c, gv);
        if (gate) ld8(z, row * wlen + c, zv);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float v = xv[k] * r * gv[k];
            if (gate) v *= silu(zv[k]);
            s[k] += v;
        }
    }
    st8(part, (i64)blockIdx.y * wlen + c, s);
}
