KERNEL rope(const TA0* x, const int* pos, const float* inv_freq, TR0* y, i64 n, int T, int H, int P, int dims, float factor, int inverse) {
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
