KERNEL cast(const TA0* x, TR0* y, i64 n) {
    for (i64 i = global_thread(); i < n; i += all_threads()) st(y, i, ld(x, i));
}
