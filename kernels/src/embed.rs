//! Launches of the embedding. Its derivative adds the occurrences of a token in their order.

use crate::record::{Args, Recorder, THREADS, aligned, int, long, over};
use crate::reduce::scale_into;

/// `y` of `tokens, table`.
pub fn embed(r: &mut Recorder, a: &Args) {
    let (table, y) = (a.arg(1), a.res(0));
    let per = match y.last().is_multiple_of(8) && aligned(&[table, y]) {
        true => 8,
        false => 1,
    };
    let function = if per == 8 { "embed8" } else { "embed" };
    r.launch(
        ("embed", function),
        a.types(),
        over(y.len() / per),
        THREADS,
        vec![
            a.arg(0).into(),
            table.into(),
            y.into(),
            long(y.len() / per),
            int(y.last() / per),
        ],
    );
    r.early();
}

/// `dtable` of `tokens, dy, into?, beta?`.
pub fn embed_bwd(r: &mut Recorder, a: &Args) {
    let (dy, beta, table) = (a.arg(1), a.arg(3), a.res(0));
    if beta.is_present() {
        scale_into(r, table, beta);
    } else {
        r.zero(table);
    }
    let types = a.types().into_iter().filter(|(n, _)| n == "TA1").collect();
    let wide = dy.last().is_multiple_of(8) && aligned(&[dy]);
    let function = if wide { "embed_bwd8" } else { "embed_bwd" };
    r.launch(
        ("embed", function),
        types,
        [dy.rows(), 1, 1],
        256,
        vec![
            a.arg(0).into(),
            dy.into(),
            table.into(),
            int(dy.rows()),
            int(dy.last()),
        ],
    );
}
