//! Launches of joining and splitting: one copy of up to [`PARTS`] neighbouring parts.

use crate::record::{
    Args, Param, Recorder, THREADS, Tensor, aligned, define, int, long, over, types,
};

/// Parts of a launch; the source says the same.
const PARTS: usize = 8;

/// Moves between parts and the columns of a whole that they are.
fn move_cols(r: &mut Recorder, parts: &[&Tensor], whole: &Tensor, back: bool) {
    let total = whole.last();
    let mut at = 0;
    let places: Vec<(&Tensor, usize)> = parts
        .iter()
        .map(|&t| {
            at += t.last();
            (t, at - t.last())
        })
        .filter(|(t, _)| !t.is_empty())
        .collect();
    for list in places.chunks(PARTS) {
        let (first, last) = (list[0].1, list[list.len() - 1]);
        let to = last.1 + last.0.last();
        let per = 16 / whole.dtype.bytes();
        let fits = aligned(&[whole])
            && total.is_multiple_of(per)
            && list
                .iter()
                .all(|(t, from)| aligned(&[t]) && from.is_multiple_of(per))
            && to.is_multiple_of(per);
        let per = if fits { per } else { 1 };
        let padded = |words: Vec<u64>| {
            let mut words = words;
            words.resize(PARTS, 0);
            words
        };
        let mut words = padded(list.iter().map(|(t, _)| t.ptr).collect());
        words.extend(padded(list.iter().map(|(_, from)| *from as u64).collect()));
        let cols = (to - first) / per;
        let n = whole.rows() * cols;
        let mut defines = types(&[("TA0", whole.dtype)]);
        defines.extend([define("PER", per), define("BACK", u8::from(back))]);
        r.launch(
            ("concat", "move_cols"),
            defines,
            over(n),
            THREADS,
            vec![
                Param::Words(words),
                whole.into(),
                long(n),
                int(cols),
                int(total),
                int(list.len()),
                int(to),
            ],
        );
        r.early();
    }
}

/// `y` of `x...`.
pub fn concat(r: &mut Recorder, a: &Args) {
    let parts: Vec<&Tensor> = a.args.iter().flatten().collect();
    move_cols(r, &parts, a.res(0), false);
}

/// `y...` of `x`.
pub fn split(r: &mut Recorder, a: &Args) {
    let parts: Vec<&Tensor> = a.results.iter().collect();
    move_cols(r, &parts, a.arg(0), true);
}
