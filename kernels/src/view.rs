//! Launches of picking the last token.

use crate::record::{Args, Recorder, THREADS, int, long, over};

fn launch(r: &mut Recorder, a: &Args, name: &'static str, time: usize) {
    let y = a.res(0);
    r.launch(
        ("view", name),
        a.types(),
        over(y.len()),
        THREADS,
        vec![
            a.arg(0).into(),
            y.into(),
            long(y.len()),
            int(time),
            int(y.last()),
        ],
    );
    r.early();
}

/// `y` of `x`.
pub fn last(r: &mut Recorder, a: &Args) {
    launch(r, a, "last", a.arg(0).size(1));
}

/// `dx` of `dy`.
pub fn last_bwd(r: &mut Recorder, a: &Args) {
    launch(r, a, "last_bwd", a.res(0).size(1));
}
