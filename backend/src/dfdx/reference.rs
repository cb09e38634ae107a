//! One op on its own, in f64: what every other backend is compared with.

use super::run_op;
use super::tape::{Cx, Fault, Value, Var};
use crate::{BackendError, HostTensor};
use marimba_ir::Type;
use marimba_ir::op::{ArgTypes, Op};

/// An argument: numbers and their type.
#[derive(Clone, Debug, PartialEq)]
pub struct Arg {
    /// Element type and sizes.
    pub ty: Type,
    /// As many elements as `ty` says; integers for `i32`, floats for all else.
    pub data: HostTensor,
}

/// What an op gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Results in the order of the op's table, rounded to f32.
    pub results: Vec<HostTensor>,
    /// Gradients of the float arguments by slot; empty without cotangents. Zero where no result with a cotangent depends on the
    /// argument.
    pub gradients: Vec<Option<HostTensor>>,
}

/// Numbers before they are rounded.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Numbers {
    /// Floats.
    Float(Vec<f64>),
    /// Integers.
    Int(Vec<i32>),
}

impl Numbers {
    fn len(&self) -> usize {
        match self {
            Numbers::Float(x) => x.len(),
            Numbers::Int(x) => x.len(),
        }
    }

    fn of(host: &HostTensor) -> Self {
        match host {
            HostTensor::F32(x) => Numbers::Float(x.iter().map(|&x| f64::from(x)).collect()),
            HostTensor::I32(x) => Numbers::Int(x.clone()),
        }
    }

    fn round(self) -> HostTensor {
        match self {
            Numbers::Float(x) => HostTensor::F32(x.into_iter().map(|x| x as f32).collect()),
            Numbers::Int(x) => HostTensor::I32(x),
        }
    }
}

/// Runs a forward op (`args` by slot, `None` where an optional one is absent) and, with `cotangents` (the gradient of some scalar
/// with respect to each result; `None` is zero), its derivative by dfdx's tape.
///
/// # Errors
/// [`BackendError::Unsupported`] for backward ops and ill-typed arguments, [`BackendError::WrongSize`] when numbers do not fit their
/// type.
pub fn op(
    op: &Op,
    args: &[Option<Arg>],
    cotangents: Option<&[Option<HostTensor>]>,
) -> Result<Outcome, BackendError> {
    let types: Vec<Option<Type>> = args
        .iter()
        .map(|a| a.as_ref().map(|a| a.ty.clone()))
        .collect();
    let data: Vec<Option<Numbers>> = args
        .iter()
        .map(|a| a.as_ref().map(|a| Numbers::of(&a.data)))
        .collect();
    let cotangents: Option<Vec<Option<Vec<f64>>>> = cotangents.map(|c| {
        c.iter()
            .map(|c| {
                c.as_ref()
                    .map(|c| c.f32().iter().map(|&x| f64::from(x)).collect())
            })
            .collect()
    });
    let (results, gradients) = evaluate(op, &types, &data, cotangents.as_deref())?;
    Ok(Outcome {
        results: results.into_iter().map(Numbers::round).collect(),
        gradients: gradients
            .into_iter()
            .map(|g| g.map(|g| Numbers::Float(g).round()))
            .collect(),
    })
}

pub(crate) type Evaluated = (Vec<Numbers>, Vec<Option<Vec<f64>>>);

/// As [`op()`], before rounding.
pub(crate) fn evaluate(
    op: &Op,
    types: &[Option<Type>],
    data: &[Option<Numbers>],
    cotangents: Option<&[Option<Vec<f64>>]>,
) -> Result<Evaluated, BackendError> {
    let refuse = |why: String| BackendError::Unsupported {
        op: op.name(),
        path: "reference".into(),
        backend: "dfdx",
        why,
    };
    let inferred = op
        .infer(&ArgTypes {
            op: op.name(),
            types,
        })
        .map_err(|e| refuse(e.to_string()))?;
    let fault = |Fault(why): Fault| refuse(why);
    let cx: Cx<f64, super::Device> = Cx::new(super::device());
    let mut args: Vec<Option<Value<f64, _>>> = Vec::new();
    for (i, (ty, numbers)) in types.iter().zip(data).enumerate() {
        let (Some(ty), Some(numbers)) = (ty, numbers) else {
            args.push(None);
            continue;
        };
        if numbers.len() != ty.len() {
            return Err(BackendError::WrongSize {
                name: format!("argument {i} of {}", op.name()),
                found: numbers.len(),
                expected: ty.to_string(),
            });
        }
        args.push(Some(match numbers {
            Numbers::Float(x) if cotangents.is_some() => {
                cx.leaf(x, &ty.sizes()).map_err(fault)?.into()
            }
            Numbers::Float(x) => cx.constant(x, &ty.sizes()).map_err(fault)?.into(),
            Numbers::Int(x) => x.clone().into(),
        }));
    }
    let values = run_op(&cx, op, &args, types, &inferred).map_err(fault)?;
    let results = values
        .iter()
        .map(|v| match v {
            Value::Float(v) => Numbers::Float(v.host()),
            Value::Int(v) => Numbers::Int(v.to_vec()),
        })
        .collect();
    let Some(cotangents) = cotangents else {
        return Ok((results, Vec::new()));
    };
    let mut loss: Var<f64, _> = cx.full(0.0, &[1]).map_err(fault)?;
    for (value, cotangent) in values.iter().zip(cotangents) {
        if let (Value::Float(y), Some(c)) = (value, cotangent) {
            let c = cx.constant(c, &y.sizes).map_err(fault)?;
            let part = cx.mul(y, &c).and_then(|p| cx.sum_all(&p));
            loss = part.and_then(|p| cx.add(&loss, &p)).map_err(fault)?;
        }
    }
    let mut grads = cx.backward(&loss).map_err(fault)?;
    let mut gradients = Vec::new();
    for a in &args {
        gradients.push(match a {
            Some(Value::Float(x)) => Some(grads.of(x).map_err(fault)?),
            Some(Value::Int(_)) | None => None,
        });
    }
    Ok((results, gradients))
}
