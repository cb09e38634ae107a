//! Products of linear layers in 8 bits: operands are narrowed with one factor a tensor, from its largest magnitude at that moment
//! (per-tensor current scaling: Micikevicius et al. 2022, arXiv 2209.05433), multiplied by cuBLASLt and summed in f32.
//!
//! cuBLASLt takes 8 bits only where both operands hold the summed dimension contiguously, in sizes that are multiples of 16: operands are
//! narrowed as they lie and transposed, whichever their products read, both in one walk, and padded with zeros.

use crate::linear::{add_bias, rows_from};
use crate::record::{
    Args, Command, DType, Eight, Eights, Product, Recorder, THREADS, Tensor, aligned, define, long,
    over, types,
};

/// Multiple of all sizes.
const STEP: usize = 16;

/// Rows and columns of a tile that is transposed.
const TILE: (usize, usize) = (128, 64);

fn padded(n: usize) -> usize {
    n.next_multiple_of(STEP)
}

/// `scale, q?, t?` of `x`: its factor, and x in 8 bits as it lies (`plain`) and transposed (`turned`), whichever is wanted.
pub fn narrow(r: &mut Recorder, a: &Args, plain: bool, turned: bool) {
    let (x, scale) = (a.arg(0), a.res(0));
    let q = if plain { a.res(1) } else { &Tensor::ABSENT };
    let t = match turned {
        true => a.res(1 + usize::from(plain)),
        false => &Tensor::ABSENT,
    };
    let (rows, cols, n) = (x.rows(), x.last(), x.len());
    let most = r.scratch(DType::I32, 1);
    r.zero(&most);
    let mut defines = types(&[("TA0", x.dtype)]);
    let (function, steps) = match aligned(&[x]) && n.is_multiple_of(8) {
        true => ("most8", n / 8),
        false => ("most", n),
    };
    r.launch(
        ("fp8", function),
        defines.clone(),
        // Few blocks, so that few of them meet at the word.
        [over(steps)[0].min(2048), 1, 1],
        THREADS,
        vec![x.into(), (&most).into(), long(n)],
    );
    let format = if plain { q.dtype } else { t.dtype };
    if format == DType::Eight(Eight::E5m2) {
        defines.push(define("E5M2", 1));
    }
    let (tall, wide) = (padded(rows), padded(cols));
    if turned {
        if aligned(&[x]) && cols.is_multiple_of(8) {
            defines.push(define("WHOLE", 1));
        }
        let params = vec![
            x.into(),
            q.into(),
            t.into(),
            (&most).into(),
            scale.into(),
            long(rows),
            long(cols),
        ];
        let grid = [wide.div_ceil(TILE.1), tall.div_ceil(TILE.0), 1];
        r.launch(("fp8", "narrow_turned"), defines, grid, THREADS, params);
        return;
    }
    let mut params = vec![x.into(), q.into(), (&most).into(), scale.into()];
    let pieces = tall * wide / STEP;
    let function = match aligned(&[x]) && cols.is_multiple_of(STEP) {
        true => {
            params.push(long(n));
            "narrow16"
        }
        false => {
            params.extend([long(rows), long(cols)]);
            "narrow"
        }
    };
    params.push(long(pieces));
    r.launch(("fp8", function), defines, over(pieces), THREADS, params);
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearFp8 {
    /// Rows of a, rows of b, and how many of their columns are summed: all without what was padded.
    pub sizes: (usize, usize, usize),
    /// Element type of the product.
    pub output: DType,
    /// Whether every partial sum is kept in f32; otherwise the tensor cores may keep fewer bits for a while, which is faster.
    pub exact: bool,
    /// First row of the buffer to which the product is added, where there is one.
    pub start: usize,
}

fn format(t: &Tensor) -> Eight {
    match t.dtype {
        DType::Eight(e) => e,
        DType::F32 | DType::Bf16 | DType::F16 | DType::I32 => Eight::E4m3,
    }
}

/// `y` of `a, a_scale, b, b_scale, bias?, add?, into?, beta?`: `a b^T` of what [`narrow`] made.
pub fn linear_fp8(r: &mut Recorder, a: &Args, op: &LinearFp8) {
    let (x, w, bias, into, beta) = (a.arg(0), a.arg(2), a.arg(4), a.arg(6), a.arg(7));
    let (m, n, k) = op.sizes;
    let sizes = (padded(m), padded(n), padded(k));
    let c = match into.is_present() {
        true => rows_from(a.res(0), op.start, m, n),
        false => a.res(0).clone(),
    };
    // What is added, and the factor on it: 1 where none is kept.
    let old = if into.is_present() { &c } else { a.arg(5) };
    let whole = sizes.0 == m && sizes.1 == n && aligned(&[&c, old]);
    let out = match whole {
        true => c.clone(),
        false => r.scratch(op.output, sizes.0 * sizes.1),
    };
    r.commands.push(Command::Product(Product {
        a: x.ptr,
        b: w.ptr,
        c: out.ptr,
        transposed: (false, true),
        sizes,
        input: op.output,
        eights: Some(Eights {
            formats: (format(x), format(w)),
            scales: (a.arg(1).ptr, a.arg(3).ptr),
            exact: op.exact,
        }),
        output: op.output,
        alpha: 1.0,
        beta: f32::from(u8::from(whole && old.is_present())),
        beta_at: if whole { beta.ptr } else { 0 },
        add: if whole && !into.is_present() {
            old.ptr
        } else {
            0
        },
    }));
    if !whole {
        r.launch(
            ("fp8", "crop"),
            types(&[("TR0", op.output)]),
            over(m * n),
            THREADS,
            vec![
                (&out).into(),
                (&c).into(),
                old.into(),
                beta.into(),
                long(m),
                long(n),
                long(sizes.1),
            ],
        );
    }
    add_bias(r, bias, &c, n);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Param;

    const E4M3: DType = DType::Eight(Eight::E4m3);
    const E5M2: DType = DType::Eight(Eight::E5m2);

    fn tensor(ptr: u64, dtype: DType, dims: &[usize]) -> Option<Tensor> {
        Some(Tensor {
            ptr,
            dtype,
            dims: dims.to_vec(),
        })
    }

    fn recorded(
        args: &[Option<Tensor>],
        results: &[Option<Tensor>],
        launch: impl Fn(&mut Recorder, &Args),
    ) -> (Vec<Command>, usize) {
        let mut r = Recorder::new(1 << 30);
        let results: Vec<Tensor> = results.iter().flatten().cloned().collect();
        launch(
            &mut r,
            &Args {
                args,
                results: &results,
                fixed: &[],
            },
        );
        let bytes = r.scratch_bytes();
        (r.commands, bytes)
    }

    fn the_product(commands: &[Command]) -> &Product {
        let products: Vec<&Product> = commands
            .iter()
            .filter_map(|c| match c {
                Command::Product(p) => Some(p),
                _ => None,
            })
            .collect();
        assert_eq!(products.len(), 1);
        products[0]
    }

    fn functions(commands: &[Command]) -> Vec<&'static str> {
        let of = |c: &Command| match c {
            Command::Launch(l) => Some(l.function),
            _ => None,
        };
        commands.iter().filter_map(of).collect()
    }

    /// One look for the largest magnitude and one walk, whichever ways are wanted.
    #[test]
    fn both_ways_are_narrowed_in_one_walk() {
        let scale = tensor(64, DType::F32, &[1]);
        for (rows, cols, plain, turned, names) in [
            (64, 48, true, false, ["most8", "narrow16"]),
            (64, 48, false, true, ["most8", "narrow_turned"]),
            (64, 48, true, true, ["most8", "narrow_turned"]),
            (5, 19, true, false, ["most", "narrow"]),
            (5, 19, true, true, ["most", "narrow_turned"]),
        ] {
            let x = tensor(256, DType::Bf16, &[rows, cols]);
            let (r, c) = (padded(rows), padded(cols));
            let q = tensor(1 << 20, E5M2, &[r, c]).filter(|_| plain);
            let t = tensor(1 << 21, E5M2, &[c, r]).filter(|_| turned);
            let (commands, bytes) =
                recorded(&[x], &[scale.clone(), q.clone(), t.clone()], |r, a| {
                    narrow(r, a, plain, turned);
                });
            // The word of the magnitude is zeroed before anything adds to it.
            assert!(matches!(commands[0], Command::Zero { bytes: 4, .. }));
            assert_eq!(functions(&commands), names);
            assert_eq!(bytes, 256);
            let Some(Command::Launch(l)) = commands.last() else {
                panic!("a launch")
            };
            assert!(l.module.defines.contains(&define("E5M2", 1)));
            let whole = l.module.defines.contains(&define("WHOLE", 1));
            assert_eq!(whole, turned && cols == 48);
            let outs: Vec<Param> = match turned {
                true => vec![
                    q.map_or(Param::Ptr(0), |q| (&q).into()),
                    (&t.unwrap()).into(),
                ],
                false => vec![(&q.unwrap()).into()],
            };
            assert_eq!(l.params[1..1 + outs.len()], outs);
        }
    }

    fn operands(m: usize, n: usize, k: usize) -> Vec<Option<Tensor>> {
        vec![
            tensor(256, E5M2, &[padded(m), padded(k)]),
            tensor(1 << 16, DType::F32, &[1]),
            tensor(1 << 20, E4M3, &[padded(n), padded(k)]),
            tensor(1 << 17, DType::F32, &[1]),
        ]
    }

    fn op(sizes: (usize, usize, usize), output: DType) -> LinearFp8 {
        LinearFp8 {
            sizes,
            output,
            exact: true,
            start: 0,
        }
    }

    #[test]
    fn whole_sizes_go_straight_to_their_result() {
        let y = tensor(1 << 21, DType::Bf16, &[2, 32, 80]);
        let op = op((64, 80, 48), DType::Bf16);
        let (commands, bytes) = recorded(&operands(64, 80, 48), &[y], |r, a| linear_fp8(r, a, &op));
        assert_eq!((commands.len(), bytes), (1, 0));
        let p = the_product(&commands);
        assert_eq!((p.sizes, p.transposed), ((64, 80, 48), (false, true)));
        assert_eq!((p.c, p.output, p.beta_at), (1 << 21, DType::Bf16, 0));
        assert_eq!((p.beta, p.add), (0.0, 0));
        let e = p.eights.as_ref().unwrap();
        assert_eq!((e.formats, e.exact), ((Eight::E5m2, Eight::E4m3), true));
        assert_eq!(e.scales, (1 << 16, 1 << 17));
        assert_eq!((p.a, p.b), (256, 1 << 20));
    }

    #[test]
    fn odd_sizes_are_cropped() {
        let dx = tensor(1 << 21, DType::Bf16, &[5, 7]);
        let op = op((5, 7, 19), DType::Bf16);
        let (commands, bytes) = recorded(&operands(5, 7, 19), &[dx], |r, a| linear_fp8(r, a, &op));
        assert_eq!(functions(&commands), ["crop"]);
        let p = the_product(&commands);
        assert_eq!(p.sizes, (16, 16, 32));
        // dx [16 16] in bf16.
        assert_eq!(bytes, 512);
        assert!(p.c >= 1 << 30);
    }

    /// What is added is read where it is, by the product or by the kernel that crops it.
    #[test]
    fn sums_are_added_on_the_way() {
        for (n, by_product) in [(80, true), (81, false)] {
            let mut args = operands(64, n, 48);
            args.extend([None, tensor(1 << 22, DType::Bf16, &[64, n])]);
            let y = tensor(1 << 21, DType::Bf16, &[64, n]);
            let op = op((64, n, 48), DType::Bf16);
            let (commands, _) = recorded(&args, &[y], |r, a| linear_fp8(r, a, &op));
            let p = the_product(&commands);
            assert_eq!(p.add, if by_product { 1 << 22 } else { 0 });
            assert_eq!(p.beta, if by_product { 1.0 } else { 0.0 });
            let cropped = commands.iter().any(|c| match c {
                Command::Launch(l) => l.function == "crop" && l.params[2] == Param::Ptr(1 << 22),
                _ => false,
            });
            assert_eq!(cropped, !by_product);
        }
    }

    #[test]
    fn gradients_are_added_to_their_rows() {
        let (into, beta) = (
            tensor(1 << 21, DType::F32, &[100, 32]),
            tensor(1 << 22, DType::F32, &[1]),
        );
        let mut args = operands(48, 32, 64);
        args.extend([None, None, into.clone(), beta]);
        let op = LinearFp8 {
            start: 3,
            ..op((48, 32, 64), DType::F32)
        };
        let (commands, _) = recorded(&args, &[into], |r, a| linear_fp8(r, a, &op));
        assert_eq!(commands.len(), 1);
        let p = the_product(&commands);
        assert_eq!((p.sizes, p.output), ((48, 32, 64), DType::F32));
        assert_eq!((p.c, p.beta_at), ((1 << 21) + 3 * 32 * 4, 1 << 22));
        assert_eq!((p.add, p.beta), (0, 1.0));
    }
}
