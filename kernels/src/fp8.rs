//! Products of linear layers in 8 bits: operands are narrowed with one factor a tensor, from its largest magnitude at that moment
//! (per-tensor current scaling: Micikevicius et al. 2022, arXiv 2209.05433), multiplied by cuBLASLt and summed in f32.
//!
//! Values and weights are e4m3, gradients e5m2. cuBLASLt takes 8 bits only where both operands hold the summed dimension contiguously, in
//! sizes that are multiples of 16: operands that lie otherwise are transposed while they are narrowed, all are padded with zeros.

use crate::linear::{self, add_bias};
use crate::record::{
    Args, Command, DType, Eight, Eights, Param, Product, Recorder, THREADS, Tensor, aligned,
    define, long, over, types,
};

/// Multiple of all sizes.
const STEP: usize = 16;

/// Rows and columns of a tile that is transposed.
const TILE: usize = 64;

/// An operand: where it lies and what its bits mean.
struct Operand<'a> {
    t: &'a Tensor,
    rows: usize,
    cols: usize,
    /// Whether the summed dimension is that of the rows.
    turned: bool,
    format: Eight,
}

/// Narrowed: first byte, and where its factor is.
struct Narrowed {
    ptr: u64,
    scale: u64,
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(STEP)
}

/// Narrows an operand; `most` is a zeroed word.
fn narrow(r: &mut Recorder, o: &Operand, most: u64) -> Narrowed {
    let (x, n) = (o.t, o.rows * o.cols);
    let scale = r.scratch(DType::F32, 1).ptr;
    let (tall, wide) = (padded(o.rows), padded(o.cols));
    let q = r.scratch_raw(tall * wide);
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
        vec![x.into(), Param::Ptr(most), long(n)],
    );
    if o.format == Eight::E5m2 {
        defines.push(define("E5M2", 1));
    }
    let mut params = vec![x.into(), Param::Ptr(q), Param::Ptr(most), Param::Ptr(scale)];
    if o.turned {
        if aligned(&[x]) && o.cols.is_multiple_of(8) {
            defines.push(define("WHOLE", 1));
        }
        params.extend([long(o.rows), long(o.cols)]);
        let grid = [wide.div_ceil(TILE), tall.div_ceil(TILE), 1];
        r.launch(("fp8", "narrow_turned"), defines, grid, THREADS, params);
    } else {
        let pieces = tall * wide / STEP;
        let function = match aligned(&[x]) && o.cols.is_multiple_of(STEP) {
            true => {
                params.push(long(n));
                "narrow16"
            }
            false => {
                params.extend([long(o.rows), long(o.cols)]);
                "narrow"
            }
        };
        params.push(long(pieces));
        r.launch(("fp8", function), defines, over(pieces), THREADS, params);
    }
    Narrowed { ptr: q, scale }
}

/// What is added to a product.
enum Added<'a> {
    /// A tensor of the result's type, or nothing where it is absent.
    Tensor(&'a Tensor),
    /// The result's memory times a factor, or nothing where that is absent.
    Factor(&'a Tensor),
}

/// `c[m n] = op(a) op(b) + add`. `exact`: sums are not shortened on the way.
fn product(
    r: &mut Recorder,
    (a, b): (&Operand, &Operand),
    c: &Tensor,
    (m, n, k): (usize, usize, usize),
    add: &Added,
    exact: bool,
) {
    let words = r.scratch(DType::I32, 2);
    r.zero(&words);
    let formats = (a.format, b.format);
    let a = narrow(r, a, words.ptr);
    let b = narrow(r, b, words.ptr + 4);
    let sizes = (padded(m), padded(n), padded(k));
    let absent = Tensor::ABSENT;
    let (old, factor) = match *add {
        Added::Tensor(t) => (t, &absent),
        Added::Factor(f) if f.is_present() => (c, f),
        Added::Factor(_) => (&absent, &absent),
    };
    let whole = sizes.0 == m && sizes.1 == n && aligned(&[c, old]);
    let out = match whole {
        true => c.clone(),
        false => r.scratch(c.dtype, sizes.0 * sizes.1),
    };
    r.commands.push(Command::Product(Product {
        a: a.ptr,
        b: b.ptr,
        c: out.ptr,
        transposed: (false, true),
        sizes,
        input: c.dtype,
        eights: Some(Eights {
            formats,
            scales: (a.scale, b.scale),
            exact,
        }),
        output: c.dtype,
        alpha: 1.0,
        beta: f32::from(u8::from(whole && old.is_present())),
        beta_at: if whole { factor.ptr } else { 0 },
        add: match add {
            Added::Tensor(t) if whole => t.ptr,
            Added::Tensor(_) | Added::Factor(_) => 0,
        },
    }));
    if !whole {
        r.launch(
            ("fp8", "crop"),
            types(&[("TR0", c.dtype)]),
            over(m * n),
            THREADS,
            vec![
                (&out).into(),
                c.into(),
                old.into(),
                factor.into(),
                long(m),
                long(n),
                long(sizes.1),
            ],
        );
    }
}

/// As [`linear::linear`].
pub fn linear_fp8(r: &mut Recorder, a: &Args) {
    let (x, w, y) = (a.arg(0), a.arg(1), a.res(0));
    let (m, n, k) = (x.rows(), w.size(0), w.size(1));
    if m * n * k == 0 {
        return linear::linear(r, a);
    }
    let x = as_is(x, m, k, Eight::E4m3);
    let w = as_is(w, n, k, Eight::E4m3);
    product(r, (&x, &w), y, (m, n, k), &Added::Tensor(a.arg(3)), false);
    add_bias(r, a);
}

/// As [`linear::linear_dx`].
pub fn linear_dx_fp8(r: &mut Recorder, a: &Args) {
    let (dy, w) = (a.arg(0), a.arg(1));
    let (m, n, k) = (dy.rows(), w.size(0), w.size(1));
    if m * n * k == 0 {
        return linear::linear_dx(r, a);
    }
    let dy = as_is(dy, m, n, Eight::E5m2);
    let w = turned(w, n, k, Eight::E4m3);
    product(
        r,
        (&dy, &w),
        a.res(0),
        (m, k, n),
        &Added::Tensor(a.arg(2)),
        true,
    );
}

/// As [`linear::linear_dw`].
pub fn linear_dw_fp8(r: &mut Recorder, a: &Args, start: usize) {
    let (x, dy) = (a.arg(0), a.arg(1));
    let (m, n, k) = (x.rows(), dy.last(), x.last());
    if m * n * k == 0 {
        return linear::linear_dw(r, a, start);
    }
    let dw = linear::rows_from(a.res(0), start, n, k);
    let dy = turned(dy, m, n, Eight::E5m2);
    let x = turned(x, m, k, Eight::E4m3);
    product(r, (&dy, &x), &dw, (n, k, m), &Added::Factor(a.arg(3)), true);
}

fn as_is(t: &Tensor, rows: usize, cols: usize, format: Eight) -> Operand<'_> {
    Operand {
        t,
        rows,
        cols,
        turned: false,
        format,
    }
}

fn turned(t: &Tensor, rows: usize, cols: usize, format: Eight) -> Operand<'_> {
    Operand {
        t,
        rows,
        cols,
        turned: true,
        format,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(ptr: u64, dtype: DType, dims: &[usize]) -> Option<Tensor> {
        Some(Tensor {
            ptr,
            dtype,
            dims: dims.to_vec(),
        })
    }

    fn recorded(
        args: &[Option<Tensor>],
        result: Tensor,
        launch: impl Fn(&mut Recorder, &Args),
    ) -> (Vec<Command>, usize) {
        let mut r = Recorder::new(1 << 30);
        let results = [result];
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

    #[test]
    fn whole_sizes_go_straight_to_their_result() {
        let (x, w) = (
            tensor(256, DType::Bf16, &[2, 32, 48]),
            tensor(1 << 20, DType::Bf16, &[80, 48]),
        );
        let y = tensor(1 << 21, DType::Bf16, &[2, 32, 80]).unwrap();
        let (commands, bytes) = recorded(&[x, w], y, linear_fp8);
        assert_eq!(
            functions(&commands),
            ["most8", "narrow16", "most8", "narrow16"]
        );
        // The words of both magnitudes are zeroed before anything adds to them.
        assert!(matches!(commands[0], Command::Zero { bytes: 8, .. }));
        let p = the_product(&commands);
        assert_eq!((p.sizes, p.transposed), ((64, 80, 48), (false, true)));
        assert_eq!((p.c, p.output, p.beta_at), (1 << 21, DType::Bf16, 0));
        assert_eq!((p.beta, p.add), (0.0, 0));
        let e = p.eights.as_ref().unwrap();
        assert_eq!((e.formats, e.exact), ((Eight::E4m3, Eight::E4m3), false));
        let inside = |at: u64| (1 << 30..(1 << 30) + bytes as u64).contains(&at);
        assert!([p.a, p.b, e.scales.0, e.scales.1].into_iter().all(inside));
        assert!(p.a.is_multiple_of(16) && p.b.is_multiple_of(16));
    }

    #[test]
    fn odd_sizes_are_padded_and_cropped() {
        let (dy, w) = (
            tensor(256, DType::Bf16, &[5, 19]),
            tensor(1 << 20, DType::Bf16, &[19, 7]),
        );
        let dx = tensor(1 << 21, DType::Bf16, &[5, 7]).unwrap();
        let (commands, bytes) = recorded(&[dy, w], dx, linear_dx_fp8);
        let names = ["most", "narrow", "most", "narrow_turned", "crop"];
        assert_eq!(functions(&commands), names);
        let p = the_product(&commands);
        assert_eq!(p.sizes, (16, 16, 32));
        assert_eq!(
            p.eights.as_ref().unwrap().formats,
            (Eight::E5m2, Eight::E4m3)
        );
        // dy [16 32] and w transposed [16 32] in bytes, dx [16 16] in bf16, three tensors of one element.
        assert_eq!(bytes, 512 + 512 + 512 + 3 * 256);
        assert!(p.c >= 1 << 30);
    }

    /// What is added is read where it is, by the product or by the kernel that crops it.
    #[test]
    fn sums_are_added_on_the_way() {
        for (n, by_product) in [(80, true), (81, false)] {
            let args = [
                tensor(256, DType::Bf16, &[64, 48]),
                tensor(1 << 20, DType::Bf16, &[n, 48]),
                None,
                tensor(1 << 22, DType::Bf16, &[64, n]),
            ];
            let y = tensor(1 << 21, DType::Bf16, &[64, n]).unwrap();
            let (commands, _) = recorded(&args, y, linear_fp8);
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
        let (x, dy) = (
            tensor(256, DType::Bf16, &[64, 32]),
            tensor(1 << 20, DType::Bf16, &[64, 48]),
        );
        let (into, beta) = (
            tensor(1 << 21, DType::F32, &[100, 32]),
            tensor(1 << 22, DType::F32, &[1]),
        );
        let args = [x, dy, into.clone(), beta];
        let (commands, _) = recorded(&args, into.unwrap(), |r, a| linear_dw_fp8(r, a, 3));
        assert_eq!(
            functions(&commands),
            ["most8", "narrow_turned", "most8", "narrow_turned"]
        );
        let p = the_product(&commands);
        assert_eq!((p.sizes, p.output), ((48, 32, 64), DType::F32));
        assert_eq!((p.c, p.beta_at), ((1 << 21) + 3 * 32 * 4, 1 << 22));
        assert_eq!(
            p.eights.as_ref().unwrap().formats,
            (Eight::E5m2, Eight::E4m3)
        );
    }
}
