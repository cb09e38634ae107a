//! Launches of activation statistics.

use crate::record::{Args, Param, Recorder, THREADS, int, long};

/// Bytes of the part of a block: `Part` of the source.
const PART: usize = 40;

/// `s` of `x`.
pub fn stat(r: &mut Recorder, a: &Args) {
    let x = a.arg(0);
    let blocks = x.len().div_ceil(8 * THREADS).clamp(1, 512);
    let parts = r.scratch_raw(blocks * PART);
    let buckets = r.scratch(crate::DType::I32, 64);
    r.zero(&buckets);
    r.launch(
        ("stat", "stat_part"),
        a.types(),
        [blocks, 1, 1],
        THREADS,
        vec![
            x.into(),
            Param::Ptr(parts),
            (&buckets).into(),
            long(x.len()),
        ],
    );
    r.launch(
        ("stat", "stat"),
        a.types(),
        [1, 1, 1],
        64,
        vec![
            Param::Ptr(parts),
            (&buckets).into(),
            a.res(0).into(),
            int(blocks),
        ],
    );
}
