KERNEL add_bias(TR0* y, const TA2* b, i64 n, int N) {
    for (i64 e = global_thread(); e < n; e += all_threads()) st(y, e, ld(y, e) + ld(b, e % N));
}
// Signs and mantissas at random, exponents of 0.5 to 2, in both halves of every word: floats of 2 and of 4 bytes alike.
KERNEL noise(u32* p, i64 n) {
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        u32 h = (u32)i * 2654435761u;
        h = (h ^ (h >> 15)) * 2246822519u;
        h ^= h >> 13;
        p[i] = 0x3f003f00u | (h & 0x80ff80ffu);
    }
}
