// Copies [rows cols] between rows of other widths.
KERNEL copy_cols(const TA0* x, i64 xs, TA0* y, i64 ys, i64 n, int cols) {
    for (i64 e = global_thread(); e < n; e += all_threads()) y[e / cols * ys + e % cols] = x[e / cols * xs + e % cols];
}
