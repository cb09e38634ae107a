// One block a row of logits [V] (f32, already multiplied). Rows 0.. are tokens first.. of the batch.
KERNEL ce_rows(const float* logits, const int* targets, float* nll, float* lse, float* hit, int V) {
    i64 row = blockIdx.x;
    const float* x = logits + row * V;
    int target = targets[row];
    float top = -INF, sum = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) top = fmaxf(top, x[i]);
    top = block_max(top);
    float before = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        sum += expf(x[i] - top);
        before += x[i] == top && i < target;
    }
    sum = block_sum(sum);
    before = block_sum(before);
    if (threadIdx.x == 0) {
        float l = top + logf(sum);
        lse[row] = l;
        nll[row] = target < 0 ? 0.f : l - x[target];
        hit[row] = target >= 0 && x[target] == top && before == 0.f;
    }
}
// d = dloss scale multiplier (valid (softmax - onehot) + 2 z lse softmax [valid or all])
KERNEL ce_grad(const float* logits, const int* targets, const float* lse, const float* scale, const float* dloss, TA0* d, int V, float multiplier, float z, int all) {
    i64 row = blockIdx.x;
    int target = targets[row];
    float f = dloss[0] * scale[0] * multiplier, l = lse[row], valid = target >= 0, zs = target >= 0 || all ? 2.f * z * l : 0.f;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        float p = expf(logits[row * V + i] - l);
        st(d, row * V + i, f * ((valid + zs) * p - (i == target ? 1.f : 0.f)));
    }
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
