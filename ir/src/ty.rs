//! Types of values: an element type and a list of lettered dimensions, such as `f32[B8 T512 D256]`.
//!
//! Letters are data, so that types print as papers write them. Two types agree when element type and sizes agree; letters are
//! never compared, because one memory may be read as `[B T I]` and as `[B T H P]`.

use std::fmt;

/// Element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single.
    F32,
    /// Brain float: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// IEEE half.
    F16,
    /// 8 bits with 3 of mantissa, up to 448: what [`crate::op::Narrow`] makes of values and weights.
    E4m3,
    /// 8 bits with 2 of mantissa, up to 57344: what it makes of gradients.
    E5m2,
    /// Token ids, positions, expert ids.
    I32,
}

impl DType {
    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::E4m3 | DType::E5m2 => 1,
        }
    }

    /// Whether values of this type are numbers by themselves and carry gradients: those of 8 bits are not without their factor.
    pub fn is_float(self) -> bool {
        match self {
            DType::F32 | DType::Bf16 | DType::F16 => true,
            DType::E4m3 | DType::E5m2 | DType::I32 => false,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::E4m3 => "e4m3",
            DType::E5m2 => "e5m2",
            DType::I32 => "i32",
        })
    }
}

/// The one legend of dimension letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Letter {
    /// Batch.
    B,
    /// Time.
    T,
    /// Source time: slots of a KV cache.
    S,
    /// Model width.
    D,
    /// Inner width of a mixer.
    I,
    /// Width of an ffn.
    F,
    /// Heads.
    H,
    /// Groups: key/value heads, or groups of B and C in Mamba-2.
    G,
    /// Width of a head.
    P,
    /// State.
    N,
    /// Convolution taps, or experts chosen per token.
    K,
    /// Chunks, or tokens of a chunk.
    C,
    /// Experts.
    E,
    /// Routed rows.
    R,
    /// Vocabulary.
    V,
    /// Anything else: scalars, statistics, tables.
    X,
}

/// One dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dim {
    /// What it counts.
    pub letter: Letter,
    /// How many.
    pub size: usize,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.letter, self.size)
    }
}

/// `dims![B 8, T t_len, D cfg.d_model]`: a `Vec<Dim>`.
#[macro_export]
macro_rules! dims {
    ($($l:ident $n:expr),* $(,)?) => { vec![$($crate::Dim { letter: $crate::Letter::$l, size: $n }),*] };
}

/// Type of a value: contiguous, row-major, the last dimension fastest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Outermost first.
    pub dims: Vec<Dim>,
}

impl Type {
    /// A type.
    pub fn new(dtype: DType, dims: Vec<Dim>) -> Self {
        Type { dtype, dims }
    }

    /// An f32 type.
    pub fn f32(dims: Vec<Dim>) -> Self {
        Type::new(DType::F32, dims)
    }

    /// An i32 type.
    pub fn i32(dims: Vec<Dim>) -> Self {
        Type::new(DType::I32, dims)
    }

    /// `f32[X1]`.
    pub fn scalar() -> Self {
        Type::f32(dims![X 1])
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().map(|d| d.size).product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }

    /// Size of dimension `i`.
    pub fn size(&self, i: usize) -> usize {
        self.dims[i].size
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Size of the last dimension (1 for rank 0).
    pub fn last(&self) -> usize {
        self.dims.last().map_or(1, |d| d.size)
    }

    /// Product of all but the last dimension.
    pub fn rows(&self) -> usize {
        self.len().checked_div(self.last()).unwrap_or(0)
    }

    /// Sizes without letters.
    pub fn sizes(&self) -> Vec<usize> {
        self.dims.iter().map(|d| d.size).collect()
    }

    /// Same sizes in the same order (letters and element type aside).
    pub fn same_shape(&self, other: &Type) -> bool {
        self.rank() == other.rank()
            && self
                .dims
                .iter()
                .zip(&other.dims)
                .all(|(a, b)| a.size == b.size)
    }

    /// The same dims with another element type.
    pub fn with_dtype(&self, dtype: DType) -> Type {
        Type::new(dtype, self.dims.clone())
    }

    /// The same type with the last dimension replaced.
    pub fn with_last(&self, last: Dim) -> Type {
        let mut dims = self.dims.clone();
        dims.pop();
        dims.push(last);
        Type::new(self.dtype, dims)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, d) in self.dims.iter().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{d}")?;
        }
        f.write_str("]")
    }
}
