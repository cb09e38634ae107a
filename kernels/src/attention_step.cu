// One query a sequence over its keys and values (a step of decoding): each block takes a share of the slots that one group of heads sees, so
// that keys and values are read once for all heads of the group, and leaves its sums with the maximum under which they were taken; a second
// kernel adds the shares in order. P: head width; ROWS: heads of a group that a block serves; WARPS (4) of them.
#ifndef MOST
#define MOST 32
#endif
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
extern __shared__ float smem[];
// The slots that the query of sequence b sees: of tiles of `tile` slots those of this block's share, from..to, within lo..=hi.
struct Share {
    int lo, hi, from, to;
};
__device__ __forceinline__ Share share_of(const int* pos, const int* slot, i64 b, int S, int window, int tile) {
    Share r;
    r.hi = min(slot ? slot[0] : 0, S - 1);
    int back = min(window - 1, r.hi);
    if (pos) back = min(back, pos[b]);
    r.lo = r.hi - back;
    int first = r.lo / tile, tiles = r.hi / tile - first + 1, each = (tiles + gridDim.x - 1) / gridDim.x;
    r.from = first + blockIdx.x * each;
    r.to = min(r.from + each, first + tiles);
    return r;
}
// Sum of head h over this block's share, channel c: to the result where the block saw all slots, or to its place among the shares.
__device__ __forceinline__ void leave(TR0* out, float* lse, float* part, i64 head, int c, float top, float sum, float o) {
    if (gridDim.x == 1) {
        st(out, head * P + c, sum > 0 ? o / sum : 0.f);
        if (c == 0) lse[head] = (top + log2f(sum)) * LN2;
        return;
    }
    float* to = part + (head * gridDim.x + blockIdx.x) * (P + 2);
    to[c] = o;
    if (c == 0) {
        to[P] = top;
        to[P + 1] = sum;
    }
}
// Shares of one head, one thread a channel: `top` is in powers of two.
KERNEL attn_step_sum(const float* part, TR0* out, float* lse, int splits) {
    early();
    __shared__ float weight[MOST];
    i64 head = blockIdx.x;
    part += head * splits * (P + 2);
    float top = -INF, sum = 0, o = 0;
    for (int s = threadIdx.x; s < splits; s += blockDim.x) {
        weight[s] = part[s * (P + 2) + P];
        top = fmaxf(top, weight[s]);
    }
    top = block_max(top);
    for (int s = threadIdx.x; s < splits; s += blockDim.x) weight[s] = weight[s] == -INF ? 0.f : exp2f(weight[s] - top);
    __syncthreads();
    int c = threadIdx.x;
    for (int s = 0; s < splits; s++) {
        sum += weight[s] * part[s * (P + 2) + P + 1];
        if (c < P) o += weight[s] * part[s * (P + 2) + c];
    }
    if (c < P) st(out, head * P + c, o / sum);
    if (c == 0) lse[head] = (top + log2f(sum)) * LN2;
}
#ifdef WARPS
// bf16 by products of warps: operands go from memory to registers, 16 bytes a load. Heads are the rows of the products. What is summed over
// may come in any order as long as both operands agree: in q.k lane t of four takes 8 channels in a row, in the weighted sum of values 4 slots,
// and columns of the latter are 8 channels apart.
#define QC ((P + 31) / 32)
#define VC ((P + 63) / 64)
__device__ __forceinline__ uint4 ld16(const bf16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
// Halves of two words: the low ones, or the high ones.
__device__ __forceinline__ u32 pair(u32 a, u32 b, bool high) { return __byte_perm(a, b, high ? 0x7632 : 0x5410); }
// c[ROWS 8] += a b; rows beyond the eighth are there only where ROWS is 16.
__device__ __forceinline__ void mma_rows(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    if (ROWS == 16) {
        mma(c, a, b);
    } else {
        float d[4] = {c[0], c[1], 0.f, 0.f};
        mma(d, a, b);
        c[0] = d[0], c[1] = d[1];
    }
}
extern "C" __global__ void __launch_bounds__(32 * WARPS) attn_step_warps(const bf16* q, const bf16* k, const bf16* v, const int* pos, const int* slot, TR0* out, float* lse, float* part, int S, int H, int G, float scale, int window) {
    early();
    constexpr int HALVES = ROWS / 8, C = 2 * HALVES;
    const uint4 none = make_uint4(0, 0, 0, 0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, heads = H / G, tiles = (heads + ROWS - 1) / ROWS;
    int group = blockIdx.y / tiles, head0 = blockIdx.y % tiles * ROWS;
    i64 b = blockIdx.z;
    Share my = share_of(pos, slot, b, S, window, 16);
    float sl = scale * LOG2E;
    uint4 qs[QC][HALVES];
#pragma unroll
    for (int j = 0; j < QC; j++)
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            int c = 32 * j + 8 * t, head = head0 + g + 8 * h;
            qs[j][h] = c < P && head < heads ? *(const uint4*)(q + ((b * H + group * heads + head) * P + c)) : none;
        }
    float o[VC][8][C], top[HALVES], sum[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) top[h] = -INF, sum[h] = 0;
#pragma unroll
    for (int j = 0; j < VC; j++)
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int y = 0; y < C; y++) o[j][i][y] = 0;
    i64 row = (i64)G * P;
    k += (b * S * G + group) * P;
    v += (b * S * G + group) * P;
    for (int tile = my.from + warp; tile < my.to; tile += WARPS) {
        int s0 = tile * 16;
        uint4 ks[2][QC], vs[VC][4];
        // Slots that the query does not see may hold anything: one that it sees is read in their place.
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bf16* from = k + max(min(s0 + 8 * n + g, my.hi), my.lo) * row + 8 * t;
#pragma unroll
            for (int j = 0; j < QC; j++) ks[n][j] = 32 * j + 32 <= P || 32 * j + 8 * t < P ? ld16(from + 32 * j) : none;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bf16* from = v + max(min(s0 + 2 * t + (i & 1) + (i & 2) * 4, my.hi), my.lo) * row + 8 * g;
#pragma unroll
            for (int j = 0; j < VC; j++) vs[j][i] = 64 * j + 64 <= P || 64 * j + 8 * g < P ? ld16(from + 64 * j) : none;
        }
        float s[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int y = 0; y < 4; y++) s[n][y] = 0;
#pragma unroll
            for (int j = 0; j < QC; j++) {
                const uint4 &a = qs[j][0], &z = HALVES == 2 ? qs[j][HALVES - 1] : none;
                mma_rows(s[n], a.x, z.x, a.y, z.y, ks[n][j].x, ks[n][j].y);
                mma_rows(s[n], a.z, z.z, a.w, z.w, ks[n][j].z, ks[n][j].w);
            }
#pragma unroll
            for (int y = 0; y < 2; y++) {
                int at = s0 + 8 * n + 2 * t + y;
                if (at < my.lo || at > my.hi) s[n][y] = s[n][y + 2] = -INF;
            }
        }
        u32 shares[4] = {0, 0, 0, 0};
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float a = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
            a = fmaxf(a, __shfl_xor_sync(FULL, a, 1));
            a = fmaxf(a, __shfl_xor_sync(FULL, a, 2));
            a = fmaxf(top[h], a * sl);
            float off = a == -INF ? 0.f : a, fix = exp2_fast(top[h] - off);
            top[h] = a;
            sum[h] *= fix;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float e0 = exp2_fast(fmaf(s[n][2 * h], sl, -off)), e1 = exp2_fast(fmaf(s[n][2 * h + 1], sl, -off));
                sum[h] += e0 + e1;
                shares[2 * n + h] = pack(e0, e1);
            }
#pragma unroll
            for (int j = 0; j < VC; j++)
#pragma unroll
                for (int i = 0; i < 8; i++) o[j][i][2 * h] *= fix, o[j][i][2 * h + 1] *= fix;
        }
#pragma unroll
        for (int j = 0; j < VC; j++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                mma_rows(o[j][i], shares[0], shares[1], shares[2], shares[3], pair(word(vs[j][0], i / 2), word(vs[j][1], i / 2), i & 1), pair(word(vs[j][2], i / 2), word(vs[j][3], i / 2), i & 1));
    }
    // The warps' sums, in order.
    float *tops = smem, *sums = tops + WARPS * ROWS, *os = sums + WARPS * ROWS;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        sum[h] += __shfl_xor_sync(FULL, sum[h], 1);
        sum[h] += __shfl_xor_sync(FULL, sum[h], 2);
        int at = warp * ROWS + g + 8 * h;
        if (t == 0) tops[at] = top[h], sums[at] = sum[h];
#pragma unroll
        for (int j = 0; j < VC; j++)
#pragma unroll
            for (int y = 0; y < 2; y++)
#pragma unroll
                for (int i = 0; i < 8; i += 4) *(float4*)(os + at * (64 * VC) + 64 * j + 16 * t + 8 * y + i) = make_float4(o[j][i][2 * h + y], o[j][i + 1][2 * h + y], o[j][i + 2][2 * h + y], o[j][i + 3][2 * h + y]);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < ROWS * P; e += 32 * WARPS) {
        int r = e / P, c = e % P;
        if (head0 + r >= heads) break;
        float most = -INF, all = 0, y = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, tops[w * ROWS + r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float f = tops[w * ROWS + r] == -INF ? 0.f : exp2f(tops[w * ROWS + r] - most);
            all += f * sums[w * ROWS + r];
            y += f * os[(w * ROWS + r) * (64 * VC) + c];
        }
        leave(out, lse, part, b * H + group * heads + head0 + r, c, most, all, y);
    }
}
#else
// Any type and width, in f32: tiles of 32 slots in shared memory, ROWS (at most 8) heads.
KERNEL attn_step(const TA0* q, const TA1* k, const TA2* v, const int* pos, const int* slot, TR0* out, float* lse, float* part, int S, int H, int G, float scale, int window) {
    early();
    float *qs = smem, *ks = qs + ROWS * P, *vs = ks + 32 * (P + 1), *ps = vs + 32 * P;
    __shared__ float top[ROWS], sum[ROWS], fix[ROWS];
    constexpr int EACH = (ROWS * P + 255) / 256;
    int heads = H / G, tiles = (heads + ROWS - 1) / ROWS, group = blockIdx.y / tiles, head0 = blockIdx.y % tiles * ROWS, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    i64 b = blockIdx.z, row = (i64)G * P, base = (b * S * G + group) * P;
    Share my = share_of(pos, slot, b, S, window, 32);
    for (int e = threadIdx.x; e < ROWS * P; e += 256) qs[e] = head0 + e / P < heads ? ld(q, (b * H + group * heads + head0) * P + e) : 0.f;
    if (threadIdx.x < ROWS) top[threadIdx.x] = -INF, sum[threadIdx.x] = 0;
    float o[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) o[i] = 0;
    for (int tile = my.from; tile < my.to; tile++) {
        __syncthreads();
        for (int e = threadIdx.x; e < 32 * P; e += 256) {
            int s = e / P, c = e % P;
            i64 at = base + max(min(tile * 32 + s, my.hi), my.lo) * row + c;
            ks[s * (P + 1) + c] = ld(k, at);
            vs[e] = ld(v, at);
        }
        __syncthreads();
        if (warp < ROWS) {
            int at = tile * 32 + lane;
            float d = 0;
            for (int c = 0; c < P; c++) d = fmaf(qs[warp * P + c], ks[lane * (P + 1) + c], d);
            d = at < my.lo || at > my.hi ? -INF : d * scale * LOG2E;
            float a = fmaxf(top[warp], warp_max(d)), e = exp2f(d - a), all = warp_sum(e);
            ps[warp * 32 + lane] = e;
            __syncwarp();
            if (lane == 0) {
                fix[warp] = exp2f(top[warp] - a);
                sum[warp] = sum[warp] * fix[warp] + all;
                top[warp] = a;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int e = threadIdx.x + 256 * i;
            if (e >= ROWS * P) break;
            int r = e / P, c = e % P;
            float y = o[i] * fix[r];
            for (int s = 0; s < 32; s++) y = fmaf(ps[r * 32 + s], vs[s * P + c], y);
            o[i] = y;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = threadIdx.x + 256 * i;
        if (e < ROWS * P && head0 + e / P < heads) leave(out, lse, part, b * H + group * heads + head0 + e / P, e % P, top[e / P], sum[e / P], o[i]);
    }
}
#endif
