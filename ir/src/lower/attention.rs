//! Grouped-query attention: project, norm q and k (optional), rotate, attend, gate (optional), project.

use super::{Cx, output_init, plain, rope};
use crate::op::{Attention, CacheWrite, Pointwise, Rope, Un};
use crate::{ParamInit, Type, TypeError, ValueId, dims};
use marimba_dsl::model::{Attention as Spec, Norm};

/// Parameters below `w`: `q_proj k_proj v_proj out_proj [.bias]`, `q_norm k_norm`, `gate_proj`. States below `state`: `k v`.
pub(super) fn lower(
    cx: &mut Cx,
    w: &str,
    state: &str,
    spec: &Spec,
    x: ValueId,
) -> Result<ValueId, TypeError> {
    let (h, g, p) = (spec.n_heads, spec.n_kv_heads, spec.head_dim);
    let init = cx.normal();
    let q = cx.linear(
        &format!("{w}.q_proj"),
        x,
        dims![H h * p],
        init.clone(),
        spec.qkv_bias,
    )?;
    let k = cx.linear(
        &format!("{w}.k_proj"),
        x,
        dims![G g * p],
        init.clone(),
        spec.qkv_bias,
    )?;
    let v = cx.linear(
        &format!("{w}.v_proj"),
        x,
        dims![G g * p],
        init.clone(),
        spec.qkv_bias,
    )?;
    let q = cx.retail(q, dims![H h, P p])?;
    let k = cx.retail(k, dims![G g, P p])?;
    let v = cx.retail(v, dims![G g, P p])?;
    let k = cx.scale(k, spec.key_multiplier)?;
    let (q, k) = match &spec.qk_norm {
        Some(norm) => (
            head_norm(cx, &format!("{w}.q_norm"), norm, q)?,
            head_norm(cx, &format!("{w}.k_norm"), norm, k)?,
        ),
        None => (q, k),
    };
    let (q, k) = match &spec.rope {
        Some(r) => {
            let freq = if rope::is_dynamic(r) && cx.stateful() {
                cx.input(&rope::input_name(r), Type::f32(dims![X r.dims / 2]))
            } else {
                let len = cx.options().seq_len;
                cx.constant(&rope::input_name(r), rope::inv_freq(r, len))
            };
            let op = Rope {
                dims: r.dims,
                factor: rope::attention_factor(r),
                inverse: false,
            };
            let pos = cx.pos();
            (
                cx.push1(op.clone(), vec![Some(q), Some(pos), Some(freq)])?,
                cx.push1(op, vec![Some(k), Some(pos), Some(freq)])?,
            )
        }
        None => (q, k),
    };
    let (k, v) = (
        cached(cx, &format!("{state}.k"), k)?,
        cached(cx, &format!("{state}.v"), v)?,
    );
    let (pos, slot) = (cx.pos(), cx.slot());
    let op = Attention {
        scale: spec.scale,
        window: spec.window,
    };
    let y = cx.push1(op, vec![Some(q), Some(k), Some(v), Some(pos), slot])?;
    let y = cx.retail(y, dims![H h * p])?;
    let y = if spec.output_gate {
        let gate = cx.linear(
            &format!("{w}.gate_proj"),
            x,
            dims![H h * p],
            init,
            spec.qkv_bias,
        )?;
        cx.push1(Pointwise::gate(Un::Sigmoid), vec![Some(gate), Some(y)])?
    } else {
        y
    };
    let d = cx.model().d_model;
    let init = output_init(cx);
    cx.linear(&format!("{w}.out_proj"), y, dims![D d], init, spec.out_bias)
}

/// RMS norm of each head with a weight `[P]`.
fn head_norm(cx: &mut Cx, name: &str, norm: &Norm, x: ValueId) -> Result<ValueId, TypeError> {
    let p = cx.ty(x).last();
    let init = if norm.zero_centered {
        ParamInit::Zeros
    } else {
        ParamInit::Ones
    };
    let w = cx.vector(name, dims![P p], init);
    cx.push1(plain(norm, p), vec![Some(x), Some(w), None])
}

/// In prefill and decode, appends to the cache and reads from it.
fn cached(cx: &mut Cx, state: &str, x: ValueId) -> Result<ValueId, TypeError> {
    let mut ty = cx.ty(x).clone();
    ty.dims[1] = crate::Dim {
        letter: crate::Letter::S,
        size: cx.options().cache_len,
    };
    match (cx.state(state, ty), cx.slot()) {
        (Some(cache), Some(slot)) => {
            let cache = cx.push1(CacheWrite, vec![Some(cache), Some(x), Some(slot)])?;
            cx.keep_state(state, cache);
            Ok(cache)
        }
        _ => Ok(x),
    }
}
