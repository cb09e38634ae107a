KERNEL cache_write(TA0* cache, const TA1* x, const int* slot, i64 n, int T, int S, int W) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = e / W, s = slot[0] + row % T;
        if (s >= 0 && s < S) st(cache, (row / T * S + s) * W + e % W, ld(x, e));
    }
}
