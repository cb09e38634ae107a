//! Elementwise programs: their CUDA source is generated, one kernel a program.

use crate::record::{Args, Command, Launch, Module, Param, Recorder, THREADS, long, over};
use std::borrow::Cow;
use std::fmt::Write;

/// Functions of one number, as the IR defines them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Un {
    Neg,
    Exp,
    Sigmoid,
    Silu,
    Softplus,
    Gelu,
    GeluTanh,
    Relu,
    DSilu,
    DGelu,
    DGeluTanh,
    Step,
    Scale(f32),
    Offset(f32),
}

/// Functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Bin {
    Add,
    Sub,
    Mul,
}

/// One instruction; operands are earlier registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Instr {
    /// Loads an argument.
    Arg(u16),
    /// A constant.
    Const(f32),
    /// Function of a register.
    Un(Un, u16),
    /// Function of two registers.
    Bin(Bin, u16, u16),
}

/// How an argument is repeated over the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broadcast {
    /// Element `i`.
    Full,
    /// One element.
    Scalar,
    /// Element `i % period`.
    Suffix(usize),
    /// Element `i / repeat`.
    Prefix(usize),
}

/// A program: instruction i fills register i.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Instructions.
    pub code: Vec<Instr>,
    /// Registers that are results.
    pub outs: Vec<u16>,
    /// How each argument is repeated.
    pub broadcast: Vec<Broadcast>,
}

/// A float as a literal with exactly its bits.
fn literal(x: f32) -> String {
    format!("__uint_as_float(0x{:08x}u)", x.to_bits())
}

impl Program {
    /// CUDA C++ of the kernel `pointwise(x0.., periods.., y0.., n)`. Registers that no result needs are left to the compiler.
    pub fn source(&self, args: &Args) -> String {
        let mut s = String::from("KERNEL pointwise(");
        for (i, b) in self.broadcast.iter().enumerate() {
            let _ = write!(s, "const {}* x{i}, ", args.arg(i).dtype.c_name());
            if matches!(b, Broadcast::Suffix(_) | Broadcast::Prefix(_)) {
                let _ = write!(s, "i64 k{i}, ");
            }
        }
        for k in 0..self.outs.len() {
            let _ = write!(s, "{}* y{k}, ", args.res(k).dtype.c_name());
        }
        s.push_str("i64 n) {\n    for (i64 i = global_thread(); i < n; i += all_threads()) {\n");
        let at = |i: usize, b: Broadcast, wide: bool| match (b, wide) {
            (Broadcast::Full, _) => "i".to_string(),
            (Broadcast::Scalar, _) => "0".to_string(),
            (Broadcast::Suffix(_), true) => format!("i % k{i}"),
            (Broadcast::Prefix(_), true) => format!("i / k{i}"),
            (Broadcast::Suffix(_), false) => format!("(u32)i % (u32)k{i}"),
            (Broadcast::Prefix(_), false) => format!("(u32)i / (u32)k{i}"),
        };
        let wide = args.res(0).len() >= u32::MAX as usize;
        for (r, instr) in self.code.iter().enumerate() {
            let text = match *instr {
                Instr::Arg(a) => {
                    let a = a as usize;
                    let b = self.broadcast.get(a).copied().unwrap_or(Broadcast::Full);
                    format!("ld(x{a}, {})", at(a, b, wide))
                }
                Instr::Const(c) => literal(c),
                Instr::Un(f, x) => match f {
                    Un::Neg => format!("-r{x}"),
                    Un::Exp => format!("expf(r{x})"),
                    Un::Sigmoid => format!("sigmoid(r{x})"),
                    Un::Silu => format!("silu(r{x})"),
                    Un::Softplus => format!("softplus(r{x})"),
                    Un::Gelu => format!("gelu(r{x})"),
                    Un::GeluTanh => format!("gelu_tanh(r{x})"),
                    Un::Relu => format!("(r{x} > 0.f ? r{x} : 0.f)"),
                    Un::DSilu => format!("dsilu(r{x})"),
                    Un::DGelu => format!("dgelu(r{x})"),
                    Un::DGeluTanh => format!("dgelu_tanh(r{x})"),
                    Un::Step => format!("(r{x} > 0.f ? 1.f : 0.f)"),
                    Un::Scale(c) => format!("{} * r{x}", literal(c)),
                    Un::Offset(c) => format!("r{x} + {}", literal(c)),
                },
                Instr::Bin(f, x, y) => {
                    let sign = match f {
                        Bin::Add => '+',
                        Bin::Sub => '-',
                        Bin::Mul => '*',
                    };
                    format!("r{x} {sign} r{y}")
                }
            };
            let _ = writeln!(s, "        float r{r} = {text};");
        }
        for (k, o) in self.outs.iter().enumerate() {
            let _ = writeln!(s, "        st(y{k}, i, r{o});");
        }
        s.push_str("    }\n}\n");
        s
    }
}

/// `y...` of `x...`.
pub fn pointwise(r: &mut Recorder, a: &Args, program: &Program) {
    let n = a.res(0).len();
    if n == 0 || program.outs.is_empty() {
        return;
    }
    let mut params: Vec<Param> = Vec::new();
    for (i, b) in program.broadcast.iter().enumerate() {
        params.push(a.arg(i).into());
        match *b {
            Broadcast::Suffix(k) | Broadcast::Prefix(k) => params.push(long(k)),
            Broadcast::Full | Broadcast::Scalar => {}
        }
    }
    params.extend(a.results.iter().map(Param::from));
    params.push(long(n));
    r.commands.push(Command::Launch(Launch {
        module: Module {
            stem: "pointwise",
            source: Cow::Owned(program.source(a)),
            defines: Vec::new(),
        },
        function: "pointwise",
        grid: over(n),
        block: THREADS,
        shared: 0,
        params,
    }));
}
