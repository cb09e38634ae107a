//! What launchers write: commands over raw device addresses.

use std::borrow::Cow;

/// Element type of a tensor on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single.
    F32,
    /// Brain float.
    Bf16,
    /// IEEE half.
    F16,
    /// Integers.
    I32,
    /// 8 bits, with a factor kept elsewhere.
    Eight(Eight),
}

impl DType {
    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Eight(_) => 1,
        }
    }

    /// Name in the kernels' sources.
    pub fn c_name(self) -> &'static str {
        match self {
            DType::F32 => "float",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "int",
            DType::Eight(_) => "unsigned char",
        }
    }
}

/// A contiguous row-major tensor at a device address.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// First byte; 0 for an absent argument.
    pub ptr: u64,
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub dims: Vec<usize>,
}

impl Tensor {
    /// An argument that is not there.
    pub const ABSENT: Tensor = Tensor {
        ptr: 0,
        dtype: DType::F32,
        dims: Vec::new(),
    };

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }

    /// Size of dimension `i`; 1 beyond the rank.
    pub fn size(&self, i: usize) -> usize {
        self.dims.get(i).copied().unwrap_or(1)
    }

    /// Size of the last dimension.
    pub fn last(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    /// Product of all other dimensions.
    pub fn rows(&self) -> usize {
        self.len().checked_div(self.last()).unwrap_or(0)
    }

    /// Whether the argument is there.
    pub fn is_present(&self) -> bool {
        self.ptr != 0
    }
}

/// Arguments and results of an op, in the order of the op's table.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// Arguments; `None` where an optional one is absent.
    pub args: &'a [Option<Tensor>],
    /// Results.
    pub results: &'a [Tensor],
    /// Arguments that nothing of the program writes, such as the weights of a step of decoding: those may be read before what was launched
    /// before has ended. Shorter than `args`: not known of the others.
    pub fixed: &'a [bool],
}

impl<'a> Args<'a> {
    /// Argument `i`, or [`Tensor::ABSENT`].
    pub fn arg(&self, i: usize) -> &'a Tensor {
        const ABSENT: &Tensor = &Tensor::ABSENT;
        self.args.get(i).and_then(Option::as_ref).unwrap_or(ABSENT)
    }

    /// Whether argument `i` is there and nothing of the program writes it.
    pub(crate) fn is_fixed(&self, i: usize) -> bool {
        self.arg(i).is_present() && self.fixed.get(i).copied().unwrap_or(false)
    }

    /// Result `i`, or [`Tensor::ABSENT`].
    pub fn res(&self, i: usize) -> &'a Tensor {
        const ABSENT: &Tensor = &Tensor::ABSENT;
        self.results.get(i).unwrap_or(ABSENT)
    }

    /// Defines for element types other than those the sources assume.
    pub(crate) fn types(&self) -> Vec<(String, String)> {
        let args = (0..self.args.len().min(11)).map(|i| (format!("TA{i}"), self.arg(i).dtype));
        let results = (0..self.results.len().min(8)).map(|i| (format!("TR{i}"), self.res(i).dtype));
        args.chain(results)
            .filter(|(_, t)| matches!(t, DType::Bf16 | DType::F16))
            .map(|(name, t)| (name, t.c_name().to_string()))
            .collect()
    }
}

/// Defines for one argument and one result type, of kernels that serve many ops.
pub(crate) fn types(list: &[(&str, DType)]) -> Vec<(String, String)> {
    list.iter()
        .filter(|(_, t)| matches!(t, DType::Bf16 | DType::F16))
        .map(|(name, t)| (name.to_string(), t.c_name().to_string()))
        .collect()
}

/// A source with its defines: what is compiled as one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// Op file it belongs to.
    pub stem: &'static str,
    /// CUDA C++ without the common head.
    pub source: Cow<'static, str>,
    /// `-D` defines.
    pub defines: Vec<(String, String)>,
}

/// A kernel parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Param {
    /// An address.
    Ptr(u64),
    /// 64-bit integer.
    Long(i64),
    /// 32-bit integer.
    Int(i32),
    /// Float.
    Float(f32),
    /// Double.
    Double(f64),
    /// A struct by value, in words of 8 bytes.
    Words(Vec<u64>),
    /// A view for the bulk copy engine, by value.
    View(View),
}

/// A view of a bf16 tensor for the bulk copy engine (sm_90): the engine copies boxes of it to shared memory, where it swizzles rows of 128
/// bytes; what lies outside the tensor arrives as zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// First byte, at a multiple of 16.
    pub ptr: u64,
    /// Sizes, innermost first; at most 5.
    pub dims: Vec<usize>,
    /// Distances in bytes of all but the innermost dimension, multiples of 16.
    pub strides: Vec<usize>,
    /// Sizes of a box; the innermost is 64 elements.
    pub sizes: Vec<usize>,
}

/// What launchers may count on besides what every GPU from sm_80 on has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Instructions of sm_90a.
    pub hopper: bool,
    /// Bytes of shared memory that a block may take; 0: unknown, what every architecture has (99 KiB) is used.
    pub shared: usize,
    /// Kernels that are launched before their predecessor has ended (sm_90 and later).
    pub early: bool,
    /// Products of operands of 8 bits (sm_89 and later).
    pub fp8: bool,
    /// Number of multiprocessors, for kernels whose blocks stay; 0: unknown, such kernels are not used.
    pub multiprocessors: usize,
    /// Whether equal runs must give equal bits: then no kernel adds in an order that the device chooses, where there is another.
    pub deterministic: bool,
}

impl From<&Tensor> for Param {
    fn from(t: &Tensor) -> Param {
        Param::Ptr(t.ptr)
    }
}

/// A kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// What to compile.
    pub module: Module,
    /// Kernel.
    pub function: &'static str,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: usize,
    /// Dynamic shared memory in bytes.
    pub shared: usize,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Whether its blocks may take their places while what was launched before still runs. Such a kernel waits by itself (`early()` in its
    /// source) before it reads or writes anything that a kernel writes.
    pub early: bool,
}

/// Format of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Eight {
    /// 4 bits of exponent, 3 of mantissa, up to 448: values and weights.
    E4m3,
    /// 5 bits of exponent, 2 of mantissa, up to 57344: gradients.
    E5m2,
}

/// Operands of 8 bits, each with a factor that the device keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct Eights {
    /// Of a and b.
    pub formats: (Eight, Eight),
    /// Addresses of the factors, each an f32, by which a and b are to be multiplied.
    pub scales: (u64, u64),
    /// Whether every partial sum is kept in f32; otherwise the tensor cores may keep fewer bits for a while, which is faster.
    pub exact: bool,
}

/// `c = alpha op(a) op(b) + beta d`, row-major, accumulated in f32; d is what c held or another matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Address of a: `[m k]`, or `[k m]` when transposed.
    pub a: u64,
    /// Address of b: `[k n]`, or `[n k]` when transposed.
    pub b: u64,
    /// Address of c `[m n]`.
    pub c: u64,
    /// Whether a and b are stored transposed.
    pub transposed: (bool, bool),
    /// m, n, k.
    pub sizes: (usize, usize, usize),
    /// Element type of a and b; without meaning where they have 8 bits.
    pub input: DType,
    /// What a and b are where they have 8 bits: then a is stored as it is and b transposed, and all sizes are multiples of 16.
    pub eights: Option<Eights>,
    /// Element type of c.
    pub output: DType,
    /// Factor on the product.
    pub alpha: f32,
    /// Factor on d; 0 never reads.
    pub beta: f32,
    /// Where the device keeps that factor, instead of `beta`; alpha is then 1. 0: it is `beta`.
    pub beta_at: u64,
    /// Address of what is multiplied by that factor and added, `[m n]` of c's type; 0: what c held.
    pub add: u64,
}

/// One thing to do, in stream order.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// A kernel.
    Launch(Launch),
    /// A matrix product.
    Product(Product),
    /// Zeroes bytes.
    Zero {
        /// First byte.
        ptr: u64,
        /// How many.
        bytes: usize,
    },
    /// Copies bytes on the device.
    Copy {
        /// Destination.
        to: u64,
        /// Source.
        from: u64,
        /// How many.
        bytes: usize,
    },
}

/// Alignment of scratch tensors.
const ALIGN: usize = 256;

/// Collects commands and the size of the scratch area they share.
#[derive(Debug, Default)]
pub struct Recorder {
    /// What was recorded.
    pub commands: Vec<Command>,
    target: Target,
    base: u64,
    used: usize,
    peak: usize,
}

impl Recorder {
    /// Records with the scratch area at `base`. With base 0 the addresses mean nothing, but [`Recorder::scratch_bytes`] is right.
    pub fn new(base: u64) -> Self {
        Recorder {
            base,
            ..Recorder::default()
        }
    }

    /// Records for a device: launchers choose kernels by what it can do.
    #[must_use]
    pub fn on(mut self, target: Target) -> Self {
        self.target = target;
        self
    }

    /// What is recorded for.
    pub(crate) fn target(&self) -> Target {
        self.target
    }

    /// Starts the next op: the scratch area is free again.
    pub fn next_op(&mut self) {
        self.used = 0;
    }

    /// Bytes of scratch that the hungriest op needs.
    pub fn scratch_bytes(&self) -> usize {
        self.peak
    }

    /// A scratch tensor, valid until the next op.
    pub(crate) fn scratch(&mut self, dtype: DType, len: usize) -> Tensor {
        let ptr = self.base + self.used as u64;
        self.scratch_raw(len * dtype.bytes());
        Tensor {
            ptr,
            dtype,
            dims: vec![len],
        }
    }

    /// Scratch bytes; returns the address.
    pub(crate) fn scratch_raw(&mut self, bytes: usize) -> u64 {
        let ptr = self.base + self.used as u64;
        self.used += bytes.next_multiple_of(ALIGN);
        self.peak = self.peak.max(self.used);
        ptr
    }

    /// Zeroes a tensor.
    pub(crate) fn zero(&mut self, t: &Tensor) {
        if !t.is_empty() {
            self.commands.push(Command::Zero {
                ptr: t.ptr,
                bytes: t.bytes(),
            });
        }
    }

    /// Appends a launch of a kernel of `stem`; nothing when the grid is empty.
    pub(crate) fn launch(
        &mut self,
        (stem, function): (&'static str, &'static str),
        defines: Vec<(String, String)>,
        grid: [usize; 3],
        block: usize,
        params: Vec<Param>,
    ) {
        self.launch_shared((stem, function), defines, grid, block, 0, params);
    }

    /// As [`Recorder::launch`] with dynamic shared memory.
    pub(crate) fn launch_shared(
        &mut self,
        (stem, function): (&'static str, &'static str),
        defines: Vec<(String, String)>,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        params: Vec<Param>,
    ) {
        if grid.contains(&0) {
            return;
        }
        self.commands.push(Command::Launch(Launch {
            module: Module {
                stem,
                source: Cow::Borrowed(source(stem)),
                defines,
            },
            function,
            grid,
            block,
            shared,
            params,
            early: false,
        }));
    }

    /// Lets the kernel launched last begin early where the device can and it has few blocks: what it costs to start a kernel is then hidden
    /// behind the one before. Its source calls `early()` first; blocks of a large grid would keep others waiting for their places.
    pub(crate) fn early(&mut self) {
        let can = self.target.early;
        if let Some(Command::Launch(l)) = self.commands.last_mut() {
            debug_assert!(waits(&l.module.source, l.function), "{}", l.function);
            l.early = can && l.grid.iter().product::<usize>() * l.block <= EARLY_THREADS;
        }
    }
}

/// Whether a kernel waits for those before it.
fn waits(source: &str, kernel: &str) -> bool {
    let start = source.find(&format!(" {kernel}(")).unwrap_or(source.len());
    let body = &source[start..];
    let end = body.find("\n}").unwrap_or(body.len());
    body[..end].contains("early();")
}

/// Most threads of a launch that begins early: about what a large device holds at once.
const EARLY_THREADS: usize = 132 * 2048;

/// Threads of a block of an elementwise kernel.
pub(crate) const THREADS: usize = 256;

/// Grid of a kernel that walks `n` elements with [`THREADS`] threads a block, several elements a thread when there are very many.
pub(crate) fn over(n: usize) -> [usize; 3] {
    [n.div_ceil(THREADS).min(1 << 20), 1, 1]
}

/// Whether all addresses allow accesses of 16 bytes; an absent tensor does.
pub(crate) fn aligned(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.ptr.is_multiple_of(16))
}

/// Chunks into which sums over `rows` are divided.
pub(crate) fn chunks(rows: usize) -> usize {
    rows.div_ceil(64).clamp(1, 256)
}

/// An int parameter.
pub(crate) fn int(x: usize) -> Param {
    Param::Int(i32::try_from(x).unwrap_or(i32::MAX))
}

/// A long parameter.
pub(crate) fn long(x: usize) -> Param {
    Param::Long(x as i64)
}

/// A flag.
pub(crate) fn flag(x: bool) -> Param {
    Param::Int(i32::from(x))
}

/// A define.
pub(crate) fn define(name: &str, value: impl ToString) -> (String, String) {
    (name.to_string(), value.to_string())
}

/// Stems, and the parts of those whose source is more than one file.
macro_rules! sources {
    ($($stem:literal $(: $($part:literal)+)?),* $(,)?) => {
        /// Stems with a source of their own.
        #[cfg(test)]
        pub(crate) const STEMS: &[&str] = &[$($stem),*];

        /// Source of a stem; empty for one without (pointwise sources are generated).
        pub(crate) fn source(stem: &str) -> &'static str {
            match stem {
                $($stem => concat!(
                    include_str!(concat!($stem, ".cu"))
                    $($(, include_str!(concat!($stem, "/", $part, ".cu")))+)?
                ),)*
                _ => "",
            }
        }
    };
}

sources![
    "adamw",
    "attention": "warps" "hopper",
    "attention_step",
    "cache_write",
    "cast",
    "causal_conv1d",
    "concat",
    "draw",
    "embed",
    "fp8",
    "gated_delta": "tiles" "walks" "grads",
    "linear",
    "linear_few",
    "linear_cross_entropy",
    "moe",
    "reduce",
    "rms_norm",
    "rope",
    "route",
    "selective_scan",
    "ssd": "tiles" "walks_hopper" "walks" "grads_hopper" "grads",
    "stat",
    "view",
];
