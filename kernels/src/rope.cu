KERNEL rope(const TA0* x, const int* pos, const float* inv_freq, TR0* y, i64 n, int T, int H, int P, int dims, float factor, int inverse) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        int p = e % P;
        if (p >= dims) {
            st(y, e, ld(x, e));
            continue;
        }
        int half = dims / 2;
        i64 row = e / P / H;
        int at = pos ? pos[row] : (int)(row % T), i = p < half ? p : p - half;
        float s, c;
        sincosf(at * inv_freq[i], &s, &c);
        s *= factor;
        c *= factor;
        if (inverse) s = -s;
        float v = ld(x, e), o = ld(x, p < half ? e + half : e - half);
        st(y, e, p < half ? v * c - o * s : v * c + o * s);
    }
}
// The same with 8 elements a thread at a time: P and half of dims are multiples of 8, addresses of 16 bytes. A block has R tokens, whose
// angles all heads share.
KERNEL rope8(const TA0* x, const int* pos, const float* inv_freq, TR0* y, i64 tokens, int T, int H, int P, int dims, float factor, int inverse, int R) {
    early();
    extern __shared__ float angles[];
    const int half = dims / 2, per = H * P / 8;
    const i64 first = (i64)blockIdx.x * R;
    const int here = (int)(tokens - first < R ? tokens - first : R);
    float *cosines = angles, *sines = angles + R * half;
    for (int e = threadIdx.x; e < here * half; e += blockDim.x) {
        i64 row = first + e / half;
        float s, c;
        sincosf((pos ? pos[row] : (int)(row % T)) * inv_freq[e % half], &s, &c);
        cosines[e] = c * factor;
        sines[e] = inverse ? -s * factor : s * factor;
    }
    __syncthreads();
    for (int v = threadIdx.x; v < here * per; v += blockDim.x) {
        int r = v / per, p = v % per * 8 % P;
        i64 at = (first * per + v) * 8;
        float a[8], o[8];
        ld8(x, at, a);
        if (p < dims) {
            bool low = p < half;
            int i = r * half + (low ? p : p - half);
            ld8(x, low ? at + half : at - half, o);
#pragma unroll
            for (int k = 0; k < 8; k++) a[k] = low ? a[k] * cosines[i + k] - o[k] * sines[i + k] : a[k] * cosines[i + k] + o[k] * sines[i + k];
        }
        st8(y, at, a);
    }
}
