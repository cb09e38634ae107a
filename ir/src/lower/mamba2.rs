//! Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060, figure 6): project once, convolve x, B and C, scan, gate and norm, project.

use super::{Cx, output_init};
use crate::op::{Gate, Pointwise, RmsNorm, Split, Ssd, Un};
use crate::{ParamInit, Type, TypeError, ValueId, dims};
use marimba_dsl::model::{GatedNorm, Mamba2 as Spec};

/// Parameters below `w`: `in_proj [I+I+GN+GN+H, D]` in the order z, x, B, C, dt; `conv [I+GN+GN, K]` in the order x, B, C; `dt_bias
/// a_log d [H]`; `norm [I]`; `out_proj [D, I]`. States below `state`: `conv_x conv_b conv_c ssm`.
pub(super) fn lower(
    cx: &mut Cx,
    w: &str,
    state: &str,
    spec: &Spec,
    u: ValueId,
) -> Result<ValueId, TypeError> {
    let (h, p, n, g) = (spec.n_heads, spec.head_dim, spec.d_state, spec.n_groups);
    let (i, gn, d) = (h * p, g * n, cx.model().d_model);
    let [mz, mx, mb, mc, mdt] = spec.multipliers;

    let in_proj = cx.matrix(
        &format!("{w}.in_proj"),
        dims![I 2 * i + 2 * gn + h],
        dims![D d],
        cx.normal(),
    );
    let bias = spec.in_proj_bias.then(|| {
        cx.vector(
            &format!("{w}.in_proj.bias"),
            dims![I 2 * i + 2 * gn + h],
            ParamInit::Zeros,
        )
    });
    let section = |cx: &mut Cx, start, len, multiplier| {
        let s = cx.section(u, in_proj, bias, start, len)?;
        cx.scale(s, multiplier)
    };
    let z = section(cx, 0, i, mz)?;
    let x = section(cx, i, i, mx)?;
    // B, C and dt are narrow: one product that is split by copying costs less than three that each read u and make its gradient.
    let narrow = cx.section(u, in_proj, bias, 2 * i, 2 * gn + h)?;
    let sizes = dims![I gn, I gn, I h].to_vec();
    let parts = cx.push(Split { sizes }, vec![Some(narrow)])?;
    let b = cx.scale(parts[0], mb)?;
    let c = cx.scale(parts[1], mc)?;
    let dt = cx.scale(parts[2], mdt)?;

    // torch's default for Conv1d: uniform within 1/sqrt(fan_in), fan_in = K for a depthwise convolution.
    let bound = 1.0 / (spec.d_conv as f64).sqrt();
    let taps = cx.matrix_f32(
        &format!("{w}.conv"),
        dims![I i + 2 * gn, K spec.d_conv],
        ParamInit::Uniform(bound),
    );
    let tap_bias = spec.conv_bias.then(|| {
        cx.vector(
            &format!("{w}.conv.bias"),
            dims![I i + 2 * gn],
            ParamInit::Uniform(bound),
        )
    });
    let conv = (taps, tap_bias);
    let x = cx.causal_conv1d(&format!("{state}.conv_x"), x, conv, 0)?;
    let b = cx.causal_conv1d(&format!("{state}.conv_b"), b, conv, i)?;
    let c = cx.causal_conv1d(&format!("{state}.conv_c"), c, conv, i + gn)?;

    let dt_init = ParamInit::DtBias {
        min: spec.dt_init.min,
        max: spec.dt_init.max,
        floor: spec.dt_init.floor,
    };
    let dt_bias = cx.vector(&format!("{w}.dt_bias"), dims![H h], dt_init);
    let a_log = cx.vector(
        &format!("{w}.a_log"),
        dims![H h],
        ParamInit::LogUniformA(spec.a_init.0, spec.a_init.1),
    );
    let a = cx.neg_exp(a_log)?;
    let skip = cx.vector(&format!("{w}.d"), dims![H h], ParamInit::Ones);

    let clamp = cx.options().mode != super::Mode::Decode || spec.dt_limit_in_decode;
    let op = Ssd {
        chunk: spec.chunk_size,
        dt_limit: if clamp {
            spec.dt_limit
        } else {
            (0.0, f64::INFINITY)
        },
    };
    let x = cx.retail(x, dims![H h, P p])?;
    let b = cx.retail(b, dims![G g, N n])?;
    let c = cx.retail(c, dims![G g, N n])?;
    let pos = cx.pos();
    let batch = cx.options().batch;
    let ssm = format!("{state}.ssm");
    let carried = cx.state(&ssm, Type::f32(dims![B batch, H h, P p, N n]));
    let args = vec![
        Some(x),
        Some(dt),
        Some(a),
        Some(b),
        Some(c),
        Some(skip),
        Some(dt_bias),
        Some(pos),
        carried,
    ];
    let r = cx.push(op, args)?;
    if carried.is_some() {
        cx.keep_state(&ssm, r[1]);
    }

    let y = cx.retail(r[0], dims![I i])?;
    let (gate, eps) = match spec.gate {
        GatedNorm::GateOnly => (None, 0.0),
        GatedNorm::GateThenNorm { eps } => (Some(Gate::Before), eps),
        GatedNorm::NormThenGate { eps } => (Some(Gate::After), eps),
    };
    let y = match gate {
        Some(gate) => {
            let weight = cx.vector(&format!("{w}.gate_norm"), dims![I i], ParamInit::Ones);
            let op = RmsNorm {
                eps,
                group: i / g,
                zero_centered: false,
                gate,
            };
            cx.push1(op, vec![Some(y), Some(weight), Some(z)])?
        }
        None => cx.push1(Pointwise::gate(Un::Silu), vec![Some(z), Some(y)])?,
    };
    let init = output_init(cx);
    cx.linear(
        &format!("{w}.out_proj"),
        y,
        dims![D d],
        init,
        spec.out_proj_bias,
    )
}
