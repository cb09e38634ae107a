//! The context that lowerings write through: places, parameters, states, and the small vocabulary of steps they are made of.

use super::{Mode, Options, plain};
use crate::op::{Bin, Cast, CausalConv1d, Linear, Op, Pointwise, Reshape, Rows, Un};
use crate::{
    DType, Dim, External, Graph, Param, ParamInit, Phase, Place, Type, TypeError, ValueId, dims,
};
use marimba_dsl::model::{Model, Norm};

/// Lowering context.
pub struct Cx<'m> {
    graph: Graph,
    model: &'m Model,
    options: &'m Options,
    place: Place,
    /// How many of `total` elements of the parameters now declared work on one token.
    pub(super) active: (usize, usize),
    aux: Vec<(String, f64, ValueId)>,
}

impl<'m> Cx<'m> {
    pub(super) fn new(model: &'m Model, options: &'m Options) -> Self {
        Cx {
            graph: Graph::new(),
            model,
            options,
            place: Place {
                path: String::new(),
                block: None,
                phase: Phase::Forward,
            },
            active: (1, 1),
            aux: Vec::new(),
        }
    }

    pub(super) fn finish(self) -> Graph {
        self.graph
    }

    /// The model being lowered.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Shapes and choices.
    pub fn options(&self) -> &'m Options {
        self.options
    }

    /// Nodes from here on belong to this DSL item.
    pub fn at(&mut self, path: &str, block: Option<usize>) {
        self.place = Place {
            path: path.to_string(),
            block: block.map(|i| i as u32),
            phase: Phase::Forward,
        };
    }

    /// The current DSL path.
    pub fn path(&self) -> &str {
        &self.place.path
    }

    /// Type of a value.
    pub fn ty(&self, v: ValueId) -> &Type {
        self.graph.ty(v)
    }

    /// Appends a node.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit.
    pub fn push(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
    ) -> Result<Vec<ValueId>, TypeError> {
        self.graph.push(op, args, &self.place)
    }

    /// Appends a node and returns its first result.
    ///
    /// # Errors
    /// [`TypeError`] when the arguments do not fit.
    pub fn push1(
        &mut self,
        op: impl Into<Op>,
        args: Vec<Option<ValueId>>,
    ) -> Result<ValueId, TypeError> {
        Ok(self.push(op, args)?[0])
    }

    /// An input of the graph.
    pub fn input(&mut self, name: &str, ty: Type) -> ValueId {
        self.external(External::Input, name, ty)
    }

    /// Memory from outside of the graph that is no parameter.
    pub(super) fn external(&mut self, kind: External, name: &str, ty: Type) -> ValueId {
        self.graph.add_external(kind, name, ty)
    }

    /// A constant vector.
    pub fn constant(&mut self, name: &str, data: Vec<f32>) -> ValueId {
        let ty = Type::f32(dims![X data.len()]);
        self.constant_of(name, data, ty)
    }

    /// A constant of any type; integers are those of the numbers given.
    pub fn constant_of(&mut self, name: &str, data: Vec<f32>, ty: Type) -> ValueId {
        self.graph.add_external(External::Const(data), name, ty)
    }

    /// `pos i32[B T]`: the position of each token within its document.
    pub fn pos(&mut self) -> ValueId {
        let ty = Type::i32(dims![B self.options.batch, T self.options.seq_len]);
        self.input("pos", ty)
    }

    /// The cache slot of token 0; prefill and decode only.
    pub fn slot(&mut self) -> Option<ValueId> {
        self.stateful()
            .then(|| self.input("slot", Type::i32(dims![X 1])))
    }

    /// Whether states are carried.
    pub fn stateful(&self) -> bool {
        match self.options.mode {
            Mode::Train => false,
            Mode::Prefill | Mode::Decode => true,
        }
    }

    /// A carried state, in prefill and decode.
    pub fn state(&mut self, name: &str, ty: Type) -> Option<ValueId> {
        self.stateful()
            .then(|| self.graph.add_external(External::State, name, ty))
    }

    /// Keeps the memory of a state's new value to the end of the run.
    pub fn keep_state(&mut self, name: &str, v: ValueId) {
        self.graph.outputs.push((format!("state:{name}"), v));
    }

    /// Marks an output.
    pub fn output(&mut self, name: &str, v: ValueId) {
        self.graph.outputs.push((name.to_string(), v));
    }

    /// Names an activation for probes.
    pub fn tap(&mut self, name: &str, v: ValueId) {
        self.graph.taps.push((name.to_string(), v));
    }

    /// A loss added to the total with this coefficient, when router losses are wanted.
    pub(super) fn aux_loss(&mut self, name: String, coefficient: f64, v: ValueId) {
        self.aux.push((name, coefficient, v));
    }

    /// `loss + aux_scale * sum of coefficient * aux`; puts each aux out as `aux:<name>`. The input `aux_scale` is one over the number of
    /// micro-batches of a step: an aux loss is a mean over its micro-batch, where the loss itself is already scaled for the whole step.
    pub(super) fn total_loss(&mut self, loss: ValueId) -> Result<ValueId, TypeError> {
        let mut total = loss;
        for (name, coefficient, v) in std::mem::take(&mut self.aux) {
            self.output(&format!("aux:{name}"), v);
            let scale = self.input("aux_scale", Type::scalar());
            let mut p = Pointwise::new(3);
            let weighted = p.un(Un::Scale(coefficient as f32), 1);
            let weighted = p.bin(Bin::Mul, weighted, 2);
            let sum = p.bin(Bin::Add, 0, weighted);
            total = self.push1(p.out(sum), vec![Some(total), Some(v), Some(scale)])?;
        }
        Ok(total)
    }

    /// Normal initialisation with the model's standard deviation.
    pub fn normal(&self) -> ParamInit {
        ParamInit::Normal(self.model.init.std)
    }

    fn param(
        &mut self,
        name: &str,
        ty: Type,
        init: ParamInit,
        decay: bool,
        trainable: bool,
    ) -> ValueId {
        if !self.graph.params.iter().any(|p| p.name == name) {
            self.graph.params.push(Param {
                name: name.to_string(),
                ty: ty.with_dtype(DType::F32),
                compute: ty.dtype,
                init,
                decay,
                trainable,
                active: self.active,
                path: self.place.path.clone(),
            });
        }
        self.graph.add_external(External::Param, name, ty)
    }

    /// A weight matrix `[out.. in..]` in compute precision, subject to weight decay.
    pub fn matrix(
        &mut self,
        name: &str,
        out: Vec<Dim>,
        inner: Vec<Dim>,
        init: ParamInit,
    ) -> ValueId {
        let mut d = out;
        d.extend(inner);
        self.param(name, Type::new(self.options.compute, d), init, true, true)
    }

    /// A small f32 parameter (norm weight, bias, A_log, D), free of weight decay.
    pub fn vector(&mut self, name: &str, d: Vec<Dim>, init: ParamInit) -> ValueId {
        self.param(name, Type::f32(d), init, false, true)
    }

    /// An f32 matrix kept out of compute precision but decayed (router, convolution taps).
    pub fn matrix_f32(&mut self, name: &str, d: Vec<Dim>, init: ParamInit) -> ValueId {
        self.param(name, Type::f32(d), init, true, true)
    }

    /// A stored vector that is not trained.
    pub fn buffer(&mut self, name: &str, d: Vec<Dim>) -> ValueId {
        self.param(name, Type::f32(d), ParamInit::Zeros, false, false)
    }

    /// Rows `start..start+len` of a parameter.
    ///
    /// # Errors
    /// [`TypeError`] when they are not there.
    pub fn rows(&mut self, w: ValueId, start: usize, len: usize) -> Result<ValueId, TypeError> {
        self.push1(Rows { start, len }, vec![Some(w)])
    }

    /// `x w^T`.
    ///
    /// # Errors
    /// [`TypeError`] when sizes differ.
    pub fn product(&mut self, x: ValueId, w: ValueId) -> Result<ValueId, TypeError> {
        self.push1(Linear, vec![Some(x), Some(w), None])
    }

    /// `x w^T + b` with the parameters `name` and, with `bias`, `name.bias`.
    ///
    /// # Errors
    /// [`TypeError`] when sizes differ.
    pub fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        out: Vec<Dim>,
        init: ParamInit,
        bias: bool,
    ) -> Result<ValueId, TypeError> {
        let inner = *self.ty(x).dims.last().unwrap_or(&Dim {
            letter: crate::Letter::D,
            size: 1,
        });
        let w = self.matrix(name, out.clone(), vec![inner], init);
        let b = bias.then(|| self.vector(&format!("{name}.bias"), out, ParamInit::Zeros));
        self.push1(Linear, vec![Some(x), Some(w), b])
    }

    /// `x w[rows]^T + b[rows]`: one section of a stored projection.
    ///
    /// # Errors
    /// [`TypeError`] when sizes differ.
    pub fn section(
        &mut self,
        x: ValueId,
        w: ValueId,
        b: Option<ValueId>,
        start: usize,
        len: usize,
    ) -> Result<ValueId, TypeError> {
        let w = self.rows(w, start, len)?;
        let b = match b {
            Some(b) => Some(self.rows(b, start, len)?),
            None => None,
        };
        self.push1(Linear, vec![Some(x), Some(w), b])
    }

    /// RMS norm over the last dimension with the weight `name`.
    ///
    /// # Errors
    /// [`TypeError`]: a bug.
    pub fn norm(&mut self, name: &str, x: ValueId, norm: &Norm) -> Result<ValueId, TypeError> {
        let last = *self.ty(x).dims.last().unwrap_or(&Dim {
            letter: crate::Letter::D,
            size: 1,
        });
        let init = if norm.zero_centered {
            ParamInit::Zeros
        } else {
            ParamInit::Ones
        };
        let w = self.vector(name, vec![last], init);
        self.push1(plain(norm, last.size), vec![Some(x), Some(w), None])
    }

    /// Depthwise causal convolution with SiLU over channels `start..start+len` of the stored taps; carries the state `state`.
    ///
    /// # Errors
    /// [`TypeError`] when sizes differ.
    pub fn causal_conv1d(
        &mut self,
        state: &str,
        x: ValueId,
        (w, b): (ValueId, Option<ValueId>),
        start: usize,
    ) -> Result<ValueId, TypeError> {
        let (ty, taps) = (self.ty(x).clone(), self.ty(w).last());
        let channels = ty.dims[2];
        let w = self.rows(w, start, channels.size)?;
        let b = match b {
            Some(b) => Some(self.rows(b, start, channels.size)?),
            None => None,
        };
        let pos = self.pos();
        let carried = if taps > 1 {
            self.state(
                state,
                Type::new(
                    ty.dtype,
                    vec![
                        ty.dims[0],
                        Dim {
                            letter: crate::Letter::K,
                            size: taps - 1,
                        },
                        channels,
                    ],
                ),
            )
        } else {
            None
        };
        let r = self.push(
            CausalConv1d { silu: true },
            vec![Some(x), Some(w), b, Some(pos), carried],
        )?;
        if carried.is_some() {
            self.keep_state(state, r[1]);
        }
        Ok(r[0])
    }

    /// The same elements under other dims.
    ///
    /// # Errors
    /// [`TypeError`] when the number of elements differs.
    pub fn reshape(&mut self, x: ValueId, d: Vec<Dim>) -> Result<ValueId, TypeError> {
        if self.ty(x).dims == d {
            return Ok(x);
        }
        self.push1(Reshape { dims: d }, vec![Some(x)])
    }

    /// Splits or merges the trailing dimensions: `[B T ..]` becomes `[B T tail]`.
    ///
    /// # Errors
    /// [`TypeError`] when the number of elements differs.
    pub fn retail(&mut self, x: ValueId, tail: Vec<Dim>) -> Result<ValueId, TypeError> {
        let mut d = self.ty(x).dims[..2].to_vec();
        d.extend(tail);
        self.reshape(x, d)
    }

    /// `c x`; no node when c is 1.
    ///
    /// # Errors
    /// [`TypeError`]: a bug.
    pub fn scale(&mut self, x: ValueId, c: f64) -> Result<ValueId, TypeError> {
        if c == 1.0 {
            return Ok(x);
        }
        self.push1(Pointwise::map(Un::Scale(c as f32)), vec![Some(x)])
    }

    /// `x + y`.
    ///
    /// # Errors
    /// [`TypeError`] when shapes differ.
    pub fn add(&mut self, x: ValueId, y: ValueId) -> Result<ValueId, TypeError> {
        self.push1(Pointwise::zip(Bin::Add), vec![Some(x), Some(y)])
    }

    /// Another element type; no node when it is the same.
    ///
    /// # Errors
    /// [`TypeError`]: a bug.
    pub fn cast(&mut self, x: ValueId, to: DType) -> Result<ValueId, TypeError> {
        if self.ty(x).dtype == to {
            return Ok(x);
        }
        self.push1(Cast { to }, vec![Some(x)])
    }

    /// `-exp(a_log)`.
    ///
    /// # Errors
    /// [`TypeError`]: a bug.
    pub fn neg_exp(&mut self, a_log: ValueId) -> Result<ValueId, TypeError> {
        let mut p = Pointwise::new(1);
        let e = p.un(Un::Exp, 0);
        let n = p.un(Un::Neg, e);
        self.push1(p.out(n), vec![Some(a_log)])
    }
}
