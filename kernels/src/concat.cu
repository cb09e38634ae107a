// Joins parts into rows of `total` elements or splits them (BACK), PER neighbouring elements a thread at a time: all widths and addresses
// are multiples of PER elements.
#define PARTS 8
#ifndef PER
#define PER 1
#endif
#ifndef BACK
#define BACK 0
#endif
struct Table { u64 at[PARTS]; i64 from[PARTS]; };
struct alignas(PER * sizeof(TA0)) Piece { TA0 e[PER]; };
// Part p has the columns from[p] to from[p + 1] (the last: to `to`) of the whole; n pieces of `cols` a row.
KERNEL move_cols(const __grid_constant__ Table t, TA0* whole, i64 n, int cols, int total, int parts, int to) {
    early();
    for (i64 i = global_thread(); i < n; i += all_threads()) {
        i64 row = i / cols;
        int c = (int)(i - row * cols) * PER + (int)t.from[0], p = 0;
#pragma unroll
        for (int k = 1; k < PARTS; k++) p += k < parts && c >= t.from[k];
        int end = to, first = (int)t.from[0];
        u64 at = t.at[0];
#pragma unroll
        for (int k = 1; k < PARTS; k++)
            if (k == p) at = t.at[k], first = (int)t.from[k];
#pragma unroll
        for (int k = 1; k < PARTS; k++)
            if (k == p + 1 && k < parts) end = (int)t.from[k];
        Piece* in = (Piece*)((TA0*)at + row * (end - first) + c - first);
        Piece* out = (Piece*)(whole + row * total + c);
        if (BACK) *in = *out;
        else *out = *in;
    }
}
