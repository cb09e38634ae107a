KERNEL cast(const TA0* x, TR0* y, i64 n) {
    early();
    for (i64 i = global_thread(); i < n; i += all_threads()) st(y, i, ld(x, i));
}
// n is a multiple of 8, both addresses of 16 bytes.
KERNEL cast8(const TA0* x, TR0* y, i64 n) {
    early();
    for (i64 i = 8 * global_thread(); i < n; i += 8 * all_threads()) {
        float v[8];
        ld8(x, i, v);
        st8(y, i, v);
    }
}
