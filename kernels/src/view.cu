KERNEL last(const TA0* x, TR0* y, i64 n, int T, int D) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(x, ((e / D + 1) * T - 1) * D + e % D));
}
KERNEL last_bwd(const TA0* dy, TR0* dx, i64 n, int T, int D) {
    early();
    for (i64 e = global_thread(); e < n; e += all_threads()) {
        i64 row = e / D;
        st(dx, e, row % T == T - 1 ? ld(dy, row / T * D + e % D) : 0.f);
    }
}
