#ifndef K
#define K 4
#endif
__device__ __forceinline__ float tap(const TA0* x, const TA4* state, i64 b, int t, int j, int c, int T, int I) {
    int s = t - j;
    if (s >= 0) return ld(x, (b * T + s) * I + c);
    return state ? ld(state, (b * (K - 1) + K - 1 + s) * I + c) : 0.f;
}
__device__ __forceinline__ float preact(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* state, i64 b, int t, int c, int T, int I) {
    int reach = pos ? pos[b * T + t] : K;
    float s = bias ? ld(bias, c) : 0.f;
#pragma unroll
    for (int j = 0; j < K; j++)
        if (j <= reach) s += ld(w, (i64)c * K + K - 1 - j) * tap(x, state, b, t, j, c, T, I);
    return s;
}
KERNEL conv(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* state, TR0* y, i64 n, int T, int I, int act) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        int c = e % I;
        i64 row = e / I;
        float s = preact(x, w, bias, pos, state, row / T, (int)(row % T), c, T, I);
        st(y, e, act ? silu(s) : s);
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
KERNEL conv_dpre(const TA0* x, const TA1* w, const TA2* bias, const int* pos, const TA4* dy, float* dpre, i64 n, int T, int I, int act) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = e / I;
        float d = ld(dy, e);
        if (act) d *= dsilu(preact(x, w, bias, pos, (const TA4*)0, row / T, (int)(row % T), (int)(e % I), T, I));
        dpre[e] = d;
    }
}
KERNEL conv_dx(const TA1* w, const int* pos, const float* dpre, TR0* dx, i64 n, int T, int I) {
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        int c = e % I;
        i64 row = e / I;
        int t = row % T;
        float s = 0;
#pragma unroll
        for (int j = 0; j < K; j++)
            if (t + j < T && (!pos || j <= pos[row + j])) s += ld(w, (i64)c * K + K - 1 - j) * dpre[e + (i64)j * I];
        st(dx, e, s);
    }
}
// part[chunk][I*K + I]: dw, then db.
KERNEL conv_dw(const TA0* x, const int* pos, const float* dpre, float* part, i64 rows, int T, int I) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= I) return;
    i64 per = (rows + gridDim.y - 1) / gridDim.y, from = blockIdx.y * per, to = from + per < rows ? from + per : rows;
    float s[K], b = 0;
#pragma unroll
    for (int j = 0; j < K; j++) s[j] = 0;
    for (i64 row = from; row < to; row++) {
        float d = dpre[row * I + c];
        int t = row % T, reach = pos ? pos[row] : K;
        b += d;
#pragma unroll
        for (int j = 0; j < K; j++)
            if (j <= reach && t - j >= 0) s[j] += d * ld(x, (row - j) * I + c);
    }
    float* p = part + (i64)blockIdx.y * I * (K + 1);
#pragma unroll
    for (int j = 0; j < K; j++) p[(i64)c * K + K - 1 - j] = s[j];
    p[(i64)I * K + c] = b;
}
