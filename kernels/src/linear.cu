KERNEL add_bias(TR0* y, const TA2* b, i64 n, int N) {
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(y, e) + ld(b, e % N));
}
