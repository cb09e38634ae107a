//! The optimiser's graph: global gradient norm, then AdamW over all trainable parameters. Runs once per step, after the micro-batches.

use crate::op::{AdamW, AdamWTensor, GlobalNorm};
use crate::{DType, External, Graph, Param, Phase, Place, Type, TypeError};

/// Constants of the optimiser.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// b1, b2.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
    /// Largest global gradient norm.
    pub clip: Option<f64>,
}

/// Inputs `lr`, `step` (from 1), both `f32[X1]`; output `grad_norm`. Parameters, gradients and moments by name. Where graphs read a
/// parameter in a narrower type, the step moves its `master`, and writes the `param` from it.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn update(params: &[Param], config: &OptimizerConfig) -> Result<Graph, TypeError> {
    update_scaled(params, config, &|_| 1.0)
}

/// [`update`] with a factor on each parameter's learning rate, above 0. The product of learning rate and weight decay stays as it is.
///
/// # Errors
/// [`TypeError`]: a bug.
pub fn update_scaled(
    params: &[Param],
    config: &OptimizerConfig,
    lr_scale: &dyn Fn(&Param) -> f64,
) -> Result<Graph, TypeError> {
    let mut g = Graph {
        params: params.to_vec(),
        ..Graph::default()
    };
    let at = Place {
        path: "optimizer".into(),
        block: None,
        phase: Phase::Update,
    };
    let lr = g.add_external(External::Input, "lr", Type::scalar());
    let step = g.add_external(External::Input, "step", Type::scalar());
    let trainable: Vec<&Param> = params.iter().filter(|p| p.trainable).collect();
    let grads: Vec<_> = trainable
        .iter()
        .map(|p| Some(g.add_external(External::Grad, &p.name, p.ty.clone())))
        .collect();
    let norm = g.push(GlobalNorm, grads.clone(), &at)?[0];
    let mut args = vec![Some(lr), Some(step), Some(norm)];
    let mut tensors = Vec::new();
    for (p, grad) in trainable.iter().zip(grads) {
        let kind = match p.compute {
            DType::F32 => External::Param,
            DType::Bf16 | DType::F16 | DType::E4m3 | DType::E5m2 | DType::I32 => External::Master,
        };
        args.push(Some(g.add_external(kind, &p.name, p.ty.clone())));
        args.push(grad);
        args.push(Some(g.add_external(
            External::Moment1,
            &p.name,
            p.ty.clone(),
        )));
        args.push(Some(g.add_external(
            External::Moment2,
            &p.name,
            p.ty.clone(),
        )));
        tensors.push(AdamWTensor {
            decay: if p.decay {
                config.weight_decay / lr_scale(p)
            } else {
                0.0
            },
            lr_scale: lr_scale(p),
        });
    }
    let copies: Vec<usize> = (0..trainable.len())
        .filter(|&i| trainable[i].compute != DType::F32)
        .collect();
    for &i in &copies {
        let p = trainable[i];
        let ty = p.ty.with_dtype(p.compute);
        args.push(Some(g.add_external(External::Param, &p.name, ty)));
    }
    let op = AdamW {
        betas: config.betas,
        eps: config.eps,
        clip: config.clip,
        tensors,
        copies: copies.clone(),
    };
    let results = g.push(op, args, &at)?;
    for (k, p) in trainable.iter().enumerate() {
        let narrow = copies.iter().position(|&i| i == k);
        let kind = match narrow {
            Some(c) => {
                let copy = results[3 * trainable.len() + c];
                g.outputs.push((format!("param:{}", p.name), copy));
                "master"
            }
            None => "param",
        };
        for (kind, r) in [kind, "moment1", "moment2"]
            .into_iter()
            .zip(&results[3 * k..])
        {
            g.outputs.push((format!("{kind}:{}", p.name), *r));
        }
    }
    g.outputs.push(("grad_norm".into(), norm));
    Ok(g)
}
