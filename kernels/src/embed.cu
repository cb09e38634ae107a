KERNEL embed(const int* tokens, const TA1* table, TR0* y, i64 n, int D) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(table, (i64)tokens[e / D] * D + e % D));
}
// Rows of W vectors of 8, n of them in all; all addresses are of 16 bytes.
KERNEL embed8(const int* tokens, const TA1* table, TR0* y, i64 n, int W) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = n < 0x7fffffff ? (int)e / W : e / W;
        float v[8];
        ld8(table, ((i64)tokens[row] * W + (e - row * W)) * 8, v);
        st8(y, e * 8, v);
    }
}

// One block a position. Where its token occurs for the first time, the block adds up the rows of all its occurrences in their order, so
// that no two blocks write the same row of the table; elsewhere it ends. A thread holds 8 columns at a time: beside each other with WIDE.
template <bool WIDE> __device__ void add_rows(const int* tokens, const TA1* dy, float* dtable, int n, int D) {
    __shared__ int found[256], in_warp[8];
    int first = blockIdx.x, token = tokens[first], seen = 0;
    for (int j = threadIdx.x; j < first; j += 256) seen |= tokens[j] == token;
    if (__syncthreads_or(seen)) return;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int base = 0; base < D; base += 8 * 256) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int most = first; most < n; most += 4 * 256) {
            // Where none of so many positions holds the token, as nearly always, there is nothing to put in order.
            u32 held = 0;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int j = most + k * 256 + threadIdx.x;
                held |= (u32)(j < n && tokens[j] == token) << k;
            }
            if (!__syncthreads_or(held)) continue;
            for (int from = most; from < most + 4 * 256; from += 256, held >>= 1) {
                bool hit = held & 1;
                u32 hits = __ballot_sync(FULL, hit);
                if (lane == 0) in_warp[warp] = __popc(hits);
                __syncthreads();
                int before = 0, count = 0;
                for (int w = 0; w < 8; w++) {
                    before += w < warp ? in_warp[w] : 0;
                    count += in_warp[w];
                }
                if (hit) found[before + __popc(hits & ((1u << lane) - 1))] = from + threadIdx.x;
                __syncthreads();
                for (int k = 0; k < count; k++) {
                    i64 row = (i64)found[k] * D;
                    if (WIDE) {
                        int c = base + 8 * threadIdx.x;
                        float v[8];
                        if (c < D) {
                            ld8(dy, row + c, v);
#pragma unroll
                            for (int e = 0; e < 8; e++) sum[e] += v[e];
                        }
                    } else {
#pragma unroll
                        for (int e = 0; e < 8; e++) {
                            int c = base + e * 256 + threadIdx.x;
                            if (c < D) sum[e] += ld(dy, row + c);
                        }
                    }
                }
                __syncthreads();
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int c = base + (WIDE ? 8 * threadIdx.x + e : e * 256 + threadIdx.x);
            if (c < D) dtable[(i64)token * D + c] += sum[e];
        }
    }
}
KERNEL embed_bwd(const int* tokens, const TA1* dy, float* dtable, int n, int D) { add_rows<false>(tokens, dy, dtable, n, D); }
KERNEL embed_bwd8(const int* tokens, const TA1* dy, float* dtable, int n, int D) { add_rows<true>(tokens, dy, dtable, n, D); }
