//! Whole graphs on dfdx: training by dfdx's tape, prefill, decode and update steps.
//!
//! A training graph may come before or after its backward phase was appended and its passes run. Forward nodes run on the tape; so
//! does `linear_cross_entropy_grad`, as the forward op it was made from; all other backward nodes and repeated forward nodes are skipped. When the graph has
//! outputs `grad:<name>`, the tape runs backwards from output `loss` and `grad:<name>` becomes `grad_keep * grad:<name> + gradient`.
//! Then the update nodes run. Nothing is planned: the plan says only how much memory there must be at least.

use super::run_op;
use super::tape::{Cx, Fault, Value};
use crate::{BackendError, Engine, HostTensor, NonFinite, Outputs, ProgramId};
use ::dfdx::prelude::Device as DfdxDevice;
use ::dfdx::tensor::Synchronize;
use marimba_ir::op::{Alias, Op};
use marimba_ir::{DType, Def, External, Graph, Node, Phase, Plan, Type, ValueId};
use std::collections::HashMap;
use std::marker::PhantomData;

/// Values and gradients of a training step live to its end, and a composition makes about this many tensors for each result of an op.
const TENSORS_PER_VALUE: usize = 8;

struct Stored {
    ty: Type,
    data: HostTensor,
}

/// Executes graphs by composing dfdx primitives on a device `D`, that of the thread that runs.
pub struct DfdxEngine<D = super::Device> {
    device: PhantomData<fn() -> D>,
    stored: HashMap<String, Stored>,
    programs: Vec<Graph>,
}

impl<D> Default for DfdxEngine<D> {
    /// An engine without programs.
    fn default() -> Self {
        DfdxEngine {
            device: PhantomData,
            stored: HashMap::new(),
            programs: Vec::new(),
        }
    }
}

fn key(g: &Graph, v: ValueId) -> Option<String> {
    g.external(v)
        .map(|e| format!("{}:{}", e.word(), g.value(v).name))
}

fn zeros(ty: &Type) -> HostTensor {
    if ty.dtype == DType::I32 {
        HostTensor::I32(vec![0; ty.len()])
    } else {
        HostTensor::F32(vec![0.0; ty.len()])
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Bytes that a Linux machine can still give; `None` elsewhere.
fn available_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// One run of one program.
struct Run<'e, D: DfdxDevice<f32>> {
    g: &'e Graph,
    stored: &'e mut HashMap<String, Stored>,
    inputs: &'e [(&'e str, HostTensor)],
    cx: Cx<f32, D>,
    values: Vec<Option<Value<f32, D>>>,
    non_finite: Option<NonFinite>,
    check: bool,
}

impl<D: DfdxDevice<f32>> Run<'_, D> {
    fn fault(node: &Node, Fault(why): Fault) -> BackendError {
        BackendError::Unsupported {
            op: node.op.name(),
            path: node.path.clone(),
            backend: "dfdx",
            why,
        }
    }

    fn general(what: &str, why: String) -> BackendError {
        BackendError::Unsupported {
            op: "graph",
            path: what.into(),
            backend: "dfdx",
            why,
        }
    }

    /// An input of this run.
    fn input(&self, name: &str, ty: &Type) -> Result<&HostTensor, BackendError> {
        let (_, data) = self
            .inputs
            .iter()
            .find(|(n, _)| *n == name)
            .ok_or_else(|| BackendError::Unknown {
                name: format!("input:{name}"),
            })?;
        if data.len() != ty.len() {
            return Err(BackendError::WrongSize {
                name: name.into(),
                found: data.len(),
                expected: ty.to_string(),
            });
        }
        Ok(data)
    }

    /// An external as a value: a parameter with a gradient output is a leaf of the tape.
    fn external(&self, v: ValueId, kind: &External) -> Result<Value<f32, D>, BackendError> {
        let value = self.g.value(v);
        let data = match kind {
            External::Input => self.input(&value.name, &value.ty)?,
            External::Param
            | External::Master
            | External::Grad
            | External::Moment1
            | External::Moment2
            | External::State
            | External::Const(_) => {
                let name = format!("{}:{}", kind.word(), value.name);
                match self.stored.get(&name) {
                    Some(s) => &s.data,
                    None => return Err(BackendError::Unknown { name }),
                }
            }
        };
        let sizes = value.ty.sizes();
        let made = match data {
            HostTensor::I32(x) => Ok(x.clone().into()),
            HostTensor::F32(x) => {
                let wanted = matches!(kind, External::Param)
                    && self.g.output(&format!("grad:{}", value.name)).is_some();
                if wanted {
                    self.cx.leaf(&wide(x), &sizes).map(Value::Float)
                } else {
                    self.cx.constant(&wide(x), &sizes).map(Value::Float)
                }
            }
        };
        made.map_err(|Fault(why)| Self::general(&value.name, why))
    }

    /// The value, made when it is external and not yet there. A gradient that backward nodes would have accumulated is read from its
    /// buffer.
    fn value(&mut self, v: ValueId) -> Result<Option<Value<f32, D>>, BackendError> {
        if let Some(x) = &self.values[v.index()] {
            return Ok(Some(x.clone()));
        }
        let root = self.g.root(v);
        let made = match &self.g.value(v).def {
            Def::External(kind) => self.external(v, kind)?,
            Def::Node { .. } => match self.g.external(root) {
                Some(kind @ External::Grad) if self.g.ty(root).same_shape(self.g.ty(v)) => {
                    self.external(root, kind)?
                }
                Some(_) | None => return Ok(None),
            },
        };
        self.values[v.index()] = Some(made.clone());
        Ok(Some(made))
    }

    fn store(&mut self, v: ValueId, x: &Value<f32, D>) {
        let Some(name) = key(self.g, v) else { return };
        let data = match x {
            Value::Float(x) => HostTensor::F32(narrow(&x.host())),
            Value::Int(x) => HostTensor::I32(x.to_vec()),
        };
        if let Some(s) = self.stored.get_mut(&name) {
            s.data = data;
        }
    }

    fn node(&mut self, i: usize) -> Result<(), BackendError> {
        let node = &self.g.nodes[i];
        let mut args = Vec::new();
        let mut types = Vec::new();
        for (slot, a) in node.args.iter().enumerate() {
            types.push(a.map(|v| self.g.ty(v).clone()));
            // Of the fused loss only the arguments of the forward op are read.
            if matches!(node.op, Op::LinearCrossEntropyGrad(_)) && slot > 3 {
                continue;
            }
            args.push(match *a {
                Some(v) => {
                    Some(self.value(v)?.ok_or_else(|| {
                        Self::fault(node, Fault(format!("{v} is a backward value")))
                    })?)
                }
                None => None,
            });
        }
        let inferred: Vec<Type> = node.results.iter().map(|&r| self.g.ty(r).clone()).collect();
        let results = run_op(&self.cx, &node.op, &args, &types, &inferred)
            .map_err(|f| Self::fault(node, f))?;
        if self.check && self.non_finite.is_none() {
            self.non_finite = non_finite(i, node, &args, &results);
        }
        for (result, (&v, x)) in node.results.iter().zip(results).enumerate() {
            let root = self.g.root(v);
            let in_place = matches!(node.op.alias(result), Some(Alias::InPlace { .. }));
            if in_place && self.g.external(root).is_some() {
                self.store(root, &x);
            }
            self.values[v.index()] = Some(x);
        }
        Ok(())
    }

    /// Runs the tape backwards from `loss` and writes the gradient buffers.
    fn backward(&mut self) -> Result<(), BackendError> {
        let names: Vec<String> = self
            .g
            .outputs
            .iter()
            .filter_map(|(n, _)| n.strip_prefix("grad:").map(String::from))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let loss = match self.g.output("loss") {
            Some(v) => self.value(v)?,
            None => None,
        };
        let Some(Value::Float(loss)) = loss else {
            return Err(Self::general(
                "loss",
                "a graph with gradients needs an output loss that forward nodes compute".into(),
            ));
        };
        let keep = f64::from(
            self.input("grad_keep", &Type::scalar())?
                .f32()
                .first()
                .copied()
                .unwrap_or(0.0),
        );
        let mut grads = self
            .cx
            .backward(&loss)
            .map_err(|Fault(why)| Self::general("loss", why))?;
        for name in names {
            let param = self
                .g
                .find_external("param", &name)
                .and_then(|v| self.values[v.index()].as_ref());
            let grad = match param {
                Some(Value::Float(x)) => grads
                    .of(x)
                    .map_err(|Fault(why)| Self::general(&name, why))?,
                Some(Value::Int(_)) | None => Vec::new(),
            };
            let count = grad.iter().filter(|x| !x.is_finite()).count();
            if self.check && count > 0 && self.non_finite.is_none() {
                let made = self
                    .g
                    .output(&format!("grad:{name}"))
                    .map(|v| &self.g.value(v).def);
                self.non_finite = Some(NonFinite {
                    node: match made {
                        Some(Def::Node { node, .. }) => node.index(),
                        Some(Def::External(_)) | None => self.g.nodes.len(),
                    },
                    op: "accumulate",
                    path: name.clone(),
                    result: 0,
                    count,
                    largest_arg: largest(&grad),
                });
            }
            let Some(buffer) = self.stored.get_mut(&format!("grad:{name}")) else {
                return Err(BackendError::Unknown {
                    name: format!("grad:{name}"),
                });
            };
            let old = buffer.data.f32();
            let new = (0..buffer.ty.len())
                .map(|i| {
                    // A factor of zero never reads what was there.
                    let kept = if keep == 0.0 {
                        0.0
                    } else {
                        keep * f64::from(old[i])
                    };
                    (kept + grad.get(i).copied().unwrap_or(0.0)) as f32
                })
                .collect();
            buffer.data = HostTensor::F32(new);
        }
        Ok(())
    }

    fn all(&mut self) -> Result<Outputs, BackendError> {
        let mut backward_done = false;
        for i in 0..self.g.nodes.len() {
            let node = &self.g.nodes[i];
            match node.phase {
                Phase::Forward => {}
                // The tape still has what these would make again.
                Phase::Recompute => continue,
                Phase::Backward => {
                    if !matches!(node.op, Op::LinearCrossEntropyGrad(_)) {
                        continue;
                    }
                }
                Phase::Update => {
                    if !backward_done {
                        self.backward()?;
                        backward_done = true;
                    }
                }
            }
            self.node(i)?;
        }
        if !backward_done {
            self.backward()?;
        }
        let mut outputs = Outputs::new();
        for (name, v) in &self.g.outputs {
            if crate::stays(name) {
                continue;
            }
            let x = self
                .value(*v)?
                .ok_or_else(|| Self::general(name, "the output is a backward value".into()))?;
            outputs.insert(
                name.clone(),
                match x {
                    Value::Float(x) => HostTensor::F32(narrow(&x.host())),
                    Value::Int(x) => HostTensor::I32(x.to_vec()),
                },
            );
        }
        Ok(outputs)
    }
}

fn largest(x: &[f64]) -> f32 {
    x.iter()
        .filter(|x| x.is_finite())
        .fold(0.0, |m: f64, x| m.max(x.abs())) as f32
}

fn non_finite<D: DfdxDevice<f32>>(
    i: usize,
    node: &Node,
    args: &[Option<Value<f32, D>>],
    results: &[Value<f32, D>],
) -> Option<NonFinite> {
    results.iter().enumerate().find_map(|(result, x)| {
        let Value::Float(x) = x else { return None };
        let count = x.host().iter().filter(|x| !x.is_finite()).count();
        (count > 0).then(|| NonFinite {
            node: i,
            op: node.op.name(),
            path: node.path.clone(),
            result,
            count,
            largest_arg: args
                .iter()
                .flatten()
                .map(|a| match a {
                    Value::Float(a) => largest(&a.host()),
                    Value::Int(_) => 0.0,
                })
                .fold(0.0, f32::max),
        })
    })
}

impl<D: DfdxDevice<f32>> DfdxEngine<D> {
    fn start<'e>(
        &'e mut self,
        program: ProgramId,
        inputs: &'e [(&'e str, HostTensor)],
        check: bool,
    ) -> Result<Run<'e, D>, BackendError> {
        let g = self
            .programs
            .get(program.0)
            .ok_or_else(|| BackendError::Unknown {
                name: format!("program {}", program.0),
            })?;
        Ok(Run {
            g,
            stored: &mut self.stored,
            inputs,
            cx: Cx::new(super::device()),
            values: vec![None; g.values.len()],
            non_finite: None,
            check,
        })
    }
}

impl<D: DfdxDevice<f32> + Synchronize> Engine for DfdxEngine<D> {
    fn name(&self) -> &'static str {
        "dfdx"
    }

    fn load(&mut self, graph: Graph, plan: Plan) -> Result<ProgramId, BackendError> {
        let need = plan.total_bytes.saturating_mul(TENSORS_PER_VALUE);
        if let Some(have) = available_bytes().filter(|&have| need > have) {
            return Err(BackendError::OutOfMemory {
                need,
                have,
                largest: "this backend keeps every value and its temporaries to the end of a step"
                    .into(),
            });
        }
        for v in graph.value_ids() {
            let Some(name) = key(&graph, v) else { continue };
            let ty = graph.ty(v).clone();
            match graph.external(v) {
                Some(External::Input) | None => continue,
                Some(External::Const(x)) => {
                    let data = match ty.dtype {
                        DType::I32 => HostTensor::I32(x.iter().map(|&v| v as i32).collect()),
                        DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 => {
                            HostTensor::F32(x.clone())
                        }
                    };
                    self.stored.insert(name, Stored { ty, data });
                }
                Some(
                    External::Param
                    | External::Master
                    | External::Grad
                    | External::Moment1
                    | External::Moment2
                    | External::State,
                ) => {
                    let data = zeros(&ty);
                    self.stored.entry(name).or_insert(Stored { ty, data });
                }
            }
        }
        self.programs.push(graph);
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn run(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Outputs, BackendError> {
        let outputs = self.start(program, inputs, false)?.all()?;
        // What nobody reads may still be computed on a device.
        let ended = super::device::<D>().try_synchronize();
        ended.map_err(|e| BackendError::Device {
            why: format!("{e:?}"),
        })?;
        Ok(outputs)
    }

    fn run_checked(
        &mut self,
        program: ProgramId,
        inputs: &[(&str, HostTensor)],
    ) -> Result<Option<NonFinite>, BackendError> {
        let mut run = self.start(program, inputs, true)?;
        run.all()?;
        Ok(run.non_finite)
    }

    fn write(&mut self, key: &str, ty: &Type, data: &HostTensor) -> Result<(), BackendError> {
        let expected = self.stored.get(key).map_or(ty, |s| &s.ty);
        if expected.len() != data.len() {
            return Err(BackendError::WrongSize {
                name: key.into(),
                found: data.len(),
                expected: expected.to_string(),
            });
        }
        let stored = Stored {
            ty: expected.clone(),
            data: data.clone(),
        };
        self.stored.insert(key.into(), stored);
        Ok(())
    }

    fn read(&self, key: &str) -> Result<HostTensor, BackendError> {
        self.stored
            .get(key)
            .map(|s| s.data.clone())
            .ok_or_else(|| BackendError::Unknown { name: key.into() })
    }

    fn device(&self) -> String {
        // Its type is the name: `Cpu` or `Cuda`.
        let name = std::any::type_name::<D>();
        format!("dfdx {}", name.rsplit("::").next().unwrap_or(name))
    }

    fn clear(&mut self) {
        self.programs.clear();
        self.stored.clear();
    }

    fn zero(&mut self, word: &str) {
        for (name, s) in &mut self.stored {
            if name.split(':').next() == Some(word) {
                s.data = zeros(&s.ty);
            }
        }
    }
}
