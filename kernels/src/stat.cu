struct Part { double squares, sum; float top, low, high; u32 beyond, finite; };
KERNEL stat_part(const TA0* x, Part* parts, u32* buckets, i64 n) {
    __shared__ u32 mine[64];
    if (threadIdx.x < 64) mine[threadIdx.x] = 0;
    __syncthreads();
    double squares = 0, sum = 0;
    float top = 0, low = INF, high = -INF;
    int beyond = 0, finite = 0;
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        float v = ld(x, i), m = fabsf(v);
        int e = (int)(__float_as_uint(m) >> 23) - 127;
        e = e < -16 ? -16 : e > 15 ? 15 : e;
        int k = v != v ? 0 : e + 16;
        atomicAdd(mine + (v < 0.f ? 31 - k : 32 + k), 1u);
        beyond += m > 65504.f || v != v;
        if (m < INF) {
            finite++;
            squares += (double)v * v;
            sum += v;
            top = fmaxf(top, m);
            low = fminf(low, v);
            high = fmaxf(high, v);
        }
    }
    squares = block_sum(squares);
    sum = block_sum(sum);
    top = block_max(top);
    low = -block_max(-low);
    high = block_max(high);
    beyond = block_sum(beyond);
    finite = block_sum(finite);
    __syncthreads();
    if (threadIdx.x == 0) parts[blockIdx.x] = {squares, sum, top, low, high, (u32)beyond, (u32)finite};
    if (threadIdx.x < 64) atomicAdd(buckets + threadIdx.x, mine[threadIdx.x]);
}
KERNEL stat(const Part* parts, const u32* buckets, float* s, int n) {
    if (threadIdx.x < 64) s[6 + threadIdx.x] = buckets[threadIdx.x];
    if (threadIdx.x) return;
    double squares = 0, sum = 0;
    float top = 0, low = INF, high = -INF;
    u64 beyond = 0, finite = 0;
    for (int i = 0; i < n; i++) {
        Part p = parts[i];
        squares += p.squares;
        sum += p.sum;
        top = fmaxf(top, p.top);
        low = fminf(low, p.low);
        high = fmaxf(high, p.high);
        beyond += p.beyond;
        finite += p.finite;
    }
    double k = finite ? finite : 1;
    s[0] = (float)sqrt(squares / k);
    s[1] = top;
    s[2] = beyond;
    s[3] = finite ? low : 0.f;
    s[4] = finite ? high : 0.f;
    s[5] = (float)(sum / k);
}
