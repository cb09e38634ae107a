// One block a row of logits [V] (already multiplied) of type TL. Rows 0.. are tokens first.. of the batch. A thread takes 8 neighbours at a
// time, in words of 16 bytes where all rows allow it (`whole`).
#ifndef TL
#define TL float
#endif
#define EACH 8
// Rounded as far as the type of the logits asks for.
__device__ __forceinline__ float power(float x) { return sizeof(TL) == 4 ? expf(x) : __expf(x); }
__device__ __forceinline__ void take(const float* p, int i, int V, int whole, float (&x)[EACH]) {
    if (whole) {
        float4 a = *(const float4*)(p + i), b = *(const float4*)(p + i + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = i + k < V ? p[i + k] : -INF;
    }
}
__device__ __forceinline__ void take(const bf16* p, int i, int V, int whole, float (&x)[EACH]) {
    if (whole) {
        uint4 a = *(const uint4*)(p + i);
        u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            x[2 * k] = __uint_as_float(w[k] << 16);
            x[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = i + k < V ? widen(p[i + k]) : -INF;
    }
}
template <class T> __device__ __forceinline__ void give(T* p, int i, int V, int whole, const float (&x)[EACH]) {
#pragma unroll
    for (int k = 0; k < EACH; k++) if (i + k < V) st(p, i + k, x[k]);
}
__device__ __forceinline__ void give(bf16* p, int i, int V, int whole, const float (&x)[EACH]) {
    if (whole) *(uint4*)(p + i) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    else {
#pragma unroll
        for (int k = 0; k < EACH; k++) if (i + k < V) st(p, i + k, x[k]);
    }
}
// Log-sum-exp of the row and what follows from it, in one sweep; every thread gets the log-sum-exp.
__device__ float row_of(const TL* x, int target, i64 row, float* nll, float* lse, float* hit, int V, int whole) {
    __shared__ float tops[32], sums[32], result;
    __shared__ int firsts[32];
    float top = -INF, sum = 0;
    int first = 0x7fffffff;
    for (int i = threadIdx.x * EACH; i < V; i += blockDim.x * EACH) {
        float v[EACH], most = -INF;
        take(x, i, V, whole, v);
#pragma unroll
        for (int k = 0; k < EACH; k++) most = fmaxf(most, v[k]);
        if (most > top) {
            sum *= expf(top - most);
            top = most;
#pragma unroll
            for (int k = EACH - 1; k >= 0; k--) first = v[k] == most ? i + k : first;
        }
        if (top > -INF) {
#pragma unroll
            for (int k = 0; k < EACH; k++) sum += power(v[k] - top);
        }
    }
    // Largest first; of equals the one that stands first.
    auto join = [&](float t, float s, int f) {
        float m = fmaxf(top, t);
        if (m > -INF) sum = sum * expf(top - m) + s * expf(t - m);
        first = t > top ? f : t == top ? min(first, f) : first;
        top = m;
    };
    for (int m = 16; m; m >>= 1) {
        float t = __shfl_xor_sync(FULL, top, m), s = __shfl_xor_sync(FULL, sum, m);
        int f = __shfl_xor_sync(FULL, first, m);
        join(t, s, f);
    }
    if ((threadIdx.x & 31) == 0) {
        tops[threadIdx.x >> 5] = top;
        sums[threadIdx.x >> 5] = sum;
        firsts[threadIdx.x >> 5] = first;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x >> 5; w++) join(tops[w], sums[w], firsts[w]);
        float l = top + logf(sum);
        lse[row] = l;
        nll[row] = target < 0 ? 0.f : l - widen(x[target]);
        hit[row] = target >= 0 && first == target;
        result = l;
    }
    __syncthreads();
    return result;
}
// d = dloss scale multiplier (valid (softmax - onehot) + 2 z lse softmax [valid or all]); d may be where the logits are.
__device__ void gradient(const TL* x, int target, float l, TA0* d, float f, int V, float z, int all, int whole) {
    float valid = target >= 0, zs = target >= 0 || all ? 2.f * z * l : 0.f, g = f * (valid + zs);
    for (int i = threadIdx.x * EACH; i < V; i += blockDim.x * EACH) {
        float v[EACH];
        take(x, i, V, whole, v);
#pragma unroll
        for (int k = 0; k < EACH; k++) v[k] = g * power(v[k] - l) - (i + k == target ? f : 0.f);
        give(d, i, V, whole, v);
    }
}
KERNEL ce_rows(const TL* logits, const int* targets, float* nll, float* lse, float* hit, int V, int whole) {
    i64 row = blockIdx.x;
    row_of(logits + row * V, targets[row], row, nll, lse, hit, V, whole);
}
KERNEL ce_grad(const TL* logits, const int* targets, const float* lse, const float* scale, const float* dloss, TA0* d, int V, float multiplier, float z, int all, int whole) {
    i64 row = blockIdx.x;
    gradient(logits + row * V, targets[row], lse[row], d + row * V, dloss[0] * scale[0] * multiplier, V, z, all, whole);
}
// Both: the second sweep finds the row in the cache.
KERNEL ce_both(const TL* logits, const int* targets, float* nll, float* lse, float* hit, const float* scale, const float* dloss, TA0* d, int V, float multiplier, float z, int all, int whole) {
    i64 row = blockIdx.x;
    int target = targets[row];
    float l = row_of(logits + row * V, target, row, nll, lse, hit, V, whole);
    gradient(logits + row * V, target, l, d + row * V, dloss[0] * scale[0] * multiplier, V, z, all, whole);
}
KERNEL ce_loss(const float* nll, const float* lse, const int* targets, const float* scale, float* loss, int rows, float z, int all) {
    double s = 0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        s += nll[i];
        if (z != 0.f && (targets[i] >= 0 || all)) s += (double)z * lse[i] * lse[i];
    }
    s = block_sum(s);
    if (threadIdx.x == 0) loss[0] = (float)(s * scale[0]);
}
