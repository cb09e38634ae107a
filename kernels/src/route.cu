// One thread a token. score: 0 softmax over all, 1 softmax over the chosen, 2 sigmoid.
__device__ __forceinline__ void norms(const float* x, int E, float& top, float& sum) {
    top = -INF;
    for (int e = 0; e < E; e++) top = fmaxf(top, x[e]);
    sum = 0;
    for (int e = 0; e < E; e++) sum += expf(x[e] - top);
}
__device__ __forceinline__ float score_of(int score, float x, float top, float sum) { return score == 2 ? sigmoid(x) : expf(x - top) / sum; }

KERNEL route(const float* logits, const float* bias, float* weights, int* experts, int rows, int E, int K, int score, int normalize, int groups, int top_groups, float scale) {
    int row = global_thread();
    if (row >= rows) return;
    const float* x = logits + (i64)row * E;
    float *w = weights + (i64)row * K, top, sum;
    int *chosen = experts + (i64)row * K, size = E / groups;
    norms(x, E, top, sum);
    // Bits of the groups that may be chosen from.
    u64 open[4] = {~0ull, ~0ull, ~0ull, ~0ull};
    if (top_groups < groups) {
        for (int i = 0; i < 4; i++) open[i] = 0;
        for (int k = 0; k < top_groups; k++) {
            int best = -1;
            float most = 0;
            for (int g = 0; g < groups; g++) {
                if (open[g >> 6] >> (g & 63) & 1) continue;
                float a = -INF, b = -INF;
                for (int e = g * size; e < (g + 1) * size; e++) {
                    float s = score_of(score, x[e], top, sum) + (bias ? bias[e] : 0.f);
                    if (s > a) { b = a; a = s; } else if (s > b) b = s;
                }
                float s = size > 1 ? a + b : a;
                if (best < 0 || s > most) { best = g; most = s; }
            }
            open[best >> 6] |= 1ull << (best & 63);
        }
    }
    for (int k = 0; k < K; k++) {
        int best = -1;
        float most = 0;
        for (int e = 0; e < E; e++) {
            int g = e / size;
            if (!(open[g >> 6] >> (g & 63) & 1)) continue;
            bool taken = false;
            for (int j = 0; j < k; j++) taken |= chosen[j] == e;
            if (taken) continue;
            float s = score_of(score, x[e], top, sum) + (bias ? bias[e] : 0.f);
            if (best < 0 || s > most) { best = e; most = s; }
        }
        chosen[k] = best;
    }
    float ctop = -INF, total = 0;
    for (int k = 0; k < K; k++) ctop = fmaxf(ctop, x[chosen[k]]);
    for (int k = 0; k < K; k++) {
        w[k] = score == 1 ? expf(x[chosen[k]] - ctop) : score_of(score, x[chosen[k]], top, sum);
        total += w[k];
    }
    if (score == 1) {
        for (int k = 0; k < K; k++) w[k] /= total;
        total = 1;
    }
    float f = normalize ? scale / (total + (score == 2 ? 1e-20f : 0.f)) : scale;
    for (int k = 0; k < K; k++) w[k] *= f;
}

KERNEL route_bwd(const float* logits, const int* experts, const float* dweights, float* dlogits, int rows, int E, int K, int score, int normalize, float scale) {
    int row = global_thread();
    if (row >= rows) return;
    const float *x = logits + (i64)row * E, *dw = dweights + (i64)row * K;
    const int* chosen = experts + (i64)row * K;
    float *dx = dlogits + (i64)row * E, top, sum, ctop = -INF, csum = 0;
    norms(x, E, top, sum);
    for (int k = 0; k < K; k++) ctop = fmaxf(ctop, x[chosen[k]]);
    for (int k = 0; k < K; k++) csum += expf(x[chosen[k]] - ctop);
    auto u = [&](int k) { return score == 1 ? expf(x[chosen[k]] - ctop) / csum : score_of(score, x[chosen[k]], top, sum); };
    float total = 0, mean = 0;
    for (int k = 0; k < K; k++) total += u(k);
    total += score == 2 ? 1e-20f : 0.f;
    for (int k = 0; k < K; k++) mean += u(k) * dw[k];
    mean /= total;
    auto du = [&](int k) { return normalize ? scale * (dw[k] - mean) / total : scale * dw[k]; };
    float inner = 0;
    for (int k = 0; k < K; k++) inner += u(k) * du(k);
    for (int e = 0; e < E; e++) dx[e] = score == 0 ? -score_of(0, x[e], top, sum) * inner : 0.f;
    for (int k = 0; k < K; k++) {
        int e = chosen[k];
        if (score == 0) dx[e] += u(k) * du(k);
        else if (score == 1) dx[e] = u(k) * (du(k) - inner);
        else dx[e] = du(k) * u(k) * (1.f - u(k));
    }
}

// share[e]: share of the choices that are e. One block an expert.
KERNEL shares(const int* experts, float* share, int n) {
    float c = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) c += experts[i] == blockIdx.x;
    c = block_sum(c);
    if (threadIdx.x == 0) share[blockIdx.x] = c / n;
}
KERNEL balance_rows(const float* logits, const float* share, float* part, int rows, int E) {
    int row = global_thread();
    if (row >= rows) return;
    const float* x = logits + (i64)row * E;
    float top, sum, s = 0;
    norms(x, E, top, sum);
    for (int e = 0; e < E; e++) s += expf(x[e] - top) / sum * share[e];
    part[row] = s;
}
KERNEL balance(const float* part, float* loss, int rows, int E) {
    double s = 0;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) s += part[i];
    s = block_sum(s);
    if (threadIdx.x == 0) loss[0] = (float)(s * E / rows);
}
KERNEL balance_bwd(const float* logits, const float* share, const float* part, const float* dloss, float* dlogits, int rows, int E) {
    int row = global_thread();
    if (row >= rows) return;
    const float* x = logits + (i64)row * E;
    float top, sum, c = dloss[0] * E / rows;
    norms(x, E, top, sum);
    for (int e = 0; e < E; e++) dlogits[(i64)row * E + e] = c * expf(x[e] - top) / sum * (share[e] - part[row]);
}
