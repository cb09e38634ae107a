//! Elementwise programs: an interpreter over tiles that stay in the first-level cache. Each instruction is one vectorised loop over a
//! tile, so a program of any length reads its arguments once and writes its results once.

use super::math;
use super::simd::simd;
use super::tensor::{Args, Cx, Results, Scratch};
use marimba_ir::op::{Bin, Broadcast, Instr, Pointwise, Un};

/// Elements of a tile: a few registers of it fit a 32 KiB cache.
const TILE: usize = 512;

/// Elements of a task.
const TASK: usize = 32 * TILE;

/// Runs the program over all elements.
pub(super) fn pointwise(op: &Pointwise, a: &Args, r: &mut Results, cx: &Cx) {
    let shape = r.ty(0);
    let args: Vec<Operand> = (0..op.n_args)
        .map(|i| Operand {
            data: a.f(i),
            // Type inference has seen that it broadcasts; a scalar reading is in bounds whatever happens.
            how: Broadcast::of(a.ty(i), shape).unwrap_or(Broadcast::Scalar),
        })
        .collect();
    let n = shape.len();
    let mut tasks: Vec<Vec<&mut [f32]>> = (0..n.div_ceil(TASK)).map(|_| Vec::new()).collect();
    for k in 0..op.outs.len() {
        for (task, chunk) in tasks.iter_mut().zip(r.take_f(k).chunks_mut(TASK)) {
            task.push(chunk);
        }
    }
    let layout = Layout::new(op, &args);
    cx.for_each(tasks, |task, mut outs, scratch| {
        run_task(op, &args, &layout, task * TASK, &mut outs, scratch);
    });
}

/// An argument and how it is repeated.
struct Operand<'a> {
    data: &'a [f32],
    how: Broadcast,
}

/// Where each register is.
#[derive(Clone, Copy)]
enum Home {
    /// A full argument: read where it lies.
    Arg(usize),
    /// Tile `i` of scratch memory.
    Tile(usize),
    /// Nothing reads it.
    Nowhere,
}

/// Homes of all registers, tiles reused as registers die.
struct Layout {
    homes: Vec<Home>,
    n_tiles: usize,
}

impl Layout {
    fn new(op: &Pointwise, args: &[Operand]) -> Self {
        let mut last = vec![None; op.code.len()];
        for (i, instr) in op.code.iter().enumerate() {
            match *instr {
                Instr::Arg(_) | Instr::Const(_) => {}
                Instr::Un(_, x) => last[x as usize] = Some(i),
                Instr::Bin(_, x, y) => {
                    last[x as usize] = Some(i);
                    last[y as usize] = Some(i);
                }
            }
        }
        for &o in &op.outs {
            last[o as usize] = Some(usize::MAX);
        }
        let (mut free, mut n_tiles) = (Vec::new(), 0);
        let mut homes = vec![Home::Nowhere; op.code.len()];
        for (i, instr) in op.code.iter().enumerate() {
            if last[i].is_none() {
                continue;
            }
            let mut tile = |pinned: bool, free: &mut Vec<usize>| {
                let reused = if pinned { None } else { free.pop() };
                Home::Tile(reused.unwrap_or_else(|| {
                    n_tiles += 1;
                    n_tiles - 1
                }))
            };
            homes[i] = match *instr {
                Instr::Arg(k) => match args[k as usize].how {
                    Broadcast::Full => Home::Arg(k as usize),
                    // Filled once for a task, so never shared; others before every tile, but the first instructions run first.
                    Broadcast::Scalar | Broadcast::Suffix { .. } | Broadcast::Prefix { .. } => {
                        tile(true, &mut free)
                    }
                },
                Instr::Const(_) => tile(true, &mut free),
                Instr::Un(..) | Instr::Bin(..) => tile(false, &mut free),
            };
            let operands = match *instr {
                Instr::Arg(_) | Instr::Const(_) => [None, None],
                Instr::Un(_, x) => [Some(x as usize), None],
                Instr::Bin(_, x, y) => [Some(x as usize), (x != y).then_some(y as usize)],
            };
            for x in operands.into_iter().flatten() {
                let temporary = matches!(op.code[x], Instr::Un(..) | Instr::Bin(..));
                if let (true, true, Home::Tile(t)) = (temporary, last[x] == Some(i), homes[x]) {
                    free.push(t);
                }
            }
        }
        Layout { homes, n_tiles }
    }
}

/// Elements `first..` of the results.
fn run_task(
    op: &Pointwise,
    args: &[Operand],
    layout: &Layout,
    first: usize,
    outs: &mut [&mut [f32]],
    scratch: &mut Scratch,
) {
    let len = outs.first().map_or(0, |o| o.len());
    let mut tiles: Vec<&mut [f32]> = scratch
        .f32(layout.n_tiles * TILE)
        .chunks_mut(TILE)
        .collect();
    // What is the same in all tiles.
    for (i, instr) in op.code.iter().enumerate() {
        let Home::Tile(t) = layout.homes[i] else {
            continue;
        };
        match *instr {
            Instr::Const(c) => tiles[t].fill(c),
            Instr::Arg(k) if args[k as usize].how == Broadcast::Scalar => {
                tiles[t].fill(args[k as usize].data[0])
            }
            Instr::Arg(_) | Instr::Un(..) | Instr::Bin(..) => {}
        }
    }
    let mut start = 0;
    while start < len {
        let n = TILE.min(len - start);
        let at = first + start;
        for (i, instr) in op.code.iter().enumerate() {
            let Home::Tile(t) = layout.homes[i] else {
                continue;
            };
            let out = std::mem::take(&mut tiles[t]);
            {
                let dst = &mut out[..n];
                let read = |x: u16| match layout.homes[x as usize] {
                    Home::Arg(k) => &args[k].data[at..at + n],
                    Home::Tile(t) => &tiles[t][..n],
                    Home::Nowhere => &[],
                };
                match *instr {
                    Instr::Arg(k) => repeat(&args[k as usize], at, dst),
                    Instr::Const(_) => {}
                    Instr::Un(f, x) => un(f, dst, read(x)),
                    Instr::Bin(f, x, y) => bin(f, dst, read(x), read(y)),
                }
            }
            tiles[t] = out;
        }
        for (&o, out) in op.outs.iter().zip(outs.iter_mut()) {
            let src = match layout.homes[o as usize] {
                Home::Arg(k) => &args[k].data[at..at + n],
                Home::Tile(t) => &tiles[t][..n],
                Home::Nowhere => &[],
            };
            out[start..start + n].copy_from_slice(src);
        }
        start += n;
    }
}

/// Elements `at..` of a repeated argument.
fn repeat(arg: &Operand, at: usize, dst: &mut [f32]) {
    match arg.how {
        Broadcast::Full => dst.copy_from_slice(&arg.data[at..at + dst.len()]),
        // Filled once for the task.
        Broadcast::Scalar => {}
        Broadcast::Suffix { period } => {
            let (mut i, mut from) = (0, at % period);
            while i < dst.len() {
                let n = (period - from).min(dst.len() - i);
                dst[i..i + n].copy_from_slice(&arg.data[from..from + n]);
                i += n;
                from = 0;
            }
        }
        Broadcast::Prefix { repeat } => {
            let mut i = 0;
            while i < dst.len() {
                let element = (at + i) / repeat;
                let n = ((element + 1) * repeat - (at + i)).min(dst.len() - i);
                dst[i..i + n].fill(arg.data[element]);
                i += n;
            }
        }
    }
}

simd! {
    fn un(f: Un, y: &mut [f32], x: &[f32]) {
        #[inline(always)]
        fn map(y: &mut [f32], x: &[f32], f: impl Fn(f32) -> f32) {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = f(x);
            }
        }
        match f {
            Un::Neg => map(y, x, |x| -x),
            Un::Exp => map(y, x, math::exp),
            Un::Sigmoid => map(y, x, math::sigmoid),
            Un::Silu => map(y, x, math::silu),
            Un::Softplus => map(y, x, math::softplus),
            Un::Gelu => map(y, x, math::gelu),
            Un::GeluTanh => map(y, x, math::gelu_tanh),
            // NaN stays NaN, as in the other backends.
            Un::Relu => map(y, x, |x| if x < 0.0 { 0.0 } else { x }),
            Un::DSilu => map(y, x, math::d_silu),
            Un::DGelu => map(y, x, math::d_gelu),
            Un::DGeluTanh => map(y, x, math::d_gelu_tanh),
            Un::Step => map(y, x, |x| if x > 0.0 { 1.0 } else { 0.0 }),
            Un::Scale(c) => map(y, x, |x| c * x),
            Un::Offset(c) => map(y, x, |x| x + c),
        }
    }

    fn bin(f: Bin, z: &mut [f32], x: &[f32], y: &[f32]) {
        #[inline(always)]
        fn zip(z: &mut [f32], x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) {
            for ((z, &x), &y) in z.iter_mut().zip(x).zip(y) {
                *z = f(x, y);
            }
        }
        match f {
            Bin::Add => zip(z, x, y, |x, y| x + y),
            Bin::Sub => zip(z, x, y, |x, y| x - y),
            Bin::Mul => zip(z, x, y, |x, y| x * y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::math::tests::erfc64;
    use super::super::testing::*;
    use super::*;
    use marimba_ir::{Type, dims};

    fn un64(f: Un, x: f64) -> f64 {
        let sig = |x: f64| 1.0 / (1.0 + (-x).exp());
        let gelu = |x: f64| 0.5 * x * erfc64(-x / 2f64.sqrt());
        let gelu_tanh = |x: f64| {
            x * sig(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x))
        };
        let h = 1e-6;
        let slope = |f: &dyn Fn(f64) -> f64| (f(x + h) - f(x - h)) / (2.0 * h);
        match f {
            Un::Neg => -x,
            Un::Exp => x.exp(),
            Un::Sigmoid => sig(x),
            Un::Silu => x * sig(x),
            Un::Softplus => {
                if x > 20.0 {
                    x
                } else {
                    x.exp().ln_1p()
                }
            }
            Un::Gelu => gelu(x),
            Un::GeluTanh => gelu_tanh(x),
            Un::Relu => x.max(0.0),
            Un::DSilu => slope(&|x| x * sig(x)),
            Un::DGelu => slope(&gelu),
            Un::DGeluTanh => slope(&gelu_tanh),
            Un::Step => f64::from(x > 0.0),
            Un::Scale(c) => f64::from(c) * x,
            Un::Offset(c) => x + f64::from(c),
        }
    }

    /// Evaluates the program element by element.
    fn reference(op: &Pointwise, args: &[(Type, Vec<f32>)], shape: &Type, out: usize) -> Vec<f64> {
        (0..shape.len())
            .map(|e| {
                let mut regs: Vec<f64> = Vec::new();
                for instr in &op.code {
                    let v = match *instr {
                        Instr::Arg(k) => {
                            let (ty, data) = &args[k as usize];
                            let at = match Broadcast::of(ty, shape).unwrap() {
                                Broadcast::Full => e,
                                Broadcast::Scalar => 0,
                                Broadcast::Suffix { period } => e % period,
                                Broadcast::Prefix { repeat } => e / repeat,
                            };
                            f64::from(data[at])
                        }
                        Instr::Const(c) => f64::from(c),
                        Instr::Un(f, x) => un64(f, regs[x as usize]),
                        Instr::Bin(Bin::Add, x, y) => regs[x as usize] + regs[y as usize],
                        Instr::Bin(Bin::Sub, x, y) => regs[x as usize] - regs[y as usize],
                        Instr::Bin(Bin::Mul, x, y) => regs[x as usize] * regs[y as usize],
                    };
                    regs.push(v);
                }
                regs[op.outs[out] as usize]
            })
            .collect()
    }

    fn check(op: &Pointwise, types: &[Type]) {
        let args: Vec<(Type, Vec<f32>)> = types
            .iter()
            .enumerate()
            .map(|(i, t)| (t.clone(), randn(i as u64 + 1, t.len())))
            .collect();
        let given: Vec<_> = args.iter().map(|(t, x)| f(t.clone(), x)).collect();
        let shape = types.iter().max_by_key(|t| t.len()).unwrap();
        for (k, got) in run(op.clone(), &given).iter().enumerate() {
            close(floats(got), &reference(op, &args, shape, k), 3e-6);
        }
    }

    #[test]
    fn every_function_agrees_with_f64() {
        let full = Type::f32(dims![B 1, T 63, D 1000]);
        for u in [
            Un::Neg,
            Un::Exp,
            Un::Sigmoid,
            Un::Silu,
            Un::Softplus,
            Un::Gelu,
            Un::GeluTanh,
            Un::Relu,
            Un::DSilu,
            Un::DGelu,
            Un::DGeluTanh,
            Un::Step,
            Un::Scale(-1.5),
            Un::Offset(0.25),
        ] {
            check(&Pointwise::map(u), std::slice::from_ref(&full));
        }
        for b in [Bin::Add, Bin::Sub, Bin::Mul] {
            check(&Pointwise::zip(b), &[full.clone(), full.clone()]);
        }
    }

    #[test]
    fn arguments_repeat_in_all_four_ways() {
        let full = Type::f32(dims![B 3, T 63, D 65]);
        let mut p = Pointwise::new(5);
        let a = p.bin(Bin::Mul, 0, 1);
        let b = p.bin(Bin::Add, a, 2);
        let c = p.bin(Bin::Sub, b, 3);
        let k = p.konst(0.5);
        let d = p.bin(Bin::Mul, c, k);
        let e = p.bin(Bin::Mul, d, 4);
        let p = p.out(e).out(a).out(0).out(k);
        let types = [
            full.clone(),
            Type::f32(dims![T 63, D 65]),
            Type::f32(dims![B 3, T 63, D 1]),
            Type::f32(dims![X 1]),
            Type::f32(dims![D 65]),
        ];
        check(&p, &types);
        // A full argument need not come first, and may be read by nothing.
        let mut q = Pointwise::new(2);
        let c = q.konst(2.0);
        let r = q.bin(Bin::Mul, 0, c);
        check(&q.out(r), &[Type::f32(dims![D 65]), full.clone()]);
        check(&Pointwise::constant(3.0), &[full]);
    }

    /// Long chains reuse tiles; no register may be overwritten while something still reads it.
    #[test]
    fn random_programs_agree_with_f64() {
        let full = Type::f32(dims![T 37, D 41]);
        for seed in 0..40u64 {
            let noise = randn(seed + 100, 200);
            let pick = |i: usize, n: usize| ((noise[i].abs() * 1e4) as usize) % n;
            let mut p = Pointwise::new(3);
            for i in 0..30 {
                let n = p.code.len();
                let (x, y) = (pick(4 * i, n) as u16, pick(4 * i + 1, n) as u16);
                match pick(4 * i + 2, 6) {
                    0 => p.un(Un::Sigmoid, x),
                    1 => p.un(Un::Scale(0.7), x),
                    2 => p.konst(noise[i]),
                    3 => p.bin(Bin::Add, x, y),
                    4 => p.bin(Bin::Sub, x, y),
                    _ => {
                        let s = p.un(Un::Sigmoid, y);
                        p.bin(Bin::Mul, x, s)
                    }
                };
            }
            let n = p.code.len() as u16;
            let p = p.out(n - 1).out(n / 2).out(n - 2);
            check(
                &p,
                &[
                    full.clone(),
                    Type::f32(dims![D 41]),
                    Type::f32(dims![T 37, D 1]),
                ],
            );
        }
    }
}
