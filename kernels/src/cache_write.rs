//! Launch of writing into a cache.

use crate::record::{Args, Recorder, THREADS, int, long, over};

/// `cache` of `cache, x, slot`.
pub fn cache_write(r: &mut Recorder, a: &Args) {
    let (cache, x) = (a.res(0), a.arg(1));
    r.launch(
        ("cache_write", "cache_write"),
        a.types(),
        over(x.len()),
        THREADS,
        vec![
            cache.into(),
            x.into(),
            a.arg(2).into(),
            long(x.len()),
            int(x.size(1)),
            int(cache.size(1)),
            int(x.size(2) * x.size(3)),
        ],
    );
    r.early();
}
