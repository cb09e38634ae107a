//! Elementwise programs: their CUDA source is generated, one kernel a program.

use crate::record::{
    Args, Command, Launch, Module, Param, Recorder, THREADS, Tensor, aligned, long, over,
};
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
        let big = args.res(0).len() >= u32::MAX as usize;
        let at = |i: usize, b: Broadcast| match (b, big) {
            (Broadcast::Full, _) => "i".to_string(),
            (Broadcast::Scalar, _) => "0".to_string(),
            (Broadcast::Suffix(_), true) => format!("i % k{i}"),
            (Broadcast::Prefix(_), true) => format!("i / k{i}"),
            (Broadcast::Suffix(_), false) => format!("(u32)i % (u32)k{i}"),
            (Broadcast::Prefix(_), false) => format!("(u32)i / (u32)k{i}"),
        };
        let of = |a: usize| self.broadcast.get(a).copied().unwrap_or(Broadcast::Full);
        let each = self.each(args);
        let _ = writeln!(
            s,
            "i64 n) {{\n    early();\n    for (i64 i = {each} * global_thread(); i < n; i += {each} * all_threads()) {{"
        );
        if each > 1 {
            for i in 0..self.broadcast.len() {
                let at = at(i, of(i));
                let _ = match of(i) {
                    Broadcast::Full | Broadcast::Suffix(_) => {
                        writeln!(s, "        float a{i}[8];\n        ld8(x{i}, {at}, a{i});")
                    }
                    Broadcast::Scalar | Broadcast::Prefix(_) => {
                        writeln!(s, "        float a{i} = ld(x{i}, {at});")
                    }
                };
            }
            for k in 0..self.outs.len() {
                let _ = writeln!(s, "        float b{k}[8];");
            }
            s.push_str("#pragma unroll\n        for (int e = 0; e < 8; e++) {\n");
        }
        for (r, instr) in self.code.iter().enumerate() {
            let text = match *instr {
                Instr::Arg(a) => {
                    let a = a as usize;
                    match (each > 1, of(a)) {
                        (true, Broadcast::Full | Broadcast::Suffix(_)) => format!("a{a}[e]"),
                        (true, Broadcast::Scalar | Broadcast::Prefix(_)) => format!("a{a}"),
                        (false, b) => format!("ld(x{a}, {})", at(a, b)),
                    }
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
            let _ = match each > 1 {
                true => writeln!(s, "        b{k}[e] = r{o};"),
                false => writeln!(s, "        st(y{k}, i, r{o});"),
            };
        }
        if each > 1 {
            s.push_str("        }\n");
            for k in 0..self.outs.len() {
                let _ = writeln!(s, "        st8(y{k}, i, b{k});");
            }
        }
        s.push_str("    }\n}\n");
        s
    }

    /// Elements that a thread computes at once: 8 where all that is loaded and stored together lies together.
    fn each(&self, args: &Args) -> usize {
        let sizes = self.broadcast.iter().all(|b| match *b {
            Broadcast::Full | Broadcast::Scalar => true,
            Broadcast::Suffix(k) | Broadcast::Prefix(k) => k.is_multiple_of(8),
        });
        let all: Vec<&Tensor> = args.args.iter().flatten().chain(args.results).collect();
        match sizes && args.res(0).len().is_multiple_of(8) && aligned(&all) {
            true => 8,
            false => 1,
        }
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
        grid: over(n / program.each(a)),
        block: THREADS,
        shared: 0,
        params,
        early: false,
    }));
    r.early();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::DType;
    use crate::{Compiler, Tensor};

    /// One element a thread and eight, in f32 and narrower types: the sources compile, and eight are taken only where that is allowed.
    #[test]
    fn sources_compile() {
        let tensor = |ptr, dtype, n| {
            Some(Tensor {
                ptr,
                dtype,
                dims: vec![n],
            })
        };
        for (dtype, n, ptr, each) in [
            (DType::F32, 64, 256, 8),
            (DType::Bf16, 64, 256, 8),
            (DType::F16, 64, 256, 8),
            (DType::Bf16, 60, 256, 1),
            (DType::Bf16, 64, 258, 1),
        ] {
            let args = [
                tensor(ptr, dtype, n),
                tensor(512, DType::F32, 1),
                tensor(512, dtype, 16),
                tensor(512, dtype, n / 16),
            ];
            let results = [
                tensor(1024, dtype, n).unwrap_or(Tensor::ABSENT),
                tensor(2048, dtype, n).unwrap_or(Tensor::ABSENT),
            ];
            let args = Args {
                args: &args,
                results: &results,
                fixed: &[],
            };
            let program = Program {
                code: vec![
                    Instr::Arg(0),
                    Instr::Arg(1),
                    Instr::Arg(2),
                    Instr::Arg(3),
                    Instr::Un(Un::Silu, 0),
                    Instr::Bin(Bin::Mul, 4, 1),
                    Instr::Bin(Bin::Add, 5, 2),
                    Instr::Bin(Bin::Sub, 6, 3),
                ],
                outs: vec![7, 4],
                broadcast: vec![
                    Broadcast::Full,
                    Broadcast::Scalar,
                    Broadcast::Suffix(16),
                    Broadcast::Prefix(16),
                ],
            };
            assert_eq!(program.each(&args), each);
            let mut r = Recorder::default();
            pointwise(&mut r, &args, &program);
            let Some(Command::Launch(launch)) = r.commands.first() else {
                panic!("no launch");
            };
            match Compiler::new("sm_90a") {
                Ok(compiler) => {
                    let image = compiler.without_cache().cubin(&launch.module);
                    assert!(image.is_ok(), "{image:?}\n{}", launch.module.source);
                }
                Err(e) => eprintln!("skipped: {e}"),
            }
        }
    }
}
