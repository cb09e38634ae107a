//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101) and clipping by global norm, over all
//! parameters in one node.
//!
//! `g' = g * min(1, clip / norm)`, `m = b1 m + (1-b1) g'`, `v = b2 v + (1-b2) g'^2`,
//! `p = p - lr (m / (1-b1^step) / (sqrt(v / (1-b2^step)) + eps) + decay p)`.
//! When `norm` is not finite nothing is written: parameters and moments stay as they were, and the caller stops.
//!
//! | op | arg/result | type | meaning |
//! |---|---|---|---|
//! | global_norm | g... | f32[..] | all gradients |
//! | | -> norm | f32[X1] | `sqrt(sum g^2)`, accumulated in f64 on a CPU |
//! | adamw | lr | f32[X1] | |
//! | | step | f32[X1] | from 1 |
//! | | norm | f32[X1] | |
//! | | p, g, m, v for each tensor | f[..], f32[..] x 3 | four slots a tensor |
//! | | copy for each entry of `copies` | f[..] | |
//! | | -> p, m, v for each tensor | | the same memory |
//! | | -> copy for each entry of `copies` | | the same memory: p in that type |

use super::{Alias, ArgTypes, OpDef};
use crate::{Type, TypeError};

/// Norm of many tensors together.
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalNorm;

/// What differs between tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWTensor {
    /// Decoupled weight decay; 0 for norms, biases, `A_log`, `dt_bias`, `D`.
    pub decay: f64,
    /// Factor on lr (muP-style transfer); usually 1.
    pub lr_scale: f64,
}

/// One optimiser step for all tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    /// b1, b2.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest global gradient norm; `None` never clips.
    pub clip: Option<f64>,
    /// One entry a tensor.
    pub tensors: Vec<AdamWTensor>,
    /// Tensors whose p is also written in another type, as graphs read it.
    pub copies: Vec<usize>,
}

impl OpDef for GlobalNorm {
    const NAME: &'static str = "global_norm";
    fn infer(&self, _: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        Ok(vec![Type::scalar()])
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args.iter().flatten().map(|t| 2.0 * t.len() as f64).sum()
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["g"]
    }
}

impl OpDef for AdamW {
    const NAME: &'static str = "adamw";
    fn infer(&self, a: &ArgTypes) -> Result<Vec<Type>, TypeError> {
        a.check(
            a.types.len() == 3 + 4 * self.tensors.len() + self.copies.len(),
            a.types.len(),
            "lr, step, norm, four slots a tensor and one a copy",
        )?;
        let mut out = Vec::new();
        for i in 0..self.tensors.len() {
            let p = a.req(3 + 4 * i, "p")?;
            for (k, name) in ["g", "m", "v"].into_iter().enumerate() {
                let t = a.req(4 + 4 * i + k, name)?;
                a.check(t.same_shape(p), t, p)?;
            }
            out.extend(
                [0, 2, 3]
                    .map(|k| a.types[3 + 4 * i + k].clone())
                    .into_iter()
                    .flatten(),
            );
        }
        let first = 3 + 4 * self.tensors.len();
        for (k, &i) in self.copies.iter().enumerate() {
            let copy = a.req(first + k, "copy")?;
            a.check(i < self.tensors.len(), i, "a copy of a tensor")?;
            let p = a.req(3 + 4 * i, "p")?;
            a.check(copy.same_shape(p) && copy.dtype.is_float(), copy, p)?;
            out.push(copy.clone());
        }
        Ok(out)
    }
    fn alias(&self, result: usize) -> Option<Alias> {
        let n = self.tensors.len();
        if result >= 3 * n {
            let arg = 3 + 4 * n + result - 3 * n;
            return Some(Alias::InPlace { arg });
        }
        let slot = [0, 2, 3][result % 3];
        Some(Alias::InPlace {
            arg: 3 + 4 * (result / 3) + slot,
        })
    }
    fn flops(&self, args: &[Option<&Type>], _: &[&Type]) -> f64 {
        args.iter()
            .skip(3)
            .step_by(4)
            .take(self.tensors.len())
            .flatten()
            .map(|t| 16.0 * t.len() as f64)
            .sum()
    }
    fn arg_names(&self) -> &'static [&'static str] {
        &["lr", "step", "norm", "p,g,m,v"]
    }
    fn attrs(&self) -> String {
        format!(
            "betas=({}, {}) eps={:e} clip={:?}",
            self.betas.0, self.betas.1, self.eps, self.clip
        )
    }
}
