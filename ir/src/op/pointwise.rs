//! Elementwise programs. One op for every chain of elementwise steps: the fusion pass merges programs, backends run them in one sweep.
//!
//! A program is a list of instructions over registers: register i is the result of instruction i, and the first `n_args` instructions
//! load the arguments. Arguments smaller than the result are repeated as [`Broadcast`] says. Arithmetic in f32.
//!
//! | arg/result | type | meaning |
//! |---|---|---|
//! | x0.. | f[..] | at least one has the full shape |
//! | -> y.. | f[..] | one per entry of `outs`; shape and element type of the first full argument |

use super::{ArgTypes, Differentiable, OpDef, SumTo};
use crate::vjp::Vjp;
use crate::{Type, TypeError};

/// How a small argument is repeated over the result, in row-major order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broadcast {
    /// Same sizes.
    Full,
    /// One element for all.
    Scalar,
    /// Sizes are a suffix of the result's: element `i % period`.
    Suffix {
        /// Number of elements of the argument.
        period: usize,
    },
    /// Same rank with trailing 1s: element `i / repeat`.
    Prefix {
        /// Elements that share one.
        repeat: usize,
    },
}

impl Broadcast {
    /// How `arg` is repeated to the shape of `out`; `None` when it cannot be.
    pub fn of(arg: &Type, out: &Type) -> Option<Broadcast> {
        let (a, o) = (arg.sizes(), out.sizes());
        if a == o {
            return Some(Broadcast::Full);
        }
        if arg.len() == 1 {
            return Some(Broadcast::Scalar);
        }
        if a.len() <= o.len() && o.ends_with(&a) {
            return Some(Broadcast::Suffix { period: arg.len() });
        }
        if a.len() == o.len() {
            let same = a.iter().zip(&o).take_while(|(x, y)| x == y).count();
            if a[same..].iter().all(|&n| n == 1) {
                return Some(Broadcast::Prefix {
                    repeat: o[same..].iter().product(),
                });
            }
        }
        None
    }
}

/// Functions of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Un {
    /// `-x`.
    Neg,
    /// `e^x`.
    Exp,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x sigmoid(x)`.
    Silu,
    /// `ln(1 + e^x)`, linear above 20 as torch.
    Softplus,
    /// `x Phi(x)`, exact by erf.
    Gelu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// Derivative of [`Un::Silu`].
    DSilu,
    /// Derivative of [`Un::Gelu`].
    DGelu,
    /// Derivative of [`Un::GeluTanh`].
    DGeluTanh,
    /// 1 where x > 0, else 0.
    Step,
    /// `c x`.
    Scale(f32),
    /// `x + c`.
    Offset(f32),
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bin {
    /// `x + y`.
    Add,
    /// `x - y`.
    Sub,
    /// `x y`.
    Mul,
}

/// One instruction; operands are earlier registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instr {
    /// Loads argument i.
    Arg(u16),
    /// A constant.
    Const(f32),
    /// Function of a register.
    Un(Un, u16),
    /// Function of two registers.
    Bin(Bin, u16, u16),
}

/// An elementwise program.
#[derive(Clone, Debug, PartialEq)]
pub struct Pointwise {
    /// Number of arguments; instruction i < n_args is `Arg(i)`.
    pub n_args: usize,
    /// Instructions.
    pub code: Vec<Instr>,
    /// Registers that are results.
    pub outs: Vec<u16>,
}

impl Pointwise {
    /// A program with `n_args` arguments in registers 0.. and no results yet.
    pub fn new(n_args: usize) -> Self {
        Pointwise {
            n_args,
            code: (0..n_args as u16).map(Instr::Arg).collect(),
            outs: Vec::new(),
        }
    }

    fn add_instr(&mut self, i: Instr) -> u16 {
        if let Some(found) = self.code.iter().position(|&c| c == i) {
            return found as u16;
        }
        self.code.push(i);
        (self.code.len() - 1) as u16
    }

    /// Appends a constant.
    pub fn konst(&mut self, c: f32) -> u16 {
        self.add_instr(Instr::Const(c))
    }

    /// Appends a function of one register.
    pub fn un(&mut self, f: Un, x: u16) -> u16 {
        self.add_instr(Instr::Un(f, x))
    }

    /// Appends a function of two registers.
    pub fn bin(&mut self, f: Bin, x: u16, y: u16) -> u16 {
        self.add_instr(Instr::Bin(f, x, y))
    }

    /// Marks a register as the next result.
    pub fn out(mut self, r: u16) -> Self {
        self.outs.push(r);
        self
    }

    /// `f(x)`.
    pub fn map(f: Un) -> Self {
        let mut p = Pointwise::new(1);
        let r = p.un(f, 0);
        p.out(r)
    }

    /// `f(x, y)`.
    pub fn zip(f: Bin) -> Self {
        let mut p = Pointwise::new(2);
        let r = p.bin(f, 0, 1);
        p.out(r)
    }

    /// `x + y`.
    pub fn add() -> Self {
        Pointwise::zip(Bin::Add)
    }

    /// `x * y`.
    pub fn mul() -> Self {
        Pointwise::zip(Bin::Mul)
    }

    /// `x + c y`: a residual sum with a multiplier.
    pub fn add_scaled(c: f32) -> Self {
        let mut p = Pointwise::new(2);
        let s = if c == 1.0 { 1 } else { p.un(Un::Scale(c), 1) };
        let r = p.bin(Bin::Add, 0, s);
        p.out(r)
    }

    /// `f(x) * y`: a gate.
    pub fn gate(f: Un) -> Self {
        let mut p = Pointwise::new(2);
        let a = p.un(f, 0);
        let r = p.bin(Bin::Mul, a, 1);
        p.out(r)
    }

    /// The same number everywhere, in the shape of the argument (which is not read).
    pub fn constant(c: f32) -> Self {
        let mut p = Pointwise::new(1);
        let r = p.konst(c);
        p.out(r)
    }

    /// Drops instructions no result needs and arguments nothing reads (but the first full one, which gives the shape, stays when none
    /// other would). Returns the program and the argument slots it kept.
    pub fn prune(&self, keep_arg: usize) -> (Pointwise, Vec<usize>) {
        let mut live = vec![false; self.code.len()];
        for &o in &self.outs {
            live[o as usize] = true;
        }
        for i in (0..self.code.len()).rev() {
            if live[i] {
                match self.code[i] {
                    Instr::Arg(_) | Instr::Const(_) => {}
                    Instr::Un(_, x) => live[x as usize] = true,
                    Instr::Bin(_, x, y) => {
                        live[x as usize] = true;
                        live[y as usize] = true;
                    }
                }
            }
        }
        live[keep_arg] = true;
        let kept: Vec<usize> = (0..self.n_args).filter(|&i| live[i]).collect();
        let mut p = Pointwise::new(kept.len());
        let mut map = vec![0u16; self.code.len()];
        for (new, &old) in kept.iter().enumerate() {
            map[old] = new as u16;
        }
        for i in self.n_args..self.code.len() {
            if live[i] {
                map[i] = match self.code[i] {
                    Instr::Arg(a) => map[a as usize],
                    Instr::Const(c) => p.konst(c),
                    Instr::Un(f, x) => p.un(f, map[x as usize]),
                    Instr::Bin(f, x, y) => p.bin(f, map[x as usize], map[y as usize]),
                };
            }
        }
        p.outs = self.outs.iter().map(|&o| map[o as usize]).collect();
        (p, kept)
    }

    /// As [`Pointwise::prune`] for arguments of these types: of the arguments that give the results their type `result`, keeps one
    /// that is read where there is one, and puts it first.
    pub(crate) fn prune_typed(&self, types: &[&Type], result: &Type) -> (Pointwise, Vec<usize>) {
        let gives = |i: usize| types[i].dtype == result.dtype && types[i].same_shape(result);
        let candidates: Vec<usize> = (0..self.n_args).filter(|&i| gives(i)).collect();
        let all = self.prune(candidates.first().copied().unwrap_or(0));
        let best = candidates
            .iter()
            .map(|&c| self.prune(c))
            .find(|(_, kept)| kept.len() < all.1.len());
        let (program, kept) = best.unwrap_or(all);
        let Some(first) = kept.iter().position(|&i| gives(i)) else {
            return (program, kept);
        };
        let mut order: Vec<usize> = (0..kept.len()).collect();
        order[..=first].rotate_right(1);
        (
            program.permute(&order),
            order.iter().map(|&i| kept[i]).collect(),
        )
    }

    /// The same program with argument `order[i]` in place i.
    fn permute(&self, order: &[usize]) -> Pointwise {
        let mut map: Vec<u16> = (0..self.code.len() as u16).collect();
        for (new, &old) in order.iter().enumerate() {
            map[old] = new as u16;
        }
        let mut p = Pointwise::new(self.n_args);
        for instr in &self.code[self.n_args..] {
            p.code.push(match *instr {
                Instr::Arg(a) => Instr::Arg(a),
                Instr::Const(c) => Instr::Const(c),
                Instr::Un(f, x) => Instr::Un(f, map[x as usize]),
                Instr::Bin(f, x, y) => Instr::Bin(f, map[x as usize], map[y as usize]),
            });
        }
        p.outs = self.outs.iter().map(|&o| map[o as usize]).collect();
        p
    }

    /// Appends the instructions of `other`, whose arguments are in the registers `args` of `self`; returns the registers of its
    /// results. The operations and their order within `other` stay, so the numbers do.
    pub(crate) fn append(&mut self, other: &Pointwise, args: &[u16]) -> Vec<u16> {
        let mut map: Vec<u16> = args.to_vec();
        for instr in &other.code[other.n_args..] {
            map.push(match *instr {
                Instr::Arg(a) => map[a as usize],
                Instr::Const(c) => self.konst(c),
                Instr::Un(f, x) => self.un(f, map[x as usize]),
                Instr::Bin(f, x, y) => self.bin(f, map[x as usize], map[y as usize]),
            });
        }
        other.outs.iter().map(|&o| map[o as usize]).collect()
    }

    /// The derivative program: arguments are those of `self`, then one gradient per result; results are the gradients of the
    /// arguments in `wanted`.
    pub fn derivative(&self, wanted: &[usize]) -> Pointwise {
        let n = self.n_args;
        let mut p = Pointwise::new(n + self.outs.len());
        let mut map: Vec<u16> = (0..n as u16).collect();
        for instr in &self.code[n..] {
            let r = match *instr {
                Instr::Arg(a) => a,
                Instr::Const(c) => p.konst(c),
                Instr::Un(f, x) => p.un(f, map[x as usize]),
                Instr::Bin(f, x, y) => p.bin(f, map[x as usize], map[y as usize]),
            };
            map.push(r);
        }
        let mut adj: Vec<Option<u16>> = vec![None; self.code.len()];
        let add = |p: &mut Pointwise, adj: &mut Vec<Option<u16>>, i: u16, d: u16| {
            adj[i as usize] = Some(match adj[i as usize] {
                Some(old) => p.bin(Bin::Add, old, d),
                None => d,
            });
        };
        for (k, &o) in self.outs.iter().enumerate() {
            add(&mut p, &mut adj, o, (n + k) as u16);
        }
        for i in (n..self.code.len()).rev() {
            let Some(d) = adj[i] else { continue };
            match self.code[i] {
                Instr::Arg(_) | Instr::Const(_) => {}
                Instr::Un(f, x) => {
                    let (xr, yr) = (map[x as usize], map[i]);
                    let dx = match f {
                        Un::Neg => p.un(Un::Neg, d),
                        Un::Exp => p.bin(Bin::Mul, d, yr),
                        Un::Sigmoid => {
                            let neg = p.un(Un::Neg, yr);
                            let one_minus = p.un(Un::Offset(1.0), neg);
                            let s = p.bin(Bin::Mul, yr, one_minus);
                            p.bin(Bin::Mul, d, s)
                        }
                        Un::Silu => {
                            let s = p.un(Un::DSilu, xr);
                            p.bin(Bin::Mul, d, s)
                        }
                        Un::Softplus => {
                            let s = p.un(Un::Sigmoid, xr);
                            p.bin(Bin::Mul, d, s)
                        }
                        Un::Gelu => {
                            let s = p.un(Un::DGelu, xr);
                            p.bin(Bin::Mul, d, s)
                        }
                        Un::GeluTanh => {
                            let s = p.un(Un::DGeluTanh, xr);
                            p.bin(Bin::Mul, d, s)
                        }
                        Un::Relu => {
                            let s = p.un(Un::Step, xr);
                            p.bin(Bin::Mul, d, s)
                        }
                        // Second derivatives never arise: backward nodes are not differentiated.
                        Un::Step | Un::DSilu | Un::DGelu | Un::DGeluTanh => continue,
                        Un::Scale(c) => p.un(Un::Scale(c), d),
                        Un::Offset(_) => d,
                    };
                    add(&mut p, &mut adj, x, dx);
                }
                Instr::Bin(f, x, y) => {
                    let (xr, yr) = (map[x as usize], map[y as usize]);
                    let (dx, dy) = match f {
                        Bin::Add => (d, d),
                        Bin::Sub => (d, p.un(Un::Neg, d)),
                        Bin::Mul => (p.bin(Bin::Mul, d, yr), p.bin(Bin::Mul, d, xr)),
                    };
                    add(&mut p, &mut adj, x, dx);
                    add(&mut p, &mut adj, y, dy);
                }
            }
        }
        for &w in wanted {
            let r = match adj[w] {
                Some(r) => r,
                None => p.konst(0.0),
            };
            p.outs.push(r);
        }
        p
    }
}

impl OpDef for Pointwise {
    const NAME: &'static str = "pointwise";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.check(
            a.types.len() == self.n_args,
            a.types.len(),
            format!("{} arguments", self.n_args),
        )?;
        let mut shape = a.req(0, "x")?;
        for i in 1..self.n_args {
            let t = a.req(i, "x")?;
            if t.len() > shape.len() || (t.len() == shape.len() && t.rank() > shape.rank()) {
                shape = t;
            }
        }
        for i in 0..self.n_args {
            let t = a.req(i, "x")?;
            a.check(
                t.dtype.is_float() && Broadcast::of(t, shape).is_some(),
                t,
                format!("a type that broadcasts to {shape}"),
            )?;
        }
        for (i, instr) in self.code.iter().enumerate() {
            let ok = match *instr {
                Instr::Arg(k) => i < self.n_args && k as usize == i,
                Instr::Const(_) => i >= self.n_args,
                Instr::Un(_, x) => i >= self.n_args && (x as usize) < i,
                Instr::Bin(_, x, y) => i >= self.n_args && (x as usize) < i && (y as usize) < i,
            };
            a.check(
                ok,
                format!("instruction {i} {instr:?}"),
                "arguments first, operands before their use",
            )?;
        }
        Ok(vec![shape.clone(); self.outs.len()])
    }
    fn flops(&self, _: &[Option<&Type>], results: &[&Type]) -> f64 {
        (self.code.len() - self.n_args) as f64 * results.first().map_or(0, |t| t.len()) as f64
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["x"]
    }
    /// An expression per result, such as `silu(x0)*x1`; what is computed once and read several times gets a name first
    /// (`t3 = sigmoid(x0); ...`).
    fn attrs(&self) -> String {
        let mut reads = vec![0usize; self.code.len()];
        for instr in &self.code {
            match *instr {
                Instr::Arg(_) | Instr::Const(_) => {}
                Instr::Un(_, x) => reads[x as usize] += 1,
                Instr::Bin(_, x, y) => {
                    reads[x as usize] += 1;
                    reads[y as usize] += 1;
                }
            }
        }
        for &o in &self.outs {
            reads[o as usize] += 1;
        }
        let mut parts = Vec::new();
        let mut texts: Vec<String> = Vec::with_capacity(self.code.len());
        for (r, instr) in self.code.iter().enumerate() {
            let of = |x: u16| &texts[x as usize];
            let text = match *instr {
                Instr::Arg(i) => format!("x{i}"),
                Instr::Const(c) => format!("{c}"),
                Instr::Un(Un::Neg, x) => format!("-{}", of(x)),
                Instr::Un(Un::Scale(c), x) => format!("{c}*{}", of(x)),
                Instr::Un(Un::Offset(c), x) => format!("({} + {c})", of(x)),
                Instr::Un(f, x) => format!("{}({})", format!("{f:?}").to_lowercase(), of(x)),
                Instr::Bin(Bin::Add, x, y) => format!("({} + {})", of(x), of(y)),
                Instr::Bin(Bin::Sub, x, y) => format!("({} - {})", of(x), of(y)),
                Instr::Bin(Bin::Mul, x, y) => format!("{}*{}", of(x), of(y)),
            };
            let leaf = matches!(instr, Instr::Arg(_) | Instr::Const(_));
            texts.push(if !leaf && reads[r] > 1 {
                parts.push(format!("t{r} = {text}"));
                format!("t{r}")
            } else {
                text
            });
        }
        parts.extend(self.outs.iter().map(|&o| texts[o as usize].clone()));
        parts.join("; ")
    }
}

impl Differentiable for Pointwise {
    fn vjp(&self, cx: &mut Vjp) -> Result<(), TypeError> {
        let wanted: Vec<usize> = (0..self.n_args).filter(|&i| cx.needs(i)).collect();
        let mut with_zero = self.clone();
        let live: Vec<usize> = (0..self.outs.len())
            .filter(|&i| cx.d_result(i).is_some())
            .collect();
        with_zero.outs = live.iter().map(|&i| self.outs[i]).collect();
        let d = with_zero.derivative(&wanted);
        let mut args: Vec<_> = cx.args().to_vec();
        args.extend(live.iter().map(|&i| cx.d_result(i)));
        // Gradients that pass through unchanged need no node; the others share one.
        let is_d = |r: u16| (r as usize) >= self.n_args && (r as usize) < d.n_args;
        let computed: Vec<usize> = (0..wanted.len()).filter(|&k| !is_d(d.outs[k])).collect();
        let mut grads: Vec<Option<crate::ValueId>> = d
            .outs
            .iter()
            .map(|&r| if is_d(r) { args[r as usize] } else { None })
            .collect();
        if !computed.is_empty() {
            let sub = Pointwise {
                outs: computed.iter().map(|&k| d.outs[k]).collect(),
                ..d.clone()
            };
            let (program, kept) = sub.prune(self.n_args);
            let results = cx.push(program, kept.iter().map(|&i| args[i]).collect())?;
            for (&k, r) in computed.iter().zip(results) {
                grads[k] = Some(r);
            }
        }
        for (&slot, grad) in wanted.iter().zip(grads) {
            let (Some(grad), Some(arg)) = (grad, cx.arg(slot)) else {
                continue;
            };
            let dims = cx.ty(arg).dims.clone();
            let grad = if cx.ty(grad).same_shape(cx.ty(arg)) {
                grad
            } else {
                cx.push1(SumTo { dims }, vec![Some(grad)])?
            };
            cx.set(slot, grad);
        }
        Ok(())
    }
}
