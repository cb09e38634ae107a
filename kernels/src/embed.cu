KERNEL embed(const int* tokens, const TA1* table, TR0* y, i64 n, int D) {
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(table, (i64)tokens[e / D] * D + e % D));
}

// Atomic adds: the order of tokens of one row of the table, and so its last bits, differ from run to run.
KERNEL embed_bwd(const int* tokens, const TA1* dy, float* dtable, i64 n, int D) {
    for (i64 e = global_thread(); e < n; e += all_threads()) atomicAdd(dtable + (i64)tokens[e / D] * D + e % D, ld(dy, e));
}
