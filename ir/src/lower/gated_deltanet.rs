//! Gated DeltaNet mixer (Yang et al. 2024, arXiv 2412.06464, as in Qwen3-Next): project, convolve q, k and v, normalise q and k, scan
//! with the gated delta rule, norm then gate, project.

use super::{Cx, output_init};
use crate::op::{Bin, Gate, GatedDelta, Pointwise, RmsNorm, Un};
use crate::{DType, ParamInit, Type, TypeError, ValueId, dims};
use marimba_dsl::model::GatedDeltaNet as Spec;

/// Added to the sum of squares of a q or k head.
const L2_EPS: f64 = 1e-6;

/// Parameters below `w`: `in_proj [QK+QK+V+V, D]` in the order q, k, v, z; `ba_proj [H+H, D]` in the order beta, a; `conv [QK+QK+V, K]`;
/// `dt_bias a_log [H]`; `gate_norm [P]`; `out_proj [D, V]`. States below `state`: `conv_q conv_k conv_v delta`.
pub(super) fn lower(
    cx: &mut Cx,
    w: &str,
    state: &str,
    spec: &Spec,
    u: ValueId,
) -> Result<ValueId, TypeError> {
    let (g, h, n, p) = (
        spec.n_k_heads,
        spec.n_v_heads,
        spec.k_head_dim,
        spec.v_head_dim,
    );
    let (qk, v_len, d) = (g * n, h * p, cx.model().d_model);

    let in_proj = cx.matrix(
        &format!("{w}.in_proj"),
        dims![I 2 * qk + 2 * v_len],
        dims![D d],
        cx.normal(),
    );
    let q = cx.section(u, in_proj, None, 0, qk)?;
    let k = cx.section(u, in_proj, None, qk, qk)?;
    let v = cx.section(u, in_proj, None, 2 * qk, v_len)?;
    let z = cx.section(u, in_proj, None, 2 * qk + v_len, v_len)?;
    let ba = cx.matrix(
        &format!("{w}.ba_proj"),
        dims![H 2 * h],
        dims![D d],
        cx.normal(),
    );
    let beta = cx.section(u, ba, None, 0, h)?;
    let a = cx.section(u, ba, None, h, h)?;

    let bound = 1.0 / (spec.d_conv as f64).sqrt();
    let taps = cx.matrix_f32(
        &format!("{w}.conv"),
        dims![I 2 * qk + v_len, K spec.d_conv],
        ParamInit::Uniform(bound),
    );
    let q = cx.causal_conv1d(&format!("{state}.conv_q"), q, (taps, None), 0)?;
    let k = cx.causal_conv1d(&format!("{state}.conv_k"), k, (taps, None), qk)?;
    let v = cx.causal_conv1d(&format!("{state}.conv_v"), v, (taps, None), 2 * qk)?;

    // x / |x| is an RMS norm of the head over sqrt(width); q is scaled by width^-1/2 besides.
    let q = cx.retail(q, dims![G g, N n])?;
    let k = cx.retail(k, dims![G g, N n])?;
    let v = cx.retail(v, dims![H h, P p])?;
    let unit = RmsNorm {
        eps: L2_EPS / n as f64,
        group: n,
        zero_centered: false,
        gate: Gate::None,
    };
    let q = cx.push1(unit.clone(), vec![Some(q), None, None])?;
    let q = cx.scale(q, 1.0 / n as f64)?;
    let k = cx.push1(unit, vec![Some(k), None, None])?;
    let k = cx.scale(k, (n as f64).powf(-0.5))?;

    let beta = cx.cast(beta, DType::F32)?;
    let beta = cx.push1(Pointwise::map(Un::Sigmoid), vec![Some(beta)])?;
    // Small steps as in the layer's published code (dt in [1e-3, 0.1]): with transformers' stand-in for a checkpoint, a bias of one, a new
    // model forgets all but e^-1.3A of its state at every token and has to unlearn that first.
    let dt_init = ParamInit::DtBias {
        min: spec.dt_init.min,
        max: spec.dt_init.max,
        floor: spec.dt_init.floor,
    };
    let dt_bias = cx.vector(&format!("{w}.dt_bias"), dims![H h], dt_init);
    let a_init = ParamInit::LogUniformA(spec.a_init.0, spec.a_init.1);
    let a_log = cx.vector(&format!("{w}.a_log"), dims![H h], a_init);
    let rate = cx.neg_exp(a_log)?;
    let a = cx.cast(a, DType::F32)?;
    let decay = {
        let mut prog = Pointwise::new(3);
        let sum = prog.bin(Bin::Add, 0, 1);
        let dt = prog.un(Un::Softplus, sum);
        let out = prog.bin(Bin::Mul, dt, 2);
        cx.push1(prog.out(out), vec![Some(a), Some(dt_bias), Some(rate)])?
    };

    let pos = cx.pos();
    let batch = cx.options().batch;
    let delta = format!("{state}.delta");
    let carried = cx.state(&delta, Type::f32(dims![B batch, H h, N n, P p]));
    let args = vec![
        Some(q),
        Some(k),
        Some(v),
        Some(decay),
        Some(beta),
        Some(pos),
        carried,
    ];
    let r = cx.push(
        GatedDelta {
            chunk: spec.chunk_size,
        },
        args,
    )?;
    if carried.is_some() {
        cx.keep_state(&delta, r[1]);
    }

    let y = cx.retail(r[0], dims![I v_len])?;
    let weight = cx.vector(&format!("{w}.gate_norm"), dims![P p], ParamInit::Ones);
    let norm = RmsNorm {
        eps: spec.norm_eps,
        group: p,
        zero_centered: false,
        gate: Gate::After,
    };
    let y = cx.push1(norm, vec![Some(y), Some(weight), Some(z)])?;
    let init = output_init(cx);
    cx.linear(&format!("{w}.out_proj"), y, dims![D d], init, false)
}
