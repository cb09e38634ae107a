//! Run-time shapes and one shared tape over dfdx.
//!
//! dfdx fixes the rank of a tensor at compile time and moves the tape from operand to result. Here every value is a flat dfdx tensor
//! with its sizes beside it ([`Var`]); each primitive views it at the rank it needs, puts the one tape of the [`Cx`] on it, and takes
//! the tape back off the result. So any number of values share one tape, and one backward pass gives the gradient of all of them.
//!
//! What dfdx 0.13.0 gets wrong on a CPU is avoided here, once: `slice` overwrites instead of adding to the gradient of what it slices
//! (rows are picked by `gather`), a product of a tensor with itself panics (the second operand is copied on the tape), and the
//! derivative of the exact GELU has a wrong factor ([`Cx::gelu`] repairs it). On a GPU the gradient of a reshaped broadcast is cut off
//! ([`Cx::expand`] adds to zeros instead).

use dfdx::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What stopped a composition: the device, or an argument that the op's types should have refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) String);

pub(crate) type Res<T> = Result<T, Fault>;

fn device(e: impl std::fmt::Display) -> Fault {
    Fault(e.to_string())
}

/// A float tensor on the tape.
#[derive(Clone)]
pub(crate) struct Var<E: Dtype, D: Storage<E>> {
    flat: Tensor<(usize,), E, D>,
    /// Sizes, outermost first.
    pub(crate) sizes: Vec<usize>,
    /// The same for all views of one dfdx tensor.
    id: u64,
    traced: bool,
}

impl<E: Dtype, D: Storage<E>> Var<E, D> {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Size of the last dimension (1 for rank 0).
    pub(crate) fn last(&self) -> usize {
        self.sizes.last().copied().unwrap_or(1)
    }

    /// Product of all but the last dimension.
    pub(crate) fn rows(&self) -> usize {
        self.len().checked_div(self.last()).unwrap_or(0)
    }

    /// The same elements under other sizes.
    pub(crate) fn view(&self, sizes: &[usize]) -> Self {
        Var {
            sizes: sizes.to_vec(),
            ..self.clone()
        }
    }

    /// The elements, in row-major order.
    pub(crate) fn host(&self) -> Vec<f64> {
        // dfdx cannot read a tensor without elements.
        if self.len() == 0 {
            return Vec::new();
        }
        self.flat
            .as_vec()
            .iter()
            .map(|x| x.to_f64().unwrap_or(f64::NAN))
            .collect()
    }
}

/// What an op takes and gives: floats on the tape, or integers, which stay on the host.
#[derive(Clone)]
pub(crate) enum Value<E: Dtype, D: Storage<E>> {
    /// Floats of any element type, computed in `E`.
    Float(Var<E, D>),
    /// Tokens, positions, routing choices.
    Int(Rc<Vec<i32>>),
}

impl<E: Dtype, D: Storage<E>> From<Var<E, D>> for Value<E, D> {
    fn from(v: Var<E, D>) -> Self {
        Value::Float(v)
    }
}

impl<E: Dtype, D: Storage<E>> From<Vec<i32>> for Value<E, D> {
    fn from(v: Vec<i32>) -> Self {
        Value::Int(Rc::new(v))
    }
}

/// Arguments of an op by slot.
pub(crate) struct Args<'a, E: Dtype, D: Storage<E>>(pub(crate) &'a [Option<Value<E, D>>]);

impl<'a, E: Dtype, D: Storage<E>> Args<'a, E, D> {
    /// The optional float argument `i`.
    pub(crate) fn opt(&self, i: usize) -> Option<&'a Var<E, D>> {
        match self.0.get(i) {
            Some(Some(Value::Float(v))) => Some(v),
            _ => None,
        }
    }

    /// The float argument `i`.
    pub(crate) fn var(&self, i: usize) -> Res<&'a Var<E, D>> {
        self.opt(i)
            .ok_or_else(|| Fault(format!("argument {i} is not a float tensor")))
    }

    /// The optional integer argument `i`.
    pub(crate) fn opt_ints(&self, i: usize) -> Option<&'a [i32]> {
        match self.0.get(i) {
            Some(Some(Value::Int(v))) => Some(v),
            _ => None,
        }
    }

    /// The integer argument `i`.
    pub(crate) fn ints(&self, i: usize) -> Res<&'a [i32]> {
        self.opt_ints(i)
            .ok_or_else(|| Fault(format!("argument {i} is not an integer tensor")))
    }
}

/// Indices from ids; negative ids are refused.
pub(crate) fn indices(ids: &[i32], below: usize) -> Res<Vec<usize>> {
    ids.iter()
        .map(|&i| match usize::try_from(i) {
            Ok(u) if u < below => Ok(u),
            _ => Err(Fault(format!("index {i} is not below {below}"))),
        })
        .collect()
}

type Taped<S, E, D> = Tensor<S, E, D, OwnedTape<E, D>>;
type Dim3 = (usize, usize, usize);

/// A device and its one tape.
pub(crate) struct Cx<E: Dtype, D: Device<E>> {
    dev: D,
    tape: RefCell<OwnedTape<E, D>>,
    next: Cell<u64>,
}

/// Functions of two tensors.
#[derive(Clone, Copy)]
enum Two {
    Add,
    Sub,
    Mul,
}

impl<E: Dtype, D: Device<E>> Cx<E, D> {
    /// An empty tape on a device.
    pub(crate) fn new(dev: D) -> Self {
        Cx {
            dev,
            tape: RefCell::new(OwnedTape::default()),
            next: Cell::new(0),
        }
    }

    /// Another empty tape on the same device.
    pub(crate) fn another(&self) -> Self {
        Cx::new(self.dev.clone())
    }

    fn fresh(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    fn put(&self, data: Vec<E>, sizes: &[usize], traced: bool) -> Res<Var<E, D>> {
        let n: usize = sizes.iter().product();
        if data.len() != n {
            return Err(Fault(format!("{} elements for {sizes:?}", data.len())));
        }
        let flat = self.dev.try_tensor_from_vec(data, (n,)).map_err(device)?;
        Ok(Var {
            flat,
            sizes: sizes.to_vec(),
            id: self.fresh(),
            traced,
        })
    }

    /// A tensor whose gradient is wanted.
    pub(crate) fn leaf(&self, data: &[f64], sizes: &[usize]) -> Res<Var<E, D>> {
        self.put(data.iter().map(|&x| real(x)).collect(), sizes, true)
    }

    /// A tensor without gradient.
    pub(crate) fn constant(&self, data: &[f64], sizes: &[usize]) -> Res<Var<E, D>> {
        self.put(data.iter().map(|&x| real(x)).collect(), sizes, false)
    }

    /// The same number everywhere, without gradient.
    pub(crate) fn full(&self, x: f64, sizes: &[usize]) -> Res<Var<E, D>> {
        self.put(vec![real(x); sizes.iter().product()], sizes, false)
    }

    fn finish<S: Shape>(&self, y: Taped<S, E, D>, traced: bool, sizes: &[usize]) -> Res<Var<E, D>> {
        let n = sizes.iter().product();
        let (flat, tape) = y.try_reshape_like(&(n,)).map_err(device)?.split_tape();
        if traced {
            self.tape.replace(tape);
        }
        Ok(Var {
            flat,
            sizes: sizes.to_vec(),
            id: self.fresh(),
            traced,
        })
    }

    fn start(&self, x: &Var<E, D>, traced: bool) -> Taped<(usize,), E, D> {
        let tape = if traced {
            self.tape.take()
        } else {
            OwnedTape::default()
        };
        x.flat.clone().put_tape(tape)
    }

    fn one<S: Shape>(
        &self,
        x: &Var<E, D>,
        sizes: &[usize],
        f: impl FnOnce(Taped<(usize,), E, D>) -> Result<Taped<S, E, D>, D::Err>,
    ) -> Res<Var<E, D>> {
        let y = f(self.start(x, x.traced)).map_err(device)?;
        self.finish(y, x.traced, sizes)
    }

    fn two<S: Shape>(
        &self,
        x: &Var<E, D>,
        y: &Var<E, D>,
        sizes: &[usize],
        f: impl FnOnce(Taped<(usize,), E, D>, Tensor<(usize,), E, D>) -> Result<Taped<S, E, D>, D::Err>,
    ) -> Res<Var<E, D>> {
        // dfdx panics when both operands are one tensor.
        let copy;
        let y = if x.id == y.id {
            copy = self.scale(y, 1.0)?;
            &copy
        } else {
            y
        };
        let traced = x.traced || y.traced;
        let z = f(self.start(x, traced), y.flat.clone()).map_err(device)?;
        self.finish(z, traced, sizes)
    }

    fn zip(&self, op: Two, x: &Var<E, D>, y: &Var<E, D>) -> Res<Var<E, D>> {
        if x.len() != y.len() {
            return Err(Fault(format!("{:?} with {:?}", x.sizes, y.sizes)));
        }
        self.two(x, y, &x.sizes, |x, y| match op {
            Two::Add => x.try_add(y),
            Two::Sub => x.try_sub(y),
            Two::Mul => x.try_mul(y),
        })
    }

    /// `x + y`, equally many elements; sizes of x.
    pub(crate) fn add(&self, x: &Var<E, D>, y: &Var<E, D>) -> Res<Var<E, D>> {
        self.zip(Two::Add, x, y)
    }

    /// `x - y`, equally many elements; sizes of x.
    pub(crate) fn sub(&self, x: &Var<E, D>, y: &Var<E, D>) -> Res<Var<E, D>> {
        self.zip(Two::Sub, x, y)
    }

    /// `x y`, equally many elements; sizes of x.
    pub(crate) fn mul(&self, x: &Var<E, D>, y: &Var<E, D>) -> Res<Var<E, D>> {
        self.zip(Two::Mul, x, y)
    }

    fn mid(&self, op: Two, x: &Var<E, D>, y: &Var<E, D>, (a, r, b): Dim3) -> Res<Var<E, D>> {
        if x.len() != a * r * b || y.len() != a * b {
            return Err(Fault(format!(
                "{:?} with {:?} as [{a} {r} {b}]",
                x.sizes, y.sizes
            )));
        }
        self.two(x, y, &x.sizes, |x, y| {
            let x = x.try_reshape_like(&(a, r, b))?;
            let y = y
                .try_reshape_like(&(a, b))?
                .try_broadcast_like::<Dim3, Axis<1>>(&(a, r, b))?;
            match op {
                Two::Add => x.try_add(y),
                Two::Sub => x.try_sub(y),
                Two::Mul => x.try_mul(y),
            }
        })
    }

    /// `x[a,r,b] + y[a,b]`; sizes of x.
    pub(crate) fn add_mid(&self, x: &Var<E, D>, y: &Var<E, D>, arb: Dim3) -> Res<Var<E, D>> {
        self.mid(Two::Add, x, y, arb)
    }

    /// `x[a,r,b] - y[a,b]`; sizes of x.
    pub(crate) fn sub_mid(&self, x: &Var<E, D>, y: &Var<E, D>, arb: Dim3) -> Res<Var<E, D>> {
        self.mid(Two::Sub, x, y, arb)
    }

    /// `x[a,r,b] y[a,b]`; sizes of x.
    pub(crate) fn mul_mid(&self, x: &Var<E, D>, y: &Var<E, D>, arb: Dim3) -> Res<Var<E, D>> {
        self.mid(Two::Mul, x, y, arb)
    }

    /// `y[a,r,b] = x[a,b]`.
    pub(crate) fn expand(&self, x: &Var<E, D>, (a, r, b): Dim3) -> Res<Var<E, D>> {
        if r == 1 {
            return Ok(x.view(&[a, 1, b]));
        }
        // A broadcast tensor may not be reshaped: on a GPU only as much of its gradient comes back as the tensor holds.
        self.add_mid(&self.full(0.0, &[a, r, b])?, x, (a, r, b))
    }

    /// `y[a,b] = sum_r x[a,r,b]`.
    pub(crate) fn sum(&self, x: &Var<E, D>, (a, r, b): Dim3) -> Res<Var<E, D>> {
        self.one(x, &[a, b], |x| {
            x.try_reshape_like(&(a, r, b))?
                .try_sum::<(usize, usize), Axis<1>>()
        })
    }

    /// Sum of all elements, as `[1]`.
    pub(crate) fn sum_all(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        Ok(self.sum(x, (1, x.len(), 1))?.view(&[1]))
    }

    /// `y[a,c,b,d] = x[a,b,c,d]`.
    pub(crate) fn swap(
        &self,
        x: &Var<E, D>,
        (a, b, c, d): (usize, usize, usize, usize),
    ) -> Res<Var<E, D>> {
        if b == 1 || c == 1 {
            return Ok(x.view(&[a, c, b, d]));
        }
        self.one(x, &[a, c, b, d], |x| {
            x.try_reshape_like(&(a, b, c, d))?
                .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()
        })
    }

    /// `z[n,m,p] = sum_k x[n,m,k] y[n,k,p]`.
    pub(crate) fn mm(
        &self,
        x: &Var<E, D>,
        y: &Var<E, D>,
        (n, m, k, p): (usize, usize, usize, usize),
    ) -> Res<Var<E, D>> {
        self.two(x, y, &[n, m, p], |x, y| {
            x.try_reshape_like(&(n, m, k))?
                .try_matmul(y.try_reshape_like(&(n, k, p))?)
        })
    }

    /// `z[n,m,p] = sum_k x[n,m,k] y[n,p,k]`.
    pub(crate) fn mm_t(
        &self,
        x: &Var<E, D>,
        y: &Var<E, D>,
        (n, m, k, p): (usize, usize, usize, usize),
    ) -> Res<Var<E, D>> {
        self.two(x, y, &[n, m, p], |x, y| {
            let y = y
                .try_reshape_like(&(n, p, k))?
                .try_permute::<Dim3, Axes3<0, 2, 1>>()?;
            x.try_reshape_like(&(n, m, k))?.try_matmul(y)
        })
    }

    /// `y[i,:] = x[idx[i],:]` of x as `[n d]`.
    pub(crate) fn rows(&self, x: &Var<E, D>, n: usize, idx: &[usize]) -> Res<Var<E, D>> {
        let d = x.len().checked_div(n).unwrap_or(0);
        let m = idx.len();
        let idx: Tensor<(usize,), usize, D> = self
            .dev
            .try_tensor_from_vec(idx.to_vec(), (m,))
            .map_err(device)?;
        self.one(x, &[m, d], |x| {
            x.try_reshape_like(&(n, d))?
                .try_gather::<(usize, usize), (usize,)>(idx)
        })
    }

    /// `y[r,j] = x[r,idx[r,j]]` of x as `[rows last]`, `per` indices a row; sizes of x with the last one replaced.
    pub(crate) fn pick(&self, x: &Var<E, D>, per: usize, idx: Vec<usize>) -> Res<Var<E, D>> {
        let (n, last) = (x.rows(), x.last());
        let mut sizes = x.sizes.clone();
        sizes.pop();
        sizes.push(per);
        let idx: Tensor<(usize, usize), usize, D> = self
            .dev
            .try_tensor_from_vec(idx, (n, per))
            .map_err(device)?;
        self.one(x, &sizes, |x| {
            x.try_reshape_like(&(n, last))?
                .try_gather::<(usize, usize), (usize, usize)>(idx)
        })
    }

    /// Elements `start..start+len` of the last dimension.
    pub(crate) fn cols(&self, x: &Var<E, D>, start: usize, len: usize) -> Res<Var<E, D>> {
        let idx = (0..x.rows()).flat_map(|_| start..start + len).collect();
        self.pick(x, len, idx)
    }

    /// `[p]` and `[q]` columns of `a` rows side by side.
    pub(crate) fn concat(&self, x: &Var<E, D>, y: &Var<E, D>, a: usize) -> Res<Var<E, D>> {
        let (p, q) = (x.len() / a.max(1), y.len() / a.max(1));
        self.two(x, y, &[a, p + q], |x, y| {
            let y = y.try_reshape_like(&(a, q))?.retaped::<OwnedTape<E, D>>();
            (x.try_reshape_like(&(a, p))?, y).try_concat_along(Axis::<1>)
        })
    }

    /// Equal tensors one after the other: `[T ..]`.
    pub(crate) fn stack(&self, parts: &[Var<E, D>]) -> Res<Var<E, D>> {
        let first = parts
            .first()
            .ok_or_else(|| Fault("nothing to stack".into()))?;
        let mut sizes = vec![parts.len()];
        sizes.extend(&first.sizes);
        let traced = parts.iter().any(|p| p.traced);
        let mut seen = std::collections::HashSet::new();
        let mut distinct = Vec::with_capacity(parts.len());
        for p in parts {
            // As for products, dfdx wants every operand to be another tensor.
            distinct.push(if seen.insert(p.id) {
                p.clone()
            } else {
                self.scale(p, 1.0)?
            });
        }
        let mut items = vec![self.start(&distinct[0], traced)];
        items.extend(distinct[1..].iter().map(|p| p.flat.retaped()));
        self.finish(items.try_stack().map_err(device)?, traced, &sizes)
    }

    /// `c x`.
    pub(crate) fn scale(&self, x: &Var<E, D>, c: f64) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_mul(real::<E>(c)))
    }

    /// `x + c`.
    pub(crate) fn offset(&self, x: &Var<E, D>, c: f64) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_add(real::<E>(c)))
    }

    /// `e^x`.
    pub(crate) fn exp(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_exp())
    }

    /// Natural logarithm.
    pub(crate) fn ln(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_ln())
    }

    /// `1 / x`.
    pub(crate) fn recip(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_recip())
    }

    /// Square root.
    pub(crate) fn sqrt(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_sqrt())
    }

    /// `x^2`.
    pub(crate) fn square(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_square())
    }

    /// `1 / (1 + e^-x)`.
    pub(crate) fn sigmoid(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_sigmoid())
    }

    /// `max(x, 0)`.
    pub(crate) fn relu(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_relu())
    }

    /// `min(max(x, lo), hi)`.
    pub(crate) fn clamp(&self, x: &Var<E, D>, lo: f64, hi: f64) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_clamp(lo, hi))
    }

    /// GELU by tanh.
    pub(crate) fn gelu_tanh(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.one(x, &x.sizes, |x| x.try_fast_gelu())
    }

    /// GELU by erf. dfdx's derivative is `Phi(x) + x phi(x) sqrt(2)`; a term that is zero in value and
    /// `x phi(x) (1 - sqrt(2))` in derivative makes it `Phi(x) + x phi(x)`.
    pub(crate) fn gelu(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        let y = self.one(x, &x.sizes, |x| x.try_accurate_gelu())?;
        if !x.traced {
            return Ok(y);
        }
        let phi = self.normal_density(x)?;
        let h = self.scale(&phi, std::f64::consts::SQRT_2 - 1.0)?;
        let h = self.sub(&h, &self.detach(&h)?)?;
        self.add(&y, &h)
    }

    /// `e^(-x^2/2) / sqrt(2 pi)`.
    pub(crate) fn normal_density(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        let e = self.exp(&self.scale(&self.square(x)?, -0.5)?)?;
        self.scale(&e, 1.0 / std::f64::consts::TAU.sqrt())
    }

    /// `x sigmoid(x)`.
    pub(crate) fn silu(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.mul(x, &self.sigmoid(x)?)
    }

    /// `ln(1 + e^x)`: `-ln sigmoid(-x)` up to 20, from there on linear.
    pub(crate) fn softplus(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        let low = self.clamp(x, f64::NEG_INFINITY, 20.0)?;
        let low = self.scale(&self.ln(&self.sigmoid(&self.scale(&low, -1.0)?)?)?, -1.0)?;
        self.add(&low, &self.relu(&self.offset(x, -20.0)?)?)
    }

    /// `ln sum_j e^x[r,j]` of x as `[rows last]`: `[rows]`. The row maximum is subtracted as a constant, which leaves value and
    /// derivative alone.
    pub(crate) fn log_sum_exp(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        let (n, last) = (x.rows(), x.last());
        let max: Vec<f64> = x
            .host()
            .chunks(last.max(1))
            .map(|r| r.iter().copied().fold(f64::MIN, f64::max))
            .collect();
        let max = self.constant(&max, &[n])?;
        let shifted = self.exp(&self.sub_mid(x, &max, (n, last, 1))?)?;
        let sum = self.sum(&shifted, (n, last, 1))?.view(&[n]);
        self.add(&self.ln(&sum)?, &max)
    }

    /// Softmax over the last dimension, given its [`Cx::log_sum_exp`].
    pub(crate) fn softmax(&self, x: &Var<E, D>, lse: &Var<E, D>) -> Res<Var<E, D>> {
        self.exp(&self.sub_mid(x, lse, (x.rows(), x.last(), 1))?)
    }

    /// The same numbers, without gradient.
    pub(crate) fn detach(&self, x: &Var<E, D>) -> Res<Var<E, D>> {
        self.constant(&x.host(), &x.sizes)
    }

    /// Runs the tape backwards from a `[1]` result.
    pub(crate) fn backward(&self, loss: &Var<E, D>) -> Res<Grads<E, D>> {
        if !loss.traced {
            return Ok(Grads(Gradients::leaky()));
        }
        let y = self
            .start(loss, true)
            .try_sum::<Rank0, Axis<0>>()
            .map_err(device)?;
        Ok(Grads(y.try_backward().map_err(device)?))
    }
}

/// Gradients by tensor.
pub(crate) struct Grads<E: Dtype, D: Device<E>>(Gradients<E, D>);

impl<E: Dtype, D: Device<E>> Grads<E, D> {
    /// Gradient of a leaf; zero where nothing depends on it.
    pub(crate) fn of(&mut self, x: &Var<E, D>) -> Res<Vec<f64>> {
        if x.len() == 0 {
            return Ok(Vec::new());
        }
        self.0.get_or_alloc_mut(&x.flat).map_err(device)?;
        Ok(self
            .0
            .get(&x.flat)
            .as_vec()
            .iter()
            .map(|g| g.to_f64().unwrap_or(f64::NAN))
            .collect())
    }
}

fn real<E: Dtype>(x: f64) -> E {
    E::from_f64(x).unwrap_or_default()
}
