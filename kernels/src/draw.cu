// Tokens in order of falling keys, equal ones in order of their numbers; see `ir/src/op/draw.rs`. Weights are integers, so sums of them are
// the same in any order.
#ifndef WEIGHT_BITS
#define WEIGHT_BITS 36
#endif
#define BINS 2048
// The larger a logit the larger its key; both zeros have one, NaN the smallest.
__device__ __forceinline__ u32 key_of(float l) {
    u32 b = __float_as_uint(l + 0.f);
    return l != l ? 0u : b & 0x80000000u ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float logit_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
__device__ __forceinline__ u64 weight_of(u32 key, u32 top, double temperature) {
    if (!key) return 0;
    if (key >= top) return 1ull << WEIGHT_BITS;
    double d = ((double)logit_of(key) - (double)logit_of(top)) / temperature;
    // Half of the smallest weight is exp(-25.6).
    return d < -30. ? 0 : __double2ull_rn(exp(d) * (double)(1ull << WEIGHT_BITS));
}
__device__ __forceinline__ u64 warp_most(u64 v) {
    for (int m = 16; m; m >>= 1) v = max(v, __shfl_xor_sync(FULL, v, m));
    return v;
}
// The largest over a block; every thread gets it.
__device__ u64 block_most(u64 v) {
    __shared__ u64 part[32];
    v = warp_most(v);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = (threadIdx.x & 31) < (blockDim.x >> 5) ? part[threadIdx.x & 31] : 0;
    return warp_most(v);
}
// Key and number of the first token of each part of a row, as one word of which the largest is the first.
KERNEL draw_first(const float* logits, u64* part, int V, int each) {
    early();
    i64 row = blockIdx.y;
    int from = blockIdx.x * each, to = min(V, from + each);
    u64 best = 0;
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) best = max(best, (u64)key_of(logits[row * V + i]) << 32 | (u32)~i);
    best = block_most(best);
    if (threadIdx.x == 0) part[row * gridDim.x + blockIdx.x] = best;
}
struct Found {
    // The token's key, how many of its equals come before it, and what all tokens before it weigh and count.
    u32 key;
    int equals;
    u64 weight, count;
};
// Exclusive sums over the threads of a block.
__device__ void block_before(u64& a, u64& b, u64* sums) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 x = a, y = b;
    for (int m = 1; m < 32; m <<= 1) {
        u64 p = __shfl_up_sync(FULL, x, m), q = __shfl_up_sync(FULL, y, m);
        if (lane >= m) x += p, y += q;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = x, sums[32 + warp] = y;
    __syncthreads();
    a = x - a, b = y - b;
    for (int w = 0; w < warp; w++) a += sums[w], b += sums[32 + w];
}
// Weights and numbers of the tokens whose key begins with `prefix`, by their next bits: BINS of them above `shift`.
__device__ void tally(const float* l, int V, u64* weights, u32* counts, u32 prefix, int known, int shift, u32 top, double temperature) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) weights[i] = 0, counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        u32 key = key_of(l[i]);
        if (known && (key ^ prefix) >> (32 - known)) continue;
        u32 bin = key >> shift & (BINS - 1);
        u64 w = weight_of(key, top, temperature);
        atomicAdd(counts + bin, 1u);
        if (w) atomicAdd((unsigned long long*)weights + bin, (unsigned long long)w);
    }
    __syncthreads();
}
// The first token with which the running weight, or the running number, exceeds `x`: there is one. Bits of its key are found 11, 11 and 10 at
// a time. `first` holds the tally of the first 11.
__device__ Found find(const float* l, int V, bool by_weight, u64 x, const u64* first_weights, const u32* first_counts, u64* weights, u32* counts, u64* sums, u32 top, double temperature) {
    __shared__ Found found;
    __shared__ u32 at;
    Found f = {0, 0, 0, 0};
    const int each = BINS / 1024;
    for (int level = 0; level < 3; level++) {
        int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level == 2 ? 1024 : BINS;
        const u64* ws = first_weights;
        const u32* cs = first_counts;
        if (level) {
            // The last level's bins are the lower half: the bit above them is known.
            tally(l, V, weights, counts, f.key, level * 11, shift, top, temperature);
            ws = weights, cs = counts;
            if (level == 2 && (f.key >> 10 & 1)) ws += 1024, cs += 1024;
        }
        // Falling: thread 0 has the largest bins.
        u64 w = 0, c = 0;
        for (int i = 0; i < each; i++) {
            int bin = bins - 1 - (threadIdx.x * each + i);
            if (bin >= 0) w += ws[bin], c += cs[bin];
        }
        block_before(w, c, sums);
        w += f.weight, c += f.count;
        for (int i = 0; i < each; i++) {
            int bin = bins - 1 - (threadIdx.x * each + i);
            if (bin < 0) break;
            u64 past = by_weight ? w : c, own = by_weight ? ws[bin] : (u64)cs[bin];
            if (past <= x && past + own > x) {
                found.weight = w, found.count = c;
                at = bin;
            }
            w += ws[bin], c += cs[bin];
        }
        __syncthreads();
        f.weight = found.weight, f.count = found.count;
        f.key |= at << shift;
        __syncthreads();
    }
    u64 own = weight_of(f.key, top, temperature);
    u64 equals = by_weight ? (x - f.weight) / own : x - f.count;
    f.equals = (int)equals;
    f.weight += equals * own, f.count += equals;
    return f;
}
// Number of the token with this key that has so many equals before it.
__device__ int number_of(const float* l, int V, u32 key, int equals, u64* sums) {
    __shared__ int token;
    int each = (V + blockDim.x - 1) / blockDim.x, from = threadIdx.x * each, to = min(V, from + each);
    u64 mine = 0, none = 0;
    for (int i = from; i < to; i++) mine += key_of(l[i]) == key;
    u64 have = mine;
    block_before(mine, none, sums);
    if (mine <= equals && equals < mine + have) {
        int left = equals - (int)mine;
        for (int i = from; i < to; i++)
            if (key_of(l[i]) == key && left-- == 0) token = i;
    }
    __syncthreads();
    return token;
}
// One block of 1024 threads a row.
extern "C" __global__ void __launch_bounds__(1024) draw_token(const float* logits, const u64* part, const float* settings, const int* bits, int* token, int V, int parts) {
    early();
    extern __shared__ u64 room[];
    u64 *first_weights = room, *weights = first_weights + BINS, *sums = weights + BINS;
    u32 *first_counts = (u32*)(sums + 64), *counts = first_counts + BINS;
    i64 row = blockIdx.x;
    const float* l = logits + row * V;
    u64 best = 0;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) best = max(best, part[row * parts + i]);
    best = block_most(best);
    double temperature = settings[0];
    u32 top = best >> 32;
    // Without a number among them all weigh nothing.
    if (!(temperature > 0) || !top) {
        if (threadIdx.x == 0) token[row] = (int)~(u32)best;
        return;
    }
    tally(l, V, first_weights, first_counts, 0, 0, 21, top, temperature);
    u64 all = 0, none = 0;
    float k = settings[1];
    if (k >= 1 && k < V) {
        Found last = find(l, V, false, (u64)k - 1, first_weights, first_counts, weights, counts, sums, top, temperature);
        all = last.weight + weight_of(last.key, top, temperature);
    } else {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) all += first_weights[i];
        u64 own = all;
        block_before(all, none, sums);
        __shared__ u64 total;
        if (threadIdx.x == blockDim.x - 1) total = all + own;
        __syncthreads();
        all = total;
    }
    double reach = ceil((double)settings[2] * (double)all);
    u64 wanted = reach >= (double)all ? all : reach > 1 ? (u64)reach : 1;
    u64 kept = all;
    if (wanted < all) {
        Found last = find(l, V, true, wanted - 1, first_weights, first_counts, weights, counts, sums, top, temperature);
        kept = last.weight + weight_of(last.key, top, temperature);
    }
    u64 r = (u64)(u32)bits[2 * row + 1] << 32 | (u32)bits[2 * row];
    Found f = find(l, V, true, __umul64hi(r, kept), first_weights, first_counts, weights, counts, sums, top, temperature);
    int drawn = number_of(l, V, f.key, f.equals, sums);
    if (threadIdx.x == 0) token[row] = drawn;
}
