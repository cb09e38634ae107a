// part[chunk][cols]: sums of the columns over the rows of each chunk; then summed in order.
KERNEL col_part(const TA0* x, float* part, i64 rows, i64 cols) {
    i64 c = global_thread();
    if (c >= cols) return;
    i64 per = (rows + gridDim.y - 1) / gridDim.y, from = blockIdx.y * per, to = from + per < rows ? from + per : rows;
    float s = 0;
    for (i64 r = from; r < to; r++) s += ld(x, r * cols + c);
    part[blockIdx.y * cols + c] = s;
}
// Sums of columns over parts: a lane has a column, the warps of a block take parts in turn, and their sums are added in order. Block
// (x, y) adds `per` parts from part y per on, for row y of the result; columns from `split` on go to `more`.
KERNEL col_sum(const float* part, float* y, float* more, int parts, int per, i64 stride, i64 cols, i64 split) {
    __shared__ float sums[32][33];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int from = blockIdx.y * per, to = from + per < parts ? from + per : parts;
    i64 c = (i64)blockIdx.x * 32 + lane;
    float s = 0;
    if (c < cols)
#pragma unroll 8
        for (int k = from + warp; k < to; k += warps) s += part[k * stride + c];
    sums[warp][lane] = s;
    __syncthreads();
    if (warp || c >= cols) return;
    for (int i = 1; i < warps; i++) s += sums[i][lane];
    if (c < split) y[blockIdx.y * cols + c] = s;
    else more[c - split] = s;
}
KERNEL row_sum(const TA0* x, float* y, i64 len) {
    float s = 0;
    for (i64 i = threadIdx.x; i < len; i += blockDim.x) s += ld(x, blockIdx.x * len + i);
    s = block_sum(s);
    if (threadIdx.x == 0) y[blockIdx.x] = s;
}
KERNEL all_part(const TA0* x, double* part, i64 n, int square) {
    double s = 0;
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        float v = ld(x, i);
        s += square ? (double)v * v : v;
    }
    s = block_sum(s);
    if (threadIdx.x == 0) part[blockIdx.x] = s;
}
// y = sum / over, or its root.
KERNEL all_sum(const double* part, float* y, int n, double over, int root) {
    double s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += part[i];
    s = block_sum(s) / over;
    if (threadIdx.x == 0) y[0] = (float)(root ? sqrt(s) : s);
}
// As accumulate; n is a multiple of 8, both addresses of 16 bytes.
KERNEL accumulate8(float* into, const float* beta, const TA2* x, i64 n) {
    float b = beta[0];
    for (i64 i = 8 * global_thread(); i < n; i += 8 * all_threads()) {
        float v[8] = {0, 0, 0, 0, 0, 0, 0, 0}, y[8];
        if (x) ld8(x, i, v);
        if (b != 0.f) {
            ld8(into, i, y);
#pragma unroll
            for (int k = 0; k < 8; k++) v[k] += b * y[k];
        }
        st8(into, i, v);
    }
}
// into = beta into + x; a beta of 0 never reads.
KERNEL accumulate(float* into, const float* beta, const TA2* x, i64 n) {
    float b = beta[0];
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        float v = x ? ld(x, i) : 0.f;
        into[i] = b == 0.f ? v : b * into[i] + v;
    }
}
// The same for many at once: block (x, y) works on sum y.
#define TABLE 64
struct Sums { u64 into[TABLE]; u64 x[TABLE]; i64 n[TABLE]; };
KERNEL accumulate_all(const __grid_constant__ Sums t, const float* beta) {
    float* into = (float*)t.into[blockIdx.y];
    const float* x = (const float*)t.x[blockIdx.y];
    float b = beta[0];
    for (i64 i = global_thread(); i < t.n[blockIdx.y]; i += all_threads()) into[i] = b == 0.f ? x[i] : b * into[i] + x[i];
}
